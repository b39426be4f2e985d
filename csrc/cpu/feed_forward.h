// out = dropout(act(input W1' + b1)) W2' + b2, or gated act(input Wg' + bg) * (input W1' + b1) in the activation's
// place; out = residual + dropout(out). Backward likewise goes through all products for a block of tokens at a time, so
// that what is as wide as d_ff stays in cache and never is as long as the tokens, but for the pre-activations that
// forward keeps.
#pragma once

#include "activations.h"
#include "gemm_epilogues.h"

namespace fusedformer::FF_LEVEL {

constexpr int64_t ROW = 512;  // columns that an epilogue sees at most

inline Dropout inner_dropout(const FeedForwardProblem& p) { return {p.seed, p.dropout_threshold, p.keep_scale, 1}; }

inline Dropout residual_dropout(const FeedForwardProblem& p) {
    return {p.seed, p.residual_dropout_threshold, p.residual_keep_scale, 2};
}

inline Matrix rows_from(const Matrix& x, int64_t row, int64_t size) {
    return {x.data ? static_cast<char*>(x.data) + row * x.row * size : nullptr, x.row};
}

// Keeps the pre-activations, and makes hidden = dropout(act(pre-activation)) of them. C: value, gate.
template <class S>
struct HiddenRows : Epilogue {
    const FeedForwardProblem& p;
    int64_t token;                            // of the block's first row
    Matrix hidden, pre_activation, pre_gate;  // of the block; null data where not wanted

    HiddenRows(const FeedForwardProblem& p, int64_t token, Matrix hidden, Matrix pre_activation, Matrix pre_gate)
        : p(p), token(token), hidden(hidden), pre_activation(pre_activation), pre_gate(pre_gate) {}

    void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
        const Dropout dropout = inner_dropout(p);
        Dropout::Lanes lanes;
        for (int64_t r = 0; r < m; r++) {
            float *value = c[0] + r * stride, *gate = p.is_gated() ? c[1] + r * stride : nullptr;
            complete(value, p.bias1, pre_activation, i + r, j, n);
            if (gate) complete(gate, p.gate_bias, pre_gate, i + r, j, n);
            if (!hidden.data) continue;
            float* x = gate ? gate : value;
            activate(p.activation, x, nullptr, n);
            if (dropout) dropout.draw(lanes, token + i + r, j, n);
            for (int64_t column = 0; column < n; column += WIDTH) {
                Floats h = load(x + column);
                if (gate) h *= load(value + column);
                if (dropout) h = dropout.of(lanes, column, h);
                store_some(at<S>(hidden, i + r, j + column), h, n - column);
            }
        }
    }

    static void complete(float* row, const void* bias, const Matrix& kept, int64_t i, int64_t j, int64_t n) {
        if (!bias && !kept.data) return;
        for (int64_t column = 0; column < n; column += WIDTH) {
            const Floats x = load(row + column) + parameters<S>(bias, j + column, n - column);
            store(row + column, x);
            if (kept.data) store_some(at<S>(kept, i, j + column), x, n - column);
        }
    }
};

// out = residual + dropout(C + b2)
template <class S>
struct OutRows : Epilogue {
    const FeedForwardProblem& p;
    int64_t token;
    Matrix out, residual;  // of the block

    OutRows(const FeedForwardProblem& p, int64_t token, Matrix out, Matrix residual)
        : p(p), token(token), out(out), residual(residual) {}

    void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
        const Dropout dropout = residual_dropout(p);
        Dropout::Lanes lanes;
        for (int64_t r = 0; r < m; r++) {
            if (dropout) dropout.draw(lanes, token + i + r, j, n);
            for (int64_t column = 0; column < n; column += WIDTH) {
                Floats x = load(c[0] + r * stride + column) + parameters<S>(p.bias2, j + column, n - column);
                if (dropout) x = dropout.of(lanes, column, x);
                if (residual.data) x += load_some(at<S>(residual, i + r, j + column), n - column);
                store_some(at<S>(out, i + r, j + column), x, n - column);
            }
        }
    }
};

// C: the gradient of hidden. From the pre-activations: hidden again, and the gradients of the pre-activations.
template <class S>
struct PreActivationGradient : Epilogue {
    const FeedForwardProblem& p;
    int64_t token;
    Matrix pre_activation, pre_gate;            // of the block
    Matrix hidden, grad_activation, grad_gate;  // of the block; null data where not wanted

