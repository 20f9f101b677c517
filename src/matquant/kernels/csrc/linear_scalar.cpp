// Any machine. What the vector versions must equal. Loops stay loops: unrolled over arrays they compile for minutes, and gain nothing.
#include <cstring>

#ifndef MQ_UNROLL
#define MQ_UNROLL 1
#endif
#include "half.h"
#include "linear.inl"

#include "attention.inl"

namespace {

struct Scalar {
    static constexpr int L = 8, BYTES = 32;
    static constexpr bool IN_PLACE = true;
    static constexpr int TWO_TILES = 0;
    static constexpr int ROWS = 2;          // that planes are unpacked for in registers
    struct I { uint8_t v[BYTES]; };
    struct F { float v[L]; };
    struct Wide { int32_t v[L]; };
    using Acc = Wide;

    static I load(const uint8_t *p) { I r; std::memcpy(r.v, p, BYTES); return r; }
    static I byte(int c) { I r; std::memset(r.v, c, BYTES); return r; }
    static I and_(I a, I b) { for (int i = 0; i < BYTES; ++i) a.v[i] &= b.v[i]; return a; }
    // a where MASK has ones, b elsewhere.
    template <int MASK> static I select(I a, I b) { for (int i = 0; i < BYTES; ++i) a.v[i] = uint8_t((a.v[i] & MASK) | (b.v[i] & ~MASK)); return a; }
    static I add_bytes(I a, I b) { for (int i = 0; i < BYTES; ++i) a.v[i] = uint8_t(a.v[i] + b.v[i]); return a; }
    static void put(uint8_t *p, I a) { std::memcpy(p, a.v, BYTES); }
    template <int N> static I shr(I a) { for (int i = 0; i < BYTES; ++i) a.v[i] = uint8_t(a.v[i] >> N); return a; }
    template <int N> static I shl(I a) { for (int i = 0; i < BYTES; ++i) a.v[i] = uint8_t(a.v[i] << N); return a; }

    struct Four { int8_t v[4]; };
    static Four broadcast(const int8_t *p) { Four r; std::memcpy(r.v, p, 4); return r; }
    static Wide wide_zero() { return Wide{}; }
    static Acc acc_zero() { return Acc{}; }
    static Acc dot(Acc a, I u, Four s) {
        for (int i = 0; i < L; ++i)
            for (int k = 0; k < 4; ++k) a.v[i] += int32_t(u.v[4 * i + k]) * s.v[k];
        return a;
    }
    static Wide widen(Wide t, Acc a) { for (int i = 0; i < L; ++i) t.v[i] += a.v[i]; return t; }
    // A sum of one step, which goes on from the whole one.
    static Acc start(Wide t) { return t; }
    static Wide finish(Wide, Acc a) { return a; }
    static Wide wide_add(Wide a, Wide b) { for (int i = 0; i < L; ++i) a.v[i] += b.v[i]; return a; }
    template <int N> static Wide wide_shr(Wide a) { for (int i = 0; i < L; ++i) a.v[i] >>= N; return a; }
    static F to_float(Wide t) { F r; for (int i = 0; i < L; ++i) r.v[i] = float(t.v[i]); return r; }

    static F set(float c) { F r; for (float &v : r.v) v = c; return r; }
    static F load_float(const float *p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
    static F load_half(const uint16_t *p) { F r; for (int i = 0; i < L; ++i) r.v[i] = half_to_float(p[i]); return r; }
    static F load_bytes(const uint8_t *p) { F r; for (int i = 0; i < L; ++i) r.v[i] = p[i]; return r; }
    static F byte_to_float(I a, int k) { F r; for (int i = 0; i < L; ++i) r.v[i] = a.v[4 * i + k]; return r; }
    static F sub(F a, F b) { for (int i = 0; i < L; ++i) a.v[i] -= b.v[i]; return a; }
    static F mul(F a, F b) { for (int i = 0; i < L; ++i) a.v[i] *= b.v[i]; return a; }
    static F fma(F a, F b, F c) { for (int i = 0; i < L; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return c; }
    static void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
};

}  // namespace

void linear_tiles_scalar(const mq_weight &w, int bits, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    linear_tiles<Scalar>(w, bits, x, bias, y, first, last);
}

void attend_over_chunk_scalar(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    attend_over_chunk<Scalar>(q, n, counts, keys, values, heads, to);
}
