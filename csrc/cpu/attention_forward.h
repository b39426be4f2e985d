// Attention forward: softmax(Q Kᵀ / √d) V in one pass over the keys ("Attention Is All You Need", equation 1; tiled
// with an online softmax as in FlashAttention, Dao et al., 2022).
//
// A task is a chunk of the query blocks of the heads that share keys and values. It walks over the keys by super-blocks
// that fit the second-level cache: packed once, used by all of its query blocks. Where that makes fewer tasks than
// threads, the keys are split too: tasks leave their rows relative to a reference, and a second pass joins them in
// order.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

template <class E>
class AttentionForward {
    using Scalar = typename E::Scalar;
    using Packed = typename E::Packed;
    static constexpr int64_t PANEL = E::PANEL, BLOCK_K = E::BLOCK_K;
    static constexpr int64_t LEAST_KEYS = 512;  // in a piece: fewer cost more to join than they give to another thread

  public:
    static void run(const Problem& p, const ForwardResults& results, const Runtime& runtime) {
        AttentionForward forward(p, results, runtime);
        if (forward.pieces_ > 1) forward.partial_ = static_cast<float*>(runtime.workspace(forward.workspace_bytes()));
        auto body = [](int64_t task, void* self) { static_cast<const AttentionForward*>(self)->compute(task); };
        runtime.parallel(forward.tasks_ * forward.pieces_, body, const_cast<AttentionForward*>(&forward));
        if (forward.pieces_ == 1) return;
        auto join = [](int64_t task, void* self) { static_cast<const AttentionForward*>(self)->join(task); };
        runtime.parallel(p.batch * p.heads * forward.blocks_, join, const_cast<AttentionForward*>(&forward));
    }

    // Beyond the results: each thread's, and what they share.
    static int64_t memory(const Problem& p, const Runtime& runtime) {
        const ForwardResults none{};
        const AttentionForward forward(p, none, runtime);
        Arena arena;
        forward.lay_out(arena);
        const int64_t shared = forward.pieces_ > 1 ? forward.workspace_bytes() : 0;
        return shared +
               static_cast<int64_t>(arena.used()) * smaller<int64_t>(runtime.threads, forward.tasks_ * forward.pieces_);
    }

  private:
    const Problem& p_;
    const ForwardResults& results_;
    const Runtime& runtime_;
    bool plain_;
    Powers powers_;
    int64_t block_q_, blocks_, heads_together_, units_per_task_, chunks_, tasks_, super_, width_v_;
    int64_t pieces_, piece_keys_;  // of the keys
    float* partial_ = nullptr;     // (pieces, B, H, L) rows of width_v + 2: out, then its sum and reference

    // What a task keeps. A unit is one block of queries of one head.
    struct Scratch {
        float* out;         // (units, block_q, width_v), relative to the references
        float* sums;        // (units, block_q, WIDTH), partial in each lane
        float* references;  // (units, block_q), near the largest score so far, -infinity where there was none
        int64_t* unset;     // (units), how many are -infinity
        bool* started;      // (units), whether `out` holds anything
        float* scores;      // (block_q, BLOCK_K)
        float* block_sums;  // (block_q, WIDTH)
        float* bias;        // (super)
        Packed *weights, *query, *keys, *values;
        uint16_t* lanes;  // dropout's, (BLOCK_K)
    };

    AttentionForward(const Problem& p, const ForwardResults& results, const Runtime& runtime)
        : p_(p), results_(results), runtime_(runtime), plain_(ScoreRules::plain(p)), powers_(ScoreRules::powers(p)) {
        block_q_ = p.len_q <= E::SHORT ? E::SHORT_BLOCK_Q : E::BLOCK_Q;
        blocks_ = (p.len_q + block_q_ - 1) / block_q_;
        // A key mask of its own would give each head other keys and values.
        heads_together_ = p.key_mask.data && p.key_mask.head != 0 ? 1 : p.heads_kv == 0 ? 1 : p.group();
        const int64_t sets = p.batch * p.heads / larger<int64_t>(heads_together_, 1), units = heads_together_ * blocks_;
        const int64_t cap = larger<int64_t>(E::CHUNK_Q / block_q_, 1), tasks_wanted = 4 * runtime.threads;
        const int64_t fair = (units * sets + tasks_wanted - 1) / tasks_wanted;
        units_per_task_ = smaller(cap, larger<int64_t>(runtime.threads == 1 ? cap : fair, 1));
        chunks_ = (units + units_per_task_ - 1) / units_per_task_;
        tasks_ = p.len_q == 0 ? 0 : sets * chunks_;
        width_v_ = round_up(p.head_dim_v, PANEL);
        const int64_t row_bytes = (p.head_dim + width_v_) * static_cast<int64_t>(sizeof(Packed)) * E::PARTS;
        const int64_t fitting = round_down(larger<int64_t>(E::CACHE / row_bytes, BLOCK_K), BLOCK_K);
        super_ = smaller(fitting, round_up(larger<int64_t>(p.len_k, 1), BLOCK_K));
        const int64_t wanted = tasks_ == 0 ? 1 : (runtime.threads + tasks_ - 1) / tasks_;
        pieces_ = larger<int64_t>(smaller(wanted, p.len_k / LEAST_KEYS), 1);
        piece_keys_ = round_up((p.len_k + pieces_ - 1) / pieces_, BLOCK_K);
    }

