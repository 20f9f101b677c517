// Random weights of random shapes through every instruction set at hand, codes chosen in turn and fake quantization, against plain loops in double
// precision.
//
//     fuzz ROUNDS [SEED]
//
// Built with sanitizers by tests/test_cpu.py, and for other processors by hand. Arrays are exactly as long as the layout says.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "fake.h"
#include "half.h"
#include "layout.h"
#include "turns.h"

namespace {

using Bytes = std::vector<uint8_t>;
std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) { return low + int64_t(random_bits() % uint64_t(high - low + 1)); }
float normal() { return std::normal_distribution<float>()(random_bits); }

Bytes bytes(int64_t n, int low, int high) {
    Bytes b(static_cast<size_t>(n));
    for (uint8_t &v : b) v = uint8_t(between(low, high));
    return b;
}

// One weight and all that it points to.
struct Weight {
    mq_weight w{};
    Bytes codes, zero, k, u;
    std::vector<uint16_t> half;
    std::vector<std::unique_ptr<uint8_t[]>> arrays;

    uint8_t *array(int64_t n) {
        arrays.emplace_back(new uint8_t[size_t(n)]);
        return arrays.back().get();
    }

    const uint8_t *rows(const void *from, int64_t width) {
        uint8_t *to = array(w.tiles * w.groups * w.lanes * width);
        mq_pack_rows(&w, from, to, width);
        return to;
    }

    Weight(const char *isa, int64_t out, int64_t group, int64_t groups, int64_t parent_bits, bool symmetric, bool overlap, int64_t refit) {
        const int64_t lanes = mq_lanes(isa), top = (int64_t(1) << parent_bits) - 1;
        w.out = out, w.in = group * groups, w.group = group, w.groups = groups, w.padded = (group + 31) / 32 * 32;
        w.lanes = lanes, w.tiles = (out + lanes - 1) / lanes, w.parent_bits = parent_bits, w.overlap = overlap, w.half = 1;
        codes = bytes(out * w.in, 0, int(top)), zero = bytes(out * groups, 0, int(top)), k = bytes(out * groups, 1, 255), u = bytes(out * groups, 0, 255);
        for (int64_t i = 0; i < out * groups; ++i) half.push_back(uint16_t(between(0x1000, 0x2400)));
        const int64_t vectors = w.tiles * groups * w.padded / 16 * 4 * lanes;
        for (int i : {0, 2, 3}) w.pair[i] = array(vectors);
        for (int i : {0, 1}) w.single[i] = array(vectors / 2);
        mq_pack(&w, codes.data(), between(1, 3));
        w.scale = rows(half.data(), 2);
        if (!symmetric) w.zero = rows(zero.data(), 1);
        if (refit) w.k[refit] = rows(k.data(), 1), w.u[refit] = rows(u.data(), 1);
    }

    // w_r as docs/FORMAT.md defines it.
    double value(int64_t o, int64_t i, int64_t bits) const {
        const int64_t c = w.parent_bits, d = c - bits, g = i / w.group, q = codes[size_t(o * w.in + i)];
        const double s = half_to_float(half[size_t(o * w.groups + g)]), one = double(int64_t(1) << d), mid = double((int64_t(1) << c) - 1) / 2;
        double p = double(q >> d), step = one, shift = (one - 1) / 2;
        if (w.overlap && bits > 4) p = double((8 >> d) * (q >> 4) + ((q & 15) >> d)), step = 2 * one, shift = 2 * ((one - 1) / 2 - 7.5) + 7.5;
        if (!w.k[bits]) return s * (step * p + shift - (w.zero ? double(zero[size_t(o * w.groups + g)]) : double(int64_t(1) << (c - 1))));
        const double m = k[size_t(o * w.groups + g)] / 128.0, moved = u[size_t(o * w.groups + g)] * std::pow(2.0, double(c - 8));
        return s * (m * (step * p + shift - mid) + mid - moved);
    }
};

