#include "turns.h"

#include <algorithm>
#include <limits>

#include "maths.h"

namespace {

constexpr int64_t TILE = 64, STREAMS = 8;  // rows that go together; widths there are, and one to spare

struct Tile {
    float x[STREAMS][TILE], t[STREAMS][TILE], weight[STREAMS][TILE];
    float cost[TILE], rest[TILE], least[TILE], nearest[TILE];  // rest: what is left of the last stream's miss
    int32_t e[TILE], best[TILE], first[TILE];                   // codes of a prefix; the best code; the first prefix to try
};

// x, t and weight of column j.
inline void want(const mq_turns &a, Tile &tile, int64_t j, int64_t from, int64_t rows) {
    for (int64_t r = 0; r < a.streams; ++r) {
        float *x = tile.x[r], *t = tile.t[r], *weight = tile.weight[r];
        const float *start = a.start + r * a.start_stride + j * a.rows + from;
        for (int64_t i = 0; i < rows; ++i) x[i] = start[i];
        for (int64_t k = 0; k < j; ++k) {
            const float c = a.coupling[(r * a.columns + j) * a.columns + k];
            const float *p = a.passed + (r * a.columns + k) * a.rows + from;
#pragma omp simd
            for (int64_t i = 0; i < rows; ++i) x[i] -= c * p[i];
        }
        const int64_t at = (r * a.groups + a.group[j]) * a.rows + from;
        const float count = a.count[r * a.columns + j], *scale = a.scale + at, *offset = a.offset + at, *of_row = a.weight + at;
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) t[i] = (x[i] - offset[i]) / scale[i], weight[i] = of_row[i] * count;
    }
}

// The best code of each row, in tile.best.
template <bool FIXED> inline void choose(const mq_turns &a, Tile &tile, int64_t rows) {
    const int64_t last = a.streams - 1;
    const float most = float(a.residuals - 1);
    for (int64_t i = 0; i < rows; ++i) tile.least[i] = tile.nearest[i] = std::numeric_limits<float>::infinity(), tile.best[i] = tile.first[i] * int32_t(a.residuals);
    for (int64_t choice = 0; choice < a.choices; ++choice) {
        const float *base = a.base + choice;
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) {
            const float reach = tile.t[last][i] - (FIXED ? base[tile.first[i]] : *base);
            float e = reach + 0.5f;
            e = e > 0 ? e : 0;  // of what is no number too; clamped first, it needs no floor, which would keep the loop from being vectors
            e = e < most ? e : most;
            tile.e[i] = int32_t(e);
            tile.rest[i] = reach - float(tile.e[i]);
            tile.cost[i] = a.last_counts ? tile.weight[last][i] * tile.rest[i] * tile.rest[i] : 0;
        }
        for (int64_t r = 0; r < last; ++r) {
            const float *p = a.below + r * a.prefixes + choice, *t = tile.t[r], *weight = tile.weight[r];
#pragma omp simd
            for (int64_t i = 0; i < rows; ++i) {
                const float miss = t[i] - (FIXED ? p[tile.first[i]] : *p);
                tile.cost[i] += weight[i] * miss * miss;
            }
        }
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) {
            const float near = a.last_counts ? 0 : __builtin_fabsf(tile.rest[i]), cost = tile.cost[i];
            const bool better = (cost < tile.least[i]) | ((cost == tile.least[i]) & (near < tile.nearest[i]));
            tile.best[i] = better ? (tile.first[i] + int32_t(choice)) * int32_t(a.residuals) + tile.e[i] : tile.best[i];
            tile.least[i] = better ? cost : tile.least[i];
            tile.nearest[i] = better ? near : tile.nearest[i];
        }
    }
}

// p of column j.
inline void pass(const mq_turns &a, Tile &tile, int64_t j, int64_t from, int64_t rows) {
    for (int64_t r = 0; r < a.streams; ++r) {
        const int64_t at = (r * a.groups + a.group[j]) * a.rows + from;
        const float *scale = a.scale + at, *offset = a.offset + at, *table = a.table + r * a.codes;
        const float *origin = a.origin ? a.origin + r * a.origin_stride + j * a.rows + from : tile.x[r];
        float *p = a.passed + (r * a.columns + j) * a.rows + from;
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) p[i] = offset[i] + scale[i] * table[tile.best[i]] - origin[i];
    }
    if (a.shared) {
        float share = 0, *mean = tile.cost;
        for (int64_t r = 0; r < a.streams; ++r) share += a.shared[r];
        std::fill(mean, mean + rows, 0.0f);
        for (int64_t r = 0; r < a.streams; ++r)
            for (int64_t i = 0; a.shared[r] && i < rows; ++i) mean[i] += a.passed[(r * a.columns + j) * a.rows + from + i] / share;
        for (int64_t r = 0; r < a.streams; ++r) std::copy(mean, mean + rows, a.passed + (r * a.columns + j) * a.rows + from);
    }
    for (int64_t r = 0; r < a.streams; ++r) {
        const float factor = a.factor[r * a.columns + j];
        float *p = a.passed + (r * a.columns + j) * a.rows + from;
        for (int64_t i = 0; i < rows; ++i) p[i] *= factor;
    }
}

MQ_CLONES void choose_rows(const mq_turns &a, int64_t from, int64_t rows) {
    Tile tile;
    const int64_t share = a.choices * a.residuals;  // codes that a row chooses among
    const bool fixed = a.choices < a.prefixes;
    for (int64_t j = 0; j < a.columns; ++j) {
        want(a, tile, j, from, rows);
        for (int64_t i = 0; i < rows; ++i) tile.first[i] = fixed ? int32_t(a.now[j * a.rows + from + i] / share * a.choices) : 0;
        if (fixed) choose<true>(a, tile, rows);
        else choose<false>(a, tile, rows);
        for (int64_t i = 0; i < rows; ++i) a.chosen[j * a.rows + from + i] = uint8_t(tile.best[i]);
        pass(a, tile, j, from, rows);
    }
}

}  // namespace

int mq_choose_in_turn(const mq_turns *turns, int64_t threads) {
    if (turns->streams > STREAMS) return 1;
    const int64_t tiles = (turns->rows + TILE - 1) / TILE;
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, std::min(threads, tiles)))) schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) choose_rows(*turns, tile * TILE, std::min(TILE, turns->rows - tile * TILE));
    return 0;
}
