// Attention of a few queries over many keys, bound by the reading of keys and values: each is read once, as it lies,
// for all rows (query, head) that share it. The keys are split into pieces, one task each; a second pass joins the
// pieces' results in their order (split-KV as in Flash-Decoding, Dao et al., 2023).
//
// A piece is walked in tiles of at most TILE keys that take part. A product of a query and a key is a sum over lanes;
// WIDTH such sums, of KEYS keys and ROWS rows, are turned into one vector of scores at a time. Features are handled in
// chunks of two vectors, the last of which overlaps its predecessor where the head dim is no multiple.
#pragma once

#include "arena.h"
#include "decode_problem.h"
#include "scores.h"

namespace fusedformer::FF_LEVEL {

constexpr int64_t CHUNK = 2 * WIDTH;

// A chunk as two vectors of float32. The order of its elements is the type's own: bfloat16 is widened fastest as the
// low and the high halves of 32-bit words.
struct Chunk {
    Floats low, high;
};

FF_INLINE Chunk load_chunk(const float* p) { return {load(p), load(p + WIDTH)}; }
FF_INLINE Chunk load_chunk(const Float16* p) { return {load(p), load(p + WIDTH)}; }
FF_INLINE Chunk load_chunk(const BFloat16* p) {
    Ints words;
    __builtin_memcpy(&words, p, sizeof words);
    return {from_bits(words << 16), from_bits(words & static_cast<int32_t>(0xffff0000))};
}

// Where in memory the elements of a chunk's two vectors stand.
template <class S>
FF_INLINE void chunk_elements(Ints& low, Ints& high) {
    low = lane_numbers(), high = low + WIDTH;
}
template <>
FF_INLINE void chunk_elements<BFloat16>(Ints& low, Ints& high) {
    low = lane_numbers() * 2, high = low + 1;
}

// Used more than once: read once, not once for each use.
FF_INLINE Floats in_register(Floats x) {
#if defined(FF_AVX512) || FF_WIDTH <= 8  // elsewhere a vector fills several registers
    asm("" : "+v"(x));
#endif
    return x;
}

template <class S>
FF_INLINE Chunk in_order(Chunk c) {
    return c;
}
template <>
FF_INLINE Chunk in_order<BFloat16>(Chunk c) {
    const Ints lane = lane_numbers(), first = (lane & 1) * WIDTH + lane / 2;
    return {__builtin_shuffle(c.low, c.high, first), __builtin_shuffle(c.low, c.high, first + WIDTH / 2)};
}

// Lane l of the result is the sum of the lanes of sums[l].
template <int COUNT>
FF_INLINE Floats sums_of_lanes(Floats* sums) {
    if constexpr (COUNT == 1) {
        return sums[0];
    } else {
        // Neighbours are joined; each step halves the number of lanes that a sum is spread over, in an order that one
        // instruction can shuffle to.
        constexpr int STEP = WIDTH / COUNT;
        const Ints lane = lane_numbers();
        Ints low, high;
        if constexpr (STEP == 1) {  // within four lanes: a0 b0 a1 b1
            const Ints base = (lane & ~3) + (lane & 1) * WIDTH + (lane & 2) / 2;
            low = base, high = base + 2;
        } else if constexpr (STEP == 2) {  // a0 b0 a2 b2 with pairs for elements
            const Ints base = (lane & ~3) + (lane & 1) + (lane & 2) / 2 * WIDTH;
            low = base, high = base + 2;
        } else if constexpr (STEP == 4) {  // the first half of a, then of b
            low = (lane & (WIDTH / 2)) * 2 + (lane & (WIDTH / 2 - 1)), high = low + WIDTH / 2;
        } else {  // 16 lanes, the last step: every other group of four
            low = (lane & 8) * 2 + (lane & 4) * 2 + (lane & 3), high = low + 4;
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT / 2; i++)
            sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], low) +
                      __builtin_shuffle(sums[2 * i], sums[2 * i + 1], high);
        return sums_of_lanes<COUNT / 2>(sums);
    }
}

template <class S>
class AttentionDecode {
    static constexpr int TILE = 128;
    static constexpr int64_t TILE_BYTES = 32768;  // of its keys or values at most
    static constexpr int64_t LINE = 64;

