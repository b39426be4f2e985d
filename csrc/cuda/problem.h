// What the CUDA kernels compute: plain structs, shared by the kernels, their launchers and the binding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedformer::cuda {

// (batch, heads, rows, features); strides in elements, features next to each other.
struct Tensor4 {
    void* data;
    int64_t batch_stride, head_stride, row_stride;
};

// Query i stands at position i + position_offset and sees the keys from position - window_left to
// position + window_right; -1 leaves a side open, a right of 0 is causal.
struct AttentionProblem {
    Tensor4 q, k, v, out;       // bf16 or fp16
    float *lse, *lse_residual;  // (batch, heads, len_q), contiguous; the second is what rounding took from the first
    int batch, heads, heads_kv, len_q, len_k, head_dim, value_dim;
    bool bf16;
    float scale;
    int64_t position_offset;
    int64_t window_left, window_right;
};

// nullptr, or why it could not be launched.
const char* attention_forward(const AttentionProblem& problem, void* stream);

struct AttentionGradients {
    Tensor4 grad_out, grad_q, grad_k, grad_v;
    const float* grad_lse;  // (batch, heads, len_q), or null
    void* workspace;
};

size_t attention_backward_workspace(const AttentionProblem& problem);
const char* attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients, void* stream);

// A few new queries over a cache, whose slots are one array or pages of one. Queries stand at the cache's end.
struct DecodeProblem {
    Tensor4 q, key_cache, value_cache, new_key, new_value, out;  // new_key.data: null without an append
    float* lse;                                                  // (batch, heads, len_q), or null
    const int64_t* cache_seqlens;                                // (batch,), before the append
    const int32_t* block_table;                                  // (batch, pages), or null
    int64_t table_stride;
    int pages, page;            // of a sequence at most; slots of a page, or of the whole cache
    const float* alibi_slopes;  // or null
    int64_t slopes_batch_stride, slopes_head_stride;
    const float* sinks;  // (heads,) or null
    int64_t sinks_head_stride;
    int batch, heads, heads_kv, len_q, appended, head_dim, value_dim;
    bool bf16;
    float scale, softcap;
    int64_t window_left, window_right;
    void* workspace;
};

size_t attention_decode_workspace(const DecodeProblem& problem, int processors);
const char* attention_decode(const DecodeProblem& problem, int processors, void* stream);

}  // namespace fusedformer::cuda
