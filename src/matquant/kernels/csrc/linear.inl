// x W_r^T over some tiles, for a vector type V (one of the files beside this one, each compiled for its instruction set):
//
//     y_o = sum over groups g   scale_r[o, g] (sum over blocks b of g  step_b  sum over columns i of b  p[o, i] q_i)  +  offset_r[o, g] sum_g
//
// with integers inside a block, p = B b + e made of the high and the low nibble's own sums (docs/FORMAT.md: B = 16 >> d, or 8 >> d with overlap).
// They stay below 2^24, so it makes no difference in which of the ways below they are added up: a row comes out the same alone or among others.
//
// A step is two chunks, 32 columns. Its planes are ORed up to words, bytes that hold four codes of two bits or two of up to four (`words_of`).
// Few rows of x: a field of a word is multiplied at once, where V::IN_PLACE even where it lies in its byte, its sum shifted down after the block.
// Many rows: a group of a tile is unpacked once, to a code a byte, and multiplied with all of them.
#include <cstring>
#include <utility>
#include <vector>

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
constexpr int FEW = MQ_UNROLL;       // rows of x that are multiplied with one unpacking in registers
constexpr int MANY = 2 * MQ_UNROLL;  // of an unpacked group, which more rows than FEW take
constexpr int PANEL = 96;            // rows that pass a tile before the next: their inputs stay in the second-level cache

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

template <class V, int N>
MQ_INLINE inline typename V::I shifted(typename V::I word) {
    if constexpr (N == 0) return word;
    else return V::template shr<N>(word);
}

// Codes of a step, one a byte, by slots.
template <class V, Words OF, class Made>
MQ_INLINE inline void spread(const typename V::I *words, Made made) {
    each<OF.count>([&](auto i) MQ_INLINE {
        each<OF.fields()>([&](auto f) MQ_INLINE { made(OF.slot(i, f), V::and_(shifted<V, OF.width * f>(words[i]), V::byte(OF.mask))); });
    });
}

// Sums of one nibble's products in a block. Class i: of fields that are multiplied WIDTH i bits too high.
//
// Where sums have 16 bits they hold 8 products of nibbles, or 16 of codes of two bits, of two columns each: those of a step, or of a block.
template <class V, int WIDTH>
struct Sums {
    static constexpr int CLASSES = V::IN_PLACE ? 8 / WIDTH : 4 / WIDTH;
    typename V::Acc acc[CLASSES];
    typename V::Wide total[CLASSES];  // of what was in `acc`, if that is narrower

    MQ_INLINE void clear() {
        each<CLASSES>([&](auto i) MQ_INLINE { acc[i] = V::acc_zero(), total[i] = V::wide_zero(); });
    }
    MQ_INLINE void flush() {
        each<CLASSES>([&](auto i) MQ_INLINE { total[i] = V::widen(total[i], acc[i]), acc[i] = V::acc_zero(); });
    }
    MQ_INLINE typename V::F value() {
        if constexpr (V::IN_PLACE) flush();
        auto sum = total[0];
        if constexpr (CLASSES > 1) sum = V::wide_add(sum, V::template wide_shr<WIDTH>(total[1]));
        if constexpr (CLASSES > 2) sum = V::wide_add(sum, V::wide_add(V::template wide_shr<4>(total[2]), V::template wide_shr<6>(total[3])));
        return V::to_float(sum);
    }
};

// Adds the products of a step's words: for T tiles and M rows of x.
template <class V, Words OF, int T, int M>
MQ_INLINE inline void multiply(const typename V::I (*words)[4], const int8_t *q, int64_t apart, Sums<V, OF.width> (*sums)[M]) {
    each<OF.count>([&](auto i) MQ_INLINE {
        each<OF.fields()>([&](auto f) MQ_INLINE {
            // how far down the field is moved, and how far too high it is multiplied
            constexpr int AT = OF.width * f, DOWN = V::IN_PLACE ? 0 : AT / 4 * 4, UP = AT - DOWN, KIND = UP / OF.width;
            typename V::I codes[T];
            each<T>([&](auto t) MQ_INLINE { codes[t] = V::and_(shifted<V, DOWN>(words[t][i]), V::byte(OF.mask << UP)); });
            each<M>([&](auto m) MQ_INLINE {
                const auto four = V::broadcast(q + m * apart + 4 * OF.slot(i, f));
                each<T>([&](auto t) MQ_INLINE { sums[t][m].acc[KIND] = V::dot(sums[t][m].acc[KIND], codes[t], four); });
            });
        });
    });
}

// What the high nibble counts in p = factor * b + e.
inline float factor_of(const mq_weight &w, int bits) {
    const int base = w.overlap ? 8 : 16;
    return float(base >> (8 - bits));
}

