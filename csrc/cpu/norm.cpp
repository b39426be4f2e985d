// The norm operators as torch sees them: tensors become the pointers and strides of `NormProblem`, nothing else.
// kernels/norm/native_cpu.py allocates the results and is their only caller, so the checks are its.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>

#include "level.h"
#include "norm_problem.h"
#include "runtime.h"
#include "tensors.h"

namespace {

using namespace fusedformer;

// (rows, d), or any leading dimensions of a contiguous tensor.
NormRowsAt rows_at(const Tensor& x) { return {x.data_ptr(), x.dim() == 2 ? x.stride(0) : x.size(x.dim() - 1)}; }
NormRowsAt rows_at(const MaybeTensor& x) { return x ? rows_at(*x) : NormRowsAt{}; }

NormVector vector(const MaybeTensor& x) { return x ? NormVector{type_of(*x), x->data_ptr()} : NormVector{}; }

void* data(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }
float* floats(const MaybeTensor& x) { return static_cast<float*>(data(x)); }

NormProblem problem(const Tensor& like, const MaybeTensor& weight, const MaybeTensor& seed, int64_t dropout_threshold,
                    double keep_scale) {
    NormProblem p;
    p.features = like.size(like.dim() - 1), p.rows = like.numel() / p.features;
    p.type = p.input_type = type_of(like);
    p.weight = vector(weight);
    p.dropout_threshold = static_cast<uint32_t>(dropout_threshold), p.keep_scale = static_cast<float>(keep_scale);
    if (seed) {
        const auto* words = static_cast<const int64_t*>(seed->data_ptr());
        p.seed[0] = static_cast<uint32_t>(words[0]), p.seed[1] = static_cast<uint32_t>(words[1]);
    }
    return p;
}

void forward(Tensor input, MaybeTensor residual, MaybeTensor weight, MaybeTensor bias, MaybeTensor seed,
             bool subtract_mean, double eps, int64_t dropout_threshold, double keep_scale, Tensor out, MaybeTensor sum,
             MaybeTensor mean, MaybeTensor rstd) {
    NormProblem p = problem(out, weight, seed, dropout_threshold, keep_scale);
    p.input_type = type_of(input);
    p.input = rows_at(input), p.residual = rows_at(residual), p.bias = vector(bias);
    p.subtract_mean = subtract_mean, p.eps = static_cast<float>(eps);
    chosen_kernels().norm_forward(p, {out.data_ptr(), data(sum), floats(mean), floats(rstd)}, runtime());
}

void backward(Tensor grad_out, MaybeTensor grad_sum, Tensor sum, MaybeTensor mean, Tensor rstd, MaybeTensor weight,
              MaybeTensor seed, int64_t dropout_threshold, double keep_scale, MaybeTensor grad_input,
              MaybeTensor grad_residual, MaybeTensor grad_weight, MaybeTensor grad_bias, MaybeTensor partial) {
    NormProblem p = problem(sum, weight, seed, dropout_threshold, keep_scale);
    if (grad_input) p.input_type = type_of(*grad_input);
    const NormGradients grads = {rows_at(grad_out), rows_at(grad_sum), rows_at(sum),        floats(mean),
                                 floats(rstd),      data(grad_input),  data(grad_residual), vector(grad_weight),
                                 vector(grad_bias), floats(partial)};
    chosen_kernels().norm_backward(p, grads, runtime());
}

// No dropout, no gradient, as few checks as a small call can bear: no result wherever there is more to it, or a
// mistake.
MaybeTensor plain(Tensor input, MaybeTensor residual, MaybeTensor weight, MaybeTensor bias, bool subtract_mean,
                  double eps) {
    constexpr int64_t MAX_DIMS = 8;
    const int64_t dims = input.dim();
    if (dims < 1 || dims > MAX_DIMS || input.numel() == 0 || !input.is_contiguous() || !(eps >= 0.0)) return {};
    std::array<int64_t, MAX_DIMS> sizes, strides;
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= 0; stride *= sizes[i--]) sizes[i] = input.size(i), strides[i] = stride;
    const int64_t features = sizes[dims - 1];
    const auto dtype = input.scalar_type();
    if (!is_computed(input)) return {};
    if (residual) {
        if (residual->dim() != dims || residual->scalar_type() != dtype || !residual->is_contiguous()) return {};
        for (int64_t i = 0; i < dims; i++)
            if (residual->size(i) != sizes[i]) return {};
    }
    for (const MaybeTensor* x : {&weight, &bias})
        if (*x &&
            ((*x)->dim() != 1 || (*x)->size(0) != features || (*x)->scalar_type() != dtype || (*x)->stride(0) != 1))
            return {};
    Tensor out = new_tensor(input, dims, sizes.data(), strides.data());
    forward(input, residual, weight, bias, {}, subtract_mean, eps, 0, 1.0, out, {}, {}, {});
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def(
        "norm_forward_cpu(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
        "bool subtract_mean, float eps, int dropout_threshold, float keep_scale, Tensor(a!) out, Tensor(b!)? sum, "
        "Tensor(c!)? mean, Tensor(d!)? rstd) -> ()");
    m.def(
        "norm_backward_cpu(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor? mean, Tensor rstd, Tensor? weight, "
        "Tensor? seed, int dropout_threshold, float keep_scale, Tensor(a!)? grad_input, Tensor(b!)? grad_residual, "
        "Tensor(c!)? grad_weight, Tensor(d!)? grad_bias, Tensor(e!)? partial) -> ()");
    m.def(
        "norm_plain_cpu(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, bool subtract_mean, float eps) "
        "-> Tensor?");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
    m.impl("norm_forward_cpu", TORCH_BOX(&forward));
    m.impl("norm_backward_cpu", TORCH_BOX(&backward));
    m.impl("norm_plain_cpu", TORCH_BOX(&plain));
}
