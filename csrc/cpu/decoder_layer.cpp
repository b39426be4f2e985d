// A few tokens through a whole decoder layer, over caches: its attentions, norms and feed-forward network in one call,
// by the kernels that calls of their own would run, so that no bit differs. Between so small calls the time of a step
// would be lost, and memory would rest.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>

#include "decode_tensors.h"
#include "gemm_tensors.h"
#include "level.h"
#include "norm_problem.h"
#include "runtime.h"

namespace {

using namespace fusedformer;

struct Weights {  // (out, in) and (out,)
    const Tensor& weight;
    const MaybeTensor& bias;
    void* packed;  // as Kernels::pack_weight left it, or null

    bool fit(const Tensor& x, int64_t out, int64_t in) const {
        return is_matrix(weight, x, out, in) && is_vector_or_none(bias, x, out);
    }
};

struct Norm {
    const MaybeTensor &weight, &bias;
    double eps;

    bool fits(const Tensor& x, int64_t features) const {
        return is_vector_or_none(weight, x, features) && is_vector_or_none(bias, x, features) && eps >= 0.0;
    }
};

// A layer's products and norms over `rows` rows.
struct Layer {
    const Kernels& kernels;
    const Type type;
    const int64_t rows, d_model;
    const Runtime threads = runtime();

    // The first `features` of the product; `then` is what will be read next.
    void linear(const Weights& w, int64_t features, void* input, void* out, const void* then) const {
        LinearProblem p = {rows, d_model, features, type, {input, d_model}, matrix(w.weight), pointer(w.bias)};
        p.packed_weight = w.packed, p.then = then;
        kernels.linear_forward(p, {out, features}, threads);
    }

    // out = norm(input + residual); that sum too, where wanted.
    void norm(const Norm& n, void* input, void* residual, void* out, void* sum = nullptr) const {
        auto vector = [&](const MaybeTensor& x) { return x ? NormVector{type, x->data_ptr()} : NormVector{}; };
        NormProblem p;
        p.rows = rows, p.features = d_model, p.type = p.input_type = type;
        p.input = {input, d_model}, p.residual = {residual, residual ? d_model : 0};
        p.weight = vector(n.weight), p.bias = vector(n.bias), p.eps = static_cast<float>(n.eps);
        kernels.norm_forward(p, {out, sum, nullptr, nullptr}, threads);
    }

