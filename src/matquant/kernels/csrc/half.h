// IEEE half precision in integers, for machines and files without instructions for it.
#pragma once
#include <cstdint>
#include <cstring>

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits = (rest << 13) + ((127 - 15) << 23);
    if (rest >= 0x7c00) bits += (128 - 16) << 23;  // infinity, nan
    float value;
    if (rest < 0x0400) {  // subnormal: rest 2^-24
        value = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}
