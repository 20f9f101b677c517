// x W_r^T over some tiles, for a vector type V (one of the files beside this one, each compiled for its instruction set):
//
//     y_o = sum over groups g   scale_r[o, g] (sum over blocks b of g  step_b  sum over columns i of b  p[o, i] q_i)  +  offset_r[o, g] sum_g
//
// with integers inside a block, p = B b + e made of the high and the low nibble's own sums (docs/FORMAT.md: B = 16 >> d, or 8 >> d with overlap).
#include "layout.h"

namespace {

constexpr int COLUMNS = 16;  // of a chunk
constexpr int ROWS = 4;      // of x that are multiplied at once

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

// scale_r and offset_r of the rows of a tile, in one group.
template <class V>
inline void affine(const mq_weight &w, int bits, const Read &r, int64_t tile, int64_t g, typename V::F &scale, typename V::F &offset) {
    const int64_t at = (tile * w.groups + g) * V::L;
    const auto s = w.half ? V::load_half(static_cast<const uint16_t *>(w.scale) + at) : V::load_float(static_cast<const float *>(w.scale) + at);
    if (w.k[bits]) {
        const auto m = V::mul(V::load_bytes(w.k[bits] + at), V::set(1.0f / 128));
        const auto moved = V::sub(V::set(r.mid), V::mul(V::load_bytes(w.u[bits] + at), V::set(r.lsb)));
        scale = V::mul(s, V::mul(m, V::set(r.step)));
        offset = V::mul(s, V::add(V::mul(m, V::set(r.shift - r.mid)), moved));
    } else {
        const auto z = w.zero ? V::load_bytes(w.zero + at) : V::set(float(1 << (w.parent_bits - 1)));
        scale = V::mul(s, V::set(r.step));
        offset = V::mul(s, V::sub(V::set(r.shift), z));
    }
}

// The planes of one tile, from some chunk on.
template <class V>
struct Planes {
    const uint8_t *p01, *p2, *p3, *p45, *p67;

