#include <algorithm>
#include <string>

#include "inputs.h"

namespace {

// Best first.
constexpr Isa ISAS[] = {
#if defined(MQ_X86)
    {"avx512", 16, linear_tiles_avx512, attend_over_chunk_avx512},
    {"avx2", 8, linear_tiles_avx2, attend_over_chunk_avx2},
#endif
#if defined(MQ_ARM)
    {"neon", 4, linear_tiles_neon, attend_over_chunk_neon},
#endif
    {"scalar", 8, linear_tiles_scalar, attend_over_chunk_scalar},
};

bool here(const std::string &name) {
#if defined(MQ_X86)
    if (name == "avx512") return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return name == "scalar" || name == "neon";
}

}  // namespace

const Isa *find_isa(const char *name) {
    for (const Isa &isa : ISAS)
        if (std::string(name) == isa.name && here(name)) return &isa;
    return nullptr;
}

bool holds(const mq_weight &w, int64_t bits) {
    return w.pair[0] && (bits < 3 || w.single[0]) && (bits < 4 || w.single[1]) && (bits < 5 || w.pair[2]) && (bits < 7 || w.pair[3]);
}

int64_t mq_lanes(const char *isa) {
    const Isa *found = find_isa(isa);
    return found ? found->lanes : 0;
}

const char *mq_best_isa(void) {
    for (const Isa &isa : ISAS)
        if (here(isa.name)) return isa.name;
    return "scalar";
}

int mq_linear(const mq_weight *w, int64_t bits, const float *x, int64_t m, const float *bias, float *y, int64_t exact, int64_t threads, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found || found->lanes != w->lanes) return 1;
    if (!holds(*w, bits)) return 2;
    Rounded rounded;
    rounded.shape(*w, m, exact != 0);
    const int64_t parts = std::max<int64_t>(1, std::min(threads, w->tiles));
#pragma omp parallel num_threads(int(parts))
    {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < m * w->groups; ++unit) {
            const int64_t row = unit / w->groups, g = unit % w->groups;
            rounded.fill(row, g, x + row * w->in + g * w->group);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part)
            found->linear(*w, int(bits), rounded.inputs, bias, y, w->tiles * part / parts, w->tiles * (part + 1) / parts);
    }
    return 0;
}
