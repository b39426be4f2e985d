// exp2 of one vector.
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

}  // namespace fusedformer::FF_LEVEL