    Scratch lay_out(Arena& arena) const {
        const int64_t units = units_per_task_, rows = units * block_q_;
        Scratch s;
        s.out = arena.take<float>(rows * width_v_);
        s.sums = arena.take<float>(rows * WIDTH);
        s.references = arena.take<float>(rows);
        s.unset = arena.take<int64_t>(units);
        s.started = arena.take<bool>(units);
        s.scores = arena.take<float>(block_q_ * BLOCK_K);
        s.block_sums = arena.take<float>(block_q_ * WIDTH);
        s.bias = arena.take<float>(super_);
        s.weights = arena.take<Packed>(E::tile_size(block_q_, BLOCK_K));
        s.query = arena.take<Packed>(E::left_size(block_q_, p_.head_dim));
        s.keys = arena.take<Packed>(E::right_size(p_.head_dim, super_));
        s.values = arena.take<Packed>(E::right_size(super_, p_.head_dim_v));
        s.lanes = arena.take<uint16_t>(BLOCK_K);
        return s;
    }

    struct Unit {
        int64_t head, first, count;  // queries [first, first + count)
    };

    Unit unit(int64_t set, int64_t index) const {
        const int64_t first = index % blocks_ * block_q_;
        return {set * heads_together_ + index / blocks_, first, smaller(block_q_, p_.len_q - first)};
    }

    int64_t row_size() const { return width_v_ + 2; }

    int64_t workspace_bytes() const {
        return pieces_ * p_.batch * p_.heads * p_.len_q * row_size() * static_cast<int64_t>(sizeof(float));
    }

    float* partial(int64_t piece, int64_t b, int64_t head, int64_t i) const {
        return partial_ + (((piece * p_.batch + b) * p_.heads + head) * p_.len_q + i) * row_size();
    }

    void compute(int64_t index) const {
        const int64_t task = index / pieces_, piece = index % pieces_;
        const int64_t sets = tasks_ / chunks_, sets_per_batch = sets / larger<int64_t>(p_.batch, 1);
        const int64_t chunk = chunks_ - 1 - task / sets, b = task % sets / sets_per_batch;  // causality: longest first
        const int64_t set = task % sets % sets_per_batch;
        const int64_t first_unit = chunk * units_per_task_;
        const int64_t units = smaller(units_per_task_, heads_together_ * blocks_ - first_unit);

        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        const Scratch s = lay_out(arena);
        [[maybe_unused]] const typename E::Session session;
        for (int64_t r = 0; r < units * block_q_; r++) s.references[r] = -INFINITE, store(s.sums + r * WIDTH, Floats{});
        Range all = {p_.len_k, 0};
        for (int64_t u = 0; u < units; u++) {
            const Unit q = unit(set, first_unit + u);
            const Range seen = visible_keys(p_, q.first, q.first + q.count - 1);
            all = {smaller(all.begin, seen.begin), larger(all.end, seen.end)};
            s.unset[u] = q.count, s.started[u] = false;
        }

        all = {larger(all.begin, piece * piece_keys_), smaller(all.end, (piece + 1) * piece_keys_)};

        const int64_t head_kv = unit(set, first_unit).head / larger<int64_t>(p_.group(), 1);
        const Scalar* keys = at(p_.key, b, head_kv);
        const Scalar* values = at(p_.value, b, head_kv);
        for (int64_t j = round_down(all.begin, PANEL); j < all.end; j += super_) {
            const int64_t count = smaller(super_, all.end - j), depth = round_up(count, E::DEPTH);
            const ScoreRules rules{p_, b, unit(set, first_unit).head};
            const float* bias = p_.key_mask.data ? s.bias : nullptr;
            if (bias && !rules.key_bias(s.bias, j, count, round_up(count, PANEL))) continue;
            E::pack_right_transposed(s.keys, keys + j * p_.key.row, p_.key.row, count, p_.head_dim, bias);
            E::pack_right(s.values, depth, values + j * p_.value.row, p_.value.row, count, p_.head_dim_v, bias);
            for (int64_t u = 0; u < units; u++) attend(s, u, b, unit(set, first_unit + u), j, count, depth, bias);
        }
        for (int64_t u = 0; u < units; u++) finish(s, u, piece, b, unit(set, first_unit + u));
    }

