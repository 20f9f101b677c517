// x W_r^T over some tiles, for a vector type V (one of the files beside this one, each compiled for its instruction set):
//
//     y_o = sum over groups g   scale_r[o, g] (sum over blocks b of g  step_b  sum over columns i of b  p[o, i] q_i)  +  offset_r[o, g] sum_g
//
// with integers inside a block, p = B b + e made of the high and the low nibble (docs/FORMAT.md: B = 16 >> d, or 8 >> d with overlap). Sums stay
// below 2^24, so it makes no difference in which of the ways below they are added up: a row comes out the same alone or among others.
//
// One row: a field of a word is multiplied at once, where V::IN_PLACE even where it lies in its byte, its sum shifted down after the block. Up to
// V::ROWS: codes are moved down, or both nibbles joined, to a byte in registers. More: a group of a tile is unpacked once, to a code a byte.
//
// Nothing here but what has internal linkage: of two instruction sets' copies of one inline function the linker would keep either.
#include <cstdlib>
#include <cstring>

#include "planes.inl"

namespace {

constexpr int FEW = MQ_UNROLL;       // rows of floats that are multiplied with one unpacking
constexpr int AHEAD = 6;             // steps that planes are asked for before they are unpacked
constexpr int PANEL = 96;            // that pass a tile before the next: their inputs stay in the second-level cache

// Memory at a vector's boundary.
template <class T>
struct Room {
    T *at;
    explicit Room(int64_t count) : at(static_cast<T *>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64))) {}
    Room(const Room &) = delete;
    ~Room() { std::free(at); }
};

template <class V>
inline void write(const mq_weight &w, const float *bias, int64_t row, int64_t tile, typename V::F values, float *y) {
    const int64_t first = tile * V::L, count = w.out - first < V::L ? w.out - first : V::L;
    if (!bias && count == V::L) return V::store(y + row * w.out + first, values);
    alignas(64) float lanes[V::L];
    V::store(lanes, values);
    if (bias)
        for (int64_t i = 0; i < count; ++i) lanes[i] += bias[first + i];
    std::memcpy(y + row * w.out + first, lanes, size_t(count) * sizeof(float));
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

// What the high nibble counts in p = factor * b + e.
inline float factor_of(const mq_weight &w, int bits) {
    const int base = w.overlap ? 8 : 16;
    return float(base >> (8 - bits));
}

// Adds the products of a step's words with M rows of x, `apart` from each other.
template <class V, Words OF, int M>
MQ_INLINE inline void multiply(const typename V::I *words, const int8_t *q, int64_t apart, Sums<V, OF.width> *sums) {
    each<OF.count>([&](auto i) MQ_INLINE {
        each<OF.fields()>([&](auto f) MQ_INLINE {
            // how far down the field is moved, and how far too high it is multiplied
            constexpr int AT = OF.width * f, DOWN = V::IN_PLACE ? 0 : AT / 4 * 4, UP = AT - DOWN, KIND = UP / OF.width;
            const auto codes = V::and_(moved<V, -DOWN>(words[i]), V::byte(OF.mask << UP));
            each<M>([&](auto m) MQ_INLINE { sums[m].acc[KIND] = V::dot(sums[m].acc[KIND], codes, V::broadcast(q + m * apart + 4 * OF.slot(i, f))); });
        });
    });
}

// sum p q of a block of one tile and M rows of x, by nibbles.
template <class V, int R, int M>
MQ_INLINE inline void block_of_nibbles(const Planes<V> &planes, int64_t column, int64_t columns, const int8_t *q, float factor, typename V::F *to) {
    constexpr Words HIGH = high_words(R < 4 ? R : 4), LOW = low_words(R);
    Sums<V, HIGH.width> high[M];
    Sums<V, LOW.width> low[M];
    each<M>([&](auto m) MQ_INLINE { high[m].clear(), low[m].clear(); });
    for (int64_t at = 0; at < columns; at += STEP) {
        typename V::I words[4];
        planes.template prefetch<R>((column + at) / STEP + AHEAD);
        words_of_high<V, (R < 4 ? R : 4)>(planes, (column + at) / STEP, words);
        multiply<V, HIGH, M>(words, q + at, columns, high);
        if constexpr (R > 4) {
            words_of_low<V, R>(planes, (column + at) / STEP, words);
            multiply<V, LOW, M>(words, q + at, columns, low);
        }
        if constexpr (!V::IN_PLACE) {
            const bool last = at + STEP >= columns;
            if (HIGH.width == 4 || last) each<M>([&](auto m) MQ_INLINE { high[m].flush(); });
            if (R > 4 && (LOW.width == 4 || last)) each<M>([&](auto m) MQ_INLINE { low[m].flush(); });
        }
    }
    each<M>([&](auto m) MQ_INLINE {
        to[m] = high[m].value();
        if constexpr (R > 4) to[m] = V::fma(to[m], V::set(factor), low[m].value());
    });
}

// sum p q of a block of one tile and M rows of x, of codes moved down to a byte each.
template <class V, int R, bool O, int M>
MQ_INLINE inline void block_of_bytes(const Planes<V> &planes, int64_t column, int64_t columns, const int8_t *q, typename V::F *sums) {
    constexpr int CHAINS = M > 4 ? 1 : 2;  // of products that wait for one another
    typename V::Acc acc[CHAINS][M];
    each<CHAINS>([&](auto c) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { acc[c][m] = V::acc_zero(); }); });
    for (int64_t at = 0; at < columns; at += STEP) {
        const auto multiply = [&](auto slot, typename V::I codes) MQ_INLINE {
            each<M>([&](auto m) MQ_INLINE {
                auto &sum = acc[slot % CHAINS][m];
                sum = V::dot(sum, codes, V::broadcast(q + m * columns + at + 4 * slot));
            });
        };
        const int64_t step = (column + at) / STEP;
        planes.template prefetch<R>(step + AHEAD);
        if constexpr (R > 4) {
            bytes_of_step<V, R, O>(planes, step, multiply);
        } else {
            typename V::I words[4];
            words_of_high<V, R>(planes, step, words);
            spread<V, high_words(R)>(words, multiply);
        }
    }
    each<M>([&](auto m) MQ_INLINE { sums[m] = V::to_float(CHAINS == 1 ? acc[0][m] : V::wide_add(acc[0][m], acc[CHAINS - 1][m])); });
}

