// exp2 and tanh of one vector.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

// 2^x for x <= 127, relative error 3e-9 before rounding; 0 below 2^-126 (-infinity too), NaN for NaN. x = n + r with
// integral n and |r| <= 1/2; 2^r is the polynomial through the Chebyshev points of that interval.
FF_INLINE Floats exp2(Floats x) {
    const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the integer in the low bits
    const Floats shifted = x + round;
    const Floats r = x - (shifted - round);
    Floats power = r * 0x1.443fffc3ce2ddp-13f + 0x1.5f48c04fb6db6p-10f;
    power = power * r + 0x1.3b2a1b715bf52p-7f;
    power = power * r + 0x1.c6aecc669aea7p-5f;
    power = power * r + 0x1.ebfbe045f4c2dp-3f;
    power = power * r + 0x1.62e430d034708p-1f;
    power = power * r + 1.0f;
    const Floats scale = from_bits((bits_of(shifted) + 127) << 23);
    return keep(~(x < -126.0f), power * scale);
}

// Relative error 1e-7: near 0 an odd polynomial (through the Chebyshev points of |x| <= 0.625), else by exp.
FF_INLINE Floats tanh(Floats x) {
    const Floats square = x * x;
    Floats near = square * 0x1.16d8e2p-9f - 0x1.0b5108p-7f;
    near = near * square + 0x1.6363c2p-6f;
    near = near * square - 0x1.b9e9fep-5f;
    near = near * square + 0x1.111046p-3f;
    near = near * square - 0x1.555552p-2f;
    near = near * square * x + x;
    const Ints sign = bits_of(x) & INT32_MIN;
    const Floats magnitude = from_bits(bits_of(x) & INT32_MAX);
    const Floats capped = magnitude > 20.0f ? broadcast(20.0f) : magnitude;  // keeps NaN
    const Floats far = 1.0f - 2.0f / (exp2(capped * (2.0f * LOG2E)) + 1.0f);
    return select(magnitude < 0.625f, near, from_bits(bits_of(far) | sign));
}

}  // namespace fusedformer::FF_LEVEL