// The inputs as the kernels round them.
std::vector<double> rounded(const Weight &weight, const std::vector<float> &x, int64_t m) {
    const mq_weight &w = weight.w;
    const int64_t block = w.padded % 64 ? 32 : 64;
    std::vector<double> r(x.size());
    for (int64_t row = 0; row < m; ++row)
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t start = 0; start < w.group; start += block) {
                const int64_t at = row * w.in + g * w.group + start, end = std::min(start + block, w.group);
                float largest = 0;
                for (int64_t i = 0; i < end - start; ++i) largest = std::max(largest, std::fabs(x[size_t(at + i)]));
                for (int64_t i = 0; i < end - start; ++i)
                    r[size_t(at + i)] = largest > 0 ? double(largest / 127) * std::lrintf(x[size_t(at + i)] * (127 / largest)) : 0;
            }
    return r;
}

int check(const char *isa) {
    const int64_t parent_bits = between(2, 8), bits = between(2, parent_bits);
    const bool overlap = parent_bits == 8 && between(0, 3) == 0, exact = between(0, 1) != 0;
    const Weight weight(isa, between(1, 40), between(1, 150), between(1, 4), parent_bits, between(0, 1) != 0, overlap, between(0, 1) ? bits : 0);
    const mq_weight &w = weight.w;
    const int64_t m = between(0, 15) ? between(1, 12) : between(90, 110);  // sometimes more rows than pass a tile at once
    std::vector<float> x(size_t(m * w.in)), bias(size_t(w.out)), y(size_t(m * w.out));
    const float size = std::ldexp(1.0f, int(between(-20, 20)));
    for (float &v : x) v = between(0, 9) ? normal() * size : 0;
    for (float &v : bias) v = normal() * size;
    const bool biased = between(0, 1) != 0;
    if (mq_linear(&w, bits, x.data(), m, biased ? bias.data() : nullptr, y.data(), exact, between(1, 3), isa)) return std::printf("%s refused\n", isa), 1;
    const std::vector<double> r = exact ? std::vector<double>(x.begin(), x.end()) : rounded(weight, x, m);
    std::vector<double> values, sizes;  // of the weight, and of what errors are measured against
    for (int64_t o = 0; o < w.out; ++o)
        for (int64_t i = 0; i < w.in; ++i) {
            values.push_back(weight.value(o, i, bits));
            sizes.push_back(std::fabs(values.back()) + std::fabs(512 * double(half_to_float(weight.half[size_t(o * w.groups + i / w.group)]))));
        }
    for (int64_t row = 0; row < m; ++row)
        for (int64_t o = 0; o < w.out; ++o) {
            const double *v = &values[size_t(o * w.in)], *size_of = &sizes[size_t(o * w.in)], *of = &r[size_t(row * w.in)];
            double want = biased ? bias[size_t(o)] : 0, whole = std::fabs(want);
            for (int64_t i = 0; i < w.in; ++i) want += v[i] * of[i], whole += size_of[i] * std::fabs(of[i]);
            const double got = y[size_t(row * w.out + o)];
            if (!(std::fabs(got - want) <= 2e-6 * whole)) {
                std::printf("%s: %lld bits of %lld, out %lld, %lld groups of %lld, m %lld, exact %d: got %g, want %g\n", isa, (long long)bits,
                            (long long)parent_bits, (long long)w.out, (long long)w.groups, (long long)w.group, (long long)m, int(exact), got, want);
                return 1;
            }
        }
    return 0;
}

std::vector<float> floats(int64_t n, float least, float most) {
    std::vector<float> f(static_cast<size_t>(n));
    for (float &v : f) v = std::uniform_real_distribution<float>(least, most)(random_bits);
    return f;
}

