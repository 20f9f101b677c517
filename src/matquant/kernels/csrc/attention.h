// Keys and values in the cache, and attention over a part of them.
//
//     keys      [layer][sequence][kv head][capacity / KEYS][size][KEYS]
//     values    [layer][sequence][kv head][capacity][padded]
//
// A chunk is CHUNK positions; room is made for whole ones.
#pragma once
#include <cstdint>

constexpr int64_t KEYS = 16, CHUNK = 64;

// padded: `size` rounded up to KEYS; what is behind `size` is zero in values.
struct Heads {
    int64_t size, padded;
    float scaling;
};

// What stands behind the `padded` numbers of a partial result.
struct Peak {
    float largest, total;
};

// n queries over the first counts[i] >= 1 positions of a chunk. All positions up to the largest count must have been written. to: [n] of [padded + 2].
using AttendOverChunk = void (*)(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &, float *const *to);
void attend_over_chunk_scalar(const float *const *, int64_t, const int64_t *, const float *, const float *, const Heads &, float *const *);
void attend_over_chunk_avx2(const float *const *, int64_t, const int64_t *, const float *, const float *, const Heads &, float *const *);
void attend_over_chunk_avx512(const float *const *, int64_t, const int64_t *, const float *, const float *, const Heads &, float *const *);
void attend_over_chunk_neon(const float *const *, int64_t, const int64_t *, const float *, const float *, const Heads &, float *const *);