  public:
    static void run(const DecodeProblem& p, const DecodeResults& results, const Runtime& runtime) {
        const AttentionDecode decode(p, results, runtime);
        auto* self = const_cast<AttentionDecode*>(&decode);
        runtime.parallel(
            decode.units_ * p.pieces,
            [](int64_t task, void* self) { static_cast<AttentionDecode*>(self)->compute(task); }, self);
        if (p.pieces == 1) return;  // each task has finished its rows
        runtime.parallel(
            decode.units_ * decode.rows_,
            [](int64_t row, void* self) { static_cast<AttentionDecode*>(self)->finish(row); }, self);
    }

  private:
    const DecodeProblem& p_;
    const DecodeResults& results_;
    const Runtime& runtime_;
    int64_t heads_together_, units_, rows_, chunks_, chunks_v_, tile_;
    bool has_terms_;

    // Keys that take part, and what they need beside their rows.
    struct Tile {
        int64_t count;
        const S *keys[TILE], *values[TILE];
        int32_t position[TILE];
        float bias[TILE];
        S padded_keys[TILE * CHUNK], padded_values[TILE * CHUNK];  // copies of rows that are shorter than a chunk
    };

    struct Scratch {
        float* query;             // (rows, chunks, CHUNK): of a block of rows (chunks, ROWS, CHUNK)
        Floats *largest, *total;  // (rows), of a block at its first row, each row's in its own lanes
        float* spare;             // stands for the partial result of a row that fills up a block
        Tile* tiles;              // the one that is computed, and the next, whose rows are on their way
    };

    // The rows that share keys and values of one sequence.
    struct Unit {
        Problem problem;  // the sequence's own: its length, and where its queries stand
        int64_t b, head, head_kv;
    };

    AttentionDecode(const DecodeProblem& p, const DecodeResults& results, const Runtime& runtime)
        : p_(p), results_(results), runtime_(runtime) {
        // A key mask of its own gives each head other keys.
        heads_together_ = p.key_mask.data && p.key_mask.head != 0 ? 1 : p.group();
        units_ = p.batch * (p.heads / heads_together_);
        rows_ = heads_together_ * p.len_q;
        chunks_ = (p.head_dim + CHUNK - 1) / CHUNK, chunks_v_ = (p.head_dim_v + CHUNK - 1) / CHUNK;
        const int64_t row_bytes = larger(p.head_dim, p.head_dim_v) * static_cast<int64_t>(sizeof(S));
        tile_ = smaller<int64_t>(TILE, larger<int64_t>(round_down(TILE_BYTES / row_bytes, WIDTH), WIDTH));
        has_terms_ = p.softcap > 0.0 || p.alibi_slopes || p.attn_mask.data || p.key_mask.data;
    }

    Scratch scratch() const {
        const int64_t rows = round_up(rows_, 4);
        Scratch s;
        auto lay_out = [&](Arena arena) {
            s.query = arena.take<float>(rows * chunks_ * CHUNK);
            s.largest = arena.take<Floats>(rows);
            s.total = arena.take<Floats>(rows);
            s.spare = arena.take<float>(chunks_v_ * CHUNK);
            s.tiles = arena.take<Tile>(2);
            return arena.used();
        };
        lay_out(Arena(runtime_.scratch(lay_out(Arena()))));
        return s;
    }

    Unit unit(int64_t index) const {
        const int64_t turns = p_.heads / heads_together_;
        Unit u = {p_, index / turns, index % turns * heads_together_, 0};
        u.head_kv = u.head / p_.group();
        if (p_.lengths) {
            u.problem.len_k = p_.lengths[u.b] + p_.appended;
            u.problem.position_offset = u.problem.len_k - p_.len_q;
        }
        return u;
    }

    // The partial result of a row: its output relative to its largest score, that score, and the sum of its weights.
    float* partial(int64_t unit, int64_t piece, int64_t row) const {
        return results_.partial + ((unit * p_.pieces + piece) * rows_ + row) * results_.partial_width;
    }
    float& largest(float* partial) const { return partial[results_.partial_width - 2]; }
    float& total(float* partial) const { return partial[results_.partial_width - 1]; }

