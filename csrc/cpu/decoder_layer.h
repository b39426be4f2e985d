// A decoder layer over a few rows, by the kernels that calls of their own would run, so that no bit differs. Between so
// small calls the time of a step would be lost, and memory would rest.
#pragma once

#include <memory>
#include <vector>

#include "decode_tensors.h"
#include "gemm_tensors.h"
#include "level.h"
#include "norm_problem.h"
#include "rotary_problem.h"
#include "runtime.h"

namespace fusedformer {

struct Weights {  // (out, in) and (out,); null data where the layer has no such part
    Matrix weight;
    const void* bias = nullptr;
    void* packed = nullptr;  // as Kernels::pack_weight left it, or null
};

struct Norm {
    NormVector weight, bias;
    float eps = 0.0f;
};

// All that is read of a layer; `memory` is what an encoder has left. Its sublayers are self-attention, attention to the
// memory if there is one, and the feed-forward network.
struct DecoderLayer {
    Weights in, out, memory_in, memory_out, first, gate, second;
    Norm norms[3];              // of the sublayers, in their order
    Norm query_norm, key_norm;  // of each head, before it is rotated; null data where there is none
    int64_t d_ff;
    DecodeProblem self;  // but for its query and lengths
    std::vector<int64_t> lengths;
    Problem memory;  // but for its query

    bool has_memory() const { return memory_in.weight.data != nullptr; }
    // What is read first.
    const void* begin() const { return in.weight.data; }
};

struct DecoderOptions {  // of all layers
    bool norm_first, subtract_mean;
    Activation activation;
    const float *cos, *sin;  // (rows, head_dim) of the rotations, or null
};

// The layers one after the other: as much memory as one of them takes.
class DecoderStep {
  public:
    DecoderStep(const Kernels& kernels, const DecoderOptions& options, const DecodeProblem& self, int64_t d_model)
        : kernels_(kernels),
          options_(options),
          type_(self.type),
          rows_(self.batch * self.len_q),
          d_model_(d_model),
          projected_width_((self.heads + 2 * self.heads_kv) * self.head_dim),
          attended_width_(self.heads * self.head_dim),
          memory_(new char[rows_ * (projected_width_ + attended_width_ + 4 * d_model) * item()]),
          lse_(new float[2 * rows_ * self.heads]) {
        char* free = memory_.get();
        auto take = [&](int64_t width) {
            char* const taken = free;
            free += rows_ * width * item();
            return taken;
        };
        projected_ = take(projected_width_), attended_ = take(attended_width_);
        update_ = take(d_model), normed_ = take(d_model);
        sums_[0] = take(d_model), sums_[1] = take(d_model);
    }

    // From `x` to `out`, both (rows, d_model) and perhaps the same; `then` is what will be read next.
    void run(const DecoderLayer& layer, void* x, void* out, const void* then) {
        const Norm* next_norm = layer.norms;
        void *input = x, *residual = x;  // of a sublayer; `update_` is what it makes of them
        auto add_norm = [&] {
            void* const sum = residual == sums_[0] ? sums_[1] : sums_[0];
            if (options_.norm_first)
                norm(*next_norm++, update_, residual, input = normed_, sum);
            else
                norm(*next_norm++, update_, residual, input = sum);
            residual = sum;
        };
        if (options_.norm_first) norm(*next_norm++, x, nullptr, input = normed_);
        attend_self(layer, input);
        add_norm();
        if (layer.has_memory()) {
            attend_memory(layer, input);
            add_norm();
        }
        if (options_.norm_first) return feed_forward(layer, input, residual, out, then);
        feed_forward(layer, input, nullptr, update_, then);
        norm(*next_norm, update_, residual, out);
    }

  private:
    const Kernels& kernels_;
    const DecoderOptions& options_;
    const Type type_;
    const int64_t rows_, d_model_, projected_width_, attended_width_;
    const std::unique_ptr<char[]> memory_;
    const std::unique_ptr<float[]> lse_;
    const Runtime threads_ = runtime();
    char *projected_, *attended_, *update_, *normed_, *sums_[2];

    int64_t item() const { return type_ == Type::float32 ? 4 : 2; }

    static Rows by_head(void* data, int64_t stride, int64_t tokens, int64_t head_dim) {
        return {data, tokens * stride, head_dim, stride};
    }

