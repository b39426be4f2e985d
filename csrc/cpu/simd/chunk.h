// Rows of features in chunks of two vectors, and the sums that products of them end in.
#pragma once

#include "vector.h"

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

// Where chunk c of a row begins: the last one overlaps its predecessor where the row is no multiple of a chunk.
FF_INLINE int64_t chunk_at(int64_t c, int64_t count) { return smaller(c * CHUNK, larger<int64_t>(count - CHUNK, 0)); }

// The elements of the last chunk that its predecessor holds become 0.
template <class S>
FF_INLINE Chunk without_overlap(Chunk chunk, int64_t c, int64_t count) {
    Ints low, high;
    chunk_elements<S>(low, high);
    const int32_t overlap = static_cast<int32_t>(c * CHUNK - chunk_at(c, count));
    return {keep(low >= overlap, chunk.low), keep(high >= overlap, chunk.high)};
}

// A row that is shorter than a chunk as a copy that is not.
template <class S>
FF_INLINE const S* whole_chunk(const S* row, int64_t count, S* copy) {
    if (count >= CHUNK) return row;
    __builtin_memset(copy, 0, CHUNK * sizeof(S));
    __builtin_memcpy(copy, row, count * sizeof(S));
    return copy;
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
        } else if constexpr (STEP == 2) {  // the same with pairs in the place of elements
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

}  // namespace fusedformer::FF_LEVEL
