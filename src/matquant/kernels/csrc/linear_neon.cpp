// NEON with dot products (armv8.2-a+dotprod): tiles of 4 rows. A nibble is a signed byte too.
#include <arm_neon.h>

#include <cstring>

#include "linear.inl"

#include "attention.inl"

namespace {

struct Neon {
    static constexpr int L = 4, BYTES = 16;
    static constexpr bool IN_PLACE = false;  // bytes up to 127
    static constexpr int TWO_TILES = 4;      // widths up to which two tiles at once are faster
    static constexpr int ROWS = 4;          // that planes are unpacked for in registers
    using I = uint8x16_t;
    using F = float32x4_t;
    using Wide = int32x4_t;
    using Acc = int32x4_t;

    static I load(const uint8_t *p) { return vld1q_u8(p); }
    static I byte(int c) { return vdupq_n_u8(uint8_t(c)); }
    static I and_(I a, I b) { return vandq_u8(a, b); }
    // a where MASK has ones, b elsewhere.
    template <int MASK> static I select(I a, I b) { return vbslq_u8(byte(MASK), a, b); }
    static I add_bytes(I a, I b) { return vaddq_u8(a, b); }
    static void put(uint8_t *p, I a) { vst1q_u8(p, a); }
    template <int N> static I shr(I a) { return vshrq_n_u8(a, N); }
    template <int N> static I shl(I a) { return vshlq_n_u8(a, N); }

    static int8x16_t broadcast(const int8_t *p) { int32_t v; std::memcpy(&v, p, 4); return vreinterpretq_s8_s32(vdupq_n_s32(v)); }
    static Wide wide_zero() { return vdupq_n_s32(0); }
    static Acc acc_zero() { return vdupq_n_s32(0); }
    static Acc dot(Acc a, I u, int8x16_t s) { return vdotq_s32(a, vreinterpretq_s8_u8(u), s); }
    static Wide widen(Wide t, Acc a) { return vaddq_s32(t, a); }
    // A sum of one step, which goes on from the whole one.
    static Acc start(Wide t) { return t; }
    static Wide finish(Wide, Acc a) { return a; }
    static Wide wide_add(Wide a, Wide b) { return vaddq_s32(a, b); }
    template <int N> static Wide wide_shr(Wide a) { return vshrq_n_s32(a, N); }
    static F to_float(Wide t) { return vcvtq_f32_s32(t); }

    static F set(float c) { return vdupq_n_f32(c); }
    static F load_float(const float *p) { return vld1q_f32(p); }
    static F load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static F load_bytes(const uint8_t *p) { const float v[4] = {float(p[0]), float(p[1]), float(p[2]), float(p[3])}; return vld1q_f32(v); }
    static F byte_to_float(I a, int k) {
        return vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(a), vdupq_n_s32(-8 * k)), vdupq_n_u32(255)));
    }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static void store(float *p, F a) { vst1q_f32(p, a); }
};

}  // namespace

void linear_tiles_neon(const mq_weight &w, int bits, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    linear_tiles<Neon>(w, bits, x, bias, y, first, last);
}

void attend_over_chunk_neon(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    attend_over_chunk<Neon>(q, n, counts, keys, values, heads, to);
}
