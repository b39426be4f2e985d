// Products of large blocks of bfloat16 by dot products of pairs, for gemm.h.
#pragma once

#include "dot_engine.h"

namespace fusedformer::FF_LEVEL {

struct GemmDot : DotEngine {
    static constexpr int64_t BLOCK_DEPTH = 512;  // of a product at a time: a panel fills the first cache,
    static constexpr int64_t BLOCK_ROWS = 96;    // so many rows stay in the second

    static constexpr int64_t FEW_ROWS = 24, PACKED_ROWS = 0, PACKING_ROWS = 6;  // as in gemm_fma.h, measured
    static constexpr bool KEEPS_WEIGHTS = false;  // whether packing for good pays: more rows hide it
    static constexpr bool LOSES_TINY = false;     // whether numbers below 2^-100 may count as 0

    static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
        product<false>(c, stride, a, b, depth, m, n, k, accumulate);
    }
};

}  // namespace fusedformer::FF_LEVEL
