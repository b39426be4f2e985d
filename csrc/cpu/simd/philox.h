// Dropout masks as a function of (seed, element index): Philox 4x32-10. kernels/common/philox.py says what it is of and
// from whom; both give the same bits.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

typedef uint64_t Longs __attribute__((vector_size(4 * FF_WIDTH)));

// The products of the lanes' low halves; what stands in the high ones does not matter.
FF_INLINE Longs multiply_low_halves(Longs a, Longs b) {
#if defined(FF_AVX512)
    return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(FF_AVX2)
    return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif FF_WIDTH == 4 && defined(__x86_64__)
    return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The 16-bit lanes of columns [first, first + count) of one row of one matrix, eight columns for each call; `first` is
// a multiple of 8, and `lanes` has room for whole batches of 64.
inline void philox_lanes(uint16_t* lanes, const uint32_t seed[2], int64_t first, int64_t count, uint32_t row,
                         uint32_t matrix, uint32_t stream) {
    constexpr int ROUNDS = 10, CALLS = WIDTH / 2, VECTORS = 8 / CALLS;
    constexpr uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
    const Longs none = {}, multiplier_0 = none + 0xD2511F53u, multiplier_1 = none + 0xCD9E8D57u;
    Longs keys[ROUNDS][2], lane, pairs[2];  // pairs: of two vectors, the lanes of both in turn, first and second half
    for (uint32_t round = 0; round < ROUNDS; round++) {
        keys[round][0] = none + static_cast<uint64_t>(seed[0] + round * WEYL_0);
        keys[round][1] = none + static_cast<uint64_t>(seed[1] + round * WEYL_1);
    }
    for (int i = 0; i < CALLS; i++) lane[i] = i;
    for (int half = 0; half < 2; half++) pairs[half] = lane / 2 + (lane & 1) * CALLS + half * CALLS / 2;
    for (int64_t done = 0; done < count; done += 64) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++, lanes += 8 * CALLS) {
            Longs c0 = lane + static_cast<uint64_t>((first + done) / 8 + v * CALLS);
            Longs c1 = none + row, c2 = none + matrix, c3 = none + stream;
#pragma GCC unroll 10
            for (int round = 0; round < ROUNDS; round++) {
                const Longs a = multiply_low_halves(c0, multiplier_0), b = multiply_low_halves(c2, multiplier_1);
                c0 = (b >> 32) ^ c1 ^ keys[round][0], c1 = b;
                c2 = (a >> 32) ^ c3 ^ keys[round][1], c3 = a;
            }
            const Longs words_01 = (c0 & 0xffffffffu) | (c1 << 32), words_23 = (c2 & 0xffffffffu) | (c3 << 32);
            for (int half = 0; half < 2; half++) {
                const Longs calls = __builtin_shuffle(words_01, words_23, pairs[half]);
                __builtin_memcpy(lanes + half * 4 * CALLS, &calls, sizeof calls);
            }
        }
    }
}

FF_INLINE Ints kept(const uint16_t* lanes, uint32_t threshold) {
    Halves h;
    __builtin_memcpy(&h, lanes, sizeof h);
    return reinterpret_cast<Ints>(__builtin_convertvector(h, Ints) >= static_cast<int32_t>(threshold));
}

}  // namespace fusedformer::FF_LEVEL