    PreActivationGradient(const FeedForwardProblem& p, int64_t token, Matrix pre_activation, Matrix pre_gate,
                          Matrix hidden, Matrix grad_activation, Matrix grad_gate)
        : p(p),
          token(token),
          pre_activation(pre_activation),
          pre_gate(pre_gate),
          hidden(hidden),
          grad_activation(grad_activation),
          grad_gate(grad_gate) {}

    void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
        const Dropout dropout = inner_dropout(p);
        Dropout::Lanes lanes;
        alignas(64) float value[ROW], slope[ROW];
        for (int64_t r = 0; r < m; r++) {
            const S* z = at<S>(pre_activation, i + r, j);
            const S* x = p.is_gated() ? at<S>(pre_gate, i + r, j) : z;
            for (int64_t column = 0; column < n; column += WIDTH)
                store(value + column, load_some(x + column, n - column));
            activate(p.activation, value, slope, n);
            if (dropout) dropout.draw(lanes, token + i + r, j, n);
            for (int64_t column = 0; column < n; column += WIDTH) {
                const int64_t count = n - column;
                Floats grad = load(c[0] + r * stride + column), h = load(value + column), s = load(slope + column);
                if (dropout) grad = dropout.of(lanes, column, grad);
                if (p.is_gated()) {
                    const Floats linear = load_some(z + column, count);
                    if (grad_gate.data) store_some(at<S>(grad_gate, i + r, j + column), grad * linear * s, count);
                    s = h, h *= linear;
                }
                if (grad_activation.data) store_some(at<S>(grad_activation, i + r, j + column), grad * s, count);
                if (dropout) h = dropout.of(lanes, column, h);
                if (hidden.data) store_some(at<S>(hidden, i + r, j + column), h, count);
            }
        }
    }
};

// The gradient before the residual's dropout.
template <class S>
struct ResidualGradient {
    const FeedForwardProblem& p;
    int64_t token;
    Matrix grad_out, to;  // of the block

    void row(int64_t i) const {
        const Dropout dropout = residual_dropout(p);
        Dropout::Lanes lanes;
        for (int64_t j = 0; j < p.d_out; j += ROW) {
            const int64_t n = smaller(ROW, p.d_out - j);
            dropout.draw(lanes, token + i, j, n);
            for (int64_t column = 0; column < n; column += WIDTH)
                store_some(at<S>(to, i, j + column),
                           dropout.of(lanes, column, load_some(at<S>(grad_out, i, j + column), n - column)),
                           n - column);
        }
    }
};

template <class E>
class FeedForward {
    using S = typename E::Scalar;
    static constexpr int64_t SIZE = sizeof(S);

  public:
    // Both return whether E computes what was given; else the results are of no use.
    static bool forward(const FeedForwardProblem& p, const FeedForwardResults& results, const Runtime& runtime) {
        FeedForward feed_forward(p, runtime);
        feed_forward.lay_out([&](Arena& arena) { feed_forward.lay_out_forward(arena); });
        bool exact = true;
        for (int64_t token = 0; exact && token < p.tokens; token += FEED_FORWARD_TOKENS)
            exact = feed_forward.forward_block(results, token, smaller(FEED_FORWARD_TOKENS, p.tokens - token));
        return exact;
    }

    static bool backward(const FeedForwardProblem& p, const FeedForwardGradients& g, const Runtime& runtime) {
        FeedForward feed_forward(p, runtime);
        feed_forward.lay_out([&](Arena& arena) { feed_forward.lay_out_backward(arena, g); });
        bool exact = true;
        for (int64_t token = 0; exact && token < p.tokens; token += FEED_FORWARD_TOKENS)
            exact = feed_forward.backward_block(g, token, smaller(FEED_FORWARD_TOKENS, p.tokens - token));
        return exact;
    }