    // Blocks of 4, 2 and 1 rows; 3 count as 4.
    template <class Body>
    void for_blocks(Body body) const {
        int64_t row = 0;
        for (; rows_ - row >= 3; row += 4) body.template operator()<4>(row);
        if (rows_ - row == 2) body.template operator()<2>(row);
        if (rows_ - row == 1) body.template operator()<1>(row);
    }

    void compute(int64_t task) const {
        const int64_t index = task / p_.pieces, piece = task % p_.pieces;
        const Unit u = unit(index);
        const Range seen = visible_keys(u.problem, 0, p_.len_q - 1);
        const int64_t end = smaller(seen.end, (piece + 1) * p_.piece_keys);
        int64_t next = larger(seen.begin, piece * p_.piece_keys);
        const Scratch s = scratch();
        Tile *tile = s.tiles, *following = s.tiles + 1;
        gather(*tile, u, next, end);
        if (tile->count > 0) {
            for_blocks([&]<int ROWS>(int64_t row) { load_queries<ROWS>(u, s, row); });
            for (int64_t row = 0; row < rows_; row++)
                for (int64_t c = 0; c < chunks_v_ * CHUNK; c += WIDTH) store(partial(index, piece, row) + c, Floats{});
        }
        for (int64_t row = 0; row < rows_; row++) s.largest[row] = broadcast(-INFINITE), s.total[row] = Floats{};
        while (tile->count > 0) {
            gather(*following, u, next, end);
            for_blocks([&]<int ROWS>(int64_t row) {
                float* out[ROWS];
                for (int i = 0; i < ROWS; i++) out[i] = row + i < rows_ ? partial(index, piece, row + i) : s.spare;
                add_tile<ROWS>(u, s, row, *tile, *following, out);
            });
            Tile* done = tile;
            tile = following, following = done;
        }
        for_blocks([&]<int ROWS>(int64_t row) { store_sums<ROWS>(s, row, index, piece); });
        if (p_.pieces == 1)
            for (int64_t row = 0; row < rows_; row++) finish(index * rows_ + row);
    }

    // ---- the keys of a tile

    // Up to a tile of the keys from `next` to `end` that take part.
    void gather(Tile& tile, const Unit& u, int64_t& next, int64_t end) const {
        tile.count = 0;
        while (next < end && tile.count < tile_) {
            int64_t slot = next, block = u.b, run = smaller(end - next, tile_ - tile.count);
            if (p_.block_table) {
                slot = next % p_.page;
                block = p_.block_table[u.b * p_.table_row + next / p_.page * p_.table_column];
                run = smaller(run, p_.page - slot);
            }
            add_run(tile, u, block, slot, next, run);
            next += run;
        }
        for (int64_t k = tile.count; tile.count > 0 && k < round_up(tile.count, WIDTH); k++)
            tile.keys[k] = tile.keys[tile.count - 1];  // read with the others, then excluded
    }

    void add_run(Tile& tile, const Unit& u, int64_t block, int64_t slot, int64_t position, int64_t run) const {
        const S* key = static_cast<const S*>(p_.key.data) + block * p_.key.batch + u.head_kv * p_.key.head;
        const S* value = static_cast<const S*>(p_.value.data) + block * p_.value.batch + u.head_kv * p_.value.head;
        key += slot * p_.key.row, value += slot * p_.value.row;
        const int64_t first = tile.count;
        if (p_.key_mask.data) {
            const void* terms = mask_row(p_.key_mask, u.b, u.head, 0);
            for (int64_t k = 0; k < run; k += WIDTH) {
                const Floats bias = mask_terms(p_.key_mask.type, terms, p_.key_mask.key, position + k, run - k);
                for (int64_t lane = 0; lane < smaller<int64_t>(WIDTH, run - k); lane++)
                    if (bias[lane] != -INFINITE) {
                        tile.bias[tile.count] = bias[lane];
                        tile.position[tile.count++] = static_cast<int32_t>(position + k + lane);
                    }
            }
        } else {
            for (int64_t k = 0; k < run; k++) tile.position[first + k] = static_cast<int32_t>(position + k);
            tile.count += run;
        }
        for (int64_t k = first; k < tile.count; k++) {
            tile.keys[k] = key + (tile.position[k] - position) * p_.key.row;
            tile.values[k] = value + (tile.position[k] - position) * p_.value.row;
        }
        for (int64_t k = first; p_.head_dim < CHUNK && k < tile.count; k++)
            tile.keys[k] = whole_chunk(tile.keys[k], p_.head_dim, tile.padded_keys + k * CHUNK);
        for (int64_t k = first; p_.head_dim_v < CHUNK && k < tile.count; k++)
            tile.values[k] = whole_chunk(tile.values[k], p_.head_dim_v, tile.padded_values + k * CHUNK);
    }

