// A few tokens through layers of a decoder, over caches, as torch sees it: one call, whose only caller is
// transformer/decoder_step.py.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "decoder_layer.h"

namespace fusedformer {
namespace {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// What is given for each layer, in the order of `LayerTensors` in transformer/decoder_step.py.
// clang-format off
enum Slot : size_t {
    IN_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS,
    MEMORY_IN_WEIGHT, MEMORY_IN_BIAS, MEMORY_OUT_WEIGHT, MEMORY_OUT_BIAS,
    WEIGHT1, BIAS1, GATE_WEIGHT, GATE_BIAS, WEIGHT2, BIAS2,
    NORM1_WEIGHT, NORM1_BIAS, NORM2_WEIGHT, NORM2_BIAS, NORM3_WEIGHT, NORM3_BIAS,
    QUERY_NORM_WEIGHT, KEY_NORM_WEIGHT,
    SLOTS
};
// clang-format on
constexpr size_t NORMS = 5, WEIGHTS = 7;  // of a layer at most: epsilons, and packed copies, in the order of `Slot`

bool has_memory(const MaybeTensor* slots) { return slots[MEMORY_IN_WEIGHT].has_value(); }

// (M, H, S, E), each shared by as many rows of the batch.
bool is_memory(const Tensor& x, const DecodeProblem& self) {
    return is_read(x, self.type) && self.batch % x.size(0) == 0 && x.size(1) == self.heads &&
           x.size(3) == self.head_dim;
}

bool is_mask_or_none(const MaybeTensor& x, const Tensor& memory) {
    return !x || (x->scalar_type() == torch::headeronly::ScalarType::Bool && x->dim() == 2 &&
                  x->size(0) == memory.size(0) && x->size(1) == memory.size(2));
}

bool are_rotations_or_none(const MaybeTensor& x, int64_t rows, int64_t head_dim) {
    return !x || (x->scalar_type() == torch::headeronly::ScalarType::Float && x->is_contiguous() &&
                  x->numel() == rows * head_dim && head_dim % 2 == 0);
}

// Reads one layer. What does not fit makes `fits` false, and is another way's to name.
struct Reader {
    const Tensor& x;
    const MaybeTensor* slots;   // SLOTS of them
    const double* eps;          // NORMS
    const MaybeTensor* packed;  // WEIGHTS
    const Kernels& kernels;
    bool fits = true;

    bool check(bool condition) { return fits = fits && condition; }

    Weights weights(Slot slot, int64_t out, int64_t in, size_t number) {
        const MaybeTensor &weight = slots[slot], &bias = slots[slot + 1];
        if (!check(weight && is_matrix(*weight, x, out, in) && is_vector_or_none(bias, x, out))) return {};
        return {matrix(*weight), pointer(bias), packed_for(packed[number], *weight, kernels)};
    }

    Norm norm(const MaybeTensor& weight, const MaybeTensor& bias, int64_t features, size_t number) {
        if (!check(is_vector_or_none(weight, x, features) && is_vector_or_none(bias, x, features) && eps[number] >= 0))
            return {};
        auto vector = [&](const MaybeTensor& v) { return v ? NormVector{type_of(x), v->data_ptr()} : NormVector{}; };
        return {vector(weight), vector(bias), static_cast<float>(eps[number])};
    }

    void parameters(DecoderLayer& layer, const DecodeProblem& self) {
        const int64_t d_model = x.size(2), width = self.heads * self.head_dim;
        if (!check(slots[WEIGHT1] && slots[WEIGHT1]->dim() == 2)) return;
        const int64_t d_ff = layer.d_ff = slots[WEIGHT1]->size(0);
        layer.in = weights(IN_WEIGHT, width + 2 * self.heads_kv * self.head_dim, d_model, 0);
        layer.out = weights(OUT_WEIGHT, d_model, width, 1);
        if (has_memory(slots)) {
            layer.memory_in = weights(MEMORY_IN_WEIGHT, 3 * width, d_model, 2);
            layer.memory_in.packed = nullptr;  // of which the query's part is read alone
            layer.memory_out = weights(MEMORY_OUT_WEIGHT, d_model, width, 3);
        }
        layer.first = weights(WEIGHT1, d_ff, d_model, 4);
        if (slots[GATE_WEIGHT]) layer.gate = weights(GATE_WEIGHT, d_ff, d_model, 5);
        layer.second = weights(WEIGHT2, d_model, d_ff, 6);
        for (size_t i = 0; i < 3; i++)
            layer.norms[i] = norm(slots[NORM1_WEIGHT + 2 * i], slots[NORM1_BIAS + 2 * i], d_model, i);
        layer.query_norm = norm(slots[QUERY_NORM_WEIGHT], {}, self.head_dim, 3);
        layer.key_norm = norm(slots[KEY_NORM_WEIGHT], {}, self.head_dim, 4);
    }

