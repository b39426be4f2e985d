// exp2 and tanh of one vector.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

// 2^r for |r| <= 1/2 as the polynomial through the Chebyshev points; relative error 1e-7 for degree 5, 3e-9 for 6.
template <int DEGREE>
FF_INLINE Floats exp2_polynomial(Floats r) {
    constexpr float C[2][7] = {
        {0x1.000002p+0f, 0x1.62e430p-1f, 0x1.ebf906p-3f, 0x1.c6af6cp-5f, 0x1.3d1070p-7f, 0x1.5f0890p-10f},
        {1.0f, 0x1.62e430p-1f, 0x1.ebfbe0p-3f, 0x1.c6aeccp-5f, 0x1.3b2a1cp-7f, 0x1.5f48c0p-10f, 0x1.444000p-13f}};
    Floats power = broadcast(C[DEGREE - 5][DEGREE]);
#pragma GCC unroll 6
    for (int i = DEGREE - 1; i >= 0; i--) power = power * r + C[DEGREE - 5][i];
    return power;
}

// 2^(x factor) for a fixed positive factor, without rounding the product: x = n / factor + r, and 1 / factor is the sum
// of two floats, the first so short that n times it is exact.
class Powers {
  public:
    explicit Powers(double factor) : factor_(static_cast<float>(factor)), least_(static_cast<float>(-126.0 / factor)) {
        const float inverse = static_cast<float>(1.0 / factor);
        uint32_t bits;
        __builtin_memcpy(&bits, &inverse, sizeof bits);
        bits &= 0xffffff00u;
        __builtin_memcpy(&inverse_, &bits, sizeof bits);
        inverse_rest_ = static_cast<float>(1.0 / factor - inverse_);
    }

    float factor() const { return factor_; }

    // x factor <= 127; 0 for -infinity and where the result is no normal number; NaN for NaN.
    template <int DEGREE = 6>
    FF_INLINE Floats of(Floats x) const {
#ifdef FF_AVX512
        if constexpr (DEGREE ==
                      5) {  // less exact: the product is rounded, and the processor splits it at floor(x factor)
            constexpr int DOWN = 0x09;
            const __m512 number = reinterpret_cast<__m512>(x * factor_);
            const __m512 finite = _mm512_max_ps(_mm512_set1_ps(-200.0f), number);  // keeps NaN
            const Floats r = reinterpret_cast<Floats>(_mm512_reduce_ps(finite, DOWN));
            Floats power = broadcast(0x1.f06faep-10f);  // as above, for 0 <= r <= 1
            power = power * r + 0x1.25429cp-7f;
            power = power * r + 0x1.c99b9ep-5f;
            power = power * r + 0x1.ebcf7ap-3f;
            power = power * r + 0x1.62e526p-1f;
            power = power * r + 0x1.fffffcp-1f;
            return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(power), finite));
        }
#endif
        const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the integer in the low bits
        const Floats shifted = x * factor_ + round, n = shifted - round;
        const Floats rest = (x - n * inverse_) - n * inverse_rest_;
        const Floats scale = from_bits((bits_of(shifted) + 127) << 23);
        return keep(~(x < least_), exp2_polynomial<DEGREE>(rest * factor_) * scale);
    }

  private:
    float factor_, least_, inverse_, inverse_rest_;
};

FF_INLINE Floats exp2(Floats x) {
    const Floats round = broadcast(12582912.0f);
    const Floats shifted = x + round;
    const Floats scale = from_bits((bits_of(shifted) + 127) << 23);
    return keep(~(x < -126.0f), exp2_polynomial<6>(x - (shifted - round)) * scale);
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
