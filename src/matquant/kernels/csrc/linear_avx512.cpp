// AVX-512 with VNNI: tiles of 16 rows.
#include <immintrin.h>

#include <cstring>

#include "linear.inl"

#include "attention.inl"

namespace {

struct Avx512 {
    static constexpr int L = 16, BYTES = 64;
    static constexpr bool IN_PLACE = true;  // products of bytes up to 255, sums of 32 bits
    static constexpr int TWO_TILES = 8;     // widths up to which two tiles at once are faster
    static constexpr int ROWS = 8;          // that planes are unpacked for in registers
    using I = __m512i;
    using F = __m512;
    using Wide = __m512i;  // 16 sums of 32 bits
    using Acc = __m512i;

    static I load(const uint8_t *p) { return _mm512_loadu_si512(p); }
    static I byte(int c) { return _mm512_set1_epi8(char(c)); }
    static I and_(I a, I b) { return _mm512_and_si512(a, b); }
    // a where MASK has ones, b elsewhere.
    template <int MASK> static I select(I a, I b) { return _mm512_ternarylogic_epi32(a, b, byte(MASK), 0xE4); }
    static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
    static void put(uint8_t *p, I a) { _mm512_storeu_si512(p, a); }
    template <int N> static I shr(I a) { return _mm512_srli_epi16(a, N); }
    template <int N> static I shl(I a) { return _mm512_slli_epi16(a, N); }

    static I broadcast(const int8_t *p) { int32_t v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
    static Wide wide_zero() { return _mm512_setzero_si512(); }
    static Acc acc_zero() { return _mm512_setzero_si512(); }
    static Acc dot(Acc a, I u, I s) { return _mm512_dpbusd_epi32(a, u, s); }
    static Wide widen(Wide t, Acc a) { return _mm512_add_epi32(t, a); }
    // A sum of one step, which goes on from the whole one.
    static Acc start(Wide t) { return t; }
    static Wide finish(Wide, Acc a) { return a; }
    static Wide wide_add(Wide a, Wide b) { return _mm512_add_epi32(a, b); }
    template <int N> static Wide wide_shr(Wide a) { return _mm512_srai_epi32(a, N); }
    static F to_float(Wide t) { return _mm512_cvtepi32_ps(t); }

    static F set(float c) { return _mm512_set1_ps(c); }
    static F load_float(const float *p) { return _mm512_loadu_ps(p); }
    static F load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
    static F load_bytes(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))); }
    static F byte_to_float(I a, int k) {
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(8 * k)), _mm512_set1_epi32(255)));
    }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
};

}  // namespace

void linear_tiles_avx512(const mq_weight &w, int bits, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    linear_tiles<Avx512>(w, bits, x, bias, y, first, last);
}

void attend_over_chunk_avx512(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    attend_over_chunk<Avx512>(q, n, counts, keys, values, heads, to);
}