// T tiles, `apart` from each other, times M rows of x from `row` on.
template <class V, int R, bool O, int T, int M>
void tiles_and_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t row, int64_t tile, int64_t apart) {
    const Read read = read_of(w, R);
    const float factor = factor_of(w, R);
    const Planes<V> planes[2] = {Planes<V>(w, tile), Planes<V>(w, tile + (T - 1) * apart)};
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    typename V::F out[T][M], sums[T][M], of_block[M];
    every([&](auto t, auto m) MQ_INLINE { out[t][m] = V::set(0); });
    for (int64_t g = 0; g < w.groups; ++g) {
        every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::set(0); });
        for (int64_t column = g * w.padded; column < (g + 1) * w.padded; column += x.block) {
            const int8_t *q = x.q + (column / x.block * x.m + row) * x.block;
            each<T>([&](auto t) MQ_INLINE {
                if constexpr (V::IN_PLACE && (R > 4 || M > 1)) block_of_bytes<V, R, O, M>(planes[t], column, x.block, q, of_block);
                else block_of_nibbles<V, R, M>(planes[t], column, x.block, q, factor, of_block);
                each<M>([&](auto m) MQ_INLINE {
                    sums[t][m] = V::fma(of_block[m], V::set(x.step[(row + m) * (x.width / x.block) + column / x.block]), sums[t][m]);
                });
            });
        }
        each<T>([&](auto t) MQ_INLINE {
            typename V::F scale, offset;
            affine<V>(w, R, read, ((tile + t * apart) * w.groups + g) * V::L, scale, offset);
            each<M>([&](auto m) MQ_INLINE { out[t][m] = V::fma(offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(scale, sums[t][m], out[t][m])); });
        });
    }
    every([&](auto t, auto m) MQ_INLINE { write<V>(w, bias, row + m, tile + t * apart, out[t][m], y); });
}

// Up to V::ROWS rows: planes are unpacked in registers.
template <class V, int R, bool O>
void few_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    if (x.m == 1) {  // two tiles at once, half of the range apart, share the row's inputs, and keep more loads under way
        const int64_t half = R <= V::TWO_TILES ? (last - first) / 2 : 0;
        for (int64_t tile = first; tile < first + half; ++tile) tiles_and_rows<V, R, O, 2, 1>(w, x, bias, y, 0, tile, half);
        for (int64_t tile = first + 2 * half; tile < last; ++tile) tiles_and_rows<V, R, O, 1, 1>(w, x, bias, y, 0, tile, 0);
    }
    each<V::ROWS + 1>([&](auto rows) {
        if constexpr (rows > 1)
            if (x.m == rows)
                for (int64_t tile = first; tile < last; ++tile) tiles_and_rows<V, R, O, 1, rows>(w, x, bias, y, 0, tile, 0);
    });
}

