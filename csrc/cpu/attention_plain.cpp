// The shortest way to attention, for calls so small that checking and wrapping arguments is most of their time: one
// operator that looks at its three tensors, allocates and computes. Whatever is not plainly right it leaves, by
// returning nothing, to the way that says what is wrong.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>

#include "decode_problem.h"
#include "tensors.h"

namespace {

using namespace fusedformer;

constexpr int64_t DIMS = 4;

struct Shape {
    Sizes sizes, strides;

    explicit Shape(const Tensor& x) {
        for (int64_t i = 0; i < DIMS; i++) sizes[i] = x.size(i), strides[i] = x.stride(i);
    }
    bool readable() const {
        return strides[3] == 1 && std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; });
    }
    Rows rows(const Tensor& x) const { return {x.data_ptr(), strides[0], strides[1], strides[2]}; }
};

std::optional<Tensor> plain(Tensor query, Tensor key, Tensor value, std::optional<double> scale, bool is_causal,
                            bool enable_gqa) {
    if (query.dim() != DIMS || key.dim() != DIMS || value.dim() != DIMS) return std::nullopt;
    if (!is_computed(query) || !is_computed(key) || !is_computed(value)) return std::nullopt;
    const Type type = type_of(query);
    if (type_of(key) != type || type_of(value) != type) return std::nullopt;
    const Shape q(query), k(key), v(value);
    if (!q.readable() || !k.readable() || !v.readable()) return std::nullopt;
    const auto [batch, heads, len_q, head_dim] = q.sizes;
    const auto [batch_k, heads_kv, len_k, head_dim_k] = k.sizes;
    if (batch_k != batch || head_dim_k != head_dim || !std::equal(v.sizes.begin(), v.sizes.end() - 1, k.sizes.begin()))
        return std::nullopt;
    if (heads_kv != heads && (!enable_gqa || heads % heads_kv != 0)) return std::nullopt;

    const Sizes sizes = {batch, heads, len_q, v.sizes[3]}, strides = dense_strides(sizes, q.strides);
    Tensor out = new_tensor(query, DIMS, sizes.data(), strides.data());
    const int64_t rows = batch * heads * len_q;
    const std::unique_ptr<float[]> lse(new float[2 * rows]);

    Problem p;
    p.batch = batch, p.heads = heads, p.heads_kv = heads_kv, p.len_q = len_q, p.len_k = len_k;
    p.head_dim = head_dim, p.head_dim_v = sizes[3], p.type = type;
    p.query = q.rows(query), p.key = k.rows(key), p.value = v.rows(value);
    p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
    p.position_offset = 0, p.window_left = -1, p.window_right = is_causal ? 0 : -1, p.softcap = 0.0;
    const Rows out_rows = {out.data_ptr(), strides[0], strides[1], strides[2]};
    attend(p, {out_rows, lse.get(), lse.get() + rows}, false);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def(
        "attention_plain_cpu(Tensor query, Tensor key, Tensor value, float? scale, bool is_causal, bool enable_gqa) "
        "-> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) { m.impl("attention_plain_cpu", TORCH_BOX(&plain)); }