    static FF_INLINE const S* whole_chunk(const S* row, int64_t count, S* copy) {
        if (count >= CHUNK) return row;
        __builtin_memset(copy, 0, CHUNK * sizeof(S));
        __builtin_memcpy(copy, row, count * sizeof(S));
        return copy;
    }

    // Where chunk c of a row begins.
    static int64_t chunk_at(int64_t c, int64_t count) { return smaller(c * CHUNK, larger<int64_t>(count - CHUNK, 0)); }

    // The elements of the last chunk that its predecessor holds become 0.
    static FF_INLINE Chunk without_overlap(Chunk chunk, int64_t c, int64_t count) {
        Ints low, high;
        chunk_elements<S>(low, high);
        const int32_t overlap = static_cast<int32_t>(c * CHUNK - chunk_at(c, count));
        return {keep(low >= overlap, chunk.low), keep(high >= overlap, chunk.high)};
    }

    // ---- the queries

    template <int ROWS>
    void load_queries(const Unit& u, const Scratch& s, int64_t row) const {
        float* to = s.query + row * chunks_ * CHUNK;
        for (int64_t c = 0; c < chunks_; c++) {
            for (int i = 0; i < ROWS; i++, to += CHUNK) {
                Chunk chunk = {};
                if (row + i < rows_) {
                    S copy[CHUNK];
                    const S* query = static_cast<const S*>(p_.query.data) + u.b * p_.query.batch +
                                     head_of(u, row + i) * p_.query.head + query_of(row + i) * p_.query.row;
                    query = whole_chunk(query, p_.head_dim, copy);
                    chunk = without_overlap(load_chunk(query + chunk_at(c, p_.head_dim)), c, p_.head_dim);
                }
                store(to, chunk.low), store(to + WIDTH, chunk.high);
            }
        }
    }

    int64_t head_of(const Unit& u, int64_t row) const { return u.head + row / p_.len_q; }
    int64_t query_of(int64_t row) const { return row % p_.len_q; }

    // ---- one tile

    template <int ROWS>
    void add_tile(const Unit& u, const Scratch& s, int64_t row, const Tile& tile, const Tile& next, float** out) const {
        alignas(64) float scores[TILE * ROWS];
        const float* query = s.query + row * chunks_ * CHUNK;
        // The first block of rows waits for memory, the others find the tile in the cache.
        Floats most = row == 0 ? products<ROWS, true>(tile, query, scores) : products<ROWS, false>(tile, query, scores);
        const int64_t count = round_up(tile.count * ROWS, WIDTH);
        if (has_terms_ || count != tile.count * ROWS || band_touches(u.problem, tile))
            most = apply_rules<ROWS>(u, row, tile, scores);
        most = over_keys<ROWS, Largest>(larger(most, s.largest[row]));
        const Floats reference = select(most == -INFINITE, Floats{}, most);
        const Floats shrink = exp2((s.largest[row] - reference) * LOG2E);
        Floats total = s.total[row] * shrink;
        for (int64_t k = 0; k < count; k += WIDTH) {
            const Floats weights = exp2((load(scores + k) - reference) * LOG2E);
            store(scores + k, weights);
            total += weights;
        }
        s.largest[row] = most, s.total[row] = total;
        if (row == 0)
            add_values<ROWS, true>(tile, next, scores, shrink, out);
        else
            add_values<ROWS, false>(tile, next, scores, shrink, out);
    }

    struct Sum {
        static FF_INLINE Floats of(Floats a, Floats b) { return a + b; }
    };
    struct Largest {
        static FF_INLINE Floats of(Floats a, Floats b) { return larger(a, b); }
    };