// Codes of 8 bits in turn for widths 8, 4 and 2, against the best of all codes, given those before.
int check_turns() {
    const int64_t streams = 3, columns = between(1, 20), rows = between(1, 140), groups = between(1, 3), fixed = 2 * between(0, 2), codes = 256;
    const int64_t stride = (columns + between(0, 2)) * rows, shift[streams] = {4, 6, 0};  // of widths 4, 2 and 8
    const std::vector<float> start = floats((streams - 1) * stride + columns * rows, 0, 1), coupling = floats(streams * columns * columns, -.2f, .2f);
    const std::vector<float> count = floats(streams * columns, .5f, 2), factor = floats(streams * columns, -1, 1), weight = floats(streams * groups * rows, 0, 1);
    const std::vector<float> offset = floats(streams * groups * rows, -.1f, .1f);
    std::vector<float> scale = floats(streams * groups * rows, .003f, .006f), table(size_t(streams * codes)), below(2 * 16), base(16), passed(size_t(streams * columns * rows));
    std::vector<int64_t> group(static_cast<size_t>(columns));
    for (int64_t &g : group) g = between(0, groups - 1);
    for (int64_t r = 0; r < streams; ++r) {
        for (int64_t i = 0; i < groups * rows; ++i) scale[size_t(r * groups * rows + i)] *= float(1 << shift[r]);
        for (int64_t q = 0; q < codes; ++q) table[size_t(r * codes + q)] = float(q >> shift[r]);
    }
    for (int64_t i = 0; i < 16; ++i) base[size_t(i)] = float(16 * i), below[size_t(i)] = float(i), below[size_t(16 + i)] = float(i >> 2);
    const Bytes now = bytes(columns * rows, 0, 255);
    Bytes chosen(now.size());
    mq_turns a{};
    a.streams = streams, a.columns = columns, a.rows = rows, a.groups = groups, a.start = start.data(), a.start_stride = stride, a.coupling = coupling.data();
    a.count = count.data(), a.factor = factor.data(), a.scale = scale.data(), a.offset = offset.data(), a.weight = weight.data(), a.group = group.data();
    a.table = table.data(), a.codes = codes, a.below = below.data(), a.base = base.data(), a.prefixes = 16, a.residuals = 16, a.last_counts = 1;
    a.choices = 16 >> fixed, a.now = now.data(), a.chosen = chosen.data(), a.passed = passed.data();
    if (mq_choose_in_turn(&a, between(1, 3))) return std::printf("turns refused\n"), 1;
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i) {
            std::vector<double> cost(codes, 0);
            for (int64_t r = 0; r < streams; ++r) {
                double x = start[size_t(r * stride + j * rows + i)];
                for (int64_t k = 0; k < j; ++k) x -= double(coupling[size_t((r * columns + j) * columns + k)]) * passed[size_t((r * columns + k) * rows + i)];
                const auto at = size_t((r * groups + group[size_t(j)]) * rows + i), in = size_t(r * columns + j);
                for (int64_t q = 0; q < codes; ++q) cost[size_t(q)] += double(weight[at]) * count[in] * std::pow((x - offset[at]) / scale[at] - double(q >> shift[r]), 2);
                const double moved = (offset[at] + double(scale[at]) * (chosen[size_t(j * rows + i)] >> shift[r]) - x) * factor[in];
                if (!(std::fabs(moved - passed[size_t((r * columns + j) * rows + i)]) <= 1e-4)) return std::printf("turns: passed %g\n", moved), 1;
            }
            const uint8_t q = chosen[size_t(j * rows + i)], held = now[size_t(j * rows + i)];
            double least = cost[q];
            for (int64_t other = 0; other < codes; ++other)
                if (other >> (8 - fixed) == held >> (8 - fixed)) least = std::min(least, cost[size_t(other)]);
            if (q >> (8 - fixed) != held >> (8 - fixed) || !(cost[q] <= least * (1 + 1e-4) + 1e-4)) return std::printf("turns: code %d at %g, best %g\n", q, cost[q], least), 1;
        }
    return 0;
}

