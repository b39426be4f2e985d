// Arithmetic with an instruction of its own.
#pragma once

#include <cstdint>

#include "thread.h"

namespace fusedformer::cuda {

// 2^x to about 2 ulp; 0 for -inf, and for results below the normal numbers.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float natural_log(float x) { return logf(x); }

// Two numbers rounded to nearest even, `low` in the low half.
template <bool BF16>
DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    if constexpr (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <bool BF16>
DEVICE float unpack(uint16_t number) {
    if constexpr (BF16) return __uint_as_float(static_cast<uint32_t>(number) << 16);
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(number));
    return x;
}
template <bool BF16>
DEVICE float unpack_low(uint32_t pair) {
    return unpack<BF16>(static_cast<uint16_t>(pair));
}
template <bool BF16>
DEVICE float unpack_high(uint32_t pair) {
    return unpack<BF16>(static_cast<uint16_t>(pair >> 16));
}

}  // namespace fusedformer::cuda