    void memory(DecoderLayer& layer, const DecodeProblem& self, const Tensor& key, const Tensor& value,
                const MaybeTensor& mask) {
        if (!check(is_memory(key, self) && is_memory(value, self) && is_mask_or_none(mask, key))) return;
        const int64_t memories = key.size(0), len_memory = key.size(2);
        if (!check(value.size(0) == memories && value.size(2) == len_memory)) return;
        Problem& p = layer.memory;
        p.type = self.type, p.batch = memories, p.heads = p.heads_kv = self.heads;
        p.len_q = self.batch * self.len_q / memories, p.len_k = len_memory;
        p.head_dim = p.head_dim_v = self.head_dim;
        p.key = rows(key), p.value = rows(value);
        if (mask) p.key_mask = {Type::boolean, mask->data_ptr(), stride(*mask, 0), 0, 0, stride(*mask, 1)};
        p.scale = self.scale, p.position_offset = 0, p.softcap = 0.0;
        p.window_left = p.window_right = -1;
    }
};

// As few checks as a small call can bear: nothing has been appended where it returns nothing.
MaybeTensor step(Tensor x, MaybeTensors slots, Tensors key_caches, Tensors value_caches, Tensor cache_seqlens,
                 MaybeTensor block_table, Tensors memory_keys, Tensors memory_values, MaybeTensor memory_mask,
                 MaybeTensor cos, MaybeTensor sin, int64_t heads, bool norm_first, bool subtract_mean,
                 int64_t activation, std::vector<double> eps, std::vector<int64_t> windows, MaybeTensors packed) {
    const size_t count = key_caches.size();
    if (x.dim() != 3 || !are_rows(x) || heads < 1 || count == 0 || value_caches.size() != count) return {};
    if (slots.size() != count * SLOTS || eps.size() != count * NORMS || packed.size() != count * WEIGHTS) return {};
    if (windows.size() != count || memory_keys.size() != memory_values.size()) return {};
    const Kernels& kernels = chosen_kernels();
    std::vector<DecoderLayer> layers(count);
    for (size_t i = 0; i < count; i++) {
        DecoderLayer& layer = layers[i];
        DecodeProblem& self = layer.self;
        self.type = type_of(x), self.batch = x.size(0), self.len_q = self.appended = x.size(1), self.heads = heads;
        self.head_dim = key_caches[i].dim() == 4 ? key_caches[i].size(3) : 0;
        auto lengths = use_cache(self, key_caches[i], value_caches[i], cache_seqlens, block_table);
        if (!lengths || self.head_dim_v != self.head_dim || heads % self.heads_kv != 0) return {};
        if (self.heads_kv != layers[0].self.heads_kv || self.head_dim != layers[0].self.head_dim) return {};
        layer.lengths = std::move(*lengths);
        self.scale = 1.0 / std::sqrt(static_cast<double>(self.head_dim));
        self.window_left = windows[i], self.window_right = 0, self.softcap = 0.0;
        Reader reader = {x, &slots[i * SLOTS], &eps[i * NORMS], &packed[i * WEIGHTS], kernels};
        reader.parameters(layer, self);
        if (has_memory(reader.slots)) {
            if (i >= memory_keys.size()) return {};
            reader.memory(layer, self, memory_keys[i], memory_values[i], memory_mask);
        }
        if (!reader.fits) return {};
    }
    const DecodeProblem& self = layers[0].self;
    for (const MaybeTensor* angles : {&cos, &sin})
        if (!are_rotations_or_none(*angles, self.batch * self.len_q, self.head_dim)) return {};
    if (cos.has_value() != sin.has_value()) return {};

    auto floats = [](const MaybeTensor& v) { return static_cast<const float*>(pointer(v)); };
    const DecoderOptions options = {norm_first, subtract_mean, static_cast<Activation>(activation), floats(cos),
                                    floats(sin)};
    Tensor result = new_rows(x, x.size(2));
    DecoderStep decoder(kernels, options, self, x.size(2));
    for (size_t i = 0; i < count; i++)
        decoder.run(layers[i], (i == 0 ? x : result).data_ptr(), result.data_ptr(),
                    i + 1 < count ? layers[i + 1].begin() : nullptr);
    return result;
}

}  // namespace
}  // namespace fusedformer

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def(
        "decoder_step_cpu(Tensor x, Tensor?[] layers, Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, "
        "Tensor cache_seqlens, Tensor? block_table, Tensor[] memory_keys, Tensor[] memory_values, "
        "Tensor? memory_mask, Tensor? cos, Tensor? sin, int heads, bool norm_first, bool subtract_mean, "
        "int activation, float[] eps, int[] windows, Tensor?[] packed) -> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) { m.impl("decoder_step_cpu", TORCH_BOX(&fusedformer::step)); }
