// Attention of a few queries over many keys, bound by the reading of keys and values: each is read once, as it lies,
// for all rows (query, head) that share it. The keys are split into pieces, one task each; the task that comes last
// joins the pieces' results in their order (split-KV as in Flash-Decoding, Dao et al., 2023).
//
// A piece is walked in tiles of keys that take part. A product of a query and a key is a sum over lanes; WIDTH such
// sums, of KEYS keys and ROWS rows, are turned into one vector of scores at a time.
#pragma once

#include "arena.h"
#include "decode_chunks.h"
#include "decode_rows.h"
#include "decode_tile.h"

namespace fusedformer::FF_LEVEL {

template <class S>
class AttentionDecode {
    static constexpr int64_t LINE = 64;
    static constexpr int64_t BLOCK = 64;  // rows of a task at most

  public:
    static void run(const DecodeProblem& p, const DecodeResults& results, const Runtime& runtime) {
        const AttentionDecode decode(p, results, runtime);
        auto* self = const_cast<AttentionDecode*>(&decode);
        runtime.parallel(
            decode.sets_ * decode.blocks_ * p.pieces,
            [](int64_t task, void* self) { static_cast<AttentionDecode*>(self)->compute(task); }, self);
    }

  private:
    using Tile = DecodeTile<S>;
    using Chunks = DecodeChunks<S>;
    using Number = typename Chunks::Number;

    const DecodeProblem& p_;
    const DecodeResults& results_;
    const Runtime& runtime_;
    int64_t heads_together_, sets_, rows_, blocks_, chunks_, chunks_v_, tile_;

    struct Scratch {
        Number* query;            // (rows, chunks, CHUNK): of a block of rows (chunks, ROWS, CHUNK)
        Floats *largest, *total;  // (rows), of a block at its first row, each row's in its own lanes
        float* spare;             // stands for the partial result of a row that fills up a block
        Tile* tiles;              // the one that is computed, and the next, whose rows are on their way
    };

    AttentionDecode(const DecodeProblem& p, const DecodeResults& results, const Runtime& runtime)
        : p_(p), results_(results), runtime_(runtime) {
        // A key mask of its own gives each head other keys.
        heads_together_ = p.key_mask.data && p.key_mask.head != 0 ? 1 : p.group();
        sets_ = p.batch * (p.heads / heads_together_);
        rows_ = heads_together_ * p.len_q;
        blocks_ = (rows_ + BLOCK - 1) / BLOCK;
        chunks_ = (p.head_dim + CHUNK - 1) / CHUNK, chunks_v_ = (p.head_dim_v + CHUNK - 1) / CHUNK;
        tile_ = Tile::size(p);
    }

    Scratch scratch() const {
        const int64_t rows = round_up(smaller(rows_, BLOCK), 4);
        Scratch s;
        auto lay_out = [&](Arena arena) {
            s.query = arena.take<Number>(rows * chunks_ * CHUNK);
            s.largest = arena.take<Floats>(rows);
            s.total = arena.take<Floats>(rows);
            s.spare = arena.take<float>(chunks_v_ * CHUNK);
            s.tiles = arena.take<Tile>(2);
            return arena.used();
        };
        lay_out(Arena(runtime_.scratch(lay_out(Arena()))));
        return s;
    }

    // The partial result of a row: its output relative to its largest score, that score, and the sum of its weights.
    float* partial(const DecodeRows& rows, int64_t piece, int64_t row) const {
        return results_.partial + ((rows.set * p_.pieces + piece) * rows_ + rows.first + row) * results_.partial_width;
    }
    float& largest(float* partial) const { return partial[results_.partial_width - 2]; }
    float& total(float* partial) const { return partial[results_.partial_width - 1]; }