// One block of T tiles and M rows of x: adds step_b sum p q to `to`.
template <class V, int R, int T, int M>
MQ_INLINE inline void block(const Planes<V> *planes, int64_t column, const Inputs &x, int64_t row, float factor, typename V::F (*to)[M]) {
    constexpr Words HIGH = high_words(R < 4 ? R : 4), LOW = low_words(R);
    Sums<V, HIGH.width> high[T][M];
    Sums<V, LOW.width> low[T][M];
    const auto every = [&](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    every([&](auto t, auto m) MQ_INLINE { high[t][m].clear(), low[t][m].clear(); });
    for (int64_t at = column; at < column + x.block; at += STEP) {
        typename V::I words[T][4];
        const int8_t *q = x.q + (column / x.block * x.m + row) * x.block + (at - column);
        each<T>([&](auto t) MQ_INLINE { words_of_high<V, (R < 4 ? R : 4)>(planes[t], at / STEP, words[t]); });
        multiply<V, HIGH, T, M>(words, q, x.block, high);
        if constexpr (R > 4) {
            each<T>([&](auto t) MQ_INLINE { words_of_low<V, R>(planes[t], at / STEP, words[t]); });
            multiply<V, LOW, T, M>(words, q, x.block, low);
        }
        if constexpr (!V::IN_PLACE) {
            const bool last = at + STEP >= column + x.block;
            if (HIGH.width == 4 || last) every([&](auto t, auto m) MQ_INLINE { high[t][m].flush(); });
            if (R > 4 && (LOW.width == 4 || last)) every([&](auto t, auto m) MQ_INLINE { low[t][m].flush(); });
        }
    }
    every([&](auto t, auto m) MQ_INLINE {
        auto sum = high[t][m].value();
        if constexpr (R > 4) sum = V::fma(sum, V::set(factor), low[t][m].value());
        to[t][m] = V::fma(sum, V::set(x.step[(row + m) * (x.width / x.block) + column / x.block]), to[t][m]);
    });
}

// The same with products of floats.
template <class V, int R, int T, int M>
inline void block_exact(const Planes<V> *planes, int64_t column, const Inputs &x, int64_t row, float factor, typename V::F (*to)[M]) {
    for (int t = 0; t < T; ++t)
        for (int64_t at = column; at < column + x.block; at += STEP) {
            typename V::I words[4], high[SLOTS], low[SLOTS];
            words_of_high<V, (R < 4 ? R : 4)>(planes[t], at / STEP, words);
            spread<V, high_words(R < 4 ? R : 4)>(words, [&](int slot, typename V::I codes) MQ_INLINE { high[slot] = codes; });
            if constexpr (R > 4) {
                words_of_low<V, R>(planes[t], at / STEP, words);
                spread<V, low_words(R)>(words, [&](int slot, typename V::I codes) MQ_INLINE { low[slot] = codes; });
            }
            for (int slot = 0; slot < SLOTS; ++slot)
                for (int k = 0; k < 4; ++k) {
                    auto p = V::byte_to_float(high[slot], k);
                    if constexpr (R > 4) p = V::fma(p, V::set(factor), V::byte_to_float(low[slot], k));
                    for (int m = 0; m < M; ++m) to[t][m] = V::fma(p, V::set(x.x[(row + m) * x.width + at + 4 * slot + k]), to[t][m]);
                }
        }
}

template <class V>
inline void write(const mq_weight &w, const float *bias, int64_t row, int64_t tile, typename V::F values, float *y) {
    alignas(64) float lanes[V::L];
    V::store(lanes, values);
    const int64_t first = tile * V::L, count = w.out - first < V::L ? w.out - first : V::L;
    if (bias)
        for (int64_t i = 0; i < count; ++i) lanes[i] += bias[first + i];
    std::memcpy(y + row * w.out + first, lanes, size_t(count) * sizeof(float));
}

// T tiles, `apart` from each other, times M rows of x from `row` on.
template <class V, int R, int T, int M>
void tiles_and_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t row, int64_t tile, int64_t apart) {
    const Read read = read_of(w, R);
    const float factor = factor_of(w, R);
    const Planes<V> planes[2] = {Planes<V>(w, tile), Planes<V>(w, tile + (T - 1) * apart)};
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    typename V::F out[T][M], sums[T][M];
    every([&](auto t, auto m) MQ_INLINE { out[t][m] = V::set(0); });
    for (int64_t g = 0; g < w.groups; ++g) {
        every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::set(0); });
        for (int64_t column = g * w.padded; column < (g + 1) * w.padded; column += x.block) {
            if (x.x) block_exact<V, R, T, M>(planes, column, x, row, factor, sums);
            else block<V, R, T, M>(planes, column, x, row, factor, sums);
        }
        each<T>([&](auto t) MQ_INLINE {
            typename V::F scale, offset;
            affine<V>(w, R, read, ((tile + t * apart) * w.groups + g) * V::L, scale, offset);
            each<M>([&](auto m) MQ_INLINE {
                out[t][m] = V::fma(offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(scale, sums[t][m], out[t][m]));
            });
        });
    }
    every([&](auto t, auto m) MQ_INLINE { write<V>(w, bias, row + m, tile + t * apart, out[t][m], y); });
}

