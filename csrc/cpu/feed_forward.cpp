// The feed-forward operators as torch sees them. kernels/feed_forward/native_cpu.py allocates the results and is their
// only caller, so the checks are its.
#include <torch/csrc/stable/library.h>

#include "gemm_problem.h"
#include "gemm_tensors.h"
#include "level.h"
#include "runtime.h"

namespace {

using namespace fusedformer;

FeedForwardProblem problem(const Tensor& input, const Tensor& weight1, const Tensor& weight2, const MaybeTensor& bias1,
                           const MaybeTensor& bias2, const MaybeTensor& gate_weight, const MaybeTensor& gate_bias,
                           const MaybeTensor& residual, const MaybeTensor& seed, int64_t activation,
                           int64_t dropout_threshold, double keep_scale, int64_t residual_dropout_threshold,
                           double residual_keep_scale) {
    FeedForwardProblem p;
    p.tokens = input.size(0), p.d_in = input.size(1), p.d_ff = weight1.size(0), p.d_out = weight2.size(0);
    p.type = type_of(input);
    p.input = matrix(input), p.weight1 = matrix(weight1), p.weight2 = matrix(weight2);
    p.gate_weight = matrix(gate_weight), p.residual = matrix(residual);
    p.bias1 = pointer(bias1), p.bias2 = pointer(bias2), p.gate_bias = pointer(gate_bias);
    p.activation = static_cast<Activation>(activation);
    if (seed) {
        const auto* words = static_cast<const int64_t*>(seed->data_ptr());
        p.seed[0] = static_cast<uint32_t>(words[0]), p.seed[1] = static_cast<uint32_t>(words[seed->stride(0)]);
    }
    p.dropout_threshold = static_cast<uint32_t>(dropout_threshold), p.keep_scale = static_cast<float>(keep_scale);
    p.residual_dropout_threshold = static_cast<uint32_t>(residual_dropout_threshold);
    p.residual_keep_scale = static_cast<float>(residual_keep_scale);
    return p;
}

void forward(Tensor input, Tensor weight1, Tensor weight2, MaybeTensor bias1, MaybeTensor bias2,
             MaybeTensor gate_weight, MaybeTensor gate_bias, MaybeTensor residual, MaybeTensor seed, int64_t activation,
             int64_t dropout_threshold, double keep_scale, int64_t residual_dropout_threshold,
             double residual_keep_scale, Tensor out, MaybeTensor pre_activation, MaybeTensor pre_gate) {
    const FeedForwardProblem p =
        problem(input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual, seed, activation,
                dropout_threshold, keep_scale, residual_dropout_threshold, residual_keep_scale);
    chosen_kernels().feed_forward_forward(p, {matrix(out), matrix(pre_activation), matrix(pre_gate)}, runtime());
}

void backward(Tensor grad_out, MaybeTensor pre_activation, MaybeTensor pre_gate, Tensor input, Tensor weight1,
              Tensor weight2, MaybeTensor bias1, MaybeTensor bias2, MaybeTensor gate_weight, MaybeTensor gate_bias,
              MaybeTensor residual, MaybeTensor seed, int64_t activation, int64_t dropout_threshold, double keep_scale,
              int64_t residual_dropout_threshold, double residual_keep_scale, MaybeTensor grad_input,
              MaybeTensor grad_weight1, MaybeTensor grad_weight2, MaybeTensor grad_bias1, MaybeTensor grad_bias2,
              MaybeTensor grad_gate_weight, MaybeTensor grad_gate_bias, MaybeTensor sums1, MaybeTensor sums2,
              MaybeTensor gate_sums) {
    const FeedForwardProblem p =
        problem(input, weight1, weight2, bias1, bias2, gate_weight, gate_bias, residual, seed, activation,
                dropout_threshold, keep_scale, residual_dropout_threshold, residual_keep_scale);
    auto floats = [](const MaybeTensor& x) { return static_cast<float*>(pointer(x)); };
    const FeedForwardGradients gradients = {matrix(grad_out),         matrix(pre_activation), matrix(pre_gate),
                                            matrix(grad_input),       matrix(grad_weight1),   matrix(grad_weight2),
                                            matrix(grad_gate_weight), pointer(grad_bias1),    pointer(grad_bias2),
                                            pointer(grad_gate_bias),  floats(sums1),          floats(sums2),
                                            floats(gate_sums)};
    chosen_kernels().feed_forward_backward(p, gradients, runtime());
}

// No dropout, no gradient, as few checks as a small call can bear: no result wherever there is more to it, or a
// mistake, which the long way names.
MaybeTensor plain(Tensor input, Tensor weight1, Tensor weight2, MaybeTensor bias1, MaybeTensor bias2,
                  MaybeTensor gate_weight, MaybeTensor gate_bias, MaybeTensor residual, int64_t activation,
                  MaybeTensor packed1, MaybeTensor packed2, MaybeTensor packed_gate) {
    if (!are_rows(input) || weight1.dim() != 2 || weight2.dim() != 2) return {};
    const int64_t d_in = input.size(input.dim() - 1), d_ff = weight1.size(0), d_out = weight2.size(0);
    if (!is_matrix(weight1, input, d_ff, d_in) || !is_matrix(weight2, input, d_out, d_ff)) return {};
    if (gate_weight ? !is_matrix(*gate_weight, input, d_ff, d_in) : gate_bias.has_value()) return {};
    if (!is_vector_or_none(bias1, input, d_ff) || !is_vector_or_none(bias2, input, d_out) ||
        !is_vector_or_none(gate_bias, input, d_ff))
        return {};
    Tensor out = new_rows(input, d_out);
    if (!is_like_or_none(residual, out)) return {};
    FeedForwardProblem p;
    p.tokens = input.numel() / d_in, p.d_in = d_in, p.d_ff = d_ff, p.d_out = d_out, p.type = type_of(input);
    p.input = row_matrix(input), p.weight1 = matrix(weight1), p.weight2 = matrix(weight2);
    p.gate_weight = matrix(gate_weight);
    if (residual) p.residual = {residual->data_ptr(), d_out};
    p.bias1 = pointer(bias1), p.bias2 = pointer(bias2), p.gate_bias = pointer(gate_bias);
    p.activation = static_cast<Activation>(activation);
    const Kernels& kernels = chosen_kernels();
    p.packed1 = packed_for(packed1, weight1, kernels), p.packed2 = packed_for(packed2, weight2, kernels);
    if (gate_weight) p.packed_gate = packed_for(packed_gate, *gate_weight, kernels);
    kernels.feed_forward_forward(p, {{out.data_ptr(), d_out}, {}, {}}, runtime());
    return out;
}

// Bytes that the kernels take beyond their results, for `explain`.
int64_t memory(int64_t element_size, int64_t tokens, int64_t d_in, int64_t d_ff, int64_t d_out, bool gated,
               bool residual_dropout, bool backward, bool recompute) {
    FeedForwardProblem p;
    p.tokens = tokens, p.d_in = d_in, p.d_ff = d_ff, p.d_out = d_out, p.type = type_of_size(element_size);
    static char some;
    if (gated) p.gate_weight.data = &some;
    p.residual_dropout_threshold = residual_dropout ? 1 : 0;
    return chosen_kernels().feed_forward_memory(p, backward, recompute, runtime());
}

#define INPUTS                                                                                          \
    "Tensor input, Tensor weight1, Tensor weight2, Tensor? bias1, Tensor? bias2, Tensor? gate_weight, " \
    "Tensor? gate_bias, Tensor? residual, Tensor? seed, int activation, int dropout_threshold, "        \
    "float keep_scale, int residual_dropout_threshold, float residual_keep_scale"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def("feed_forward_forward_cpu(" INPUTS
          ", Tensor(a!) out, Tensor(b!)? pre_activation, Tensor(c!)? pre_gate) -> ()");
    m.def("feed_forward_backward_cpu(Tensor grad_out, Tensor? pre_activation, Tensor? pre_gate, " INPUTS
          ", Tensor(a!)? grad_input, Tensor(b!)? grad_weight1, Tensor(c!)? grad_weight2, Tensor(d!)? grad_bias1, "
          "Tensor(e!)? grad_bias2, Tensor(f!)? grad_gate_weight, Tensor(g!)? grad_gate_bias, Tensor(h!)? sums1, "
          "Tensor(i!)? sums2, Tensor(j!)? gate_sums) -> ()");
    m.def(
        "feed_forward_plain_cpu(Tensor input, Tensor weight1, Tensor weight2, Tensor? bias1, Tensor? bias2, "
        "Tensor? gate_weight, Tensor? gate_bias, Tensor? residual, int activation, Tensor? packed1=None, "
        "Tensor? packed2=None, Tensor? packed_gate=None) -> Tensor?");
    m.def(
        "feed_forward_memory_cpu(int element_size, int tokens, int d_in, int d_ff, int d_out, bool gated, "
        "bool residual_dropout, bool backward, bool recompute) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("feed_forward_forward_cpu", TORCH_BOX(&forward));
    m.impl("feed_forward_plain_cpu", TORCH_BOX(&plain));
    m.impl("feed_forward_backward_cpu", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CompositeExplicitAutograd, m) {
    m.impl("feed_forward_memory_cpu", TORCH_BOX(&memory));
}
