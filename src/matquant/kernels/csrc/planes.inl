// Planes of some rows made into codes, for a vector type V (linear.inl says how these files are compiled).
//
// A step is two chunks, 32 columns. Its planes are ORed up to words, bytes that hold four codes of two bits or two of up to four (`words_of`);
// fields of words are multiplied where they lie, or moved down to a code a byte (`spread`), or both nibbles joined to a byte (`bytes_of_step`).
#pragma once
#include <utility>

#include "layout.h"

#ifdef MQ_UNROLL  // by whoever wants short code: instrumented, or of arrays, long unrolled loops take minutes to compile
#define MQ_INLINE
#else
#define MQ_INLINE __attribute__((always_inline))
#define MQ_UNROLL 4
#endif

namespace {

constexpr int STEP = 32;             // columns
constexpr int SLOTS = 8;             // of a step: four columns each, the bytes of a lane

// f(0), ..., f(N - 1), unrolled: what is kept in arrays by such an index stays in registers.
template <int N, class F>
MQ_INLINE inline void each(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) MQ_INLINE { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

struct Read {  // w = s (m (step p + shift - mid) + mid - u lsb), or without a refit w = s (step p + shift - z)
    float step, shift, mid, lsb;
};

inline Read read_of(const mq_weight &w, int bits) {
    const int c = int(w.parent_bits), d = c - bits;
    const float one = float(1 << d);
    Read r{one, (one - 1) / 2, float((1 << c) - 1) / 2, 1.0f / float(1 << (8 - c))};
    if (w.overlap && bits > 4) r.step = 2 * one, r.shift = 2 * ((one - 1) / 2 - 7.5f) + 7.5f;
    return r;
}

// scale_r and offset_r of the rows of a tile in one group, whose numbers begin at `at`.
template <class V>
MQ_INLINE inline void affine(const mq_weight &w, int bits, const Read &r, int64_t at, typename V::F &scale, typename V::F &offset) {
    const auto s = w.half ? V::load_half(static_cast<const uint16_t *>(w.scale) + at) : V::load_float(static_cast<const float *>(w.scale) + at);
    if (w.k[bits]) {
        const auto k = V::load_bytes(w.k[bits] + at), u = V::load_bytes(w.u[bits] + at);
        scale = V::mul(V::mul(s, V::set(r.step / 128)), k);
        offset = V::mul(s, V::fma(k, V::set((r.shift - r.mid) / 128), V::fma(u, V::set(-r.lsb), V::set(r.mid))));
    } else {
        const auto z = w.zero ? V::load_bytes(w.zero + at) : V::set(float(1 << (w.parent_bits - 1)));
        scale = V::mul(s, V::set(r.step));
        offset = V::mul(s, V::sub(V::set(r.shift), z));
    }
}

// The planes of one tile.
template <class V>
struct Planes {
    const uint8_t *p01, *p2, *p3, *p45, *p67;

    Planes(const mq_weight &w, int64_t tile) {
        const int64_t pairs = tile * (w.groups * w.padded / 16) * V::BYTES, singles = pairs / 2;
        p01 = w.pair[0] + pairs;
        p2 = w.single[0] ? w.single[0] + singles : nullptr;
        p3 = w.single[1] ? w.single[1] + singles : nullptr;
        p45 = w.pair[2] ? w.pair[2] + pairs : nullptr;
        p67 = w.pair[3] ? w.pair[3] + pairs : nullptr;
    }

    // Ask for a step's bytes; behind the last one there may be none.
    template <int R>
    MQ_INLINE void prefetch(int64_t step) const {
        const int64_t pair = 2 * step * V::BYTES, single = step * V::BYTES;
        const auto two = [&](const uint8_t *p) MQ_INLINE { __builtin_prefetch(p + pair), __builtin_prefetch(p + pair + V::BYTES); };
        two(p01);
        if (R > 2) __builtin_prefetch(p2 + single);
        if (R > 3) __builtin_prefetch(p3 + single);
        if (R > 4) two(p45);
        if (R > 6) two(p67);
    }
};

// How the codes of one nibble lie in words. width: bits between fields of a byte. mask: of a code. count: words of a step.
//
// width 2: word h holds columns 4f + k of chunk h in field f. width 4: word 2h + n holds columns 4n + k and 4n + 8 + k of chunk h.
struct Words {
    int width, mask, count;
    constexpr int fields() const { return 8 / width; }
    constexpr int slot(int word, int field) const { return width == 2 ? 4 * word + field : 4 * (word / 2) + word % 2 + 2 * field; }
};

constexpr Words high_words(int bits) { return bits == 2 ? Words{2, 3, 2} : bits == 3 ? Words{4, 7, 4} : Words{4, 15, 4}; }
constexpr Words low_words(int bits) { return bits == 5 ? Words{2, 1, 2} : bits == 6 ? Words{2, 3, 2} : bits == 7 ? Words{4, 7, 4} : Words{4, 15, 4}; }

// The words of the high nibble in a step. Shifts of 16 bits carry bits into the next byte; each select or mask leaves these out.
template <class V, int R>
MQ_INLINE inline void words_of_high(const Planes<V> &p, int64_t step, typename V::I *words) {
    const auto pair = [&](int h) { return V::load(p.p01 + (2 * step + h) * V::BYTES); };
    if constexpr (R == 2) {
        words[0] = pair(0), words[1] = pair(1);
        return;
    }
    const auto a = pair(0), b = pair(1), two = V::load(p.p2 + step * V::BYTES);
    if constexpr (R == 3) {
        words[0] = V::template select<0x66>(V::template shl<1>(a), two);
        words[1] = V::template select<0x66>(V::template shr<1>(a), V::template shr<1>(two));
        words[2] = V::template select<0x66>(V::template shl<1>(b), V::template shr<2>(two));
        words[3] = V::template select<0x66>(V::template shr<1>(b), V::template shr<3>(two));
    } else if constexpr (R >= 4) {
        const auto three = V::load(p.p3 + step * V::BYTES);
        const auto even = V::template select<0xAA>(V::template shl<1>(two), three), odd = V::template select<0xAA>(two, V::template shr<1>(three));
        words[0] = V::template select<0xCC>(V::template shl<2>(a), even);
        words[1] = V::template select<0xCC>(a, odd);
        words[2] = V::template select<0xCC>(V::template shl<2>(b), V::template shr<2>(even));
        words[3] = V::template select<0xCC>(b, V::template shr<2>(odd));
    }
}

// The same of the low nibble, above 4 bits.
template <class V, int R>
MQ_INLINE inline void words_of_low(const Planes<V> &p, int64_t step, typename V::I *words) {
    for (int h = 0; h < 2; ++h) {
        const auto four = V::load(p.p45 + (2 * step + h) * V::BYTES);
        if constexpr (R == 5) words[h] = V::template shr<1>(four);  // plane 4 is the upper of its pair
        if constexpr (R == 6) words[h] = four;
        if constexpr (R >= 7) {
            const auto six = V::load(p.p67 + (2 * step + h) * V::BYTES);
            if constexpr (R == 7) {
                words[2 * h] = V::template select<0x66>(V::template shl<1>(four), V::template shr<1>(six));
                words[2 * h + 1] = V::template select<0x66>(V::template shr<1>(four), V::template shr<3>(six));
            } else {
                words[2 * h] = V::template select<0xCC>(V::template shl<2>(four), six);
                words[2 * h + 1] = V::template select<0xCC>(four, V::template shr<2>(six));
            }
        }
    }
}

// Up by N bits, or down.
template <class V, int N>
MQ_INLINE inline typename V::I moved(typename V::I word) {
    if constexpr (N > 0) return V::template shl<N>(word);
    else if constexpr (N < 0) return V::template shr<-N>(word);
    else return word;
}

// Codes of a step, one a byte, by slots.
template <class V, Words OF, class Made>
MQ_INLINE inline void spread(const typename V::I *words, Made made) {
    each<OF.count>([&](auto i) MQ_INLINE {
        each<OF.fields()>([&](auto f) MQ_INLINE { made(OF.slot(i, f), V::and_(moved<V, -OF.width * f>(words[i]), V::byte(OF.mask))); });
    });
}

// Where a product takes whole bytes: p of a step above 4 bits, a byte each, by slots. O: cells of the low nibble overlap.
//
//     p = (high << (r - 4)) | low,   or with overlap   p = (high << (r - 5)) + low
template <class V, int R, bool O, class Made>
MQ_INLINE inline void bytes_of_step(const Planes<V> &planes, int64_t step, Made made) {
    constexpr Words HIGH = high_words(4), LOW = low_words(R);
    constexpr int UP = R - 4, AT = O ? UP - 1 : UP, BELOW = (1 << UP) - 1;
    typename V::I high[4], low[4];
    words_of_high<V, 4>(planes, step, high);
    words_of_low<V, R>(planes, step, low);
    each<HIGH.count>([&](auto i) MQ_INLINE {
        each<HIGH.fields()>([&](auto f) MQ_INLINE {
            constexpr int SLOT = HIGH.slot(i, f), WORD = LOW.width == 2 ? SLOT / 4 : int(i), FIELD = LOW.width == 2 ? SLOT % 4 : int(f);
            const auto of_high = moved<V, AT - 4 * f>(high[i]), of_low = moved<V, -LOW.width * FIELD>(low[WORD]);
            if constexpr (O) made(std::integral_constant<int, SLOT>{}, V::add_bytes(V::and_(of_high, V::byte(15 << AT)), V::and_(of_low, V::byte(BELOW))));
            else if constexpr (R == 8) made(std::integral_constant<int, SLOT>{}, V::template select<BELOW>(of_low, of_high));
            else made(std::integral_constant<int, SLOT>{}, V::and_(V::template select<BELOW>(of_low, of_high), V::byte((16 << UP) - 1)));
        });
    });
}

}  // namespace
