// Pairs of bfloat16, one in each 32-bit lane, and their dot product (AVX512-BF16). Where FF_EMULATE is defined the same
// operations are plain code, so that everything built on them is tested on any machine.
#pragma once

#include "vector.h"

namespace fusedformer::FF_LEVEL {

FF_INLINE Words load_words(const BFloat16* pairs) {
    Words v;
    __builtin_memcpy(&v, pairs, sizeof v);
    return v;
}

// 2 * WIDTH numbers, zeros from `count` on.
FF_INLINE Words load_some_words(const BFloat16* pairs, int64_t count) {
    if (count >= 2 * WIDTH) return load_words(pairs);
    Words v = {};
    __builtin_memcpy(&v, pairs, larger<int64_t>(count, 0) * sizeof(BFloat16));
    return v;
}

FF_INLINE void store_words(BFloat16* pairs, Words v) { __builtin_memcpy(pairs, &v, sizeof v); }

FF_INLINE Words broadcast_word(const BFloat16* pair) {
    uint32_t word;
    __builtin_memcpy(&word, pair, sizeof word);
    return word - Words{};
}

// The numbers of a and of b in turn.
FF_INLINE void interleave(Words a, Words b, Words& low, Words& high) {
    typedef uint16_t Numbers __attribute__((vector_size(4 * WIDTH)));
    Numbers from = {};
    for (int i = 0; i < 2 * WIDTH; i++) from[i] = static_cast<uint16_t>(i / 2 + i % 2 * 2 * WIDTH);
    const auto x = reinterpret_cast<Numbers>(a), y = reinterpret_cast<Numbers>(b);
    low = reinterpret_cast<Words>(__builtin_shuffle(x, y, from));
    high = reinterpret_cast<Words>(__builtin_shuffle(x, y, from + static_cast<uint16_t>(WIDTH)));
}

#ifdef FF_EMULATE

FF_INLINE Halves to_bfloat16(Floats x) { return narrow(BFloat16{}, x); }

// The numbers in the upper halves. As the units do, denormal factors count as 0.
FF_INLINE Floats upper_factors(Words pairs) {
    const Words is_normal = reinterpret_cast<Words>((pairs & 0x7f800000u) != 0);
    return reinterpret_cast<Floats>(pairs & (is_normal | 0x80000000u) & 0xffff0000u);
}

FF_INLINE Floats add_dot(Floats sum, Words a, Words b) {
    sum += upper_factors(a) * upper_factors(b);
    return sum + upper_factors(a << 16) * upper_factors(b << 16);
}

#else

// Rounds to nearest; denormals become 0, as the units would take them.
FF_INLINE Halves to_bfloat16(Floats x) {
    Halves h;
    asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
    return h;
}

#ifdef FF_AVX512_BF16

FF_INLINE Floats add_dot(Floats sum, Words a, Words b) {
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

#endif
#endif

}  // namespace fusedformer::FF_LEVEL