    // Bytes beyond results: the scratch of all threads, and what they share; in backward of all gradients.
    static int64_t memory(const FeedForwardProblem& p, bool backward, bool recompute, const Runtime& runtime) {
        FeedForward feed_forward(p, runtime);
        const int64_t m = smaller(FEED_FORWARD_TOKENS, p.tokens);
        auto of = [&](bool left_transposed, bool right_transposed, bool gated, bool shared, int64_t m, int64_t n,
                      int64_t k) {
            const Operand left = {{}, left_transposed}, right = {{}, right_transposed};
            const Product products[] = {{left, right, 0}, {left, right, shared ? 0 : 1}};
            return Gemm<E>::memory(products, gated ? 2 : 1, m, n, k, runtime);
        };
        Arena shared;
        feed_forward.lay_out_forward(shared);
        const bool gated = p.is_gated();
        const int64_t first = of(false, true, gated, false, m, p.d_ff, p.d_in);
        const int64_t forward =
            larger(first, of(false, true, false, false, m, p.d_out, p.d_ff)) + static_cast<int64_t>(shared.used());
        if (!backward) return forward;
        static char wanted;
        FeedForwardGradients g = {};
        g.grad_input.data = &wanted;
        g.grad_weight2.data = g.grad_bias1 = g.grad_bias2 = g.grad_gate_bias = &wanted;
        if (!recompute) g.pre_activation.data = &wanted;
        Arena measure;
        feed_forward.lay_out_backward(measure, g);
        int64_t most = recompute ? first : 0;
        most = larger(most, of(false, false, false, false, m, p.d_ff, p.d_out));
        most = larger(most, of(true, false, false, false, p.d_out, p.d_ff, m));
        most = larger(most, of(false, false, gated, true, m, p.d_in, p.d_ff));
        most = larger(most, of(true, false, false, false, p.d_ff, p.d_in, m));
        return larger(forward, most + static_cast<int64_t>(measure.used()));
    }

  private:
    const FeedForwardProblem& p_;
    const Runtime& runtime_;
    // Of a block of tokens; null data where not wanted.
    Matrix hidden_, grad_activation_, grad_gate_, pre_activation_, pre_gate_, grad_linear_;
    float *bias_sums1_ = nullptr, *bias_sums2_ = nullptr, *gate_bias_sums_ = nullptr;

    FeedForward(const FeedForwardProblem& p, const Runtime& runtime) : p_(p), runtime_(runtime) {}

    template <class Body>
    void lay_out(const Body& body) {
        Arena measure;
        body(measure);
        Arena arena(runtime_.workspace(measure.used()));
        body(arena);
    }

    Matrix block(Arena& arena, int64_t width, bool wanted = true) const {
        if (!wanted) return {};
        // No power of two: rows would share the first cache's sets.
        const int64_t row = round_up(width, 64) + 64 / SIZE;
        return {arena.take<S>(smaller(FEED_FORWARD_TOKENS, p_.tokens) * row), row};
    }

    void lay_out_forward(Arena& arena) { hidden_ = block(arena, p_.d_ff); }

    void lay_out_backward(Arena& arena, const FeedForwardGradients& g) {
        const bool gated = p_.is_gated(), recompute = !g.pre_activation.data;
        hidden_ = block(arena, p_.d_ff, g.grad_weight2.data);
        grad_activation_ = block(arena, p_.d_ff, needs_activation(g));
        grad_gate_ = block(arena, p_.d_ff, needs_gate(g));
        pre_activation_ = block(arena, p_.d_ff, recompute);
        pre_gate_ = block(arena, p_.d_ff, recompute && gated);
        grad_linear_ = block(arena, p_.d_out, p_.residual_dropout_threshold > 0);
        bias_sums1_ = arena.take<float>(p_.d_ff);
        bias_sums2_ = arena.take<float>(p_.d_out);
        gate_bias_sums_ = arena.take<float>(gated ? p_.d_ff : 0);
    }

    static bool needs_activation(const FeedForwardGradients& g) {
        return g.grad_input.data || g.grad_weight1.data || g.grad_bias1;
    }
    bool needs_gate(const FeedForwardGradients& g) const {
        return p_.is_gated() && (g.grad_input.data || g.grad_gate_weight.data || g.grad_gate_bias);
    }

    static void* kept(void* packed) { return E::KEEPS_WEIGHTS ? packed : nullptr; }

    bool first_products(const Epilogue& epilogue, int64_t token, int64_t m) const {
        const Matrix input = rows_from(p_.input, token, SIZE);
        const void* then = p_.weight2.data;
        const Product products[] = {{{input}, {p_.weight1, true, false, kept(p_.packed1)}, 0, then},
                                    {{input}, {p_.gate_weight, true, false, kept(p_.packed_gate)}, 1, then}};
        return Gemm<E>::run(products, p_.is_gated() ? 2 : 1, m, p_.d_ff, p_.d_in, epilogue, runtime_);
    }

