// One vector of WIDTH floats, in the compiler's own vector types: the same source becomes SSE2, AVX2 or AVX-512. Only
// what has no plain expression (half conversion) names an instruction. Everything lives in a namespace of the level
// that includes it, so that no two levels share a function.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(FF_LEVEL) || !defined(FF_WIDTH)
#error "a file of levels/ defines FF_LEVEL and FF_WIDTH, and FF_AVX2 or FF_AVX512 where it has those instructions"
#endif

#define FF_INLINE inline __attribute__((always_inline))

namespace fusedformer::FF_LEVEL {

constexpr int WIDTH = FF_WIDTH;
typedef float Floats __attribute__((vector_size(4 * FF_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * FF_WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * FF_WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * FF_WIDTH)));

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2E = 1.44269504088896340736f;

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class T>
constexpr T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
    return a < b ? b : a;
}
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t round_down(int64_t n, int64_t multiple) { return n / multiple * multiple; }

FF_INLINE Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
FF_INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
FF_INLINE Floats broadcast(float x) { return x - Floats{}; }
FF_INLINE Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
FF_INLINE Floats from_bits(Ints v) { return reinterpret_cast<Floats>(v); }
FF_INLINE Floats select(Ints mask, Floats a, Floats b) { return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask)); }
FF_INLINE Floats keep(Ints mask, Floats a) { return from_bits(bits_of(a) & mask); }  // 0 elsewhere
FF_INLINE Floats smaller(Floats a, Floats b) { return a > b ? b : a; }               // a where either is NaN
FF_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }                // b where either is NaN

FF_INLINE Ints lane_numbers() {
    Ints v;
    for (int i = 0; i < WIDTH; i++) v[i] = i;
    return v;
}

// Lane i takes lane i + WIDTH / PARTS, in a circle.
template <int PARTS>
FF_INLINE Floats rotated(Floats v) {
    return __builtin_shuffle(v, (lane_numbers() + WIDTH / PARTS) & (WIDTH - 1));
}

FF_INLINE float sum(Floats v) {
    if constexpr (WIDTH >= 16) v += rotated<WIDTH / 8>(v);
    if constexpr (WIDTH >= 8) v += rotated<WIDTH / 4>(v);
    v += rotated<WIDTH / 2>(v);
    return (v + rotated<WIDTH>(v))[0];
}

FF_INLINE float largest(Floats v) {  // of lanes that are no NaN, or -infinity
    if constexpr (WIDTH >= 16) v = larger(v, rotated<WIDTH / 8>(v));
    if constexpr (WIDTH >= 8) v = larger(v, rotated<WIDTH / 4>(v));
    v = larger(v, rotated<WIDTH / 2>(v));
    return larger(v, rotated<WIDTH>(v))[0];
}

FF_INLINE Ints select_lanes(Ints odd, Ints a, Ints b) { return odd != 0 ? a : b; }

// One exchange of a transpose: of each 2 x 2 square of STEP x STEP squares, those off the diagonal swap.
template <int STEP>
FF_INLINE void exchange(Floats* rows) {
    const Ints lane = lane_numbers(), odd = lane & STEP;
    const Ints low = select_lanes(odd, lane - STEP + WIDTH, lane), high = select_lanes(odd, lane + WIDTH, lane + STEP);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        if (i & STEP) continue;
        const Floats a = rows[i], b = rows[i + STEP];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + STEP] = __builtin_shuffle(a, b, high);
    }
}

FF_INLINE void transpose(Floats (&rows)[WIDTH]) {
    if constexpr (WIDTH >= 16) exchange<8>(rows);
    if constexpr (WIDTH >= 8) exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

FF_INLINE bool any(Ints mask) {
#ifdef FF_AVX512
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(FF_AVX2)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < WIDTH; i++) found |= mask[i];
    return found != 0;
#endif
}

// ---- 16-bit floats

FF_INLINE Floats widen(BFloat16, Halves h) {
#ifdef FF_AVX2  // one instruction, of which the compiler makes four
    return from_bits(reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h))) << 16);
#else
    return from_bits(reinterpret_cast<Ints>(__builtin_convertvector(h, Words) << 16));
#endif
}

FF_INLINE Floats widen(Float16, Halves h) {
#ifdef FF_AVX512
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif defined(FF_AVX2)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
    const Words wide = __builtin_convertvector(h, Words);
    const Ints magnitude = reinterpret_cast<Ints>((wide & 0x7fff) << 13);
    const Ints special = magnitude >= (0x7c00 << 13);  // infinite or NaN: the exponent's other bits are set too
    const Ints value = bits_of(from_bits(magnitude) * 0x1p112f);
    const Ints exact = (special & (magnitude | 0x7f800000)) | (~special & value);
    return from_bits(exact | reinterpret_cast<Ints>((wide & 0x8000) << 16));
#endif
}

FF_INLINE Halves narrow(BFloat16, Floats v) {
    const Words bits = reinterpret_cast<Words>(v);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into an infinity
    const Words either = v != v ? nan : rounded;
#ifdef FF_AVX2
    const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(either), reinterpret_cast<__m256i>(either));
    return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
    return __builtin_convertvector(either, Halves);
#endif
}

FF_INLINE Halves narrow(Float16, Floats v) {
#ifdef FF_AVX512
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(FF_AVX2)
    return reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    const Words bits = reinterpret_cast<Words>(v), magnitude = bits & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 a half counts in units of 2^-24, the last place of 0.5: the addition rounds.
    const Words denormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const Words is_denormal = reinterpret_cast<Words>(magnitude < (113u << 23));
    const Words is_infinite = reinterpret_cast<Words>(magnitude >= 0x477ff000u);  // 65520 rounds up
    const Words is_nan = reinterpret_cast<Words>(v != v);
    Words half = (is_denormal & denormal) | (~is_denormal & normal);
    half = (is_infinite & 0x7c00u) | (~is_infinite & half);
    half = (is_nan & 0x7e00u) | (~is_nan & half);
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
#endif
}

FF_INLINE Floats load(const BFloat16* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(BFloat16{}, h);
}
FF_INLINE Floats load(const Float16* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(Float16{}, h);
}
FF_INLINE void store(BFloat16* p, Floats v) {
    const Halves h = narrow(BFloat16{}, v);
    __builtin_memcpy(p, &h, sizeof h);
}
FF_INLINE void store(Float16* p, Floats v) {
    const Halves h = narrow(Float16{}, v);
    __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` lanes (0 <= count <= WIDTH; more counts as WIDTH); zeros after them.
template <class T>
FF_INLINE Floats load_some(const T* p, int64_t count) {
    if (count >= WIDTH) return load(p);
    T lanes[WIDTH] = {};
    __builtin_memcpy(lanes, p, larger<int64_t>(count, 0) * sizeof(T));
    return load(lanes);
}

template <class T>
FF_INLINE void store_some(T* p, Floats v, int64_t count) {
    if (count >= WIDTH) return store(p, v);
    T lanes[WIDTH];
    store(lanes, v);
    __builtin_memcpy(p, lanes, larger<int64_t>(count, 0) * sizeof(T));
}

template <class T>
FF_INLINE float load_one(const T* p) {
    return load_some(p, 1)[0];
}
template <>
FF_INLINE float load_one(const float* p) {
    return *p;
}

}  // namespace fusedformer::FF_LEVEL