    // Joins the lanes of each row, which hold different keys.
    template <int ROWS, class Join>
    static FF_INLINE Floats over_keys(Floats x) {
        if constexpr (WIDTH / ROWS >= 2) x = Join::of(x, rotated<2>(x));
        if constexpr (WIDTH / ROWS >= 4) x = Join::of(x, rotated<4>(x));
        if constexpr (WIDTH / ROWS >= 8) x = Join::of(x, rotated<8>(x));
        if constexpr (WIDTH / ROWS >= 16) x = Join::of(x, rotated<16>(x));
        return x;
    }

    template <int ROWS>
    void store_sums(const Scratch& s, int64_t row, int64_t index, int64_t piece) const {
        const Floats sums = over_keys<ROWS, Sum>(s.total[row]);
        for (int i = 0; i < ROWS && row + i < rows_; i++) {
            largest(partial(index, piece, row + i)) = s.largest[row][i];
            total(partial(index, piece, row + i)) = sums[i];
        }
    }

    // Fetches chunk c of a row that is used later. Where several chunks share a line, each fetches it for one in so
    // many rows, so that the fetches are spread evenly. They go to the second-level cache: so many lines are on their
    // way at a time that the first level's buffers for misses would be the limit.
    static constexpr int64_t CHUNK_BYTES = CHUNK * sizeof(S), SHARED = CHUNK_BYTES < LINE ? LINE / CHUNK_BYTES : 1;

    static FF_INLINE void prefetch(const S* row, int64_t c) {
        const char* at = reinterpret_cast<const char*>(row) + c / SHARED * (SHARED * CHUNK_BYTES);
        for (int64_t line = 0; line < CHUNK_BYTES; line += LINE) __builtin_prefetch(at + line, 0, 2);
    }

    template <int COUNT>
    static FF_INLINE void prefetch_rows(const S* const* rows, int64_t c) {
        if constexpr (COUNT % SHARED == 0) {
            for (int i = 0; i < COUNT; i += SHARED) prefetch(rows[i + c % SHARED], c);
        } else if (c % SHARED == 0) {
            for (int i = 0; i < COUNT; i++) prefetch(rows[i], c);
        }
    }

    // scores (keys, ROWS) = K Qᵀ * scale; in each lane the largest.
    template <int ROWS, bool AHEAD>
    Floats products(const Tile& tile, const float* query, float* scores) const {
        constexpr int KEYS = WIDTH / ROWS;
        const float scale = static_cast<float>(p_.scale);
        Floats most = broadcast(-INFINITE);
        for (int64_t k = 0; k < tile.count; k += KEYS) {
            const Floats found = dot_products<ROWS, AHEAD>(tile.keys + k, tile.values + k, query) * scale;
            store(scores + k * ROWS, found);
            most = larger(found, most);
        }
        return most;
    }