// A tile times M rows of floats from `row` on.
template <class V, int R, int M>
void tile_and_floats(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t row, int64_t tile) {
    const Read read = read_of(w, R);
    const float factor = factor_of(w, R);
    const Planes<V> planes(w, tile);
    typename V::F out[M], sums[M];
    each<M>([&](auto m) MQ_INLINE { out[m] = V::set(0); });
    for (int64_t g = 0; g < w.groups; ++g) {
        each<M>([&](auto m) MQ_INLINE { sums[m] = V::set(0); });
        for (int64_t at = g * w.padded; at < (g + 1) * w.padded; at += STEP) {
            typename V::I words[4], high[SLOTS], low[SLOTS];
            words_of_high<V, (R < 4 ? R : 4)>(planes, at / STEP, words);
            spread<V, high_words(R < 4 ? R : 4)>(words, [&](int slot, typename V::I codes) MQ_INLINE { high[slot] = codes; });
            if constexpr (R > 4) {
                words_of_low<V, R>(planes, at / STEP, words);
                spread<V, low_words(R)>(words, [&](int slot, typename V::I codes) MQ_INLINE { low[slot] = codes; });
            }
            for (int slot = 0; slot < SLOTS; ++slot)
                for (int k = 0; k < 4; ++k) {
                    auto p = V::byte_to_float(high[slot], k);
                    if constexpr (R > 4) p = V::fma(p, V::set(factor), V::byte_to_float(low[slot], k));
                    for (int m = 0; m < M; ++m) sums[m] = V::fma(p, V::set(x.x[(row + m) * x.width + at + 4 * slot + k]), sums[m]);
                }
        }
        typename V::F scale, offset;
        affine<V>(w, R, read, (tile * w.groups + g) * V::L, scale, offset);
        each<M>([&](auto m) MQ_INLINE { out[m] = V::fma(offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(scale, sums[m], out[m])); });
    }
    each<M>([&](auto m) MQ_INLINE { write<V>(w, bias, row + m, tile, out[m], y); });
}

template <class V, int R>
void rows_of_floats(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + FEW <= x.m; row += FEW)
        for (int64_t tile = first; tile < last; ++tile) tile_and_floats<V, R, FEW>(w, x, bias, y, row, tile);
    for (; row < x.m; ++row)
        for (int64_t tile = first; tile < last; ++tile) tile_and_floats<V, R, 1>(w, x, bias, y, row, tile);
}

// Codes of one group of a tile, a code a byte: [step][slot][vector]; the low nibble's apart, behind them, unless a product takes whole bytes.
template <class V, int R, bool O>
void unpack(const mq_weight &w, int64_t tile, int64_t g, uint8_t *codes) {
    const Planes<V> planes(w, tile);
    const int64_t steps = w.padded / STEP;
    for (int64_t step = 0; step < steps; ++step) {
        uint8_t *to = codes + step * SLOTS * V::BYTES;
        planes.template prefetch<R>(g * steps + step + AHEAD);
        const auto put = [&](auto slot, typename V::I c) MQ_INLINE { V::put(to + slot * V::BYTES, c); };
        if constexpr (R > 4 && V::IN_PLACE) {
            bytes_of_step<V, R, O>(planes, g * steps + step, put);
        } else {
            typename V::I words[4];
            words_of_high<V, (R < 4 ? R : 4)>(planes, g * steps + step, words);
            spread<V, high_words(R < 4 ? R : 4)>(words, put);
            if constexpr (R > 4) {
                to += steps * SLOTS * V::BYTES;
                words_of_low<V, R>(planes, g * steps + step, words);
                spread<V, low_words(R)>(words, put);
            }
        }
    }
}

// sum p q of one unpacked block of T tiles, `apart` from each other, and M rows of x.
template <class V, int T, int M>
MQ_INLINE inline void block_of_codes(const uint8_t *codes, int64_t apart, int64_t columns, const int8_t *q, typename V::F (*sums)[M]) {
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    typename V::Wide total[T][M];
    every([&](auto t, auto m) MQ_INLINE { total[t][m] = V::wide_zero(); });
    for (int64_t at = 0; at < columns; at += STEP) {
        typename V::Acc acc[T][M];
        every([&](auto t, auto m) MQ_INLINE { acc[t][m] = V::start(total[t][m]); });
        each<SLOTS>([&](auto slot) MQ_INLINE {
            typename V::I c[T];
            each<T>([&](auto t) MQ_INLINE { c[t] = V::load(codes + t * apart + (at / STEP * SLOTS + slot) * V::BYTES); });
            each<M>([&](auto m) MQ_INLINE {
                const auto four = V::broadcast(q + m * columns + at + 4 * slot);
                each<T>([&](auto t) MQ_INLINE { acc[t][m] = V::dot(acc[t][m], c[t], four); });
            });
        });
        every([&](auto t, auto m) MQ_INLINE { total[t][m] = V::finish(total[t][m], acc[t][m]); });
    }
    every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::to_float(total[t][m]); });
}

// What a group of a tile is read with, for the rows of a tile: scale, offset.
template <class V>
struct Affine {
    typename V::F scale, offset;
};

