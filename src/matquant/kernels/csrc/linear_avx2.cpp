// AVX2, FMA and F16C: tiles of 8 rows.
#include <immintrin.h>

#include <cstring>

#include "linear.inl"

#include "attention.inl"

namespace {

struct Avx2 {
    static constexpr int L = 8, BYTES = 32;
    static constexpr bool IN_PLACE = false;  // sums of 16 bits
    static constexpr int TWO_TILES = 4;      // widths up to which two tiles at once are faster
    static constexpr int ROWS = 4;          // that planes are unpacked for in registers
    using I = __m256i;
    using F = __m256;
    using Wide = __m256i;  // 8 sums of 32 bits
    using Acc = __m256i;   // 16 of 16 bits: 8 products of a nibble and 127 by twos are at most 30480

    static I load(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static I byte(int c) { return _mm256_set1_epi8(char(c)); }
    static I and_(I a, I b) { return _mm256_and_si256(a, b); }
    // a where MASK has ones, b elsewhere.
    template <int MASK> static I select(I a, I b) { return _mm256_xor_si256(b, _mm256_and_si256(_mm256_xor_si256(a, b), byte(MASK))); }
    static I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
    static void put(uint8_t *p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a); }
    template <int N> static I shr(I a) { return _mm256_srli_epi16(a, N); }
    template <int N> static I shl(I a) { return _mm256_slli_epi16(a, N); }

    static I broadcast(const int8_t *p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
    static Wide wide_zero() { return _mm256_setzero_si256(); }
    static Acc acc_zero() { return _mm256_setzero_si256(); }
    static Acc dot(Acc a, I u, I s) { return _mm256_add_epi16(a, _mm256_maddubs_epi16(u, s)); }
    static Wide widen(Wide t, Acc a) { return _mm256_add_epi32(t, _mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
    // A sum of one step, which may go on from a whole one where both are as wide.
    static Acc start(Wide) { return acc_zero(); }
    static Wide finish(Wide t, Acc a) { return widen(t, a); }
    static Wide wide_add(Wide a, Wide b) { return _mm256_add_epi32(a, b); }
    template <int N> static Wide wide_shr(Wide a) { return _mm256_srai_epi32(a, N); }
    static F to_float(Wide t) { return _mm256_cvtepi32_ps(t); }

    static F set(float c) { return _mm256_set1_ps(c); }
    static F load_float(const float *p) { return _mm256_loadu_ps(p); }
    static F load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
    static F load_bytes(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))); }
    static F byte_to_float(I a, int k) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128(8 * k)), _mm256_set1_epi32(255)));
    }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
};

}  // namespace

void linear_tiles_avx2(const mq_weight &w, int bits, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    linear_tiles<Avx2>(w, bits, x, bias, y, first, last);
}

void attend_over_chunk_avx2(const float *const *q, int64_t n, const int64_t *counts, const float *keys, const float *values, const Heads &heads, float *const *to) {
    attend_over_chunk<Avx2>(q, n, counts, keys, values, heads, to);
}