    // All sums once, then all of them again: a sum's two terms stand far apart.
    template <int ROWS>
    static FF_INLINE void add_products(Floats* sums, const Chunk* chunks, const float* query) {
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Floats low = in_register(load(query + row * CHUNK));
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH / ROWS; i++) sums[i * ROWS + row] += chunks[i].low * low;
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Floats high = in_register(load(query + row * CHUNK + WIDTH));
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH / ROWS; i++) sums[i * ROWS + row] += chunks[i].high * high;
        }
    }

    template <int ROWS, bool AHEAD>
    FF_INLINE Floats dot_products(const S* const* keys, const S* const* ahead, const float* query) const {
        constexpr int KEYS = WIDTH / ROWS;
        Floats sums[WIDTH] = {};
        const S* key[KEYS];
        for (int i = 0; i < KEYS; i++) key[i] = keys[i];
        const int64_t whole = p_.head_dim / CHUNK;
        Chunk chunks[KEYS];
        for (int64_t c = 0; c < whole; c++, query += ROWS * CHUNK) {
            if constexpr (AHEAD) prefetch_rows<KEYS>(ahead, c);
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++) chunks[i] = load_chunk(key[i] + c * CHUNK);
            add_products<ROWS>(sums, chunks, query);
        }
        if (whole < chunks_) {
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++)
                chunks[i] = without_overlap(load_chunk(key[i] + chunk_at(whole, p_.head_dim)), whole, p_.head_dim);
            add_products<ROWS>(sums, chunks, query);
        }
        return sums_of_lanes<WIDTH>(sums);
    }

    // Whether causality or the window excludes a key of the tile from some query.
    bool band_touches(const Problem& p, const Tile& tile) const {
        const int64_t first = tile.position[0], last = tile.position[tile.count - 1];
        return (p.window_right >= 0 && last > p.position_offset + p.window_right) ||
               (p.window_left >= 0 && first < p.position_offset + p.len_q - 1 - p.window_left);
    }

    // The scaled products become scores: softcap, ALiBi, masks, exclusions; in each lane the largest.
    template <int ROWS>
    __attribute__((noinline)) Floats apply_rules(const Unit& u, int64_t row, const Tile& tile, float* scores) const {
        constexpr int KEYS = WIDTH / ROWS;
        const Problem& p = u.problem;
        const float cap = static_cast<float>(p.softcap);
        Floats most = broadcast(-INFINITE);
        Ints stands;
        Floats slope = {};
        for (int lane = 0; lane < WIDTH; lane++) {
            const int64_t r = smaller(row + lane % ROWS, rows_ - 1);
            stands[lane] = static_cast<int32_t>(query_of(r) + p.position_offset);
            if (p.alibi_slopes) slope[lane] = p.alibi_slopes[u.b * p.alibi_batch + head_of(u, r) * p.alibi_head];
        }
        for (int64_t k = 0; k < tile.count; k += KEYS) {
            Floats x = load(scores + k * ROWS), bias = {}, terms = {};
            Ints position = {};
            for (int lane = 0; lane < WIDTH; lane++) {
                const int64_t key = smaller(k + lane / ROWS, tile.count - 1);
                position[lane] = tile.position[key];
                if (p.key_mask.data) bias[lane] = tile.bias[key];
                if (p.attn_mask.data) terms[lane] = mask_value(u, row + lane % ROWS, tile.position[key]);
            }
            const Ints away = position - stands;
            if (cap > 0.0f) x = cap * tanh(x / cap);
            if (p.alibi_slopes) x -= slope * from_bits(bits_of(__builtin_convertvector(away, Floats)) & INT32_MAX);
            if (p.attn_mask.data) x = add_terms(x, terms);
            if (p.key_mask.data) x = add_terms(x, bias);
            Ints inside = lane_numbers() < static_cast<int32_t>((tile.count - k) * ROWS);
            if (p.window_right >= 0)
                inside &= away <= static_cast<int32_t>(smaller<int64_t>(p.window_right, INT32_MAX));
            if (p.window_left >= 0) inside &= away >= -static_cast<int32_t>(smaller<int64_t>(p.window_left, INT32_MAX));
            x = select(inside, x, broadcast(-INFINITE));
            store(scores + k * ROWS, x);
            most = larger(x, most);
        }
        return most;
    }

    float mask_value(const Unit& u, int64_t row, int64_t key) const {
        const int64_t r = smaller(row, rows_ - 1);
        const Mask& mask = p_.attn_mask;
        return mask_terms(mask.type, mask_row(mask, u.b, head_of(u, r), query_of(r)), mask.key, key, 1)[0];
    }

    // out (ROWS, chunks_v * CHUNK) = out * shrink + weightsᵀ V
    template <int ROWS, bool AHEAD>
    void add_values(const Tile& tile, const Tile& next, const float* weights, Floats shrink, float** out) const {
        constexpr int64_t TOGETHER = (WIDTH == 16 ? 8 : 4) / ROWS;  // chunks: two accumulators for each and each row
        int64_t c = 0;
        for (; c + TOGETHER <= chunks_v_; c += TOGETHER)
            add_chunks<ROWS, TOGETHER, AHEAD>(tile, next, weights, shrink, out, c);
        if constexpr (TOGETHER > 1)
            for (; c < chunks_v_; c++) add_chunks<ROWS, 1, AHEAD>(tile, next, weights, shrink, out, c);
    }

    template <int ROWS, int CHUNKS, bool AHEAD>
    FF_INLINE void add_chunks(const Tile& tile, const Tile& next, const float* weights, Floats shrink, float** out,
                              int64_t c) const {
        Chunk sums[CHUNKS][ROWS];
        int64_t at[CHUNKS];
#pragma GCC unroll 8
        for (int n = 0; n < CHUNKS; n++) {
            at[n] = chunk_at(c + n, p_.head_dim_v);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                const float* from = out[row] + (c + n) * CHUNK;
                sums[n][row] = {load(from) * shrink[row], load(from + WIDTH) * shrink[row]};
            }
        }
        for (int64_t k = 0; k < tile.count; k++) {
            const S* value = tile.values[k];
#pragma GCC unroll 8
            for (int n = 0; n < CHUNKS; n++) {
                if constexpr (AHEAD)
                    if ((k + c + n) % SHARED == 0) prefetch(next.keys[k], c + n);
                const Chunk chunk = load_chunk(value + at[n]);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row++) {
                    sums[n][row].low += chunk.low * weights[k * ROWS + row];
                    sums[n][row].high += chunk.high * weights[k * ROWS + row];
                }
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < CHUNKS; n++) {
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                float* to = out[row] + (c + n) * CHUNK;
                store(to, sums[n][row].low), store(to + WIDTH, sums[n][row].high);
            }
        }
    }

    // ---- the pieces together

    static float power(float x) { return exp2(broadcast(x * LOG2E))[0]; }

    // Row number `row` of all units: its pieces' results, and the sink's.
    void finish(int64_t row) const {
        const int64_t index = row / rows_, r = row % rows_;
        const Unit u = unit(index);
        const int64_t head = head_of(u, r), query = query_of(r);
        const bool has_sink = p_.sinks.data != nullptr;
        const float sink = has_sink ? mask_term(p_.sinks, u.b, head) : -INFINITE;
        float most = sink;
        for (int64_t piece = 0; piece < p_.pieces; piece++) {
            const float found = largest(partial(index, piece, r));
            most = found > most ? found : most;
        }
        const float reference = most == -INFINITE ? 0.0f : most;
        float sum = power(sink - reference), share[MOST_PIECES];
        for (int64_t piece = 0; piece < p_.pieces; piece++) {
            share[piece] = power(largest(partial(index, piece, r)) - reference);
            sum += total(partial(index, piece, r)) * share[piece];
        }
        S* out = static_cast<S*>(results_.out.data) + u.b * results_.out.batch + head * results_.out.head +
                 query * results_.out.row;
        const float divisor = sum == 0.0f ? 1.0f : sum;
        for (int64_t c = 0; c < chunks_v_; c++) {
            Chunk mean = {};
            for (int64_t piece = 0; piece < p_.pieces; piece++) {
                float* part = partial(index, piece, r);
                if (total(part) == 0.0f) continue;  // it saw no key and wrote nothing
                mean.low += load(part + c * CHUNK) * (share[piece] / divisor);
                mean.high += load(part + c * CHUNK + WIDTH) * (share[piece] / divisor);
            }
            mean = in_order<S>(mean);
            const int64_t at = chunk_at(c, p_.head_dim_v);
            store_some(out + at, mean.low, p_.head_dim_v - at);
            store_some(out + at + WIDTH, mean.high, p_.head_dim_v - at - WIDTH);
        }
        const double lse = sum == 0.0f ? -INFINITE : reference + __builtin_log(static_cast<double>(sum));
        const int64_t at = (u.b * p_.heads + head) * p_.len_q + query;
        const float rounded = static_cast<float>(lse);
        if (results_.lse) results_.lse[at] = rounded;
        if (results_.lse_residual) results_.lse_residual[at] = sum == 0.0f ? 0.0f : static_cast<float>(lse - rounded);
    }
};

inline void decode_attention(const DecodeProblem& p, const DecodeResults& results, const Runtime& runtime) {
    switch (p.type) {
        case Type::float16:
            return AttentionDecode<Float16>::run(p, results, runtime);
        case Type::bfloat16:
            return AttentionDecode<BFloat16>::run(p, results, runtime);
        default:
            return AttentionDecode<float>::run(p, results, runtime);
    }
}

}  // namespace fusedformer::FF_LEVEL