// Codes of one group of a tile, a code a byte: [step][slot][vector]; the low nibble's apart, behind them, unless a product takes whole bytes.
template <class V, int R>
void unpack(const mq_weight &w, int64_t tile, int64_t g, uint8_t *codes) {
    const Planes<V> planes(w, tile);
    const int64_t steps = w.padded / STEP;
    for (int64_t step = 0; step < steps; ++step) {
        typename V::I words[4], whole[SLOTS];
        uint8_t *to = codes + step * SLOTS * V::BYTES;
        words_of_high<V, (R < 4 ? R : 4)>(planes, g * steps + step, words);
        if constexpr (R <= 4 || !V::IN_PLACE) {
            spread<V, high_words(R < 4 ? R : 4)>(words, [&](int slot, typename V::I c) MQ_INLINE { V::put(to + slot * V::BYTES, c); });
            if constexpr (R > 4) {
                to += steps * SLOTS * V::BYTES;
                words_of_low<V, R>(planes, g * steps + step, words);
                spread<V, low_words(R)>(words, [&](int slot, typename V::I c) MQ_INLINE { V::put(to + slot * V::BYTES, c); });
            }
        } else {
            constexpr int UP = R - 4;  // of B = 16 >> d
            spread<V, high_words(4)>(words, [&](int slot, typename V::I c) MQ_INLINE { whole[slot] = w.overlap ? V::template shl<UP - 1>(c) : V::template shl<UP>(c); });
            words_of_low<V, R>(planes, g * steps + step, words);
            spread<V, low_words(R)>(words, [&](int slot, typename V::I c) MQ_INLINE { V::put(to + slot * V::BYTES, V::add_bytes(whole[slot], c)); });
        }
    }
}

// One unpacked block of T tiles, `apart` from each other, times M rows of x.
template <class V, int T, int M>
MQ_INLINE inline void block_of_codes(const uint8_t *codes, int64_t apart, int64_t columns, const int8_t *q, typename V::F (*sums)[M]) {
    typename V::Wide total[T][M];
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    every([&](auto t, auto m) MQ_INLINE { total[t][m] = V::wide_zero(); });
    for (int64_t at = 0; at < columns; at += STEP) {
        typename V::Acc acc[T][M];
        every([&](auto t, auto m) MQ_INLINE { acc[t][m] = V::acc_zero(); });
        each<SLOTS>([&](auto slot) MQ_INLINE {
            typename V::I c[T];
            each<T>([&](auto t) MQ_INLINE { c[t] = V::load(codes + t * apart + (at / STEP * SLOTS + slot) * V::BYTES); });
            each<M>([&](auto m) MQ_INLINE {
                const auto four = V::broadcast(q + m * columns + at + 4 * slot);
                each<T>([&](auto t) MQ_INLINE { acc[t][m] = V::dot(acc[t][m], c[t], four); });
            });
        });
        every([&](auto t, auto m) MQ_INLINE { total[t][m] = V::widen(total[t][m], acc[t][m]); });
    }
    every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::to_float(total[t][m]); });
}

// A group of T neighbouring tiles, unpacked `apart` from each other, times M rows of x: adds to out[T][PANEL][L].
template <class V, int R, int T, int M>
void group_of_codes(const mq_weight &w, const Read &read, const uint8_t *codes, int64_t apart, const Inputs &x, int64_t row, int64_t tile, int64_t g, float *out) {
    const float factor = factor_of(w, R);
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    typename V::F sums[T][M], high[T][M], low[T][M];
    every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::set(0); });
    for (int64_t within = 0; within < w.padded; within += x.block) {
        const int8_t *q = x.q + ((g * w.padded + within) / x.block * x.m + row) * x.block;
        const uint8_t *own = codes + within / STEP * SLOTS * V::BYTES;
        block_of_codes<V, T, M>(own, apart, x.block, q, high);
        if constexpr (R > 4 && !V::IN_PLACE) {
            block_of_codes<V, T, M>(own + w.padded / STEP * SLOTS * V::BYTES, apart, x.block, q, low);
            every([&](auto t, auto m) MQ_INLINE { high[t][m] = V::fma(high[t][m], V::set(factor), low[t][m]); });
        }
        every([&](auto t, auto m) MQ_INLINE {
            sums[t][m] = V::fma(high[t][m], V::set(x.step[(row + m) * (x.width / x.block) + (g * w.padded + within) / x.block]), sums[t][m]);
        });
    }
    each<T>([&](auto t) MQ_INLINE {
        typename V::F scale, offset;
        affine<V>(w, R, read, ((tile + t) * w.groups + g) * V::L, scale, offset);
        each<M>([&](auto m) MQ_INLINE {
            float *to = out + (t * PANEL + m) * V::L;
            V::store(to, V::fma(offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(scale, sums[t][m], V::load_float(to))));
        });
    });
}

