// Inputs of a product, rounded one group of one row at a time, so that threads can share the work.
#pragma once
#include <cstring>
#include <vector>

#include "attention.h"
#include "layout.h"

// An instruction set: what multiplies and attends, and the rows of its tiles. Null where this machine or build lacks it.
struct Isa {
    const char *name;
    int64_t lanes;
    LinearTiles linear;
    AttendOverChunk attend;
};
const Isa *find_isa(const char *name);
bool holds(const mq_weight &w, int64_t bits);

// Room for the inputs of weights that share their channels and groups.
struct Rounded {
    std::vector<int8_t> q;
    std::vector<float> step, sum, padded;
    Inputs inputs{};
    int64_t group = 0, groups = 0, padded_group = 0;

    // For `m` rows of inputs of `w`; padding stays zero.
    void shape(const mq_weight &w, int64_t m, bool exact);
    bool fits(const mq_weight &w) const { return group == w.group && groups == w.groups && padded_group == w.padded; }
    // Group `g` of a row from its `group` floats.
    void fill(int64_t row, int64_t g, const float *from);
};
