// Which keys the decode kernel computes next: their rows, wherever they lie, and what their scores need.
#pragma once

#include "decode_problem.h"
#include "scores.h"
#include "simd/chunk.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct DecodeTile {
    static constexpr int MOST = 128;
    static constexpr int64_t BYTES = 32768;  // of its keys or values at most

    int64_t count;
    const S *keys[MOST], *values[MOST];  // up to a multiple of WIDTH keys may be read
    int64_t position[MOST];
    float bias[MOST];  // where there is a key mask
    S padded_keys[MOST * CHUNK], padded_values[MOST * CHUNK];

    static int64_t size(const Problem& p) {
        const int64_t row_bytes = larger(p.head_dim, p.head_dim_v) * static_cast<int64_t>(sizeof(S));
        return smaller<int64_t>(MOST, larger<int64_t>(round_down(BYTES / row_bytes, WIDTH), WIDTH));
    }

    // Up to `size` of the keys from `next` to `end` that take part, for sequence b and the heads from `head` on.
    void gather(const DecodeProblem& p, int64_t b, int64_t head, int64_t size, int64_t& next, int64_t end) {
        count = 0;
        while (next < end && count < size) {
            int64_t slot = next, block = b, run = smaller(end - next, size - count);
            if (p.block_table) {
                slot = next % p.page;
                block = p.block_table[b * p.table_row + next / p.page * p.table_column];
                run = smaller(run, p.page - slot);
            }
            const int64_t first = count, head_kv = head / p.group();
            choose(p, b, head, next, run);
            const S* key = row(p.key, block, head_kv, slot);
            const S* value = row(p.value, block, head_kv, slot);
            for (int64_t k = first; k < count; k++) {
                keys[k] = key + (position[k] - next) * p.key.row;
                values[k] = value + (position[k] - next) * p.value.row;
            }
            next += run;
        }
        for (int64_t k = 0; p.head_dim < CHUNK && k < count; k++)
            keys[k] = whole_chunk(keys[k], p.head_dim, padded_keys + k * CHUNK);
        for (int64_t k = 0; p.head_dim_v < CHUNK && k < count; k++)
            values[k] = whole_chunk(values[k], p.head_dim_v, padded_values + k * CHUNK);
        for (int64_t k = count; count > 0 && k < round_up(count, WIDTH); k++) keys[k] = keys[count - 1];
    }

  private:
    // Adds those of the keys [first, first + run) that the key mask leaves in.
    void choose(const DecodeProblem& p, int64_t b, int64_t head, int64_t first, int64_t run) {
        if (!p.key_mask.data) {
            for (int64_t k = 0; k < run; k++) position[count + k] = first + k;
            count += run;
            return;
        }
        const void* terms = mask_row(p.key_mask, b, head, 0);
        for (int64_t k = 0; k < run; k += WIDTH) {
            const Floats found = mask_terms(p.key_mask.type, terms, p.key_mask.key, first + k, run - k);
            for (int64_t lane = 0; lane < smaller<int64_t>(WIDTH, run - k); lane++)
                if (found[lane] != -INFINITE) {
                    bias[count] = found[lane];
                    position[count++] = first + k + lane;
                }
        }
    }

    static const S* row(const Rows& rows, int64_t block, int64_t head, int64_t slot) {
        return static_cast<const S*>(rows.data) + block * rows.batch + head * rows.head + slot * rows.row;
    }
};

}  // namespace fusedformer::FF_LEVEL
