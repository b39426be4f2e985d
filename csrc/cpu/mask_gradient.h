// The gradient of attn_mask in its own shape: dS summed over what the mask is broadcast along. A task is one block of
// queries of one of the mask's matrices.
#pragma once

#include "gradient_tiles.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class MaskGradient : GradientTiles<E> {
    using Tiles = GradientTiles<E>;
    using Tiles::PANEL, Tiles::BLOCK_Q, Tiles::BLOCK_K, Tiles::p_, Tiles::results_, Tiles::runtime_, Tiles::plain_,
        Tiles::blocks_, Tiles::at, Tiles::fill, Tiles::store_term;
    using typename Tiles::Scalar, typename Tiles::Packed, typename Tiles::TileScratch;

  public:
    // `delta` of the results is filled already.
    static void run(const Problem& p, const BackwardInputs& inputs, const BackwardResults& results,
                    const Runtime& runtime) {
        const MaskGradient gradient(p, inputs, results, runtime);
        const Mask& to = results.grad_attn_mask;
        const int64_t matrices = (to.batch ? p.batch : 1) * (to.head ? p.heads : 1);
        runtime.parallel(
            matrices * gradient.blocks_,
            [](int64_t task, void* self) { static_cast<const MaskGradient*>(self)->compute(task); },
            const_cast<MaskGradient*>(&gradient));
    }

  private:
    using Tiles::Tiles;

    struct Scratch : TileScratch {
        float *mean, *bias;  // (BLOCK_Q, BLOCK_K), (BLOCK_K)
        Packed *keys_t, *values_t;
    };

    Scratch lay_out(Arena& arena) const {
        Scratch s;
        Tiles::lay_out_tile(arena, s);
        s.mean = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.bias = arena.take<float>(BLOCK_K);
        s.keys_t = arena.take<Packed>(E::right_size(p_.head_dim, BLOCK_K));
        s.values_t = arena.take<Packed>(E::right_size(p_.head_dim_v, BLOCK_K));
        return s;
    }

    Scratch scratch() const {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        return lay_out(arena);
    }

    void compute(int64_t task) const {
        if (plain_)
            rows<true>(task);
        else
            rows<false>(task);
    }

    template <bool PLAIN>
    void rows(int64_t task) const {
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
        Tiles::template tile<PLAIN>(s, b, Tiles::queries(s, b, h, i), s.keys_t, s.values_t, j, n, bias,
                                    [&](int64_t r, int64_t k, Floats, Floats ds, Floats, Floats ds_below) {
                                        float* mean = s.mean + r * BLOCK_K + k;
                                        store(mean, load(mean) + ds);
                                        if (r + 1 < m) store(mean + BLOCK_K, load(mean + BLOCK_K) + ds_below);
                                    });
    }
};

}  // namespace fusedformer::FF_LEVEL
