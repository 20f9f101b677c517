// How a nested weight lies in memory to be multiplied, and the functions that Python calls.
//
// Rows go in tiles of L = 16, 8 or 4, as many 32-bit lanes as a vector of the machine has. A chunk is 16 columns of a tile: one vector, whose
// lane i belongs to row i and whose byte k of a lane to the columns 4 j + k, j = 0..3:
//
//     pair planes (0|1, 4|5, 6|7)   bits 2j, 2j + 1 of that byte are the two planes' bits of column 4 j + k
//     single planes (2, 3)          two chunks h = 0, 1 share a vector; bit 2h + (j mod 2) + 4 (j div 2) is column 16 h + 4 j + k
//
// so that (v >> 2n) & 0x33 of a pair plane, and (v >> (2h + n)) & 0x11 of a single one, put columns 4n + k in the low and 4n + 8 + k in the high
// nibble of a byte: planes are ORed up to nibbles, and a row's sum never leaves its lane. Every plane array is contiguous over the weight, tile
// after tile: reading r bits touches the arrays of r planes and no other (5 bits touch plane 5 too, and 7 bits plane 7).
//
// Groups of columns are padded to a multiple of 32 with zero codes, which meet zero inputs; rows to a whole tile.
#pragma once
#include <cstddef>
#include <cstdint>

#define MQ_PUBLIC __attribute__((visibility("default")))

extern "C" {

// One weight. Arrays that a reader of the widths wanted does not need are null.
struct mq_weight {
    int64_t out, in;             // channels, without padding
    int64_t group;               // input channels that share a scale, without padding
    int64_t groups;              // of a row
    int64_t padded;              // columns of a group with padding: a multiple of 32
    int64_t tiles, lanes;        // rows in tiles
    int64_t parent_bits;         // c
    int64_t overlap;             // 1: cells of the low nibble overlap
    const uint8_t *pair[4];      // planes 0|1, nothing, 4|5, 6|7: [tile][chunk][vector]
    const uint8_t *single[2];    // planes 2, 3: [tile][chunk / 2][vector]
    const void *scale;           // [tile][group][lane], float16 if half else float32
    int64_t half;
    const uint8_t *zero;         // [tile][group][lane]; null: the grid's centre
    const uint8_t *k[9], *u[9];  // of the refit of a width: [tile][group][lane]; null: none
};

// Rows of a tile for the instructions this machine has; 0 for an instruction set that it, or this build, lacks.
MQ_PUBLIC int64_t mq_lanes(const char *isa);
MQ_PUBLIC const char *mq_best_isa(void);

// codes: [out][in] of an 8-bit parent. Fills every array of `w` that is not null; all are to be written to.
MQ_PUBLIC void mq_pack(const mq_weight *w, const uint8_t *codes, int64_t threads);
// The same for [tile][group][lane] arrays from [out][groups] ones; `bytes` of an element.
MQ_PUBLIC void mq_pack_rows(const mq_weight *w, const void *from, void *to, int64_t bytes);

// y[m][out] = x[m][in] W_r^T + bias. exact: products of floats; otherwise inputs are rounded to 8 bits, block by block. Returns 0, or 1 for an
// instruction set that is not here, 2 for planes that are not held.
MQ_PUBLIC int mq_linear(const mq_weight *w, int64_t bits, const float *x, int64_t m, const float *bias, float *y, int64_t exact, int64_t threads, const char *isa);
}

// Inputs rounded to 8 bits. A block is 64 columns, or 32 where a padded group is no multiple of 64.
struct Inputs {
    int64_t m, width, block;  // rows, padded columns of a row, columns of a block
    const int8_t *q;          // [width / block][m][block]: rows that are multiplied together lie together
    const float *step;        // [m][width / block]: x is about step q
    const float *sum;         // [m][groups]: of step q over a group
    const float *x;           // [m][width], padded, for exact products; otherwise null
};

// Tiles [first, last) of y. One of these for each instruction set.
using LinearTiles = void (*)(const mq_weight &, int bits, const Inputs &, const float *bias, float *y, int64_t first, int64_t last);
void linear_tiles_scalar(const mq_weight &, int, const Inputs &, const float *, float *, int64_t, int64_t);
void linear_tiles_avx2(const mq_weight &, int, const Inputs &, const float *, float *, int64_t, int64_t);
void linear_tiles_avx512(const mq_weight &, int, const Inputs &, const float *, float *, int64_t, int64_t);
void linear_tiles_neon(const mq_weight &, int, const Inputs &, const float *, float *, int64_t, int64_t);
