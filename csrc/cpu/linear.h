// input weight' + bias, and backward.
#pragma once

#include "gemm_epilogues.h"

namespace fusedformer::FF_LEVEL {

template <class E>
struct Linear {
    using S = typename E::Scalar;

    // Both return whether E computes what was given; else the results are of no use.
    static bool forward(const LinearProblem& p, const Matrix& out, const Runtime& runtime) {
        const Operand weight = {p.weight, true, false, E::KEEPS_WEIGHTS ? p.packed_weight : nullptr};
        const Product product = {{p.input}, weight, 0, p.then};
        return Gemm<E>::run(&product, 1, p.rows, p.out_features, p.in_features, Store<S>(out, p.bias), runtime);
    }

    static bool backward(const LinearProblem& p, const LinearGradients& g, const Runtime& runtime) {
        bool exact = true;
        if (g.grad_input.data) {
            const Product product = {{g.grad_out}, {p.weight}};
            exact = Gemm<E>::run(&product, 1, p.rows, p.in_features, p.out_features, Store<S>(g.grad_input), runtime);
        }
        if (exact && g.grad_weight.data) {
            const Product product = {{g.grad_out, true}, {p.input}};
            exact = Gemm<E>::run(&product, 1, p.out_features, p.in_features, p.rows, Store<S>(g.grad_weight), runtime);
        }
        if (exact && g.grad_bias)
            ColumnSums<S>::add(g.grad_out, p.rows, p.out_features, nullptr, g.grad_bias, true, true, runtime);
        return exact;
    }

    // Bytes of scratch of all threads.
    static int64_t memory(const LinearProblem& p, bool backward, const Runtime& runtime) {
        auto of = [&](bool left_transposed, bool right_transposed, int64_t m, int64_t n, int64_t k) {
            const Product product = {{{}, left_transposed}, {{}, right_transposed}};
            return Gemm<E>::memory(&product, 1, m, n, k, runtime);
        };
        const int64_t forward = of(false, true, p.rows, p.out_features, p.in_features);
        if (!backward) return forward;
        return larger(forward, larger(of(false, false, p.rows, p.in_features, p.out_features),
                                      of(true, false, p.out_features, p.in_features, p.rows)));
    }
};

}  // namespace fusedformer::FF_LEVEL
