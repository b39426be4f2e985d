// How the decode kernel multiplies chunks of queries, keys and values.
#pragma once

#include "simd/chunk.h"
#ifdef FF_AVX512_BF16
#include "simd/pairs.h"
#endif

namespace fusedformer::FF_LEVEL {

template <class S>
struct DecodeChunks {
    using Number = float;  // of the copies of queries and weights
    using Loaded = Chunk;
    static constexpr int64_t VALUES = 1;  // rows that are added at a time

    static FF_INLINE Loaded load(const S* from) { return load_chunk(from); }

    static FF_INLINE Loaded without_overlap(Loaded chunk, int64_t c, int64_t count) {
        return FF_LEVEL::without_overlap<S>(chunk, c, count);
    }

    static FF_INLINE void put(float* to, Loaded chunk) { store(to, chunk.low), store(to + WIDTH, chunk.high); }

    // To the sums of KEYS keys times ROWS queries: all sums once, then all of them again, as a sum's two terms shall
    // stand far apart.
    template <int KEYS, int ROWS>
    static FF_INLINE void add_products(Floats* sums, const Loaded* keys, const float* query) {
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Floats low = in_register(FF_LEVEL::load(query + row * CHUNK));
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++) sums[i * ROWS + row] += keys[i].low * low;
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Floats high = in_register(FF_LEVEL::load(query + row * CHUNK + WIDTH));
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++) sums[i * ROWS + row] += keys[i].high * high;
        }
    }

    // Weights (keys, ROWS) from the i-th on.
    template <int ROWS>
    static FF_INLINE void put_weights(float* to, int64_t i, Floats weights) {
        store(to + i, weights);
    }

    // Adds the values of key k, from column `at` on, to each row's sums.
    template <int ROWS>
    static FF_INLINE void add_values(Chunk* sums, const S* const* values, int64_t k, int64_t, int64_t at,
                                     const float* weights) {
        const Chunk chunk = load_chunk(values[k] + at);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            sums[row].low += chunk.low * weights[k * ROWS + row];
            sums[row].high += chunk.high * weights[k * ROWS + row];
        }
    }
};

#ifdef FF_AVX512_BF16

// By dot products of pairs: of two columns of a query and a key, and of two keys' weights and values.
template <>
struct DecodeChunks<BFloat16> {
    using Number = BFloat16;
    using Loaded = Words;
    static constexpr int64_t VALUES = 2;

    static FF_INLINE Loaded load(const BFloat16* from) { return load_words(from); }

    static FF_INLINE Loaded without_overlap(Loaded chunk, int64_t c, int64_t count) {
        const Ints first = lane_numbers() * 2;  // the columns of a pair are this one and the next
        const int32_t overlap = static_cast<int32_t>(c * CHUNK - chunk_at(c, count));
        const Words low = reinterpret_cast<Words>(first >= overlap),
                    high = reinterpret_cast<Words>(first >= overlap - 1);
        return chunk & ((low & 0xffffu) | (high & 0xffff0000u));
    }

    static FF_INLINE void put(BFloat16* to, Loaded chunk) { store_words(to, chunk); }

    template <int KEYS, int ROWS>
    static FF_INLINE void add_products(Floats* sums, const Loaded* keys, const BFloat16* query) {
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Words columns = load_words(query + row * CHUNK);
#pragma GCC unroll 16
            for (int i = 0; i < KEYS; i++) sums[i * ROWS + row] = add_dot(sums[i * ROWS + row], keys[i], columns);
        }
    }

    // (keys / 2, ROWS, 2): a row's weights of two keys are side by side.
    template <int ROWS>
    static FF_INLINE void put_weights(BFloat16* to, int64_t i, Floats weights) {
        Halves from;
        for (int lane = 0; lane < WIDTH; lane++) {
            const int pair = lane / (2 * ROWS), row = lane % (2 * ROWS) / 2;
            from[lane] = static_cast<uint16_t>((2 * pair + lane % 2) * ROWS + row);
        }
        const Halves rounded = __builtin_shuffle(to_bfloat16(weights), from);
        __builtin_memcpy(to + i, &rounded, sizeof rounded);
    }

    template <int ROWS>
    static FF_INLINE void add_values(Chunk* sums, const BFloat16* const* values, int64_t k, int64_t count, int64_t at,
                                     const BFloat16* weights) {
        const Words first = load_words(values[k] + at);
        const Words second = k + 1 < count ? load_words(values[k + 1] + at) : Words{};
        const Words even = (first & 0xffffu) | second << 16, odd = first >> 16 | (second & 0xffff0000u);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            const Words pair = broadcast_word(weights + k * ROWS + 2 * row);
            sums[row].low = add_dot(sums[row].low, even, pair);
            sums[row].high = add_dot(sums[row].high, odd, pair);
        }
    }
};

#endif

}  // namespace fusedformer::FF_LEVEL
