#include <algorithm>
#include <cstring>

#include "layout.h"

namespace {

// Input channel behind a padded column of a row, or -1.
inline int64_t channel(const mq_weight &w, int64_t column) {
    const int64_t g = column / w.padded, within = column % w.padded;
    return within < w.group ? g * w.group + within : -1;
}

void pack_tile(const mq_weight &w, const uint8_t *codes, int64_t tile) {
    const int64_t bytes = 4 * w.lanes, chunks = w.groups * w.padded / 16;
    auto *const *pair = const_cast<uint8_t *const *>(w.pair);
    auto *const *single = const_cast<uint8_t *const *>(w.single);
    const int64_t rows = std::min(w.lanes, w.out - tile * w.lanes);
    for (uint8_t *p : {pair[0], pair[2], pair[3]})
        if (p) std::memset(p + tile * chunks * bytes, 0, size_t(chunks * bytes));
    for (uint8_t *p : {single[0], single[1]})
        if (p) std::memset(p + tile * chunks * bytes / 2, 0, size_t(chunks * bytes / 2));
    for (int64_t lane = 0; lane < rows; ++lane) {
        const uint8_t *row = codes + (tile * w.lanes + lane) * w.in;
        for (int64_t column = 0; column < chunks * 16; ++column) {
            const int64_t from = channel(w, column);
            if (from < 0) continue;
            const int code = row[from] << (8 - w.parent_bits);
            const int64_t chunk = column / 16, j = column % 16 / 4, k = column % 4;
            const int64_t at = (tile * chunks + chunk) * bytes + 4 * lane + k;
            const int64_t half = (tile * chunks / 2 + chunk / 2) * bytes + 4 * lane + k;
            const int64_t bit = 2 * (chunk % 2) + j % 2 + 4 * (j / 2);
            if (pair[0]) pair[0][at] |= uint8_t((code >> 6 & 3) << (2 * j));
            if (single[0]) single[0][half] |= uint8_t((code >> 5 & 1) << bit);
            if (single[1]) single[1][half] |= uint8_t((code >> 4 & 1) << bit);
            if (pair[2]) pair[2][at] |= uint8_t((code >> 2 & 3) << (2 * j));
            if (pair[3]) pair[3][at] |= uint8_t((code & 3) << (2 * j));
        }
    }
}

}  // namespace

void mq_pack(const mq_weight *w, const uint8_t *codes, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (int64_t tile = 0; tile < w->tiles; ++tile) pack_tile(*w, codes, tile);
}

void mq_pack_rows(const mq_weight *w, const void *from, void *to, int64_t bytes) {
    const auto *source = static_cast<const uint8_t *>(from);
    auto *target = static_cast<uint8_t *>(to);
    std::memset(target, 0, size_t(w->tiles * w->groups * w->lanes * bytes));
    for (int64_t o = 0; o < w->out; ++o)
        for (int64_t g = 0; g < w->groups; ++g)
            std::memcpy(target + ((o / w->lanes * w->groups + g) * w->lanes + o % w->lanes) * bytes, source + (o * w->groups + g) * bytes, size_t(bytes));
}
