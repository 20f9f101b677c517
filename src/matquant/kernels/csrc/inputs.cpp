#include "inputs.h"

#include <algorithm>
#include <cmath>

#include "maths.h"

namespace {

// q = nearest integers to x / step, step = |x|'s largest / 127. Returns (step, step times the sum of q).
struct Block {
    float step, sum;
};
MQ_CLONES Block round_block(const float *x, int64_t n, int8_t *q) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = largest > 0 ? 127 / largest : 0;
    int32_t whole = 0;
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < n; ++i) {
        const auto rounded = int32_t(__builtin_rintf(x[i] * inverse));
        q[i] = int8_t(rounded), whole += rounded;
    }
    return {largest / 127, largest / 127 * float(whole)};
}

}  // namespace

void Rounded::shape(const mq_weight &w, int64_t m, bool exact) {
    group = w.group, groups = w.groups, padded_group = w.padded;
    const int64_t width = w.groups * w.padded, block = w.padded % 64 ? 32 : 64;
    const bool padding = width != w.in;  // stays zero; all else is written by `fill`
    sum.resize(size_t(m * groups));
    if (padding) padded.clear(), q.clear();
    padded.resize(exact ? size_t(m * width) : 0);
    q.resize(exact ? 0 : size_t(m * width));
    step.resize(exact ? 0 : size_t(m * width / block));
    inputs = Inputs{m, width, block, q.data(), step.data(), sum.data(), exact ? padded.data() : nullptr};
}

void Rounded::fill(int64_t row, int64_t g, const float *from) {
    float total = 0;
    const int64_t start = row * inputs.width + g * padded_group;
    if (inputs.x) {
        float *to = &padded[size_t(start)];
        for (int64_t i = 0; i < group; ++i) to[i] = from[i], total += from[i];
    } else {
        for (int64_t at = 0; at < group; at += inputs.block) {
            int8_t *to = &q[size_t(((g * padded_group + at) / inputs.block * inputs.m + row) * inputs.block)];
            const Block block = round_block(from + at, std::min(inputs.block, group - at), to);
            step[size_t((start + at) / inputs.block)] = block.step;
            total += block.sum;
        }
    }
    sum[size_t(row * groups + g)] = total;
}
