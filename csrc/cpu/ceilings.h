// What the units of a core reach at best: loops that do one thing only, for the benchmark to hold the kernels against.
#pragma once

#include "problem.h"
#include "simd/tiles.h"

namespace fusedformer::FF_LEVEL {

// Multiplications and additions in registers alone; returns how many. -x + y goes to and fro between two random
// numbers, so that all bits switch.
inline double multiply_and_add(const float* data, int64_t rounds) {
    constexpr int CHAINS = 12;  // enough to hide the latency, and they leave the factors two of 16 registers
    Floats factor = broadcast(-1.0f), term = load(data), sums[CHAINS];
    asm("" : "+m"(factor));  // the compiler shall not know it
    for (int i = 0; i < CHAINS; i++) sums[i] = load(data + i * WIDTH);
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = sums[i] * factor + term;
    asm volatile("" : : "m"(sums));
    return 2.0 * CHAINS * WIDTH * static_cast<double>(rounds);
}

// Reads all of `data` in every round; returns how many bytes.
inline double read_all(const float* data, int64_t bytes, int64_t rounds) {
    constexpr int CHAINS = 8;
    constexpr int64_t STEP = CHAINS * WIDTH;
    const int64_t count = round_down(bytes / static_cast<int64_t>(sizeof(float)), STEP);
    Ints sums[CHAINS] = {};
    for (int64_t round = 0; round < rounds; round++) {
        for (int64_t i = 0; i < count; i += STEP)
#pragma GCC unroll 16
            for (int j = 0; j < CHAINS; j++) sums[j] ^= bits_of(load(data + i + j * WIDTH));
        asm volatile("" : "+m"(sums) : : "memory");  // each round reads again
    }
    return static_cast<double>(count) * sizeof(float) * static_cast<double>(rounds);
}

#if defined(FF_AVX512_BF16) && !defined(FF_EMULATE)
#define FF_MEASURES_DOTS

// Dot products of pairs of bfloat16 in registers alone; returns how many multiplications and additions.
inline double multiply_pairs(const float* data, int64_t rounds) {
    constexpr int CHAINS = 12;
    const auto* numbers = reinterpret_cast<const BFloat16*>(data);
    const Words left = load_words(numbers), right = load_words(numbers + 2 * WIDTH);
    Floats sums[CHAINS];
    for (int i = 0; i < CHAINS; i++) sums[i] = load(data + i * WIDTH);  // equal chains would be computed once
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = add_dot(sums[i], left, right);
    asm volatile("" : : "m"(sums));
    return 4.0 * CHAINS * WIDTH * static_cast<double>(rounds);
}

#endif

#if defined(FF_AMX) && !defined(FF_EMULATE)
#define FF_MEASURES_TILES

// bfloat16 products of tiles: two by two of them from the first cache, as a matrix product would; returns how many
// multiplications and additions.
inline double multiply_tiles(const void* data, int64_t rounds) {
    const TileSession session;
    const auto* operands = static_cast<const char*>(data);
    FF_TILE_ZERO(0);
    FF_TILE_ZERO(1);
    FF_TILE_ZERO(2);
    FF_TILE_ZERO(3);
    for (int64_t round = 0; round < rounds; round++) {
        FF_TILE_LOAD(4, operands, 64);
        FF_TILE_LOAD(5, operands + 1024, 64);
        FF_TILE_LOAD(6, operands + 2048, 64);
        FF_TILE_LOAD(7, operands + 3072, 64);
        FF_TILE_MULTIPLY(0, 4, 6);
        FF_TILE_MULTIPLY(1, 4, 7);
        FF_TILE_MULTIPLY(2, 5, 6);
        FF_TILE_MULTIPLY(3, 5, 7);
    }
    return 4 * 2.0 * 16 * 16 * 32 * static_cast<double>(rounds);
}

#endif

// Does `rounds` of the work that `kind` counts; returns how much that was, 0 where this level has no such unit. `data`
// are random bfloat16 numbers, 4 KB or more.
inline double measure_ceiling(Ceiling kind, const void* data, int64_t bytes, int64_t rounds) {
    const auto* floats = static_cast<const float*>(data);
    switch (kind) {
        case Ceiling::fma:
            return multiply_and_add(floats, rounds);
        case Ceiling::read:
            return read_all(floats, bytes, rounds);
#ifdef FF_MEASURES_DOTS
        case Ceiling::dot:
            return multiply_pairs(floats, rounds);
#endif
#ifdef FF_MEASURES_TILES
        case Ceiling::amx:
            return multiply_tiles(data, rounds);
#endif
        default:
            return 0.0;
    }
}

}  // namespace fusedformer::FF_LEVEL
