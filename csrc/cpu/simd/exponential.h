// exp2 and tanh of one vector.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

// 2^r as the polynomial through the Chebyshev points of an interval of length 1: [0, 1] where the processor splits a
// number there by itself, else [-1/2, 1/2]. Relative error 1e-7 for degree 5 and 3e-9 for 6.
template <int DEGREE>
FF_INLINE Floats exp2_polynomial(Floats r) {
#ifdef FF_AVX512
    constexpr float C[2][7] = {
        {0x1.fffffcp-1f, 0x1.62e526p-1f, 0x1.ebcf7ap-3f, 0x1.c99b9ep-5f, 0x1.25429cp-7f, 0x1.f06faep-10f},
        {1.0f, 0x1.62e428p-1f, 0x1.ebfdf2p-3f, 0x1.c67f50p-5f, 0x1.3d54d8p-7f, 0x1.44d4d2p-10f, 0x1.ca8f0ap-13f}};
#else
    constexpr float C[2][7] = {
        {0x1.000002p+0f, 0x1.62e430p-1f, 0x1.ebf906p-3f, 0x1.c6af6cp-5f, 0x1.3d1070p-7f, 0x1.5f0890p-10f},
        {1.0f, 0x1.62e430p-1f, 0x1.ebfbe0p-3f, 0x1.c6aeccp-5f, 0x1.3b2a1cp-7f, 0x1.5f48c0p-10f, 0x1.444000p-13f}};
#endif
    Floats power = broadcast(C[DEGREE - 5][DEGREE]);
#pragma GCC unroll 6
    for (int i = DEGREE - 1; i >= 0; i--) power = power * r + C[DEGREE - 5][i];
    return power;
}

// 2^x for x <= 127; 0 for -infinity and where the result or, by level, any denormal is too small; NaN for NaN.
template <int DEGREE = 6>
FF_INLINE Floats exp2(Floats x) {
#ifdef FF_AVX512
    constexpr int DOWN = 0x09;  // x - floor(x)
    const __m512 number = _mm512_max_ps(_mm512_set1_ps(-200.0f), reinterpret_cast<__m512>(x));  // keeps NaN
    const Floats power = exp2_polynomial<DEGREE>(reinterpret_cast<Floats>(_mm512_reduce_ps(number, DOWN)));
    return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), number));  // by 2^floor(x)
#else
    const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the integer in the low bits
    const Floats shifted = x + round;
    const Floats power = exp2_polynomial<DEGREE>(x - (shifted - round));
    const Floats scale = from_bits((bits_of(shifted) + 127) << 23);
    return keep(~(x < -126.0f), power * scale);
#endif
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
