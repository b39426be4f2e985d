// Linear and feed-forward problems as the kernels see them. They mirror `LinearProblem` (kernels/linear/problem.py) and
// `FeedForwardProblem` (kernels/feed_forward/problem.py), which say what each field means.
#pragma once

#include "problem.h"

namespace fusedformer {

// Its place here is an activation's number in kernels/common/activations.py.
enum class Activation : int32_t { relu, gelu, gelu_tanh, silu, relu2 };

struct Matrix {  // unit stride in the columns; null data where there is none
    void* data = nullptr;
    int64_t row = 0;
};

struct LinearProblem {
    int64_t rows, in_features, out_features;
    Type type;  // of all tensors
    Matrix input, weight;
    const void* bias = nullptr;
    void* packed_weight = nullptr;  // as Kernels::pack_weight left it
    const void* then = nullptr;     // what will be read after the weight, if that is known
};

struct LinearGradients {  // null data where not wanted
    Matrix grad_out, grad_input, grad_weight;
    void* grad_bias;
};

struct FeedForwardProblem {
    int64_t tokens, d_in, d_ff, d_out;
    Type type;  // of all tensors
    Matrix input, weight1, weight2, gate_weight, residual;
    const void *bias1 = nullptr, *bias2 = nullptr, *gate_bias = nullptr;
    void *packed1 = nullptr, *packed2 = nullptr,
         *packed_gate = nullptr;  // the weights, as Kernels::pack_weight left them
    const void* then = nullptr;   // what will be read after them, if that is known
    Activation activation;
    uint32_t seed[2] = {0, 0};
    uint32_t dropout_threshold = 0, residual_dropout_threshold = 0;
    float keep_scale = 1.0f, residual_keep_scale = 1.0f;

    bool is_gated() const { return gate_weight.data != nullptr; }
};

struct FeedForwardResults {
    Matrix out, pre_activation, pre_gate;  // of the last two null data where not kept
};

struct FeedForwardGradients {
    Matrix grad_out, pre_activation, pre_gate;                        // of the last two null data: recomputed
    Matrix grad_input, grad_weight1, grad_weight2, grad_gate_weight;  // null data where not wanted
    void *grad_bias1, *grad_bias2, *grad_gate_bias;                   // likewise
    float *sums1, *sums2,
        *gate_sums;  // like the weights, contiguous; null where one block holds all tokens, or float32
};

// So many tokens go through both products at a time, which bounds what lies between them.
constexpr int64_t FEED_FORWARD_TOKENS = 512;

}  // namespace fusedformer