    static const Scalar* at(const Rows& x, int64_t b, int64_t h) {
        return static_cast<const Scalar*>(x.data) + b * x.batch + h * x.head;
    }

    // One unit over the packed keys [first, first + count).
    void attend(const Scratch& s, int64_t u, int64_t b, Unit q, int64_t first, int64_t count, int64_t depth,
                const float* bias) const {
        const Range seen = visible_keys(p_, q.first, q.first + q.count - 1);
        const int64_t begin = larger(round_down(seen.begin, PANEL), first), end = smaller(seen.end, first + count);
        if (begin >= end) return;
        const Scalar* query = at(p_.query, b, q.head) + q.first * p_.query.row;
        const auto left = E::left(query, p_.query.row, q.count, p_.head_dim, s.query);
        const ScoreRules rules{p_, b, q.head};
        float* out = s.out + u * block_q_ * width_v_;
        for (int64_t j = begin; j < end; j += BLOCK_K) {
            const int64_t n = smaller(BLOCK_K, end - j), width = round_up(n, E::COLUMNS), packed = j - first;
            const float* block_bias = bias ? bias + packed : nullptr;
            if (block_bias && all_excluded(block_bias, n)) continue;
            E::multiply_packed(s.scores, BLOCK_K, left, E::right_at(s.keys, p_.head_dim, 0, packed), p_.head_dim,
                               q.count, n, p_.head_dim, false);
            if (plain_) {
                if (rules.touches(q.first, q.count, j, width, block_bias))
                    rules.apply<true>(s.scores, BLOCK_K, q.first, q.count, j, width, block_bias);
                weigh(s, u, rules, q, j, width, out);
            } else {
                rules.apply<false>(s.scores, BLOCK_K, q.first, q.count, j, width, block_bias);
                weigh(s, u, rules, q, j, width, out);
            }
            E::multiply_packed(out, width_v_, E::left_of(s.weights, block_q_, BLOCK_K),
                               E::right_at(s.values, depth, packed, 0), depth, q.count, p_.head_dim_v, n, s.started[u]);
            s.started[u] = true;
        }
    }

    static bool all_excluded(const float* bias, int64_t n) {
        for (int64_t j = 0; j < n; j++)
            if (bias[j] != -INFINITE) return false;
        return true;
    }

    // Scores to weights relative to the references. A reference only has to be near its row's largest score: weights
    // may grow to 2^ROOM before it is raised and what has been summed is rescaled. Most blocks pass without.
    void weigh(const Scratch& s, int64_t u, const ScoreRules& rules, Unit q, int64_t j, int64_t width,
               float* out) const {
        float* references = s.references + u * block_q_;
        float* sums = s.sums + u * block_q_ * WIDTH;
        if (s.unset[u] > 0) raise(s, u, q, width, out);
        const bool fits = p_.has_dropout() ? exponentials<true>(s, rules, references, q, j, width)
                                           : exponentials<false>(s, rules, references, q, j, width);
        if (!fits) {
            raise(s, u, q, width, out);
            if (p_.has_dropout())
                exponentials<true>(s, rules, references, q, j, width);
            else
                exponentials<false>(s, rules, references, q, j, width);
        }
        for (int64_t r = 0; r < q.count * WIDTH; r += WIDTH) store(sums + r, load(sums + r) + load(s.block_sums + r));
    }

    static constexpr float ROOM = 8.0f;

    template <bool DROPOUT>
    bool exponentials(const Scratch& s, const ScoreRules& rules, const float* references, Unit q, int64_t j,
                      int64_t width) const {
        Floats highest = broadcast(-INFINITE);
        for (int64_t r = 0; r < q.count; r++) {
            const float reference = references[r] == -INFINITE ? 0.0f : references[r];
            const float* scores = s.scores + r * BLOCK_K;
            if constexpr (DROPOUT)
                philox_lanes(s.lanes, p_.seed, j, width, static_cast<uint32_t>(q.first + r), rules.matrix(), 0);
            Floats total = {};
            for (int64_t k = 0; k < width; k += WIDTH) {
                const Floats x = load(scores + k) - reference;  // exactly 0 for the score that is the reference
                highest = larger(x, highest);
                Floats weight = powers_.template of<EXP2_DEGREE<Scalar>>(x);
                total += weight;
                if constexpr (DROPOUT) weight = keep(kept(s.lanes + k, p_.dropout_threshold), weight);
                E::put_left(s.weights, block_q_, BLOCK_K, r, k, weight);
            }
            store(s.block_sums + r * WIDTH, total);
        }
        return !any(highest * powers_.factor() > ROOM);
    }

