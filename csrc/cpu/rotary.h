// Rotary positions, in place: feature i and feature i + head_dim / 2 of each head turned by one angle.
#pragma once

#include "rotary_problem.h"
#include "simd/vector.h"

namespace fusedformer::FF_LEVEL {

template <class S>
void rotate_rows(const RotaryProblem& p) {
    const int64_t half = p.head_dim / 2;
    for (int64_t row = 0; row < p.rows; row++) {
        const float *const cos = p.cos + row * p.head_dim, *const sin = p.sin + row * p.head_dim;
        for (int64_t head = 0; head < p.heads; head++) {
            S* const low = static_cast<S*>(p.data) + row * p.stride + head * p.head_dim;
            S* const high = low + half;
            for (int64_t i = 0; i < half; i += WIDTH) {
                const int64_t n = half - i;
                const Floats a = load_some(low + i, n), b = load_some(high + i, n);
                store_some(low + i, a * load_some(cos + i, n) + b * load_some(sin + i, n), n);
                store_some(high + i, b * load_some(cos + half + i, n) + a * load_some(sin + half + i, n), n);
            }
        }
    }
}

inline void rotate(const RotaryProblem& p) {
    switch (p.type) {
        case Type::float16:
            return rotate_rows<Float16>(p);
        case Type::bfloat16:
            return rotate_rows<BFloat16>(p);
        default:
            return rotate_rows<float>(p);
    }
}

}  // namespace fusedformer::FF_LEVEL