    // The network; with the residual added where there is one.
    void feed_forward(const Weights& first, const Weights& second, Activation activation, void* input, void* residual,
                      void* out) const {
        FeedForwardProblem p;
        p.tokens = rows, p.d_in = p.d_out = d_model, p.d_ff = first.weight.size(0), p.type = type;
        p.input = {input, d_model}, p.residual = {residual, residual ? d_model : 0};
        p.weight1 = matrix(first.weight), p.bias1 = pointer(first.bias), p.packed1 = first.packed;
        p.weight2 = matrix(second.weight), p.bias2 = pointer(second.bias), p.packed2 = second.packed;
        p.activation = activation;
        kernels.feed_forward_forward(p, {{out, d_model}, {}, {}}, threads);
    }
};

// (M, H, S, E), each shared by as many rows of the batch.
bool is_memory(const Tensor& x, Type type, int64_t batch, int64_t heads, int64_t head_dim) {
    return is_read(x, type) && batch % x.size(0) == 0 && x.size(1) == heads && x.size(3) == head_dim;
}

bool is_mask_or_none(const MaybeTensor& x, const Tensor& memory) {
    return !x || (x->scalar_type() == torch::headeronly::ScalarType::Bool && x->dim() == 2 &&
                  x->size(0) == memory.size(0) && x->size(1) == memory.size(2));
}

// As few checks as a small call can bear: nothing has been appended where it returns nothing.
MaybeTensor step(Tensor x, Tensor in_weight, MaybeTensor in_bias, Tensor out_weight, MaybeTensor out_bias,
                 Tensor memory_in_weight, MaybeTensor memory_in_bias, Tensor memory_out_weight,
                 MaybeTensor memory_out_bias, Tensor weight1, MaybeTensor bias1, Tensor weight2, MaybeTensor bias2,
                 MaybeTensor norm1_weight, MaybeTensor norm1_bias, MaybeTensor norm2_weight, MaybeTensor norm2_bias,
                 MaybeTensor norm3_weight, MaybeTensor norm3_bias, Tensor key_cache, Tensor value_cache,
                 Tensor cache_seqlens, MaybeTensor block_table, Tensor memory_key, Tensor memory_value,
                 MaybeTensor memory_mask, int64_t heads, bool norm_first, int64_t activation, double eps1, double eps2,
                 double eps3, MaybeTensor packed_in, MaybeTensor packed_out, MaybeTensor packed_memory_out,
                 MaybeTensor packed1, MaybeTensor packed2) {
    if (x.dim() != 3 || !are_rows(x) || heads < 1 || x.size(2) % heads != 0 || weight1.dim() != 2) return {};
    const int64_t batch = x.size(0), length = x.size(1), d_model = x.size(2), head_dim = d_model / heads;
    const int64_t d_ff = weight1.size(0), rows = batch * length;
    const Type type = type_of(x);
    const Kernels& kernels = chosen_kernels();
    for (const Tensor* weight : {&in_weight, &out_weight, &memory_in_weight, &memory_out_weight, &weight2})
        if (weight->dim() != 2 || !is_computed(*weight)) return {};
    if (!is_computed(weight1)) return {};
    auto weights = [&](const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed) {
        return Weights{weight, bias, packed_for(packed, weight, kernels)};
    };
    const Weights in = weights(in_weight, in_bias, packed_in), out = weights(out_weight, out_bias, packed_out);
    const Weights memory_in = weights(memory_in_weight, memory_in_bias, {});
    const Weights memory_out = weights(memory_out_weight, memory_out_bias, packed_memory_out);
    const Weights first = weights(weight1, bias1, packed1), second = weights(weight2, bias2, packed2);
    for (const Weights* w : {&in, &memory_in})
        if (!w->fit(x, 3 * d_model, d_model)) return {};
    for (const Weights* w : {&out, &memory_out})
        if (!w->fit(x, d_model, d_model)) return {};
    if (!first.fit(x, d_ff, d_model) || !second.fit(x, d_model, d_ff)) return {};
    const Norm norm1 = {norm1_weight, norm1_bias, eps1}, norm2 = {norm2_weight, norm2_bias, eps2};
    const Norm norm3 = {norm3_weight, norm3_bias, eps3};
    for (const Norm* norm : {&norm1, &norm2, &norm3})
        if (!norm->fits(x, d_model)) return {};
    for (const Tensor* kept : {&memory_key, &memory_value})
        if (!is_memory(*kept, type, batch, heads, head_dim)) return {};
    const int64_t memories = memory_key.size(0), len_memory = memory_key.size(2);
    if (memory_value.size(0) != memories || memory_value.size(2) != len_memory) return {};
    if (!is_mask_or_none(memory_mask, memory_key)) return {};

    DecodeProblem own;
    own.type = type, own.batch = batch, own.heads = heads, own.len_q = length, own.head_dim = head_dim;
    own.appended = length;
    const auto lengths = use_cache(own, key_cache, value_cache, cache_seqlens, block_table);
    if (!lengths || own.heads_kv != heads || own.head_dim_v != head_dim) return {};
    own.lengths = lengths->data();
    own.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    own.window_left = -1, own.window_right = 0, own.softcap = 0.0;

    // Three of d_model for query, key and value of a token; the others are of the same size.
    const int64_t item = type == Type::float32 ? 4 : 2, row_bytes = d_model * item;
    const std::unique_ptr<char[]> memory(new char[7 * rows * row_bytes]);
    const std::unique_ptr<float[]> lse(new float[2 * rows * heads]);
    char* const projected = memory.get();
    char *const attended = projected + 3 * rows * row_bytes, *const update = attended + rows * row_bytes;
    char *const normed = update + rows * row_bytes, *const sum = normed + rows * row_bytes;
    Tensor result = new_rows(x, d_model);
    const Layer layer = {kernels, type, rows, d_model};
    auto by_head = [&](void* data, int64_t stride, int64_t tokens) {
        return Rows{data, tokens * stride, head_dim, stride};
    };

    // x, or its norm, goes in; the sums of x and what has been computed are the residuals.
    void* residual = x.data_ptr();
    if (norm_first) layer.norm(norm1, residual, nullptr, normed);
    layer.linear(in, 3 * d_model, norm_first ? normed : residual, projected, out_weight.data_ptr());
    own.query = by_head(projected, 3 * d_model, length);
    append_and_attend(own, by_head(projected + row_bytes, 3 * d_model, length),
                      by_head(projected + 2 * row_bytes, 3 * d_model, length), by_head(attended, d_model, length),
                      lse.get());
    layer.linear(out, d_model, attended, update, memory_in_weight.data_ptr());
    if (norm_first)
        layer.norm(norm2, update, residual, normed, sum);
    else
        layer.norm(norm1, update, residual, normed);
    residual = norm_first ? sum : normed;

    layer.linear(memory_in, d_model, normed, projected, memory_key.data_ptr());
    const int64_t shared = rows / memories;
    Problem of_memory;
    of_memory.type = type, of_memory.batch = memories, of_memory.heads = of_memory.heads_kv = heads;
    of_memory.len_q = shared, of_memory.len_k = len_memory;
    of_memory.head_dim = of_memory.head_dim_v = head_dim;
    of_memory.query = by_head(projected, d_model, shared);
    of_memory.key = fusedformer::rows(memory_key), of_memory.value = fusedformer::rows(memory_value);
    if (memory_mask)
        of_memory.key_mask = {Type::boolean,          memory_mask->data_ptr(), stride(*memory_mask, 0), 0, 0,
                              stride(*memory_mask, 1)};
    of_memory.scale = own.scale, of_memory.position_offset = 0, of_memory.softcap = 0.0;
    of_memory.window_left = of_memory.window_right = -1;
    attend(of_memory, {by_head(attended, d_model, shared), lse.get(), lse.get() + rows * heads}, false);
    layer.linear(memory_out, d_model, attended, update, weight1.data_ptr());

    const auto function = static_cast<Activation>(activation);
    if (norm_first) {
        layer.norm(norm3, update, residual, normed, projected);
        layer.feed_forward(first, second, function, normed, projected, result.data_ptr());
    } else {
        layer.norm(norm2, update, residual, sum);
        layer.feed_forward(first, second, function, sum, nullptr, update);
        layer.norm(norm3, update, sum, result.data_ptr());
    }
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def(
        "decoder_layer_plain_cpu(Tensor x, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, "
        "Tensor memory_in_weight, Tensor? memory_in_bias, Tensor memory_out_weight, Tensor? memory_out_bias, "
        "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? norm1_weight, Tensor? norm1_bias, "
        "Tensor? norm2_weight, Tensor? norm2_bias, Tensor? norm3_weight, Tensor? norm3_bias, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? block_table, Tensor memory_key, Tensor memory_value, "
        "Tensor? memory_mask, int heads, bool norm_first, int activation, float eps1, float eps2, float eps3, "
        "Tensor? packed_in, Tensor? packed_out, Tensor? packed_memory_out, Tensor? packed1, Tensor? packed2) "
        "-> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) { m.impl("decoder_layer_plain_cpu", TORCH_BOX(&step)); }
