// The attention weights themselves, from the log-sum-exp: what `need_weights` asks for.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class AttentionWeights {
    using Scalar = typename E::Scalar;
    using Packed = typename E::Packed;
    static constexpr int64_t PANEL = E::PANEL, BLOCK_K = E::BLOCK_K, BLOCK_Q = E::BLOCK_Q;

  public:
    static void run(const Problem& p, const WeightsResults& results, const Runtime& runtime) {
        const AttentionWeights weights{p, results, runtime};
        auto body = [](int64_t task, void* self) { static_cast<const AttentionWeights*>(self)->compute(task); };
        const int64_t matrices = p.batch * (results.average_heads ? 1 : p.heads);
        runtime.parallel(matrices * weights.blocks_, body, const_cast<AttentionWeights*>(&weights));
    }

  private:
    const Problem& p_;
    const WeightsResults& results_;
    const Runtime& runtime_;
    const bool plain_ = ScoreRules::plain(p_);
    const int64_t blocks_ = (p_.len_q + BLOCK_Q - 1) / BLOCK_Q;

    AttentionWeights(const Problem& p, const WeightsResults& results, const Runtime& runtime)
        : p_(p), results_(results), runtime_(runtime) {}

    struct Scratch {
        float *scores, *mean, *bias;
        Packed *query, *keys;
        uint16_t* lanes;
    };

    Scratch lay_out(Arena& arena) const {
        Scratch s;
        s.scores = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.mean = arena.take<float>(BLOCK_Q * BLOCK_K);
        s.bias = arena.take<float>(BLOCK_K);
        s.query = arena.take<Packed>(E::left_size(BLOCK_Q, p_.head_dim));
        s.keys = arena.take<Packed>(E::right_size(p_.head_dim, BLOCK_K));
        s.lanes = arena.take<uint16_t>(BLOCK_K);
        return s;
    }

    void compute(int64_t task) const {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        const Scratch s = lay_out(arena);
        [[maybe_unused]] const typename E::Session session;
        const int64_t i = task % blocks_ * BLOCK_Q, m = smaller(BLOCK_Q, p_.len_q - i), matrix = task / blocks_;
        const int64_t heads = results_.average_heads ? p_.heads : 1;
        const int64_t b = results_.average_heads ? matrix : matrix / p_.heads;
        const int64_t first = results_.average_heads ? 0 : matrix % p_.heads;
        Scalar* to = static_cast<Scalar*>(results_.weights) + (matrix * p_.len_q + i) * p_.len_k;
        for (int64_t j = 0; j < p_.len_k; j += BLOCK_K) {
            const int64_t n = smaller(BLOCK_K, p_.len_k - j);
            for (int64_t r = 0; r < m * BLOCK_K; r += WIDTH) store(s.mean + r, Floats{});
            for (int64_t h = first; h < first + heads; h++) {
                if (plain_)
                    add_head<true>(s, b, h, i, m, j, n);
                else
                    add_head<false>(s, b, h, i, m, j, n);
            }
            const float share = p_.keep_scale / static_cast<float>(heads);
            for (int64_t r = 0; r < m; r++)
                for (int64_t k = 0; k < n; k += WIDTH)
                    store_some(to + r * p_.len_k + j + k, load(s.mean + r * BLOCK_K + k) * share, n - k);
        }
    }

    template <bool PLAIN>
    void add_head(const Scratch& s, int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
        const Range seen = visible_keys(p_, i, i + m - 1);
        if (seen.begin >= j + n || seen.end <= j) return;
        const ScoreRules rules{p_, b, h};
        const int64_t width = round_up(n, E::COLUMNS), head_kv = h / p_.group();
        const float* bias = p_.key_mask.data ? s.bias : nullptr;
        if (bias && !rules.key_bias(s.bias, j, n, width)) return;
        const auto* query = static_cast<const Scalar*>(p_.query.data) + b * p_.query.batch + h * p_.query.head;
        const auto* keys = static_cast<const Scalar*>(p_.key.data) + b * p_.key.batch + head_kv * p_.key.head;
        const auto left = E::left(query + i * p_.query.row, p_.query.row, m, p_.head_dim, s.query);
        E::pack_right_transposed(s.keys, keys + j * p_.key.row, p_.key.row, n, p_.head_dim, bias);
        E::multiply_packed(s.scores, BLOCK_K, left, s.keys, p_.head_dim, m, n, p_.head_dim, false);
        if (!PLAIN || rules.touches(i, m, j, width, bias)) rules.apply<PLAIN>(s.scores, BLOCK_K, i, m, j, width, bias);
        const Powers powers = ScoreRules::powers(p_);
        for (int64_t r = 0; r < m; r++) {
            const float lse = results_.lse[(b * p_.heads + h) * p_.len_q + i + r];
            const float reference = lse == -INFINITE ? 0.0f : PLAIN ? static_cast<float>(lse / p_.scale) : lse;
            if (p_.has_dropout())
                philox_lanes(s.lanes, p_.seed, j, width, static_cast<uint32_t>(i + r), rules.matrix(), 0);
            for (int64_t k = 0; k < width; k += WIDTH) {
                Floats weight = powers.template of<EXP2_DEGREE<Scalar>>(
                    smaller(load(s.scores + r * BLOCK_K + k) - reference, Floats{}));
                if (p_.has_dropout()) weight = keep(kept(s.lanes + k, p_.dropout_threshold), weight);
                float* mean = s.mean + r * BLOCK_K + k;
                store(mean, load(mean) + weight);
            }
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