    void raise(const Scratch& s, int64_t u, Unit q, int64_t width, float* out) const {
        float* references = s.references + u * block_q_;
        s.unset[u] = 0;
        for (int64_t r = 0; r < q.count; r++) {
            Floats most = broadcast(-INFINITE);
            for (int64_t k = 0; k < width; k += WIDTH) most = larger(load(s.scores + r * BLOCK_K + k), most);
            const float before = references[r], after = larger(before, largest(most));
            // A row that is within its room stays as it is: what its neighbours hold changes none of its bits.
            if (before != -INFINITE && !((after - before) * powers_.factor() > ROOM)) continue;
            references[r] = after;
            s.unset[u] += after == -INFINITE;
            if (before == -INFINITE) continue;
            const float ratio = powers_.of(broadcast(before - after))[0];
            float* sums = s.sums + (u * block_q_ + r) * WIDTH;
            store(sums, load(sums) * ratio);
            if (!s.started[u]) continue;
            for (int64_t e = 0; e < width_v_; e += WIDTH)
                store(out + r * width_v_ + e, load(out + r * width_v_ + e) * ratio);
        }
    }

    void finish(const Scratch& s, int64_t u, int64_t piece, int64_t b, Unit q) const {
        for (int64_t r = 0; r < q.count; r++) {
            const int64_t row = u * block_q_ + r;
            const float total = sum(load(s.sums + row * WIDTH));
            const float* out = s.started[u] ? s.out + row * width_v_ : nullptr;
            if (pieces_ == 1) {
                finish_row(out, total, s.references[row], b, q.head, q.first + r);
                continue;
            }
            float* to = partial(piece, b, q.head, q.first + r);
            for (int64_t e = 0; e < width_v_; e += WIDTH) store(to + e, out ? load(out + e) : Floats{});
            to[width_v_] = total, to[width_v_ + 1] = s.references[row];
        }
    }

    void join(int64_t task) const {
        const int64_t bh = task / blocks_, b = bh / p_.heads, head = bh % p_.heads, first = task % blocks_ * block_q_;
        for (int64_t i = first; i < smaller(first + block_q_, p_.len_q); i++) {
            float* joined = partial(0, b, head, i);
            for (int64_t piece = 1; piece < pieces_; piece++) {
                const float* next = partial(piece, b, head, i);
                const float before = joined[width_v_ + 1], after = next[width_v_ + 1];
                if (next[width_v_] == 0.0f) continue;  // it saw no key
                const float most = larger(before, after);
                const float mine = joined[width_v_] == 0.0f ? 0.0f : powers_.of(broadcast(before - most))[0];
                const float its = powers_.of(broadcast(after - most))[0];
                for (int64_t e = 0; e < width_v_; e += WIDTH)
                    store(joined + e, load(joined + e) * mine + load(next + e) * its);
                joined[width_v_] = joined[width_v_] * mine + next[width_v_] * its;
                joined[width_v_ + 1] = most;
            }
            finish_row(joined, joined[width_v_], joined[width_v_ + 1], b, head, i);
        }
    }

    // `out`, null for zeros, and `total` are relative to the reference.
    void finish_row(const float* out, float total, float reference, int64_t b, int64_t head, int64_t i) const {
        const double sink = p_.sinks.data ? mask_term(p_.sinks, b, head) : -INFINITE;
        double lse = -INFINITE;
        float factor = 0.0f;
        if (total != 0.0f) {  // some key took part
            lse = (reference == -INFINITE ? 0.0 : reference * (plain_ ? p_.scale : 1.0)) + __builtin_log(total);
            factor = 1.0f / total;
        }
        if (sink != -INFINITE) {
            const double most = lse > sink ? lse : sink;
            const double both = most + __builtin_log(__builtin_exp(lse - most) + __builtin_exp(sink - most));
            factor *= static_cast<float>(__builtin_exp(lse - both));
            lse = both;
        }
        const int64_t row = (b * p_.heads + head) * p_.len_q + i;
        results_.lse[row] = static_cast<float>(lse);
        results_.lse_residual[row] = __builtin_isfinite(lse) ? static_cast<float>(lse - static_cast<float>(lse)) : 0.0f;
        Scalar* to = const_cast<Scalar*>(at(results_.out, b, head)) + i * results_.out.row;
        for (int64_t e = 0; e < p_.head_dim_v; e += WIDTH)
            store_some(to + e, total != 0.0f && out ? load(out + e) * (factor * p_.keep_scale) : Floats{},
                       p_.head_dim_v - e);
    }
};

}  // namespace fusedformer::FF_LEVEL
