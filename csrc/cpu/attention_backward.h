// Attention backward by recomputation (FlashAttention-2, Dao, 2023, algorithm 2, without atomics):
//
//     P = exp(S - lse)   dV = Pᵀ dO   dP = dO Vᵀ   dS = P ∘ (dP - delta)   dQ = dS K   dK = dSᵀ Q
//
// with delta = rowsum(dO ∘ O) - grad_lse. A task takes every `groups`-th chunk of keys of one batch and key head: it
// packs a chunk once and walks over the queries that see it. dK and dV are its own, kept transposed so that both
// operands of each product come as they are computed; dQ goes to its group's partial sum, and the sums are added at the
// end, in order.
#pragma once

#include "gradient_tiles.h"
#include "mask_gradient.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class AttentionBackward : GradientTiles<E> {
    using Tiles = GradientTiles<E>;
    using Tiles::PANEL, Tiles::BLOCK_Q, Tiles::BLOCK_K, Tiles::p_, Tiles::inputs_, Tiles::results_, Tiles::runtime_,
        Tiles::plain_, Tiles::blocks_, Tiles::at, Tiles::fill, Tiles::store_term;
    using typename Tiles::Scalar, typename Tiles::Packed, typename Tiles::Queries, typename Tiles::TileScratch;

  public:
    static void run(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                    const Runtime& runtime) {
        AttentionBackward backward{p, inputs, results, runtime};
        backward.for_each(p.batch * p.heads * backward.blocks_, &AttentionBackward::sum_rows);
        if (results.grad_query.data || results.grad_key.data || results.grad_value.data || results.grad_key_mask.data)
            backward.for_each(p.batch * p.heads_kv * results.groups, &AttentionBackward::keys_of_group);
        if (results.grad_query.data && results.partial_grad_query)
            backward.for_each(p.batch * p.heads * backward.blocks_, &AttentionBackward::add_partial);
        if (results.grad_attn_mask.data) MaskGradient<E>::run(p, inputs, results, runtime);
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
    const int64_t width_ = round_up(p_.head_dim, PANEL);
    const int64_t chunk_ = backward_chunk(p_.len_k, results_.groups);

    using Tiles::Tiles;

    struct Scratch : TileScratch {
        float* grad_query;                 // (BLOCK_Q, width)
        float *grad_keys, *grad_values;    // (chunk / BLOCK_K, E or Ev, BLOCK_K)
        float *bias, *grad_bias;           // (chunk)
        Packed *query_t, *grad_out_t;      // left operands: Qᵀ, dOᵀ
        Packed *keys_t, *values_t, *keys;  // right operands: Kᵀ, Vᵀ, K
        Packed *weights, *left, *right;    // P as a right operand, dS as both
    };

    Scratch lay_out(Arena& arena) const {
        const int64_t d = p_.head_dim, dv = p_.head_dim_v;
        Scratch s;
        Tiles::lay_out_tile(arena, s);
        s.grad_query = arena.take<float>(BLOCK_Q * width_);
        s.grad_keys = arena.take<float>(chunk_ * round_up(d, E::ROW_MULTIPLE));
        s.grad_values = arena.take<float>(chunk_ * round_up(dv, E::ROW_MULTIPLE));
        s.bias = arena.take<float>(chunk_);
        s.grad_bias = arena.take<float>(chunk_);
        s.query_t = arena.take<Packed>(E::left_size(d, BLOCK_Q));
        s.grad_out_t = arena.take<Packed>(E::left_size(dv, BLOCK_Q));
        s.keys_t = arena.take<Packed>(E::right_size(d, chunk_));
        s.values_t = arena.take<Packed>(E::right_size(dv, chunk_));
        s.keys = arena.take<Packed>(E::right_size(chunk_, d));
        s.weights = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
        s.left = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
        s.right = arena.take<Packed>(E::tile_size(BLOCK_Q, BLOCK_K));
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
        const Queries q = Tiles::queries(s, b, h, i);
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
            // No further than some query of the block sees, by what is computed at a time.
            const int64_t n = smaller(smaller(BLOCK_K, round_up(end - j, E::COLUMNS)), first + count - j),
                          at_key = j - first;
            const float* block_bias = bias ? bias + at_key : nullptr;
            Tiles::template tile<PLAIN>(
                s, b, q, E::right_at(s.keys_t, p_.head_dim, 0, at_key),
                E::right_at(s.values_t, p_.head_dim_v, 0, at_key), j, n, block_bias,
                [&](int64_t r, int64_t k, Floats p, Floats ds, Floats p_below, Floats ds_below) {
                    E::put_right(s.weights, BLOCK_Q, r, k, p, p_below);
                    float* grad_bias = s.grad_bias + at_key + k;
                    store(grad_bias, load(grad_bias) + (ds + ds_below));
                    if (p_.softcap > 0.0) {
                        ds = Tiles::through_cap(s, r, k, ds);
                        if (r + 1 < q.count) ds_below = Tiles::through_cap(s, r + 1, k, ds_below);
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
                    Scalar* to = Tiles::template at<Scalar>(results_.grad_query, b, q.head, q.first + r) + e;
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
                    store_some(Tiles::template at<Scalar>(to, b, h, first + j + lane) + e, square[lane], columns - e);
            }
        }
    }

    void store_bias(const Scratch& s, int64_t b, int64_t h, int64_t first, int64_t count) const {
        const Mask& to = results_.grad_key_mask;
        char* row = static_cast<char*>(const_cast<void*>(mask_row(to, b, h, 0)));
        for (int64_t j = 0; j < count; j++) store_term(to.type, row, (first + j) * to.key, s.grad_bias[j]);
    }

    void add_partial(int64_t task) const {
        const int64_t bh = task / blocks_, b = bh / p_.heads, h = bh % p_.heads, first = task % blocks_ * BLOCK_Q;
        for (int64_t i = first; i < smaller(first + BLOCK_Q, p_.len_q); i++) {
            for (int64_t e = 0; e < p_.head_dim; e += WIDTH) {
                Floats total = {};
                for (int64_t group = 0; group < results_.groups; group++)
                    total += load_some(partial(group, b, h, i) + e, p_.head_dim - e);
                store_some(Tiles::template at<Scalar>(results_.grad_query, b, h, i) + e,
                           total * static_cast<float>(p_.scale), p_.head_dim - e);
            }
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