// T neighbouring tiles times `count` rows of x from `start` on. codes, out: room for a group of the tiles, and for their products.
template <class V, int R, int T>
void panel(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t start, int64_t count, int64_t tile, uint8_t *codes, float *out) {
    const Read read = read_of(w, R);
    const int64_t apart = 2 * w.padded / STEP * SLOTS * V::BYTES;
    for (int64_t i = 0; i < T * PANEL * V::L; ++i) out[i] = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
        for (int t = 0; t < T; ++t) unpack<V, R>(w, tile + t, g, codes + t * apart);
        int64_t row = 0;
        for (; row + MANY <= count; row += MANY) group_of_codes<V, R, T, MANY>(w, read, codes, apart, x, start + row, tile, g, out + row * V::L);
        for (; row + FEW <= count; row += FEW) group_of_codes<V, R, T, FEW>(w, read, codes, apart, x, start + row, tile, g, out + row * V::L);
        for (; row < count; ++row) group_of_codes<V, R, T, 1>(w, read, codes, apart, x, start + row, tile, g, out + row * V::L);
    }
    for (int t = 0; t < T; ++t)
        for (int64_t row = 0; row < count; ++row) write<V>(w, bias, start + row, tile + t, V::load_float(out + (t * PANEL + row) * V::L), y);
}

template <class V, int R>
void many_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    constexpr int T = V::IN_PLACE ? 2 : 1;  // as many as there are registers for
    std::vector<uint8_t> room(size_t(T * 2 * w.padded / STEP * SLOTS * V::BYTES + 64));
    uint8_t *codes = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64);
    std::vector<float> out(size_t(T * PANEL * V::L));
    for (int64_t start = 0; start < x.m; start += PANEL) {
        const int64_t count = x.m - start < PANEL ? x.m - start : PANEL;
        int64_t tile = first;
        for (; tile + T <= last; tile += T) panel<V, R, T>(w, x, bias, y, start, count, tile, codes, out.data());
        for (; tile < last; ++tile) panel<V, R, 1>(w, x, bias, y, start, count, tile, codes, out.data());
    }
}

// Two tiles at once, half of the range apart, share the row's inputs, and keep more loads under way.
template <class V, int R>
void one_row(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t row, int64_t first, int64_t last) {
    const int64_t half = R <= V::TWO_TILES ? (last - first) / 2 : 0;
    for (int64_t tile = first; tile < first + half; ++tile) tiles_and_rows<V, R, 2, 1>(w, x, bias, y, row, tile, half);
    for (int64_t tile = first + 2 * half; tile < last; ++tile) tiles_and_rows<V, R, 1, 1>(w, x, bias, y, row, tile, 0);
}

template <class V, int R>
void all_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    if (x.m > FEW && !x.x) return many_rows<V, R>(w, x, bias, y, first, last);
    int64_t row = 0;
    for (; row + FEW <= x.m; row += FEW)
        for (int64_t tile = first; tile < last; ++tile) tiles_and_rows<V, R, 1, FEW>(w, x, bias, y, row, tile, 0);
    if (x.m - row == 1) return one_row<V, R>(w, x, bias, y, row, first, last);
    each<FEW>([&](auto rows) {  // 2 or 3 rows are left: the planes are read once for all of them
        if constexpr (rows > 1)
            if (x.m - row == rows)
                for (int64_t tile = first; tile < last; ++tile) tiles_and_rows<V, R, 1, rows>(w, x, bias, y, row, tile, 0);
    });
}

template <class V>
void linear_tiles(const mq_weight &w, int bits, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    // A parent of fewer than 8 bits is stored in the first planes of 8: its codes are read with their own width's planes.
    switch (bits) {
        case 2: return all_rows<V, 2>(w, x, bias, y, first, last);
        case 3: return all_rows<V, 3>(w, x, bias, y, first, last);
        case 4: return all_rows<V, 4>(w, x, bias, y, first, last);
        case 5: return all_rows<V, 5>(w, x, bias, y, first, last);
        case 6: return all_rows<V, 6>(w, x, bias, y, first, last);
        case 7: return all_rows<V, 7>(w, x, bias, y, first, last);
        default: return all_rows<V, 8>(w, x, bias, y, first, last);
    }
}

}  // namespace
