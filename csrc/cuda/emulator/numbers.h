// 16-bit floating point on the host, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedformer::cuda {

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline uint16_t to_bf16(float x) {
    if (x != x) return 0x7FFF;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
}

inline uint16_t to_half(float x) {
    const auto rounded = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}

}  // namespace fusedformer::cuda
