// Dropout masks as a function of (seed, element index): Philox 4x32-10. kernels/common/philox.py says what it is of and
// from whom; both give the same bits.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

// The 16-bit lanes of columns [first, first + count) of one row of one matrix, eight columns for each call; `first` is
// a multiple of 8, and `lanes` has room for whole batches of 64.
inline void philox_lanes(uint16_t* lanes, const uint32_t seed[2], int64_t first, int64_t count, uint32_t row,
                         uint32_t matrix, uint32_t stream) {
    constexpr int CALLS = 8;
    constexpr uint64_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57;
    constexpr uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
    for (int64_t done = 0; done < count; done += 8 * CALLS, lanes += 8 * CALLS) {
        uint32_t c0[CALLS], c1[CALLS], c2[CALLS], c3[CALLS];
        for (int i = 0; i < CALLS; i++) {
            c0[i] = static_cast<uint32_t>((first + done) / 8 + i);
            c1[i] = row, c2[i] = matrix, c3[i] = stream;
        }
        uint32_t k0 = seed[0], k1 = seed[1];
        for (int round = 0; round < 10; round++, k0 += WEYL_0, k1 += WEYL_1) {
            for (int i = 0; i < CALLS; i++) {
                const uint64_t a = MULTIPLIER_0 * c0[i], b = MULTIPLIER_1 * c2[i];
                c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0, c1[i] = static_cast<uint32_t>(b);
                c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1, c3[i] = static_cast<uint32_t>(a);
            }
        }
        for (int i = 0; i < CALLS; i++) {
            const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
            for (int w = 0; w < 4; w++) {
                lanes[8 * i + 2 * w] = static_cast<uint16_t>(words[w]);
                lanes[8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
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
