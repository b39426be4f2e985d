// One dropout + addition + norm as the kernels see it. It mirrors `NormProblem` and `Saved` (kernels/norm/problem.py),
// which say what each field means.
#pragma once

#include "problem.h"

namespace fusedformer {

struct NormRowsAt {  // (rows, d), unit stride in the features
    void* data = nullptr;
    int64_t stride = 0;
};

struct NormVector {  // (d,), contiguous
    Type type = Type::none;
    void* data = nullptr;
};

struct NormProblem {
    int64_t rows, features;
    Type input_type, type;  // of input and its gradient; of what else has rows. float32, or the same for both
    NormRowsAt input, residual;
    NormVector weight, bias;  // float32, or of `type`
    bool subtract_mean = true;
    float eps = 0.0f;
    uint32_t seed[2] = {0, 0};
    uint32_t dropout_threshold = 0;  // 16-bit lanes below it are dropped
    float keep_scale = 1.0f;

    bool has_dropout() const { return dropout_threshold > 0; }
};

struct NormResults {     // contiguous; null where not wanted
    void *out, *sum;     // (rows, d)
    float *mean, *rstd;  // (rows,), of which rms_norm has no mean
};

struct NormGradients {
    NormRowsAt grad_out, grad_sum, sum;  // no data where no gradient is sent to the sum
    const float *mean, *rstd;
    void *input, *residual;   // the results, contiguous; null where not wanted
    NormVector weight, bias;  // likewise
    float* partial;           // (parameters wanted, chunks, d)
};

// Backward sums the gradients of the parameters over chunks of rows, then over the chunks. (Static: a function that
// levels share must not be compiled for one of them.)
constexpr int64_t NORM_MIN_CHUNK = 32, NORM_MAX_CHUNKS = 128;

static constexpr int64_t norm_chunk_rows(int64_t rows) {
    const int64_t share = (rows + NORM_MAX_CHUNKS - 1) / NORM_MAX_CHUNKS;
    return share < NORM_MIN_CHUNK ? NORM_MIN_CHUNK : share;
}

}  // namespace fusedformer
