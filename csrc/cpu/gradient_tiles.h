// What both passes of attention backward compute: the tiles of P and dS, from one block of queries and packed keys and
// values.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class GradientTiles {
  protected:
    using Scalar = typename E::Scalar;
    using Packed = typename E::Packed;
    static constexpr int64_t PANEL = E::PANEL, BLOCK_Q = E::BACKWARD_BLOCK_Q, BLOCK_K = BACKWARD_BLOCK_K;

    const Problem& p_;
    const BackwardInputs& inputs_;
    const BackwardResults& results_;
    const Runtime& runtime_;
    const bool plain_ = ScoreRules::plain(p_);
    const Powers powers_ = ScoreRules::powers(p_);
    const int64_t blocks_ = (p_.len_q + BLOCK_Q - 1) / BLOCK_Q;

    GradientTiles(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                  const Runtime& runtime)
        : p_(p), inputs_(inputs), results_(results), runtime_(runtime) {}

    struct TileScratch {
        float *scores, *products, *raw;     // (BLOCK_Q, BLOCK_K): S, dP and, under a softcap, Q Kᵀ
        float *lse, *lse_residual, *delta;  // (BLOCK_Q)
        Packed *query, *grad_out;
        uint16_t* lanes;
    };

    void lay_out_tile(Arena& arena, TileScratch& s) const {
        s.scores = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.products = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.raw = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.lse = arena.take<float>(BLOCK_Q);
        s.lse_residual = arena.take<float>(BLOCK_Q);
        s.delta = arena.take<float>(BLOCK_Q);
        s.query = arena.take<Packed>(E::left_size(BLOCK_Q, p_.head_dim));
        s.grad_out = arena.take<Packed>(E::left_size(BLOCK_Q, p_.head_dim_v));
        s.lanes = arena.take<uint16_t>(2 * BLOCK_K);
    }

    template <class T = const Scalar>
    static T* at(const Rows& x, int64_t b, int64_t h, int64_t row) {
        return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
    }

    static void fill(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

    static void store_term(Type type, void* row, int64_t at, float x) {
        switch (type) {
            case Type::float32:
                static_cast<float*>(row)[at] = x;
                break;
            case Type::float64:
                static_cast<double*>(row)[at] = x;
                break;
            case Type::float16:
                store_some(static_cast<Float16*>(row) + at, broadcast(x), 1);
                break;
            case Type::bfloat16:
                store_some(static_cast<BFloat16*>(row) + at, broadcast(x), 1);
                break;
            default:
                break;
        }
    }

    // One block of queries, as every product with it needs it.
    struct Queries {
        int64_t head, first, count;
        typename E::Left query, grad_out;
    };

    Queries queries(const TileScratch& s, int64_t b, int64_t h, int64_t first) const {
        const int64_t count = smaller(BLOCK_Q, p_.len_q - first);
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = (b * p_.heads + h) * p_.len_q + first + r;
            s.delta[r] = results_.delta[row];
            if (inputs_.lse[row] == -INFINITE) {  // every score is -infinity
                s.lse[r] = s.lse_residual[r] = 0.0f;
            } else if (plain_) {  // in units of the products, still in two floats
                const double exact = (static_cast<double>(inputs_.lse[row]) + inputs_.lse_residual[row]) / p_.scale;
                s.lse[r] = static_cast<float>(exact);
                s.lse_residual[r] = static_cast<float>(exact - s.lse[r]);
            } else {
                s.lse[r] = inputs_.lse[row], s.lse_residual[r] = inputs_.lse_residual[row];
            }
        }
        return {h, first, count, E::left(at(p_.query, b, h, first), p_.query.row, count, p_.head_dim, s.query),
                E::left(at(inputs_.grad_out, b, h, first), inputs_.grad_out.row, count, p_.head_dim_v, s.grad_out)};
    }

    // S, then P and dS of keys [j, j + n): `each(row, column, P, dS, P below, dS below)` gets two rows at a time, P as
    // it multiplied the values. Packed keys and values begin at key j.
    template <bool PLAIN, class F>
    void tile(const TileScratch& s, int64_t b, const Queries& q, const Packed* keys_t, const Packed* values_t,
              int64_t j, int64_t n, const float* bias, F each) const {
        const int64_t width = round_up(n, E::COLUMNS);
        const ScoreRules rules{p_, b, q.head};
        E::multiply_packed(s.scores, BLOCK_K, q.query, keys_t, p_.head_dim, q.count, n, p_.head_dim, false);
        E::multiply_packed(s.products, BLOCK_K, q.grad_out, values_t, p_.head_dim_v, q.count, n, p_.head_dim_v, false);
        if (p_.softcap > 0.0)
            for (int64_t r = 0; r < q.count * BLOCK_K; r += WIDTH) store(s.raw + r, load(s.scores + r));
        if (!PLAIN || rules.touches(q.first, q.count, j, width, bias))
            rules.apply<PLAIN>(s.scores, BLOCK_K, q.first, q.count, j, width, bias);
        for (int64_t r = 0; r < q.count; r += 2) {
            const bool pair = r + 1 < q.count;
            if (p_.has_dropout())
                for (int64_t below = 0; below <= pair; below++)
                    philox_lanes(s.lanes + below * BLOCK_K, p_.seed, j, width,
                                 static_cast<uint32_t>(q.first + r + below), rules.matrix(), 0);
            if (p_.len_k <= BLOCK_K)
                for (int64_t below = 0; below <= pair; below++) sum_row(s, b, q, r + below, width, below);
            for (int64_t k = 0; k < width; k += WIDTH) {
                Floats weight, weight_below = {}, grad, grad_below = {};
                differentiate(s, r, k, s.lanes + k, weight, grad);
                if (pair) differentiate(s, r + 1, k, s.lanes + BLOCK_K + k, weight_below, grad_below);
                each(r, k, weight, grad, weight_below, grad_below);
            }
        }
    }

    // Where all of a row is here, delta is the sum of these very products: a peaked row's rounding errors then cancel,
    // which those of rowsum(out * grad_out) would not.
    void sum_row(const TileScratch& s, int64_t b, const Queries& q, int64_t r, int64_t width, int64_t below) const {
        s.delta[r] = 0.0f;
        Floats total = {}, weight, product;
        for (int64_t k = 0; k < width; k += WIDTH) {
            differentiate(s, r, k, s.lanes + below * BLOCK_K + k, weight, product);
            total += product;
        }
        const int64_t row = (b * p_.heads + q.head) * p_.len_q + q.first + r;
        s.delta[r] = sum(total) - (inputs_.grad_lse ? inputs_.grad_lse[row] : 0.0f);
    }

    FF_INLINE void differentiate(const TileScratch& s, int64_t r, int64_t k, const uint16_t* lanes, Floats& weight,
                                 Floats& grad) const {
        const Floats score = load(s.scores + r * BLOCK_K + k);
        // No weight is above 1; the rounding of huge scores would make it so.
        const Floats below = smaller((score - s.lse[r]) - s.lse_residual[r], Floats{});
        weight = powers_.template of<EXP2_DEGREE<Scalar>>(below);
        Floats product = load(s.products + r * BLOCK_K + k);
        const Floats whole = weight;
        if (p_.has_dropout()) {
            const Ints mask = kept(lanes, p_.dropout_threshold);
            weight = keep(mask, weight * p_.keep_scale);
            product = keep(mask, product * p_.keep_scale);
        }
        // Where the weight is 0, so is the gradient, whatever an excluded slot's product is.
        grad = keep(~(whole == 0.0f), whole * (product - s.delta[r]));
    }

    // The derivative of softcap * tanh(x / softcap), x the scaled product.
    FF_INLINE Floats through_cap(const TileScratch& s, int64_t r, int64_t k, Floats grad) const {
        const float cap = static_cast<float>(p_.softcap);
        const Floats t = tanh(load(s.raw + r * BLOCK_K + k) * (static_cast<float>(p_.scale) / cap));
        return grad * (1.0f - t * t);
    }
};

}  // namespace fusedformer::FF_LEVEL
