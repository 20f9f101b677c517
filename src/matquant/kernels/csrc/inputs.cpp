#include "inputs.h"

#include <algorithm>
#include <cmath>

void Rounded::shape(const mq_weight &w, int64_t m, bool exact) {
    group = w.group, groups = w.groups, padded_group = w.padded;
    const int64_t width = w.groups * w.padded, block = w.padded % 64 ? 32 : 64;
    sum.assign(size_t(m * groups), 0.0f);
    padded.assign(exact ? size_t(m * width) : 0, 0.0f);
    q.assign(exact ? 0 : size_t(m * width), 0);
    step.assign(exact ? 0 : size_t(m * width / block), 0.0f);
    inputs = Inputs{m, width, block, q.data(), step.data(), sum.data(), exact ? padded.data() : nullptr};
}

void Rounded::fill(int64_t row, int64_t g, const float *from) {
    float &total = sum[size_t(row * groups + g)];
    total = 0;
    const int64_t start = row * inputs.width + g * padded_group;
    if (inputs.x) {
        float *to = &padded[size_t(start)];
        for (int64_t i = 0; i < group; ++i) to[i] = from[i], total += from[i];
        return;
    }
    for (int64_t at = 0; at < group; at += inputs.block) {
        const int64_t length = std::min(inputs.block, group - at);
        float largest = 0;
        for (int64_t i = 0; i < length; ++i) largest = std::max(largest, std::fabs(from[at + i]));
        const float one = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
        int8_t *to = &q[size_t(start + at)];
        int32_t whole = 0;
        for (int64_t i = 0; i < length; ++i) {
            const auto rounded = int8_t(__builtin_rintf(from[at + i] * inverse));
            to[i] = rounded, whole += rounded;
        }
        step[size_t((start + at) / inputs.block)] = one;
        total += one * float(whole);
    }
}