    // The first `features` of the product.
    void linear(const Weights& w, void* input, int64_t in, void* out, int64_t features, const void* then) const {
        LinearProblem p = {rows_, in, features, type_, {input, in}, w.weight, w.bias};
        p.packed_weight = w.packed, p.then = then;
        kernels_.linear_forward(p, {out, features}, threads_);
    }

    // out = norm(input + residual); that sum too, where wanted.
    void norm(const Norm& n, void* input, void* residual, void* out, void* sum = nullptr) const {
        NormProblem p = norm_problem(n, rows_, d_model_, options_.subtract_mean);
        p.input = {input, d_model_}, p.residual = {residual, residual ? d_model_ : 0};
        kernels_.norm_forward(p, {out, sum, nullptr, nullptr}, threads_);
    }

    // Of each of `heads` heads of a row, in place.
    void norm_heads(const Norm& n, char* row, int64_t heads, int64_t head_dim) const {
        if (!n.weight.data) return;
        NormProblem p = norm_problem(n, heads, head_dim, false);
        p.input = {row, head_dim};
        kernels_.norm_forward(p, {row, nullptr, nullptr, nullptr}, threads_);
    }

    NormProblem norm_problem(const Norm& n, int64_t rows, int64_t features, bool subtract_mean) const {
        NormProblem p;
        p.rows = rows, p.features = features, p.type = p.input_type = type_, p.subtract_mean = subtract_mean;
        p.weight = n.weight, p.bias = n.bias, p.eps = n.eps;
        return p;
    }

    void attend_self(const DecoderLayer& layer, void* input) const {
        DecodeProblem p = layer.self;
        linear(layer.in, input, d_model_, projected_, projected_width_, layer.out.weight.data);
        const int64_t keys = p.heads * p.head_dim, values = keys + p.heads_kv * p.head_dim;
        for (int64_t row = 0; row < rows_; row++) {
            char* const query = projected_ + row * projected_width_ * item();
            norm_heads(layer.query_norm, query, p.heads, p.head_dim);
            norm_heads(layer.key_norm, query + keys * item(), p.heads_kv, p.head_dim);
        }
        if (options_.cos)
            kernels_.rotate({rows_, p.heads + p.heads_kv, p.head_dim, type_, projected_, projected_width_, options_.cos,
                             options_.sin});
        auto part = [&](int64_t first) {
            return by_head(projected_ + first * item(), projected_width_, p.len_q, p.head_dim);
        };
        p.query = part(0), p.lengths = layer.lengths.data();
        append_and_attend(p, part(keys), part(values), by_head(attended_, attended_width_, p.len_q, p.head_dim),
                          lse_.get());
        const Weights& next = layer.has_memory() ? layer.memory_in : layer.first;
        linear(layer.out, attended_, attended_width_, update_, d_model_, next.weight.data);
    }

    void attend_memory(const DecoderLayer& layer, void* input) const {
        Problem p = layer.memory;
        linear(layer.memory_in, input, d_model_, projected_, attended_width_, p.key.data);
        p.query = by_head(projected_, attended_width_, p.len_q, p.head_dim);
        attend(p, {by_head(attended_, attended_width_, p.len_q, p.head_dim), lse_.get(), lse_.get() + rows_ * p.heads},
               false);
        linear(layer.memory_out, attended_, attended_width_, update_, d_model_, layer.first.weight.data);
    }

    // The network; with the residual added where there is one.
    void feed_forward(const DecoderLayer& layer, void* input, void* residual, void* out, const void* then) const {
        FeedForwardProblem p;
        p.tokens = rows_, p.d_in = p.d_out = d_model_, p.d_ff = layer.d_ff, p.type = type_;
        p.input = {input, d_model_}, p.residual = {residual, residual ? d_model_ : 0};
        p.weight1 = layer.first.weight, p.bias1 = layer.first.bias, p.packed1 = layer.first.packed;
        p.gate_weight = layer.gate.weight, p.gate_bias = layer.gate.bias, p.packed_gate = layer.gate.packed;
        p.weight2 = layer.second.weight, p.bias2 = layer.second.bias, p.packed2 = layer.second.packed;
        p.activation = options_.activation, p.then = then;
        kernels_.feed_forward_forward(p, {{out, d_model_}, {}, {}}, threads_);
    }
};

}  // namespace fusedformer
