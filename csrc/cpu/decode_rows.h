// The rows (query, head) of a task of the decode kernel, and the rules that make scores of their products.
#pragma once

#include "decode_problem.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

// Rows of one sequence that share keys and values: `count` of them from `first` on. Row r is query r % len_q of the
// head that stands r / len_q after `head`.
struct DecodeRows {
    Problem problem;  // the sequence's own: its length, and where its queries stand
    int64_t set, b, head, first, count;

    // Of the heads of a sequence, `heads_together` share keys; `set` counts those over all sequences.
    DecodeRows(const DecodeProblem& p, int64_t heads_together, int64_t set, int64_t first, int64_t count)
        : problem(p), set(set), first(first), count(count) {
        const int64_t sets = p.heads / heads_together;
        b = set / sets, head = set % sets * heads_together;
        if (p.lengths) {
            problem.len_k = p.lengths[b] + p.appended;
            problem.position_offset = problem.len_k - p.len_q;
        }
    }

    int64_t head_of(int64_t row) const { return head + (first + row) / problem.len_q; }
    int64_t query_of(int64_t row) const { return (first + row) % problem.len_q; }

    // The keys that some row sees.
    Range seen() const {
        const bool one_head = head_of(0) == head_of(count - 1);
        return visible_keys(problem, one_head ? query_of(0) : 0, one_head ? query_of(count - 1) : problem.len_q - 1);
    }

    // By 4, 2 and 1 rows; 3 count as 4.
    template <class Body>
    void by_four(Body body) const {
        int64_t row = 0;
        for (; count - row >= 3; row += 4) body.template operator()<4>(row);
        if (count - row == 2) body.template operator()<2>(row);
        if (count - row == 1) body.template operator()<1>(row);
    }

    bool has_terms() const {
        const Problem& p = problem;
        return p.softcap > 0.0 || p.alibi_slopes || p.attn_mask.data || p.key_mask.data;
    }

    // Whether causality or the window excludes a key of the tile from some query.
    template <class Tile>
    bool band_touches(const Tile& tile) const {
        const Problem& p = problem;
        const int64_t nearest = tile.position[0], farthest = tile.position[tile.count - 1];
        return (p.window_right >= 0 && farthest > p.position_offset + p.window_right) ||
               (p.window_left >= 0 && nearest < p.position_offset + p.len_q - 1 - p.window_left);
    }

    // The scaled products become scores: softcap, ALiBi, masks, exclusions; in each lane the largest.
    template <int ROWS, class Tile>
    __attribute__((noinline)) Floats apply_rules(int64_t row, const Tile& tile, float* scores) const {
        constexpr int KEYS = WIDTH / ROWS;
        const Problem& p = problem;
        const float cap = static_cast<float>(p.softcap);
        Floats most = broadcast(-INFINITE);
        int64_t stands[WIDTH];
        Floats slope = {};
        for (int lane = 0; lane < WIDTH; lane++) {
            const int64_t r = smaller(row + lane % ROWS, count - 1);
            stands[lane] = query_of(r) + p.position_offset;
            if (p.alibi_slopes) slope[lane] = p.alibi_slopes[b * p.alibi_batch + head_of(r) * p.alibi_head];
        }
        for (int64_t k = 0; k < tile.count; k += KEYS) {
            Floats x = load(scores + k * ROWS), bias = {}, terms = {};
            Ints away = {};
            for (int lane = 0; lane < WIDTH; lane++) {
                const int64_t key = smaller(k + lane / ROWS, tile.count - 1);
                away[lane] = within_32_bits(tile.position[key] - stands[lane]);
                if (p.key_mask.data) bias[lane] = tile.bias[key];
                if (p.attn_mask.data) terms[lane] = mask_value(row + lane % ROWS, tile.position[key]);
            }
            if (cap > 0.0f) x = cap * tanh(x / cap);
            if (p.alibi_slopes) x -= slope * from_bits(bits_of(__builtin_convertvector(away, Floats)) & INT32_MAX);
            if (p.attn_mask.data) x = add_terms(x, terms);
            if (p.key_mask.data) x = add_terms(x, bias);
            Ints inside = lane_numbers() < static_cast<int32_t>((tile.count - k) * ROWS);
            if (p.window_right >= 0) inside &= away <= within_32_bits(p.window_right);
            if (p.window_left >= 0) inside &= away >= within_32_bits(-p.window_left);
            x = select(inside, x, broadcast(-INFINITE));
            store(scores + k * ROWS, x);
            most = larger(x, most);
        }
        return most;
    }

  private:
    static int32_t within_32_bits(int64_t x) {
        return static_cast<int32_t>(smaller<int64_t>(larger<int64_t>(x, -INT32_MAX), INT32_MAX));
    }

    float mask_value(int64_t row, int64_t key) const {
        const int64_t r = smaller(row, count - 1);
        const Mask& mask = problem.attn_mask;
        return mask_terms(mask.type, mask_row(mask, b, head_of(r), query_of(r)), mask.key, key, 1)[0];
    }
};

}  // namespace fusedformer::FF_LEVEL