    Planes(const mq_weight &w, int64_t tile) {
        const int64_t pairs = tile * (w.groups * w.padded / COLUMNS) * V::BYTES, singles = pairs / 2;
        p01 = w.pair[0] + pairs;
        p2 = w.single[0] ? w.single[0] + singles : nullptr;
        p3 = w.single[1] ? w.single[1] + singles : nullptr;
        p45 = w.pair[2] ? w.pair[2] + pairs : nullptr;
        p67 = w.pair[3] ? w.pair[3] + pairs : nullptr;
    }
};

// Bytes of 16 columns: high[j] and low[j] are the nibbles of the columns 4j..4j+3. low is only made above 4 bits.
template <class V, int R>
inline void unpack(const Planes<V> &p, int64_t chunk, typename V::I *high, typename V::I *low) {
    const auto pair = V::load(p.p01 + chunk * V::BYTES);
    const int h = int(chunk & 1);
    if constexpr (R == 2) {
        high[0] = V::and_(pair, V::byte(3));
        high[1] = V::and_(V::template shr<2>(pair), V::byte(3));
        high[2] = V::and_(V::template shr<4>(pair), V::byte(3));
        high[3] = V::and_(V::template shr<6>(pair), V::byte(3));
        return;
    }
    typename V::I n[2] = {V::and_(pair, V::byte(0x33)), V::and_(V::template shr<2>(pair), V::byte(0x33))};
    if constexpr (R >= 3) {
        auto bits = V::load(p.p2 + (chunk >> 1) * V::BYTES);
        if (h) bits = V::template shr<2>(bits);
        n[0] = V::or_(V::template shl<1>(n[0]), V::and_(bits, V::byte(0x11)));
        n[1] = V::or_(V::template shl<1>(n[1]), V::and_(V::template shr<1>(bits), V::byte(0x11)));
    }
    if constexpr (R >= 4) {
        auto bits = V::load(p.p3 + (chunk >> 1) * V::BYTES);
        if (h) bits = V::template shr<2>(bits);
        n[0] = V::or_(V::template shl<1>(n[0]), V::and_(bits, V::byte(0x11)));
        n[1] = V::or_(V::template shl<1>(n[1]), V::and_(V::template shr<1>(bits), V::byte(0x11)));
    }
    for (int i = 0; i < 2; ++i) high[i] = V::and_(n[i], V::byte(15)), high[i + 2] = V::and_(V::template shr<4>(n[i]), V::byte(15));
    if constexpr (R > 4) {
        const auto four = V::load(p.p45 + chunk * V::BYTES);
        const auto mask = V::byte(R == 5 ? 0x22 : 0x33);  // plane 4 is the upper of its pair
        typename V::I e[2] = {V::and_(four, mask), V::and_(V::template shr<2>(four), mask)};
        if constexpr (R == 5) e[0] = V::template shr<1>(e[0]), e[1] = V::template shr<1>(e[1]);
        if constexpr (R >= 7) {
            const auto six = V::load(p.p67 + chunk * V::BYTES);
            e[0] = V::or_(V::template shl<2>(e[0]), V::and_(six, V::byte(0x33)));
            e[1] = V::or_(V::template shl<2>(e[1]), V::and_(V::template shr<2>(six), V::byte(0x33)));
            if constexpr (R == 7) e[0] = V::and_(V::template shr<1>(e[0]), V::byte(0x77)), e[1] = V::and_(V::template shr<1>(e[1]), V::byte(0x77));
        }
        for (int i = 0; i < 2; ++i) low[i] = V::and_(e[i], V::byte(15)), low[i + 2] = V::and_(V::template shr<4>(e[i]), V::byte(15));
    }
}

// What the high nibble counts in p = factor * b + e.
inline float factor_of(const mq_weight &w, int bits) {
    const int base = w.overlap ? 8 : 16;
    return float(base >> (8 - bits));
}

// One block for M rows of x: adds step_b sum p q to `sums`.
template <class V, int R, int M>
inline void block(const Planes<V> &planes, int64_t column, const Inputs &x, int64_t row, float factor, typename V::F *sums) {
    constexpr int HALVES = R > 4 ? 2 : 1;
    typename V::Wide total[M][HALVES];
    for (int m = 0; m < M; ++m)
        for (int i = 0; i < HALVES; ++i) total[m][i] = V::wide_zero();
    for (int64_t at = column; at < column + x.block; at += 2 * COLUMNS) {
        typename V::Acc acc[M][HALVES];
        for (int m = 0; m < M; ++m)
            for (int i = 0; i < HALVES; ++i) acc[m][i] = V::acc_zero();
        for (int half = 0; half < 2; ++half) {
            typename V::I codes[HALVES][4];
            unpack<V, R>(planes, at / COLUMNS + half, codes[0], codes[HALVES - 1]);
            for (int m = 0; m < M; ++m) {
                const int8_t *q = x.q + (row + m) * x.width + at + half * COLUMNS;
                for (int j = 0; j < 4; ++j) {
                    const auto four = V::broadcast(q + 4 * j);
                    for (int i = 0; i < HALVES; ++i) acc[m][i] = V::dot(acc[m][i], codes[i][j], four);
                }
            }
        }
        for (int m = 0; m < M; ++m)
            for (int i = 0; i < HALVES; ++i) total[m][i] = V::widen(total[m][i], acc[m][i]);
    }
    for (int m = 0; m < M; ++m) {
        auto sum = V::to_float(total[m][HALVES - 1]);
        if constexpr (HALVES == 2) sum = V::fma(V::to_float(total[m][0]), V::set(factor), sum);
        sums[m] = V::fma(sum, V::set(x.step[(row + m) * (x.width / x.block) + column / x.block]), sums[m]);
    }
}

// The same with products of floats.
template <class V, int R, int M>
inline void block_exact(const Planes<V> &planes, int64_t column, const Inputs &x, int64_t row, float factor, typename V::F *sums) {
    typename V::I high[4], low[4];
    for (int64_t at = column; at < column + x.block; at += COLUMNS) {
        unpack<V, R>(planes, at / COLUMNS, high, low);
        for (int j = 0; j < 4; ++j)
            for (int k = 0; k < 4; ++k) {
                auto p = V::byte_to_float(high[j], k);
                if constexpr (R > 4) p = V::fma(p, V::set(factor), V::byte_to_float(low[j], k));
                for (int m = 0; m < M; ++m) sums[m] = V::fma(p, V::set(x.x[(row + m) * x.width + at + 4 * j + k]), sums[m]);
            }
    }
}

template <class V, int R, int M>
void rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t row, int64_t first, int64_t last) {
    const Read read = read_of(w, R);
    const float factor = factor_of(w, R);
    for (int64_t tile = first; tile < last; ++tile) {
        const Planes<V> planes(w, tile);
        typename V::F out[M];
        for (int m = 0; m < M; ++m) out[m] = V::set(0);
        for (int64_t g = 0; g < w.groups; ++g) {
            typename V::F sums[M], scale, offset;
            for (int m = 0; m < M; ++m) sums[m] = V::set(0);
            for (int64_t column = g * w.padded; column < (g + 1) * w.padded; column += x.block) {
                if (x.x) block_exact<V, R, M>(planes, column, x, row, factor, sums);
                else block<V, R, M>(planes, column, x, row, factor, sums);
            }
            affine<V>(w, R, read, tile, g, scale, offset);
            for (int m = 0; m < M; ++m)
                out[m] = V::fma(offset, V::set(x.sum[(row + m) * w.groups + g]), V::fma(scale, sums[m], out[m]));
        }
        for (int m = 0; m < M; ++m) {
            alignas(64) float lanes[V::L];
            V::store(lanes, out[m]);
            for (int64_t i = 0; i < V::L && tile * V::L + i < w.out; ++i) {
                const int64_t o = tile * V::L + i;
                y[(row + m) * w.out + o] = lanes[i] + (bias ? bias[o] : 0.0f);
            }
        }
    }
}

template <class V, int R>
void all_rows(const mq_weight &w, const Inputs &x, const float *bias, float *y, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + ROWS <= x.m; row += ROWS) rows<V, R, ROWS>(w, x, bias, y, row, first, last);
    for (; row < x.m; ++row) rows<V, R, 1>(w, x, bias, y, row, first, last);
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