    bool forward_block(const FeedForwardResults& results, int64_t token, int64_t m) const {
        auto rows = [&](const Matrix& x) { return rows_from(x, token, SIZE); };
        const HiddenRows<S> first(p_, token, hidden_, rows(results.pre_activation), rows(results.pre_gate));
        const OutRows<S> second(p_, token, rows(results.out), rows(p_.residual));
        const Product product = {{hidden_, false, true}, {p_.weight2, true, false, kept(p_.packed2)}, 0, p_.then};
        return first_products(first, token, m) && Gemm<E>::run(&product, 1, m, p_.d_out, p_.d_ff, second, runtime_);
    }

    bool backward_block(const FeedForwardGradients& g, int64_t token, int64_t m) const {
        auto rows = [&](const Matrix& x) { return rows_from(x, token, SIZE); };
        Matrix grad = rows(g.grad_out), pre_activation = rows(g.pre_activation), pre_gate = rows(g.pre_gate);
        if (p_.residual_dropout_threshold > 0) {
            ResidualGradient<S> dropped{p_, token, grad, grad_linear_};
            auto body = [](int64_t i, void* self) { static_cast<ResidualGradient<S>*>(self)->row(i); };
            runtime_.parallel(m, body, &dropped);
            grad = grad_linear_;
        }
        if (!g.pre_activation.data) {
            pre_activation = pre_activation_, pre_gate = pre_gate_;
            if (!first_products(HiddenRows<S>(p_, token, {}, pre_activation, pre_gate), token, m)) return false;
        }
        const bool needs_gradient = grad_activation_.data || grad_gate_.data;
        if (needs_gradient || hidden_.data) {
            const PreActivationGradient<S> gradient(p_, token, pre_activation, pre_gate, hidden_, grad_activation_,
                                                    grad_gate_);
            const Product product = {{grad}, {p_.weight2}};
            if (!Gemm<E>::run(&product, 1, m, p_.d_ff, needs_gradient ? p_.d_out : 0, gradient, runtime_)) return false;
        }
        if (g.grad_input.data) {
            const Product products[] = {{{grad_activation_, false, true}, {p_.weight1}},
                                        {{grad_gate_, false, true}, {p_.gate_weight}}};
            if (!Gemm<E>::run(products, p_.is_gated() ? 2 : 1, m, p_.d_in, p_.d_ff, Store<S>(rows(g.grad_input)),
                              runtime_))
                return false;
        }
        const Operand input = {rows(p_.input)}, hidden = {hidden_, false, true};
        const Operand grad_activation = {grad_activation_, true, true}, grad_gate = {grad_gate_, true, true};
        return add_up(token, m, {grad, true}, hidden, g.grad_weight2, g.sums2, g.grad_bias2, bias_sums2_, p_.d_out,
                      p_.d_ff) &&
               add_up(token, m, grad_activation, input, g.grad_weight1, g.sums1, g.grad_bias1, bias_sums1_, p_.d_ff,
                      p_.d_in) &&
               add_up(token, m, grad_gate, input, g.grad_gate_weight, g.gate_sums, g.grad_gate_bias, gate_bias_sums_,
                      p_.d_ff, p_.d_in);
    }

    // A block's share of the gradients of a weight and its bias: left right, and the sums of left's rows.
    bool add_up(int64_t token, int64_t m, const Operand& left, const Operand& right, const Matrix& grad_weight,
                float* sums, void* grad_bias, float* bias_sums, int64_t rows, int64_t columns) const {
        const bool first = token == 0, last = token + m == p_.tokens;
        if (grad_bias) ColumnSums<S>::add(left.matrix, m, rows, bias_sums, grad_bias, first, last, runtime_);
        if (!grad_weight.data) return true;
        const Product product = {left, right};
        const Matrix between = SIZE == sizeof(float) ? grad_weight : Matrix{sums, columns};
        return Gemm<E>::run(&product, 1, rows, columns, m, AddUp<S>(grad_weight, between, first, last), runtime_);
    }
};

}  // namespace fusedformer::FF_LEVEL
