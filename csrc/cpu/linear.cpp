// The linear operators as torch sees them. kernels/linear/native_cpu.py allocates the results and is their only caller,
// so the checks are its.
#include <torch/csrc/stable/library.h>

#include <new>

#include "gemm_problem.h"
#include "gemm_tensors.h"
#include "level.h"
#include "runtime.h"

namespace {

using namespace fusedformer;

LinearProblem problem(const Tensor& input, const Tensor& weight, const MaybeTensor& bias) {
    return {input.size(0), input.size(1), weight.size(0), type_of(input), matrix(input), matrix(weight), pointer(bias)};
}

void forward(Tensor input, Tensor weight, MaybeTensor bias, Tensor out) {
    chosen_kernels().linear_forward(problem(input, weight, bias), matrix(out), runtime());
}

void backward(Tensor grad_out, Tensor input, Tensor weight, MaybeTensor grad_input, MaybeTensor grad_weight,
              MaybeTensor grad_bias) {
    const LinearGradients gradients = {matrix(grad_out), matrix(grad_input), matrix(grad_weight), pointer(grad_bias)};
    chosen_kernels().linear_backward(problem(input, weight, {}), gradients, runtime());
}

// No gradient, as few checks as a small call can bear: no result wherever there is more to it, or a mistake, which the
// long way names.
MaybeTensor plain(Tensor input, Tensor weight, MaybeTensor bias, MaybeTensor packed) {
    if (!are_rows(input) || weight.dim() != 2) return {};
    const int64_t in_features = input.size(input.dim() - 1), out_features = weight.size(0);
    if (!is_matrix(weight, input, out_features, in_features) || !is_vector_or_none(bias, input, out_features))
        return {};
    Tensor out = new_rows(input, out_features);
    const Kernels& kernels = chosen_kernels();
    const LinearProblem p = {
        input.numel() / in_features, in_features,    out_features,  type_of(input),
        row_matrix(input),           matrix(weight), pointer(bias), packed_for(packed, weight, kernels)};
    kernels.linear_forward(p, {out.data_ptr(), out_features}, runtime());
    return out;
}

// None where this level gains nothing by it, or its products would not be those of the weight.
MaybeTensor pack(Tensor weight) {
    if (weight.dim() != 2 || !is_computed(weight) || weight.numel() == 0 || weight.stride(1) != 1) return {};
    const Kernels& kernels = chosen_kernels();
    const PackedWeight head = {&kernels, type_of(weight), weight.size(0), weight.size(1)};
    const int64_t bytes = kernels.packed_bytes(head.type, head.rows, head.columns);
    if (bytes == 0) return {};
    Tensor packed = new_bytes(PackedWeight::SIZE + bytes);
    char* const data = static_cast<char*>(packed.data_ptr());
    new (data) PackedWeight(head);
    if (!kernels.pack_weight(head.type, matrix(weight), head.rows, head.columns, data + PackedWeight::SIZE, runtime()))
        return {};
    return packed;
}

// Bytes that the kernels take beyond their results, for `explain`.
int64_t memory(int64_t element_size, int64_t rows, int64_t in_features, int64_t out_features, bool backward) {
    const LinearProblem p = {rows, in_features, out_features, type_of_size(element_size), {}, {}, nullptr};
    return chosen_kernels().linear_memory(p, backward, runtime());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def("linear_forward_cpu(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
    m.def(
        "linear_backward_cpu(Tensor grad_out, Tensor input, Tensor weight, Tensor(a!)? grad_input, "
        "Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
    m.def("linear_plain_cpu(Tensor input, Tensor weight, Tensor? bias, Tensor? packed=None) -> Tensor?");
    m.def("pack_weight_cpu(Tensor weight) -> Tensor?");
    m.def("linear_memory_cpu(int element_size, int rows, int in_features, int out_features, bool backward) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("linear_forward_cpu", TORCH_BOX(&forward));
    m.impl("linear_plain_cpu", TORCH_BOX(&plain));
    m.impl("pack_weight_cpu", TORCH_BOX(&pack));
    m.impl("linear_backward_cpu", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CompositeExplicitAutograd, m) {
    m.impl("linear_memory_cpu", TORCH_BOX(&memory));
}