    void compute(int64_t task) const {
        const int64_t piece = task % p_.pieces, block = task / p_.pieces % blocks_, first = block * BLOCK;
        const DecodeRows rows(p_, heads_together_, task / p_.pieces / blocks_, first, smaller(BLOCK, rows_ - first));
        const Range seen = rows.seen();
        const int64_t end = smaller(seen.end, (piece + 1) * p_.piece_keys);
        int64_t next = larger(seen.begin, piece * p_.piece_keys);
        const Scratch s = scratch();
        Tile *tile = s.tiles, *following = s.tiles + 1;
        tile->gather(p_, rows.b, rows.head, tile_, next, end);
        if (tile->count > 0) {
            rows.by_four([&]<int ROWS>(int64_t row) { load_queries<ROWS>(rows, s, row); });
            for (int64_t row = 0; row < rows.count; row++)
                for (int64_t c = 0; c < chunks_v_ * CHUNK; c += WIDTH) store(partial(rows, piece, row) + c, Floats{});
        }
        for (int64_t row = 0; row < rows.count; row++) s.largest[row] = broadcast(-INFINITE), s.total[row] = Floats{};
        while (tile->count > 0) {
            following->gather(p_, rows.b, rows.head, tile_, next, end);
            rows.by_four([&]<int ROWS>(int64_t row) {
                float* out[ROWS];
                for (int i = 0; i < ROWS; i++) out[i] = row + i < rows.count ? partial(rows, piece, row + i) : s.spare;
                add_tile<ROWS>(rows, s, row, *tile, *following, out);
            });
            Tile* done = tile;
            tile = following, following = done;
        }
        rows.by_four([&]<int ROWS>(int64_t row) { store_sums<ROWS>(rows, s, row, piece); });
        // Who comes last joins the pieces, whoever it is in the same order.
        int32_t* finished = results_.finished + task / p_.pieces;
        if (__atomic_add_fetch(finished, 1, __ATOMIC_ACQ_REL) < p_.pieces) return;
        for (int64_t row = 0; row < rows.count; row++) finish(rows, row);
    }

    // ---- the queries

    template <int ROWS>
    void load_queries(const DecodeRows& rows, const Scratch& s, int64_t row) const {
        Number* to = s.query + row * chunks_ * CHUNK;
        for (int64_t c = 0; c < chunks_; c++) {
            for (int i = 0; i < ROWS; i++, to += CHUNK) {
                typename Chunks::Loaded chunk = {};
                if (row + i < rows.count) {
                    S copy[CHUNK];
                    const S* query = static_cast<const S*>(p_.query.data) + rows.b * p_.query.batch +
                                     rows.head_of(row + i) * p_.query.head + rows.query_of(row + i) * p_.query.row;
                    query = whole_chunk(query, p_.head_dim, copy);
                    chunk = Chunks::without_overlap(Chunks::load(query + chunk_at(c, p_.head_dim)), c, p_.head_dim);
                }
                Chunks::put(to, chunk);
            }
        }
    }

    // ---- one tile