// Reads and gradients of codes of 8 bits, none of them near a border, and some beyond the ends of the range.
int check_fake() {
    const int64_t groups = between(1, 200), size = between(1, 150), bits = between(2, 8), n = groups * size;
    const bool half_up = between(0, 1) != 0, own = between(0, 1) != 0, of_weight = between(0, 1) != 0;
    const std::vector<float> scale = floats(groups, .01f, .02f), zero = floats(groups, 0, 255), m = floats(groups, .5f, 2), u = floats(groups, 0, 255);
    const std::vector<float> g = floats(n, -1, 1), off = floats(n, -.4f, .4f);
    std::vector<float> w(static_cast<size_t>(n)), read(w.size()), dw(w.size());
    std::vector<int64_t> whole(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
        const size_t of = i / size_t(size);
        whole[i] = between(-20, 275);
        w[i] = (float(whole[i]) + off[i] - zero[of]) * scale[of];
    }
    mq_fake a{};
    a.groups = groups, a.size = size, a.max_code = 255, a.cut = 8 - bits, a.half_up = half_up, a.top = (1 << bits) - 1;
    a.under = half_up && a.cut ? 256 - (1 << (a.cut - 1)) : 256;
    a.step = float(1 << a.cut), a.added = -100, a.mid = 127.5f, a.w = w.data(), a.scale = scale.data(), a.zero = zero.data();
    if (own) a.m = m.data(), a.u = u.data();
    std::vector<float> parts[4];
    for (std::vector<float> &part : parts) part.resize(size_t(groups));
    mq_fake_read(&a, read.data(), between(1, 3));
    mq_fake_gradients(&a, g.data(), of_weight ? dw.data() : nullptr, parts[0].data(), parts[1].data(), own ? parts[2].data() : nullptr, own ? parts[3].data() : nullptr, between(1, 3));
    for (size_t of = 0; of < size_t(groups); ++of) {
        const double s = scale[of], z = zero[of], stretch = own ? m[of] : 1, moved = 127.5 - (own ? u[of] : z);
        double ds = 0, dz = 0, dm = 0, du = 0;
        for (size_t i = of * size_t(size); i < (of + 1) * size_t(size); ++i) {
            const bool inside = whole[i] >= 0 && whole[i] <= 255;
            const int64_t q = std::min<int64_t>(std::max<int64_t>(whole[i], 0), 255), cut = q >> a.cut;
            const int64_t up = half_up && a.cut ? cut + ((q >> (a.cut - 1)) & 1) : cut, p = std::min<int64_t>(up, a.top);
            const double level = double(a.step) * double(p) - 100, want = s * (stretch * level + moved), stop = inside ? g[i] : 0, through = up > a.top ? 0 : stop;
            if (!(std::fabs(read[i] - want) <= 1e-4)) return std::printf("fake: read %g, want %g\n", read[i], want), 1;
            if (of_weight && !(std::fabs(dw[i] - stop * stretch) <= 1e-6)) return std::printf("fake: dw %g\n", dw[i]), 1;
            ds += g[i] * (stretch * level + moved) - stretch / s * through * w[i], dz += s * stretch * through, dm += s * g[i] * level, du -= s * g[i];
        }
        const double wants[4] = {ds, own ? dz : dz + du, dm, du};
        for (size_t k = 0; k < (own ? 4 : 2); ++k)
            if (!(std::fabs(parts[k][of] - wants[k]) <= 1e-2 + 1e-3 * std::fabs(wants[k]))) return std::printf("fake: sum %zu %g, want %g\n", k, parts[k][of], wants[k]), 1;
    }
    return 0;
}

}  // namespace

int main(int count, char **words) {
    const int64_t rounds = count > 1 ? std::atoll(words[1]) : 1000;
    random_bits.seed(count > 2 ? std::strtoull(words[2], nullptr, 10) : 0);
    int64_t made = 0;
    for (const char *isa : {"avx512", "avx2", "neon", "scalar"})
        for (int64_t i = 0; i < (mq_lanes(isa) ? rounds : 0); ++i, ++made)
            if (check(isa)) return 1;
    for (int64_t i = 0; i < rounds / 4; ++i)
        if (check_turns() || check_fake()) return 1;
    std::printf("%lld products equal, best %s\n", (long long)made, mq_best_isa());
    return made ? 0 : 1;
}
