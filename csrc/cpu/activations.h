// The activations of the feed-forward network and their derivatives, in float32: a vector at a time, and a row.
#pragma once

#include "gemm_problem.h"
#include "simd/exponential.h"

namespace fusedformer::FF_LEVEL {

struct Curve {
    Floats value, slope;  // act(x) and act'(x); what of them is not used costs nothing
};

struct Relu {
    static FF_INLINE Curve at(Floats x) {  // a NaN stays one
        const Ints positive = ~(x <= 0.0f);
        return {keep(positive, x), keep(positive, broadcast(1.0f))};
    }
};

struct Relu2 {
    static FF_INLINE Curve at(Floats x) {
        const Floats positive = Relu::at(x).value;
        return {positive * positive, 2.0f * positive};
    }
};

// x Phi(x), Phi the normal distribution. Its tail is Phi(-|x|) = exp(-x^2 / 2) g(t), t = (|x| - 3) / (|x| + 3), with
// the polynomial through g's Chebyshev points; so that the relative error is a few roundings also where Phi nears 0.
struct Gelu {
    static FF_INLINE Curve at(Floats x) {
        const Floats size = smaller(from_bits(bits_of(x) & INT32_MAX), broadcast(20.0f));  // from 13.2 on the tail is 0
        const Floats square = size * size, high = from_bits(bits_of(size) & -4096);
        const Floats rounded_off = (high * high - square) + (size - high) * (size + high);
        const Floats bell = Powers(0.5 * 1.4426950408889634).of(-square) * (1.0f - 0.5f * rounded_off);
        const Floats t = (size - 3.0f) / (size + 3.0f);
        constexpr float G[] = {0x1.f1b89cp-4f, -0x1.a6b66ap-3f,  0x1.f8baccp-4f,   -0x1.7a9434p-5f, 0x1.91e11ep-8f,
                               0x1.7cb072p-9f, -0x1.0205acp-10f, -0x1.640cfep-12f, 0x1.e76950p-14f, 0x1.c5c5aep-15f};
        Floats tail = broadcast(G[9]);
#pragma GCC unroll 9
        for (int i = 8; i >= 0; i--) tail = tail * t + G[i];
        tail *= bell;
        const Floats share = select(x < 0.0f, tail, 1.0f - tail);
        constexpr float INV_SQRT_2PI = 0.3989422804014327f;
        return {x * share, share + x * bell * INV_SQRT_2PI};
    }
};

// 1 / (1 + exp(-x)), and how far that is from 1: each to its own last places.
struct Sigmoid {
    Floats value, rest;

    explicit FF_INLINE Sigmoid(Floats x) {
        const Floats e = Powers(1.4426950408889634).of(from_bits(bits_of(x) | INT32_MIN));
        const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
        value = select(x < 0.0f, smaller, larger), rest = select(x < 0.0f, larger, smaller);
    }
};

struct Silu {
    static FF_INLINE Curve at(Floats x) {
        const Sigmoid s(x);
        return {x * s.value, s.value * (1.0f + x * s.rest)};
    }
};

// x / 2 (1 + tanh(u / 2)) = x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016).
struct GeluTanh {
    static FF_INLINE Curve at(Floats x) {
        constexpr float INNER = 1.5957691216057308f, CUBE = 0.044715f;
        const Floats square = smaller(x * x, broadcast(1e4f));  // further out the slope is 0 or 1 as well
        const Sigmoid s(INNER * x * (1.0f + CUBE * square));
        return {x * s.value, s.value + x * s.value * s.rest * (INNER * (1.0f + 3.0f * CUBE * square))};
    }
};

template <class Function>
void activate_by(float* value, float* slope, int64_t count) {
    if (slope) {
        for (int64_t i = 0; i < count; i += WIDTH) {
            const Curve curve = Function::at(load(value + i));
            store(value + i, curve.value), store(slope + i, curve.slope);
        }
    } else {
        for (int64_t i = 0; i < count; i += WIDTH) store(value + i, Function::at(load(value + i)).value);
    }
}

// Whole vectors of `value` become act(value), and `slope`, unless it is null, act'(value).
inline void activate(Activation activation, float* value, float* slope, int64_t count) {
    switch (activation) {
        case Activation::relu:
            return activate_by<Relu>(value, slope, count);
        case Activation::gelu:
            return activate_by<Gelu>(value, slope, count);
        case Activation::gelu_tanh:
            return activate_by<GeluTanh>(value, slope, count);
        case Activation::silu:
            return activate_by<Silu>(value, slope, count);
        case Activation::relu2:
            return activate_by<Relu2>(value, slope, count);
    }
}

}  // namespace fusedformer::FF_LEVEL
