// Attention of some queries over one chunk of positions, for a vector type V (linear.inl says how these files are compiled):
//
//     s_i = scaling q k_i;   largest = max s;   e_i = exp(s_i - largest);   total = sum e_i;   out = sum e_i v_i
//
// Chunks are merged in their order (step.cpp), so a row's result depends neither on the rows beside it nor on how threads share the chunks. It is the
// online softmax of https://arxiv.org/abs/1805.02867 with the split of https://crfm.stanford.edu/2023/10/12/flashdecoding.html at fixed places.
#include "attention.h"
#include "maths.h"

namespace {

// s_i of N queries, for positions below `until`, and up to a few behind it. Keys of 16 positions lie together, a lane for each: no sum crosses lanes.
template <class V, int N>
MQ_INLINE inline void scores_of(const float *const *q, const float *keys, int64_t until, int64_t size, float scaling, float (*scores)[CHUNK]) {
    constexpr int AT_ONCE = 2 * V::L > KEYS ? 2 * V::L : KEYS, VECTORS = AT_ONCE / V::L;
    for (int64_t first = 0; first < until; first += AT_ONCE) {
        typename V::F sums[N][VECTORS];
        each<N>([&](auto n) MQ_INLINE { each<VECTORS>([&](auto v) MQ_INLINE { sums[n][v] = V::set(0); }); });
        for (int64_t j = 0; j < size; ++j) {
            typename V::F k[VECTORS];
            each<VECTORS>([&](auto v) MQ_INLINE { k[v] = V::load_float(keys + (first / KEYS + v * V::L / KEYS) * KEYS * size + j * KEYS + v * V::L % KEYS); });
            each<N>([&](auto n) MQ_INLINE {
                const auto one = V::set(q[n][j]);
                each<VECTORS>([&](auto v) MQ_INLINE { sums[n][v] = V::fma(one, k[v], sums[n][v]); });
            });
        }
        each<N>([&](auto n) MQ_INLINE { each<VECTORS>([&](auto v) MQ_INLINE { V::store(&scores[n][first + v * V::L], V::mul(sums[n][v], V::set(scaling))); }); });
    }
}

// sum e_i v_i over positions below `until`, for D vectors of N queries.
template <class V, int N, int D>
MQ_INLINE inline void mean_of(const float (*e)[CHUNK], const float *values, int64_t until, int64_t apart, int64_t at, float *const *to) {
    typename V::F sums[N][D];
    each<N>([&](auto n) MQ_INLINE { each<D>([&](auto d) MQ_INLINE { sums[n][d] = V::set(0); }); });
    for (int64_t i = 0; i < until; ++i) {
        typename V::F v[D];
        each<D>([&](auto d) MQ_INLINE { v[d] = V::load_float(values + i * apart + at + d * V::L); });
        each<N>([&](auto n) MQ_INLINE {
            const auto one = V::set(e[n][i]);
            each<D>([&](auto d) MQ_INLINE { sums[n][d] = V::fma(one, v[d], sums[n][d]); });
        });
    }
    each<N>([&](auto n) MQ_INLINE { each<D>([&](auto d) MQ_INLINE { V::store(to[n] + at + d * V::L, sums[n][d]); }); });
}

// e_i of one query, zero from `count` on. Returns (largest, total).
inline Peak exponentials(float *scores, int64_t count) {
    float largest = -__builtin_inff(), total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = count; i < CHUNK; ++i) scores[i] = -__builtin_inff();
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < CHUNK; ++i) {
        scores[i] = scores[i] > -__builtin_inff() ? exp_of(scores[i] - largest) : 0;
        total += scores[i];
    }
    return {largest, total};
}

template <class V, int N>
void queries_over_chunk(const float *const *q, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    constexpr int WIDE = V::L >= 16 ? 4 : 2;  // vectors of values at once, as many as there are registers for
    alignas(64) float scores[N][CHUNK];
    int64_t until = 0;
    for (int n = 0; n < N; ++n) until = counts[n] > until ? counts[n] : until;
    scores_of<V, N>(q, keys, until, heads.size, heads.scaling, scores);
    for (int n = 0; n < N; ++n) {
        const Peak peak = exponentials(scores[n], counts[n]);
        std::memcpy(to[n] + heads.padded, &peak, sizeof peak);
    }
    int64_t at = 0;
    for (; at + WIDE * V::L <= heads.padded; at += WIDE * V::L) mean_of<V, N, WIDE>(scores, values, until, heads.padded, at, to);
    for (; at < heads.padded; at += V::L) mean_of<V, N, 1>(scores, values, until, heads.padded, at, to);
}

template <class V>
void attend_over_chunk(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    for (; n >= 4; n -= 4, q += 4, counts += 4, to += 4) queries_over_chunk<V, 4>(q, counts, keys, values, heads, to);
    if (n == 3) queries_over_chunk<V, 3>(q, counts, keys, values, heads, to);
    if (n == 2) queries_over_chunk<V, 2>(q, counts, keys, values, heads, to);
    if (n == 1) queries_over_chunk<V, 1>(q, counts, keys, values, heads, to);
}

}  // namespace
