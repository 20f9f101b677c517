// Arithmetic on rows of floats, compiled for each instruction set of x86 and chosen when the library is loaded. None of it depends on what else is computed.
#pragma once
#include <bit>
#include <cstdint>

#if defined(MQ_X86) && defined(__linux__)
#define MQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MQ_CLONES
#endif

namespace {  // of every file that includes this: each is compiled for another instruction set, and the linker must not take one's code for the other's

// e^x within 2e-7 of its size, without branches: 2^n e^f with n the integer nearest to x / ln 2, ln 2 in two parts, e^f by its series up to f^7.
// Below -87 it is as at -87, where floats have nearly reached their least normal number; above 88 as at 88.
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = __builtin_rintf(x * 1.44269504f), f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * f + 1.0f / 720, e = e * f + 1.0f / 120, e = e * f + 1.0f / 24, e = e * f + 1.0f / 6, e = e * f + 0.5f, e = e * f + 1.0f, e = e * f + 1.0f;
    return e * std::bit_cast<float>((int32_t(n) + 127) << 23);
}

// x / (1 + e^-x), and x / 2 (1 + tanh(sqrt(2 / pi) (x + .044715 x^3))), which is x / (1 + e^-2 y) of that tanh's y.
inline float silu(float x) { return x / (1 + exp_of(-x)); }
inline float gelu(float x) { return x / (1 + exp_of(-1.5957691216f * (x + 0.044715f * x * x * x))); }

}  // namespace
