// The attention operators as torch sees them: tensors become the pointers and strides of `Problem`, nothing else.
// kernels/attention/native_cpu.py allocates the results and is their only caller, so the checks are its.
#include <torch/csrc/stable/library.h>

#include <string>

#include "decode_problem.h"
#include "level.h"
#include "runtime.h"
#include "tensors.h"

namespace fusedformer {
namespace {

Mask mask(const MaybeTensor& x) {  // (B, H, L, S)
    if (!x) return {};
    return {type_of(*x), x->data_ptr(), stride(*x, 0), stride(*x, 1), stride(*x, 2), stride(*x, 3)};
}

Mask key_mask(const MaybeTensor& x) {  // (B, H, S)
    if (!x) return {};
    return {type_of(*x), x->data_ptr(), stride(*x, 0), stride(*x, 1), 0, stride(*x, 2)};
}

float* floats(const MaybeTensor& x) { return x ? static_cast<float*>(x->data_ptr()) : nullptr; }

Problem problem(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                const MaybeTensor& masked_keys, const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                const MaybeTensor& seed, double scale, int64_t position_offset, int64_t window_left,
                int64_t window_right, double softcap, int64_t dropout_threshold, double keep_scale) {
    Problem p;
    p.batch = query.size(0), p.heads = query.size(1), p.heads_kv = key.size(1);
    p.len_q = query.size(2), p.len_k = key.size(2), p.head_dim = query.size(3), p.head_dim_v = value.size(3);
    p.type = type_of(query);
    p.query = rows(query), p.key = rows(key), p.value = rows(value);
    p.attn_mask = mask(attn_mask), p.key_mask = key_mask(masked_keys), p.sinks = per_head(sinks);
    if (alibi_slopes) {
        p.alibi_slopes = floats(alibi_slopes);
        p.alibi_batch = stride(*alibi_slopes, 0), p.alibi_head = stride(*alibi_slopes, 1);
    }
    p.scale = scale, p.position_offset = position_offset, p.softcap = softcap;
    p.window_left = window_left, p.window_right = window_right;
    p.dropout_threshold = static_cast<uint32_t>(dropout_threshold), p.keep_scale = static_cast<float>(keep_scale);
    if (seed) {
        const auto* words = static_cast<const int64_t*>(seed->data_ptr());
        p.seed[0] = static_cast<uint32_t>(words[0]), p.seed[1] = static_cast<uint32_t>(words[seed->stride(0)]);
    }
    return p;
}

void forward(Tensor query, Tensor key, Tensor value, MaybeTensor attn_mask, MaybeTensor masked_keys,
             MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor seed, double scale, int64_t position_offset,
             int64_t window_left, int64_t window_right, double softcap, int64_t dropout_threshold, double keep_scale,
             bool return_lse, Tensor out, Tensor lse, Tensor lse_residual) {
    const Problem p = problem(query, key, value, attn_mask, masked_keys, alibi_slopes, sinks, seed, scale,
                              position_offset, window_left, window_right, softcap, dropout_threshold, keep_scale);
    attend(p, {rows(out), floats(lse), floats(lse_residual)}, return_lse);
}

void backward(Tensor grad_out, MaybeTensor grad_lse, Tensor out, Tensor lse, Tensor lse_residual, Tensor query,
              Tensor key, Tensor value, MaybeTensor attn_mask, MaybeTensor masked_keys, MaybeTensor alibi_slopes,
              MaybeTensor sinks, MaybeTensor seed, double scale, int64_t position_offset, int64_t window_left,
              int64_t window_right, double softcap, int64_t dropout_threshold, double keep_scale,
              MaybeTensor grad_query, MaybeTensor grad_key, MaybeTensor grad_value, MaybeTensor grad_attn_mask,
              MaybeTensor grad_key_mask, Tensor delta, MaybeTensor partial_grad_query) {
    const Problem p = problem(query, key, value, attn_mask, masked_keys, alibi_slopes, sinks, seed, scale,
                              position_offset, window_left, window_right, softcap, dropout_threshold, keep_scale);
    const BackwardInputs inputs = {rows(grad_out), rows(out), floats(grad_lse), floats(lse), floats(lse_residual)};
    const BackwardResults results = {rows(grad_query),           rows(grad_key),
                                     rows(grad_value),           mask(grad_attn_mask),
                                     key_mask(grad_key_mask),    floats(delta),
                                     floats(partial_grad_query), partial_grad_query ? partial_grad_query->size(0) : 1};
    chosen_kernels().backward(p, inputs, results, runtime());
}

void weights(Tensor lse, Tensor query, Tensor key, Tensor value, MaybeTensor attn_mask, MaybeTensor masked_keys,
             MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor seed, double scale, int64_t position_offset,
             int64_t window_left, int64_t window_right, double softcap, int64_t dropout_threshold, double keep_scale,
             Tensor result, bool average_heads) {
    const Problem p = problem(query, key, value, attn_mask, masked_keys, alibi_slopes, sinks, seed, scale,
                              position_offset, window_left, window_right, softcap, dropout_threshold, keep_scale);
    chosen_kernels().weights(p, {floats(lse), result.data_ptr(), average_heads}, runtime());
}

// Bytes that the kernels take beyond their results, for `explain`; of forward alone for 0 groups.
int64_t memory(int64_t element_size, int64_t batch, int64_t heads, int64_t heads_kv, int64_t len_q, int64_t len_k,
               int64_t head_dim, int64_t head_dim_v, bool mask_per_head, int64_t backward_groups) {
    Problem p{};
    p.type = element_size == 4 ? Type::float32 : Type::bfloat16;
    p.batch = batch, p.heads = heads, p.heads_kv = heads_kv, p.len_q = len_q, p.len_k = len_k;
    p.head_dim = head_dim, p.head_dim_v = head_dim_v, p.scale = 1.0;
    static bool some_mask;
    if (mask_per_head) p.key_mask = {Type::boolean, &some_mask, 0, 1, 0, 1};
    return chosen_kernels().memory(p, backward_groups, runtime());
}

// A line for each level, best first: its name, and after a colon why this machine refuses it.
std::string level_table() {
    std::string lines;
    for (const Level& level : levels())
        lines += std::string(level.kernels->level) + (level.refusal.empty() ? "" : ": " + level.refusal) + "\n";
    return lines;
}

std::string level_in_use() { return chosen_kernels().level; }

#define INPUTS                                                                                            \
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_mask, Tensor? alibi_slopes, " \
    "Tensor? sinks, Tensor? seed, float scale, int position_offset, int window_left, int window_right, "  \
    "float softcap, int dropout_threshold, float keep_scale"

}  // namespace

void attend(const Problem& p, const ForwardResults& results, bool return_lse) {
    if (!return_lse && is_decode(p)) return decode({p}, results.out, results.lse, results.lse_residual);
    chosen_kernels().forward(p, results, runtime());
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def("attention_forward_cpu(" INPUTS
          ", bool return_lse, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) lse_residual) -> ()");
    m.def(
        "attention_backward_cpu(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor lse_residual, " INPUTS
        ", Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, Tensor(d!)? grad_attn_mask, "
        "Tensor(e!)? grad_key_mask, Tensor(f!) delta, Tensor(g!)? partial_grad_query) -> ()");
    m.def("attention_weights_cpu(Tensor lse, " INPUTS ", Tensor(a!) weights, bool average_heads) -> ()");
    m.def(
        "attention_memory_cpu(int element_size, int batch, int heads, int heads_kv, int len_q, int len_k, int "
        "head_dim, "
        "int head_dim_v, bool mask_per_head, int backward_groups) -> int");
    m.def("cpu_levels() -> str");
    m.def("cpu_level() -> str");
    m.def("choose_cpu_level(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("attention_forward_cpu", TORCH_BOX(&forward));
    m.impl("attention_backward_cpu", TORCH_BOX(&backward));
    m.impl("attention_weights_cpu", TORCH_BOX(&weights));
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CompositeExplicitAutograd, m) {
    m.impl("attention_memory_cpu", TORCH_BOX(&memory));
    m.impl("cpu_levels", TORCH_BOX(&level_table));
    m.impl("cpu_level", TORCH_BOX(&level_in_use));
    m.impl("choose_cpu_level", TORCH_BOX(&choose_level));
}

}  // namespace fusedformer
