// One attention problem as the kernels see it: raw pointers, sizes, and strides counted in elements. It mirrors
// `AttentionProblem` (kernels/attention/problem.py), which says what each field means.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedformer {

enum class Type : int32_t { none, boolean, float32, float16, bfloat16, float64 };

struct Rows {  // (B, H, rows, columns), unit stride in the columns
    void* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
};

struct Mask {  // (B, H, L, S); a stride of 0 where it is broadcast
    Type type = Type::none;
    void* data = nullptr;
    int64_t batch = 0, head = 0, query = 0, key = 0;
};

struct Problem {
    int64_t batch, heads, heads_kv, len_q, len_k, head_dim, head_dim_v;
    Type type;  // of query, key, value and what is computed from them
    Rows query, key, value;
    Mask attn_mask, key_mask, sinks;      // key_mask: query stride 0; sinks: only batch and head
    const float* alibi_slopes = nullptr;  // (B, H)
    int64_t alibi_batch = 0, alibi_head = 0;
    double scale;
    int64_t position_offset, window_left, window_right;  // sizes of -1 leave a side open
    double softcap;
    uint32_t seed[2] = {0, 0};
    uint32_t dropout_threshold = 0;  // 16-bit lanes below it are dropped
    float keep_scale = 1.0f;

    int64_t group() const { return heads / heads_kv; }
    bool has_dropout() const { return dropout_threshold > 0; }
};

// The keys of one head are split between `groups` threads in backward, each of which keeps the gradients of a chunk of
// keys at a time.
constexpr int64_t BACKWARD_CHUNK = 512, BACKWARD_BLOCK_K = 64;

// (Static: a function that levels share must not be compiled for one of them.)
static constexpr int64_t backward_chunk(int64_t len_k, int64_t groups) {
    const int64_t share = (len_k + groups - 1) / groups;
    const int64_t blocks = (share + BACKWARD_BLOCK_K - 1) / BACKWARD_BLOCK_K;
    return blocks < 1                                   ? BACKWARD_BLOCK_K
           : blocks * BACKWARD_BLOCK_K < BACKWARD_CHUNK ? blocks * BACKWARD_BLOCK_K
                                                        : BACKWARD_CHUNK;
}

struct ForwardResults {
    Rows out;
    float *lse, *lse_residual;  // (B, H, L), contiguous
};

struct BackwardInputs {
    Rows grad_out, out;
    const float *grad_lse, *lse, *lse_residual;  // (B, H, L), contiguous; grad_lse may be null
};

struct BackwardResults {  // null data where not wanted
    Rows grad_query, grad_key, grad_value;
    Mask grad_attn_mask;        // in the shape and type of attn_mask, strides 0 where it is broadcast
    Mask grad_key_mask;         // (B, H, S)
    float* delta;               // (B, H, L): rowsum(out * grad_out) - grad_lse
    float* partial_grad_query;  // (groups, B, H, L, E) float32; null where one chunk holds all keys
    int64_t groups;
};

struct WeightsResults {
    const float* lse;  // (B, H, L), contiguous
    void* weights;     // (B, L, S) averaged over heads, or (B, H, L, S); contiguous
    bool average_heads;
};

// Threads and scratch memory, which come from torch; the kernels know nothing of it.
struct Runtime {
    int threads;
    void (*parallel)(int64_t tasks, void (*body)(int64_t task, void* context), void* context);
    void* (*scratch)(size_t bytes);  // the calling thread's, kept between calls; holds nothing to rely on
    void* (*workspace)(
        size_t bytes);  // likewise, for results that the threads of a call share: taken before they start
};

// What the benchmark holds the kernels against; see ceilings.h.
enum class Ceiling : int32_t { fma, dot, amx, read };

struct DecodeProblem;  // decode_problem.h
struct DecodeResults;
struct Matrix;  // gemm_problem.h
struct LinearProblem;
struct LinearGradients;
struct FeedForwardProblem;
struct FeedForwardResults;
struct FeedForwardGradients;
struct NormProblem;  // norm_problem.h
struct NormResults;
struct NormGradients;
struct RotaryProblem;  // rotary_problem.h

// The kernels of one instruction set level.
struct Kernels {
    const char* level;
    void (*forward)(const Problem&, const ForwardResults&, const Runtime&);
    void (*backward)(const Problem&, const BackwardInputs&, const BackwardResults&, const Runtime&);
    int64_t (*memory)(const Problem&, int64_t backward_groups, const Runtime&);  // bytes; of forward alone for 0 groups
    void (*weights)(const Problem&, const WeightsResults&, const Runtime&);
    double (*ceiling)(Ceiling, const void* data, int64_t bytes, int64_t rounds);  // see ceilings.h
    void (*decode)(const DecodeProblem&, const DecodeResults&, const Runtime&);
    void (*linear_forward)(const LinearProblem&, const Matrix& out, const Runtime&);
    void (*linear_backward)(const LinearProblem&, const LinearGradients&, const Runtime&);
    int64_t (*linear_memory)(const LinearProblem&, bool backward, const Runtime&);  // bytes
    // Bytes of a weight (rows, columns) packed for good, 0 where this level gains nothing by it; and packs it, if the
    // products of what is packed are those of the weight.
    int64_t (*packed_bytes)(Type, int64_t rows, int64_t columns);
    bool (*pack_weight)(Type, const Matrix& weight, int64_t rows, int64_t columns, void* to, const Runtime&);
    void (*feed_forward_forward)(const FeedForwardProblem&, const FeedForwardResults&, const Runtime&);
    void (*feed_forward_backward)(const FeedForwardProblem&, const FeedForwardGradients&, const Runtime&);
    int64_t (*feed_forward_memory)(const FeedForwardProblem&, bool backward, bool recompute, const Runtime&);
    void (*norm_forward)(const NormProblem&, const NormResults&, const Runtime&);
    void (*norm_backward)(const NormProblem&, const NormGradients&, const Runtime&);
    void (*rotate)(const RotaryProblem&);
};

}  // namespace fusedformer