// A group of T neighbouring tiles, unpacked `apart` from each other, times M rows of x: adds to out[T][PANEL][L]. TWO: nibbles are unpacked apart.
template <class V, bool TWO, int T, int M>
void group_of_codes(const mq_weight &w, const Affine<V> *affine, float factor, const uint8_t *codes, int64_t apart, const Inputs &x, int64_t row, int64_t g, float *out) {
    const auto every = [](auto f) MQ_INLINE { each<T>([&](auto t) MQ_INLINE { each<M>([&](auto m) MQ_INLINE { f(t, m); }); }); };
    typename V::F sums[T][M], high[T][M], low[T][M];
    every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::set(0); });
    for (int64_t within = 0; within < w.padded; within += x.block) {
        const int64_t block = (g * w.padded + within) / x.block;
        const int8_t *q = x.q + (block * x.m + row) * x.block;
        const uint8_t *own = codes + within / STEP * SLOTS * V::BYTES;
        block_of_codes<V, T, M>(own, apart, x.block, q, high);
        if constexpr (TWO) {
            block_of_codes<V, T, M>(own + w.padded / STEP * SLOTS * V::BYTES, apart, x.block, q, low);
            every([&](auto t, auto m) MQ_INLINE { high[t][m] = V::fma(high[t][m], V::set(factor), low[t][m]); });
        }
        every([&](auto t, auto m) MQ_INLINE { sums[t][m] = V::fma(high[t][m], V::set(x.step[(row + m) * (x.width / x.block) + block]), sums[t][m]); });
    }
    every([&](auto t, auto m) MQ_INLINE {
        float *to = out + (t * PANEL + m) * V::L;
        V::store(to, V::fma(affine[t].offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(affine[t].scale, sums[t][m], V::load_float(to))));
    });
}

// Rows that an unpacked group is multiplied with at once: as many as there are registers for.
constexpr int MANY = 2 * MQ_UNROLL;

// T tiles, `beside` from each other, times `count` rows of x from `start` on. codes, out: room for a group of the tiles, and for their products.
template <class V, int R, int T>
void panel(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t start, int64_t count, int64_t tile, int64_t beside, uint8_t *codes, float *out) {
    constexpr bool TWO = R > 4 && !V::IN_PLACE;
    const Read read = read_of(w, R);
    const float factor = factor_of(w, R);
    const int64_t apart = 2 * w.padded / STEP * SLOTS * V::BYTES;
    for (int t = 0; t < T; ++t) std::memset(out + t * PANEL * V::L, 0, size_t(count * V::L) * sizeof(float));
    for (int64_t g = 0; g < w.groups; ++g) {
        Affine<V> own[T];
        for (int t = 0; t < T; ++t) {
            affine<V>(w, R, read, ((tile + t * beside) * w.groups + g) * V::L, own[t].scale, own[t].offset);
            if (w.overlap) unpack<V, R, true>(w, tile + t * beside, g, codes + t * apart);
            else unpack<V, R, false>(w, tile + t * beside, g, codes + t * apart);
        }
        int64_t row = 0;
        for (; row + MANY <= count; row += MANY) group_of_codes<V, TWO, T, MANY>(w, own, factor, codes, apart, x, start + row, g, out + row * V::L);
        each<MANY>([&](auto rest) {
            if constexpr (rest > 0)
                if (count - row == rest) group_of_codes<V, TWO, T, rest>(w, own, factor, codes, apart, x, start + row, g, out + row * V::L);
        });
    }
    for (int t = 0; t < T; ++t)
        for (int64_t row = 0; row < count; ++row) write<V>(w, bias, start + row, tile + t * beside, V::load_float(out + (t * PANEL + row) * V::L), y);
}

template <class V, int R>
void many_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    constexpr int T = V::IN_PLACE ? 2 : 1;  // as many as there are registers for
    Room<uint8_t> codes(T * 2 * w.padded / STEP * SLOTS * V::BYTES);
    Room<float> out(T * PANEL * V::L);
    for (int64_t start = 0; start < x.m; start += PANEL) {
        const int64_t count = x.m - start < PANEL ? x.m - start : PANEL;
        const int64_t half = T == 2 ? (last - first) / 2 : 0;
        for (int64_t tile = first; tile < first + half; ++tile) panel<V, R, T>(w, x, bias, y, start, count, tile, half, codes.at, out.at);
        for (int64_t tile = first + 2 * half; tile < last; ++tile) panel<V, R, 1>(w, x, bias, y, start, count, tile, 0, codes.at, out.at);
    }
}

template <class V, int R>
void all_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    if (x.x) return rows_of_floats<V, R>(w, x, bias, y, first, last);
    if (x.m > V::ROWS) return many_rows<V, R>(w, x, bias, y, first, last);
    return w.overlap && R > 4 ? few_rows<V, R, true>(w, x, bias, y, first, last) : few_rows<V, R, false>(w, x, bias, y, first, last);
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
