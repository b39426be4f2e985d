// Rows of heads and the rotations of their positions, as `rotate` in transformer/rotary.py takes them.
#pragma once

#include "problem.h"

namespace fusedformer {

struct RotaryProblem {
    int64_t rows, heads, head_dim;  // an even head_dim
    Type type;
    void* data;              // the heads of a row one behind the other
    int64_t stride;          // from row to row
    const float *cos, *sin;  // (rows, head_dim), contiguous
};

}  // namespace fusedformer