    template <int ROWS>
    void add_tile(const DecodeRows& rows, const Scratch& s, int64_t row, const Tile& tile, const Tile& next,
                  float** out) const {
        alignas(64) float scores[Tile::MOST * ROWS];
        const Number* query = s.query + row * chunks_ * CHUNK;
        // The first block of rows waits for memory, the others find the tile in the cache.
        Floats most = row == 0 ? products<ROWS, true>(tile, query, scores) : products<ROWS, false>(tile, query, scores);
        const int64_t count = round_up(tile.count * ROWS, WIDTH);
        if (rows.has_terms() || count != tile.count * ROWS || rows.band_touches(tile))
            most = rows.apply_rules<ROWS>(row, tile, scores);
        most = over_keys<ROWS, Largest>(larger(most, s.largest[row]));
        const Floats reference = select(most == -INFINITE, Floats{}, most);
        const Floats shrink = exp2((s.largest[row] - reference) * LOG2E);
        Floats total = s.total[row] * shrink;
        auto* weights = reinterpret_cast<Number*>(scores);  // none is written before its score is read
        for (int64_t k = 0; k < count; k += WIDTH) {
            const Floats found = exp2((load(scores + k) - reference) * LOG2E);
            Chunks::template put_weights<ROWS>(weights, k, found);
            total += found;
        }
        s.largest[row] = most, s.total[row] = total;
        if (row == 0)
            add_values<ROWS, true>(tile, next, weights, shrink, out);
        else
            add_values<ROWS, false>(tile, next, weights, shrink, out);
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
    void store_sums(const DecodeRows& rows, const Scratch& s, int64_t row, int64_t piece) const {
        const Floats sums = over_keys<ROWS, Sum>(s.total[row]);
        for (int i = 0; i < ROWS && row + i < rows.count; i++) {
            largest(partial(rows, piece, row + i)) = s.largest[row][i];
            total(partial(rows, piece, row + i)) = sums[i];
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
    Floats products(const Tile& tile, const Number* query, float* scores) const {
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

    template <int ROWS, bool AHEAD>
    FF_INLINE Floats dot_products(const S* const* keys, const S* const* ahead, const Number* query) const {
        constexpr int KEYS = WIDTH / ROWS;
        Floats sums[WIDTH] = {};
        const S* key[KEYS];
        for (int i = 0; i < KEYS; i++) key[i] = keys[i];
        const int64_t whole = p_.head_dim / CHUNK;
        typename Chunks::Loaded chunks[KEYS];
        for (int64_t c = 0; c < whole; c++, query += ROWS * CHUNK) {
            if constexpr (AHEAD) prefetch_rows<KEYS>(ahead, c);
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++) chunks[i] = Chunks::load(key[i] + c * CHUNK);
            Chunks::template add_products<KEYS, ROWS>(sums, chunks, query);
        }
        if (whole < chunks_) {
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++)
                chunks[i] =
                    Chunks::without_overlap(Chunks::load(key[i] + chunk_at(whole, p_.head_dim)), whole, p_.head_dim);
            Chunks::template add_products<KEYS, ROWS>(sums, chunks, query);
        }
        return sums_of_lanes<WIDTH>(sums);
    }

    // out (ROWS, chunks_v * CHUNK) = out * shrink + weightsᵀ V
    template <int ROWS, bool AHEAD>
    void add_values(const Tile& tile, const Tile& next, const Number* weights, Floats shrink, float** out) const {
        constexpr int64_t TOGETHER = (WIDTH == 16 ? 8 : 4) / ROWS;  // chunks: two accumulators for each and each row
        int64_t c = 0;
        for (; c + TOGETHER <= chunks_v_; c += TOGETHER)
            add_chunks<ROWS, TOGETHER, AHEAD>(tile, next, weights, shrink, out, c);
        if constexpr (TOGETHER > 1)
            for (; c < chunks_v_; c++) add_chunks<ROWS, 1, AHEAD>(tile, next, weights, shrink, out, c);
    }

    template <int ROWS, int CHUNKS, bool AHEAD>
    FF_INLINE void add_chunks(const Tile& tile, const Tile& next, const Number* weights, Floats shrink, float** out,
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
        for (int64_t k = 0; k < tile.count; k += Chunks::VALUES) {
#pragma GCC unroll 8
            for (int n = 0; n < CHUNKS; n++) {
                if constexpr (AHEAD)
                    for (int64_t i = k; i < k + Chunks::VALUES; i++)
                        if ((i + c + n) % SHARED == 0) prefetch(next.keys[i], c + n);
                Chunks::template add_values<ROWS>(sums[n], tile.values, k, tile.count, at[n], weights);
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

    // A row's pieces, and the sink's part.
    void finish(const DecodeRows& rows, int64_t row) const {
        const int64_t head = rows.head_of(row), query = rows.query_of(row);
        const bool has_sink = p_.sinks.data != nullptr;
        const float sink = has_sink ? mask_term(p_.sinks, rows.b, head) : -INFINITE;
        float most = sink;
        for (int64_t piece = 0; piece < p_.pieces; piece++) {
            const float found = largest(partial(rows, piece, row));
            most = found > most ? found : most;
        }
        const float reference = most == -INFINITE ? 0.0f : most;
        float sum = power(sink - reference), share[MOST_PIECES];
        for (int64_t piece = 0; piece < p_.pieces; piece++) {
            share[piece] = power(largest(partial(rows, piece, row)) - reference);
            sum += total(partial(rows, piece, row)) * share[piece];
        }
        S* out = static_cast<S*>(results_.out.data) + rows.b * results_.out.batch + head * results_.out.head +
                 query * results_.out.row;
        const float divisor = sum == 0.0f ? 1.0f : sum;
        for (int64_t c = 0; c < chunks_v_; c++) {
            Chunk mean = {};
            for (int64_t piece = 0; piece < p_.pieces; piece++) {
                float* part = partial(rows, piece, row);
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
        const int64_t at = (rows.b * p_.heads + head) * p_.len_q + query;
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
