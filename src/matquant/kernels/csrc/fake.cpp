#include "fake.h"

#include <algorithm>

#include "maths.h"

#define INTO_CLONES __attribute__((always_inline)) inline // what is called from a clone is compiled for the least processor

namespace {

struct Group {
    float s, z, m, moved; // moved: mid - u

    Group(const mq_fake &a, int64_t g) : s(a.scale[g]), z(a.zero[g]), m(a.m ? a.m[g] : 1.0f), moved(a.mid - (a.u ? a.u[g] : a.zero[g])) {}
};

struct Slices {
    float step, added, last, under;
    int32_t cut, top;

    explicit Slices(const mq_fake &a)
        : step(a.step), added(a.added), last(float(a.max_code)), under(float(a.under)), cut(int32_t(a.cut)), top(int32_t(a.top)) {}
};

// t: w / s + z + 1/2. Clamped before it is rounded down, which needs no floor then; and nothing here branches: loops around it are to be vectors.
template <bool HALF_UP> INTO_CLONES float level_of(float t, float last, float step, float added, int32_t cut, int32_t top) {
    t = t > 0 ? t : 0; // of what is no number too
    t = t < last ? t : last;
    const int32_t code = int32_t(t);
    int32_t p = code >> cut;
    if constexpr (HALF_UP) {
        p += (code >> (cut - 1)) & 1;
        p = p < top ? p : top;
    }
    return step * float(p) + added;
}

template <bool HALF_UP> INTO_CLONES void read_group(const mq_fake &a, int64_t g, float *read) {
    const Group of(a, g);
    const Slices by(a);
    const float *w = a.w + g * a.size, s = of.s, z = of.z, m = of.m, moved = of.moved, last = by.last, step = by.step, added = by.added;
    const int32_t cut = by.cut, top = by.top;
    const int64_t size = a.size;
    float *to = read + g * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        to[i] = (level_of<HALF_UP>(w[i] / s + z + 0.5f, last, step, added, cut, top) * m + moved) * s;
    }
}

struct Sums {
    float total = 0, along = 0, through = 0, weighed = 0; // of g; times the level; of what clamps let through; that times w
};

template <bool HALF_UP, bool OF_WEIGHT> INTO_CLONES Sums sums_of(const mq_fake &a, int64_t g, const float *pull, float *dw) {
    const Group of(a, g);
    const Slices by(a);
    const float *w = a.w + g * a.size, s = of.s, z = of.z, m = of.m, last = by.last, under = by.under, step = by.step, added = by.added;
    const int32_t cut = by.cut, top = by.top;
    const int64_t size = a.size;
    float total = 0, along = 0, through = 0, weighed = 0;
#pragma omp simd reduction(+ : total, along, through, weighed)
    for (int64_t i = 0; i < size; ++i) {
        const float t = w[i] / s + z + 0.5f, own = pull[i];
        const float stops = (t >= 0) & (t < under) ? own : 0.0f;
        total += own;
        along += own * level_of<HALF_UP>(t, last, step, added, cut, top);
        through += stops;
        weighed += stops * w[i];
        if constexpr (OF_WEIGHT) dw[i] = (t >= 0) & (t < last + 1) ? own * m : 0.0f;
    }
    return {total, along, through, weighed};
}

MQ_CLONES void read_groups(const mq_fake &a, int64_t from, int64_t to, float *read) {
    const bool half_up = a.half_up && a.cut;
    for (int64_t g = from; g < to; ++g) {
        if (half_up) read_group<true>(a, g, read);
        else read_group<false>(a, g, read);
    }
}

MQ_CLONES void sum_groups(const mq_fake &a, int64_t from, int64_t to, const float *pull, float *dw, Sums *sums) {
    const bool half_up = a.half_up && a.cut;
    for (int64_t g = from; g < to; ++g) {
        const float *own = pull + g * a.size;
        float *to_weight = dw ? dw + g * a.size : nullptr;
        if (half_up) sums[g - from] = dw ? sums_of<true, true>(a, g, own, to_weight) : sums_of<true, false>(a, g, own, nullptr);
        else sums[g - from] = dw ? sums_of<false, true>(a, g, own, to_weight) : sums_of<false, false>(a, g, own, nullptr);
    }
}

constexpr int64_t TOGETHER = 64; // groups

// Calls function(from, to) for parts of all groups, threads sharing them.
template <class F> void in_parts(int64_t groups, int64_t threads, F function) {
    const int64_t parts = (groups + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, std::min(threads, parts)))) schedule(static)
    for (int64_t part = 0; part < parts; ++part) function(part * TOGETHER, std::min((part + 1) * TOGETHER, groups));
}

} // namespace

void mq_fake_read(const mq_fake *fake, float *read, int64_t threads) {
    in_parts(fake->groups, threads, [&](int64_t from, int64_t to) { read_groups(*fake, from, to, read); });
}

void mq_fake_gradients(const mq_fake *fake, const float *g, float *dw, float *ds, float *dz, float *dm, float *du, int64_t threads) {
    in_parts(fake->groups, threads, [&](int64_t from, int64_t to) {
        Sums sums[TOGETHER];
        sum_groups(*fake, from, to, g, dw, sums);
        for (int64_t i = from; i < to; ++i) {
            const Group of(*fake, i);
            const Sums &sum = sums[i - from];
            ds[i] = of.m * sum.along + of.moved * sum.total - of.m / of.s * sum.weighed;
            const float to_zero = of.s * of.m * sum.through, to_shift = -of.s * sum.total;
            dz[i] = fake->u ? to_zero : to_zero + to_shift;
            if (fake->u) dm[i] = of.s * sum.along, du[i] = to_shift;
        }
    });
}
