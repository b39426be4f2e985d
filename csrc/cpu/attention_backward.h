// Attention backward by recomputation (FlashAttention-2, Dao, 2023, algorithm 2, without atomics):
//
//     P = exp(S - lse)   dV = Pᵀ dO   dP = dO Vᵀ   dS = P ∘ (dP - delta)   dQ = dS K   dK = dSᵀ Q
//
// with delta = rowsum(dO ∘ O) - grad_lse. A task takes every `groups`-th chunk of keys of one batch and key head: it
// packs a chunk once and walks over the queries that see it. dK and dV are its own, kept transposed so that both
// operands of each product come as they are computed; dQ goes to its group's partial sum, and the sums are added at the
// end, in order.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class AttentionBackward {
    using Scalar = typename E::Scalar;
    using Packed = typename E::Packed;
    static constexpr int64_t PANEL = E::PANEL, BLOCK_Q = E::BACKWARD_BLOCK_Q, BLOCK_K = E::BLOCK_K;
    static_assert(BACKWARD_BLOCK_K % BLOCK_K == 0);

  public:
    static void run(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                    const Runtime& runtime) {
        AttentionBackward backward{p, inputs, results, runtime};
        backward.for_each(p.batch * p.heads * backward.blocks_, &AttentionBackward::sum_rows);
        if (results.grad_query.data || results.grad_key.data || results.grad_value.data || results.grad_key_mask.data)
            backward.for_each(p.batch * p.heads_kv * results.groups, &AttentionBackward::keys_of_group);
        if (results.grad_query.data && results.partial_grad_query)
            backward.for_each(p.batch * p.heads * backward.blocks_, &AttentionBackward::add_partial);
        if (results.grad_attn_mask.data) {
            const int64_t batches = results.grad_attn_mask.batch ? p.batch : 1;
            const int64_t heads = results.grad_attn_mask.head ? p.heads : 1;
            backward.for_each(batches * heads * backward.blocks_, &AttentionBackward::mask_gradient);
        }
    }

    // Beyond the results, in all threads together.
    static int64_t memory(const Problem& p, int64_t groups, const Runtime& runtime) {
        BackwardResults results{};
        results.groups = groups;
        const BackwardInputs none{};
        const AttentionBackward backward{p, none, results, runtime};
        Arena arena;
        backward.lay_out(arena);
        return static_cast<int64_t>(arena.used()) * smaller<int64_t>(runtime.threads, p.batch * p.heads_kv * groups);
    }

  private:
    const Problem& p_;
    const BackwardInputs& inputs_;
    const BackwardResults& results_;
    const Runtime& runtime_;
    const bool plain_ = ScoreRules::plain(p_);
    const int64_t blocks_ = (p_.len_q + BLOCK_Q - 1) / BLOCK_Q;
    const int64_t width_ = round_up(p_.head_dim, PANEL);
    const int64_t chunk_ = backward_chunk(p_.len_k, results_.groups);

    AttentionBackward(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                      const Runtime& runtime)
        : p_(p), inputs_(inputs), results_(results), runtime_(runtime) {}

    struct Scratch {
        float *scores, *products, *raw;     // (BLOCK_Q, BLOCK_K): S, dP and, under a softcap, Q Kᵀ
        float *lse, *lse_residual, *delta;  // (BLOCK_Q)
        float* grad_query;                  // (BLOCK_Q, width)
        float *grad_keys, *grad_values;     // (chunk / BLOCK_K, E or Ev, BLOCK_K)
        float *bias, *grad_bias;            // (chunk)
        float* mean;                        // (BLOCK_Q, BLOCK_K)
        Packed *query, *query_t, *grad_out, *grad_out_t;
        Packed *keys_t, *values_t, *keys;  // right operands: Kᵀ, Vᵀ, K
        Packed *weights, *left, *right;    // P as a right operand, dS as both
        uint16_t* lanes;
    };

    Scratch lay_out(Arena& arena) const {
        const int64_t d = p_.head_dim, dv = p_.head_dim_v;
        Scratch s;
        s.scores = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.products = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.raw = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.mean = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.lse = arena.take<float>(BLOCK_Q);
        s.lse_residual = arena.take<float>(BLOCK_Q);
        s.delta = arena.take<float>(BLOCK_Q);
        s.grad_query = arena.take<float>(BLOCK_Q * width_);
        s.grad_keys = arena.take<float>(chunk_ * round_up(d, E::ROW_MULTIPLE));
        s.grad_values = arena.take<float>(chunk_ * round_up(dv, E::ROW_MULTIPLE));
        s.bias = arena.take<float>(chunk_);
        s.grad_bias = arena.take<float>(chunk_);
        s.query = arena.take<Packed>(E::left_size(BLOCK_Q, d));
        s.query_t = arena.take<Packed>(E::left_size(d, BLOCK_Q));
        s.grad_out = arena.take<Packed>(E::left_size(BLOCK_Q, dv));
        s.grad_out_t = arena.take<Packed>(E::left_size(dv, BLOCK_Q));
        s.keys_t = arena.take<Packed>(E::right_size(d, chunk_));
        s.values_t = arena.take<Packed>(E::right_size(dv, chunk_));
        s.keys = arena.take<Packed>(E::right_size(chunk_, d));
        s.weights = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
        s.left = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
        s.right = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
        s.lanes = arena.take<uint16_t>(2 * BLOCK_K);
        return s;
    }

    Scratch scratch() const {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        return lay_out(arena);
    }

    void for_each(int64_t tasks, void (AttentionBackward::*method)(int64_t) const) const {
        struct Call {
            const AttentionBackward* self;
            void (AttentionBackward::*method)(int64_t) const;
        } call{this, method};
        runtime_.parallel(
            tasks,
            [](int64_t task, void* context) {
                const Call& c = *static_cast<Call*>(context);
                (c.self->*c.method)(task);
            },
            &call);
    }

    template <class T = const Scalar>
    static T* at(const Rows& x, int64_t b, int64_t h, int64_t row) {
        return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
    }

    void sum_rows(int64_t task) const {
        const int64_t bh = task / blocks_, b = bh / p_.heads, h = bh % p_.heads, first = task % blocks_ * BLOCK_Q;
        for (int64_t i = first; i < smaller(first + BLOCK_Q, p_.len_q); i++) {
            const Scalar *out = at(inputs_.out, b, h, i), *grad = at(inputs_.grad_out, b, h, i);
            Floats total = {};
            for (int64_t e = 0; e < p_.head_dim_v; e += WIDTH)
                total += load_some(out + e, p_.head_dim_v - e) * load_some(grad + e, p_.head_dim_v - e);
            const int64_t row = bh * p_.len_q + i;
            // An empty row's result is the constant 0; its log-sum-exp has no gradient.
            const float grad_lse = inputs_.grad_lse && inputs_.lse[row] != -INFINITE ? inputs_.grad_lse[row] : 0.0f;
            results_.delta[row] = sum(total) - grad_lse;
        }
    }

    // ---- one block of queries, as every product with it needs it

    struct Queries {
        int64_t head, first, count;
        typename E::Left query, grad_out;
    };

    Queries queries(const Scratch& s, int64_t b, int64_t h, int64_t first) const {
        const int64_t count = smaller(BLOCK_Q, p_.len_q - first);
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = (b * p_.heads + h) * p_.len_q + first + r;
            s.delta[r] = results_.delta[row];
            if (inputs_.lse[row] == -INFINITE) {  // every score is -infinity
                s.lse[r] = s.lse_residual[r] = 0.0f;
            } else if (plain_) {  // in powers of two, still in two floats
                const double exact = (static_cast<double>(inputs_.lse[row]) + inputs_.lse_residual[row]) / LN2;
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
    void tile(const Scratch& s, int64_t b, const Queries& q, const Packed* keys_t, const Packed* values_t, int64_t j,
              int64_t n, const float* bias, F each) const {
        const int64_t width = round_up(n, PANEL);
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
            for (int64_t k = 0; k < width; k += WIDTH) {
                Floats weight, weight_below = {}, grad, grad_below = {};
                differentiate<PLAIN>(s, r, k, s.lanes + k, weight, grad);
                if (pair) differentiate<PLAIN>(s, r + 1, k, s.lanes + BLOCK_K + k, weight_below, grad_below);
                each(r, k, weight, grad, weight_below, grad_below);
            }
        }
    }

    template <bool PLAIN>
    FF_INLINE void differentiate(const Scratch& s, int64_t r, int64_t k, const uint16_t* lanes, Floats& weight,
                                 Floats& grad) const {
        const Floats score = load(s.scores + r * BLOCK_K + k);
        Floats power;
        if constexpr (PLAIN)
            power = score * (static_cast<float>(p_.scale) * LOG2E) - s.lse[r] - s.lse_residual[r];
        else
            power = ((score - s.lse[r]) - s.lse_residual[r]) * LOG2E;
        weight = exp2<EXP2_DEGREE<Scalar>>(power);
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
    FF_INLINE Floats through_cap(const Scratch& s, int64_t r, int64_t k, Floats grad) const {
        const float cap = static_cast<float>(p_.softcap);
        const Floats t = tanh(load(s.raw + r * BLOCK_K + k) * (static_cast<float>(p_.scale) / cap));
        return grad * (1.0f - t * t);
    }

    // ---- the gradients of query, key, value and key_mask

    void keys_of_group(int64_t task) const {
        const int64_t group = task % results_.groups, head_kv = task / results_.groups % p_.heads_kv;
        const int64_t b = task / results_.groups / p_.heads_kv;
        const Scratch s = scratch();
        [[maybe_unused]] const typename E::Session session;
        const int64_t first_head = head_kv * p_.group();
        if (results_.partial_grad_query)
            for (int64_t h = first_head; h < first_head + p_.group(); h++)
                fill(partial(group, b, h, 0), p_.len_q * p_.head_dim);
        for (int64_t j = group * chunk_; j == 0 || j < p_.len_k; j += results_.groups * chunk_) {
            if (plain_)
                chunk<true>(s, group, b, head_kv, j);
            else
                chunk<false>(s, group, b, head_kv, j);
        }
    }

    float* partial(int64_t group, int64_t b, int64_t h, int64_t row) const {
        return results_.partial_grad_query + (((group * p_.batch + b) * p_.heads + h) * p_.len_q + row) * p_.head_dim;
    }

    static void fill(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

    template <bool PLAIN>
    void chunk(const Scratch& s, int64_t group, int64_t b, int64_t head_kv, int64_t first) const {
        const int64_t count = smaller(chunk_, p_.len_k - first), depth = round_up(count, E::DEPTH);
        const int64_t rows_k = round_up(p_.head_dim, E::ROW_MULTIPLE),
                      rows_v = round_up(p_.head_dim_v, E::ROW_MULTIPLE);
        fill(s.grad_keys, round_up(count, BLOCK_K) * rows_k);
        fill(s.grad_values, round_up(count, BLOCK_K) * rows_v);
        const Scalar *keys = at(p_.key, b, head_kv, first), *values = at(p_.value, b, head_kv, first);
        const bool own_masks = p_.key_mask.data && p_.key_mask.head != 0;
        const float* bias = p_.key_mask.data ? s.bias : nullptr;
        for (int64_t h = head_kv * p_.group(); h < (head_kv + 1) * p_.group(); h++) {
            if (h == head_kv * p_.group() || own_masks) {
                if (bias) ScoreRules{p_, b, h}.key_bias(s.bias, first, count, round_up(count, PANEL));
                E::pack_right_transposed(s.keys_t, keys, p_.key.row, count, p_.head_dim, bias);
                E::pack_right_transposed(s.values_t, values, p_.value.row, count, p_.head_dim_v, bias);
                E::pack_right(s.keys, depth, keys, p_.key.row, count, p_.head_dim, bias);
            }
            fill(s.grad_bias, chunk_);
            const bool writes_all = results_.grad_query.data && !results_.partial_grad_query;
            const Range seen = count > 0 ? visible_queries(p_, first, first + count - 1) : Range{0, 0};
            for (int64_t i = 0; i < p_.len_q; i += BLOCK_Q) {
                const bool visible = i < seen.end && i + BLOCK_Q > seen.begin;
                if (visible || writes_all) block<PLAIN>(s, group, b, h, i, first, count, depth, bias, visible);
            }
            if (results_.grad_key_mask.data) store_bias(s, b, h, first, count);
        }
        store_transposed(results_.grad_key, s.grad_keys, rows_k, b, head_kv, first, count, p_.head_dim,
                         static_cast<float>(p_.scale));
        store_transposed(results_.grad_value, s.grad_values, rows_v, b, head_kv, first, count, p_.head_dim_v, 1.0f);
    }

    template <bool PLAIN>
    void block(const Scratch& s, int64_t group, int64_t b, int64_t h, int64_t i, int64_t first, int64_t count,
               int64_t depth, const float* bias, bool visible) const {
        const Queries q = queries(s, b, h, i);
        const auto query_t =
            E::left_transposed(q.query, at(p_.query, b, h, i), p_.query.row, q.count, p_.head_dim, s.query_t);
        const auto grad_out_t = E::left_transposed(q.grad_out, at(inputs_.grad_out, b, h, i), inputs_.grad_out.row,
                                                   q.count, p_.head_dim_v, s.grad_out_t);
        const int64_t rows_k = round_up(p_.head_dim, E::ROW_MULTIPLE),
                      rows_v = round_up(p_.head_dim_v, E::ROW_MULTIPLE);
        const Range seen = visible_keys(p_, i, i + q.count - 1);
        const int64_t begin = larger(round_down(seen.begin, BLOCK_K), first), end = smaller(seen.end, first + count);
        bool started = false;
        for (int64_t j = begin; visible && j < end; j += BLOCK_K) {
            const int64_t n = smaller(BLOCK_K, first + count - j), at_key = j - first;
            const float* block_bias = bias ? bias + at_key : nullptr;
            tile<PLAIN>(s, b, q, E::right_at(s.keys_t, p_.head_dim, 0, at_key),
                        E::right_at(s.values_t, p_.head_dim_v, 0, at_key), j, n, block_bias,
                        [&](int64_t r, int64_t k, Floats p, Floats ds, Floats p_below, Floats ds_below) {
                            E::put_right(s.weights, BLOCK_Q, r, k, p, p_below);
                            float* grad_bias = s.grad_bias + at_key + k;
                            store(grad_bias, load(grad_bias) + (ds + ds_below));
                            if (p_.softcap > 0.0) {
                                ds = through_cap(s, r, k, ds);
                                if (r + 1 < q.count) ds_below = through_cap(s, r + 1, k, ds_below);
                            }
                            E::put_right(s.right, BLOCK_Q, r, k, ds, ds_below);
                            E::put_left(s.left, BLOCK_Q, BLOCK_K, r, k, ds);
                            if (r + 1 < q.count) E::put_left(s.left, BLOCK_Q, BLOCK_K, r + 1, k, ds_below);
                        });
            E::clear_right(s.weights, BLOCK_Q, q.count, n);
            E::clear_right(s.right, BLOCK_Q, q.count, n);
            E::multiply(s.grad_values + at_key * rows_v, BLOCK_K, grad_out_t, s.weights, BLOCK_Q, p_.head_dim_v, n,
                        q.count, true);
            E::multiply(s.grad_keys + at_key * rows_k, BLOCK_K, query_t, s.right, BLOCK_Q, p_.head_dim, n, q.count,
                        true);
            if (!results_.grad_query.data) continue;
            E::multiply_packed(s.grad_query, width_, E::left_of(s.left, BLOCK_Q, BLOCK_K),
                               E::right_at(s.keys, depth, at_key, 0), depth, q.count, p_.head_dim, n, started);
            started = true;
        }
        if (results_.grad_query.data) store_query(s, group, b, q, started);
    }

    void store_query(const Scratch& s, int64_t group, int64_t b, const Queries& q, bool started) const {
        for (int64_t r = 0; r < q.count; r++) {
            const float* from = s.grad_query + r * width_;
            for (int64_t e = 0; e < p_.head_dim; e += WIDTH) {
                const Floats grad = started ? load(from + e) : Floats{};
                if (results_.partial_grad_query) {
                    float* to = partial(group, b, q.head, q.first + r) + e;
                    store_some(to, load_some(to, p_.head_dim - e) + grad, p_.head_dim - e);
                } else {
                    Scalar* to = at<Scalar>(results_.grad_query, b, q.head, q.first + r) + e;
                    store_some(to, grad * static_cast<float>(p_.scale), p_.head_dim - e);
                }
            }
        }
    }

    // (blocks, rows, BLOCK_K) transposed to the rows of the keys [first, first + count).
    static void store_transposed(const Rows& to, const float* from, int64_t rows, int64_t b, int64_t h, int64_t first,
                                 int64_t count, int64_t columns, float factor) {
        if (!to.data) return;
        for (int64_t j = 0; j < count; j += WIDTH) {
            const float* block = from + round_down(j, BLOCK_K) * rows + j % BLOCK_K;
            for (int64_t e = 0; e < columns; e += WIDTH) {
                Floats square[WIDTH];
                for (int lane = 0; lane < WIDTH; lane++)
                    square[lane] = e + lane < columns ? load(block + (e + lane) * BLOCK_K) * factor : Floats{};
                transpose(square);
                for (int64_t lane = 0; lane < smaller<int64_t>(WIDTH, count - j); lane++)
                    store_some(at<Scalar>(to, b, h, first + j + lane) + e, square[lane], columns - e);
            }
        }
    }

    void store_bias(const Scratch& s, int64_t b, int64_t h, int64_t first, int64_t count) const {
        const Mask& to = results_.grad_key_mask;
        char* row = static_cast<char*>(const_cast<void*>(mask_row(to, b, h, 0)));
        for (int64_t j = 0; j < count; j++) store_term(to.type, row, (first + j) * to.key, s.grad_bias[j]);
    }

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

    void add_partial(int64_t task) const {
        const int64_t bh = task / blocks_, b = bh / p_.heads, h = bh % p_.heads, first = task % blocks_ * BLOCK_Q;
        for (int64_t i = first; i < smaller(first + BLOCK_Q, p_.len_q); i++) {
            for (int64_t e = 0; e < p_.head_dim; e += WIDTH) {
                Floats total = {};
                for (int64_t group = 0; group < results_.groups; group++)
                    total += load_some(partial(group, b, h, i) + e, p_.head_dim - e);
                store_some(at<Scalar>(results_.grad_query, b, h, i) + e, total * static_cast<float>(p_.scale),
                           p_.head_dim - e);
            }
        }
    }

    // ---- the gradient of attn_mask, in its own shape: dS summed over what it is broadcast along

    void mask_gradient(int64_t task) const {
        if (plain_)
            mask_rows<true>(task);
        else
            mask_rows<false>(task);
    }

    template <bool PLAIN>
    void mask_rows(int64_t task) const {
        const Mask& to = results_.grad_attn_mask;
        const Scratch s = scratch();
        [[maybe_unused]] const typename E::Session session;
        const int64_t i = task % blocks_ * BLOCK_Q, matrix = task / blocks_, m = smaller(BLOCK_Q, p_.len_q - i);
        const int64_t mask_heads = to.head ? p_.heads : 1, mask_b = matrix / mask_heads, mask_h = matrix % mask_heads;
        float row_sums[BLOCK_Q] = {};
        for (int64_t j = 0; j < p_.len_k; j += BLOCK_K) {
            const int64_t n = smaller(BLOCK_K, p_.len_k - j);
            fill(s.mean, BLOCK_Q * BLOCK_K);
            for (int64_t b = to.batch ? mask_b : 0; b < (to.batch ? mask_b + 1 : p_.batch); b++)
                for (int64_t h = to.head ? mask_h : 0; h < (to.head ? mask_h + 1 : p_.heads); h++)
                    add_tile<PLAIN>(s, b, h, i, m, j, n);
            for (int64_t r = 0; r < m; r++) {
                char* row = static_cast<char*>(const_cast<void*>(mask_row(to, mask_b, mask_h, i + r)));
                for (int64_t k = 0; k < n; k++) {
                    const float x = s.mean[r * BLOCK_K + k];
                    if (to.key == 0)
                        row_sums[r] += x;
                    else
                        store_term(to.type, row, (j + k) * to.key, x);
                }
            }
        }
        for (int64_t r = 0; to.key == 0 && r < m; r++) {
            void* row = const_cast<void*>(mask_row(to, mask_b, mask_h, i + r));
            store_term(to.type, row, 0, row_sums[r]);
        }
    }

    template <bool PLAIN>
    void add_tile(const Scratch& s, int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
        const Range seen = visible_keys(p_, i, i + m - 1);
        if (seen.begin >= j + n || seen.end <= j) return;
        const float* bias = p_.key_mask.data ? s.bias : nullptr;
        if (bias && !ScoreRules{p_, b, h}.key_bias(s.bias, j, n, round_up(n, PANEL))) return;
        const int64_t head_kv = h / p_.group();
        E::pack_right_transposed(s.keys_t, at(p_.key, b, head_kv, j), p_.key.row, n, p_.head_dim, bias);
        E::pack_right_transposed(s.values_t, at(p_.value, b, head_kv, j), p_.value.row, n, p_.head_dim_v, bias);
        tile<PLAIN>(s, b, queries(s, b, h, i), s.keys_t, s.values_t, j, n, bias,
                    [&](int64_t r, int64_t k, Floats, Floats ds, Floats, Floats ds_below) {
                        float* mean = s.mean + r * BLOCK_K + k;
                        store(mean, load(mean) + ds);
                        if (r + 1 < m) store(mean + BLOCK_K, load(mean + BLOCK_K) + ds_below);
                    });
    }
};

}  // namespace fusedformer::FF_LEVEL
