// Operands for the instructions that multiply pairs of bfloat16 and add in float32, on the tile unit (amx_engine.h) or
// in vectors (dot_engine.h).
//
// A float16 is the exact sum of two bfloat16 and a float32 of three, so that products of those are sums of products of
// parts: all four of them, or the six largest of nine (the others are below float32's last place).
#pragma once

#include "simd/pairs.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct Parts {
    static constexpr int COUNT = 1, PRODUCTS = 1, LEFT[] = {0}, RIGHT[] = {0};
};
template <>
struct Parts<Float16> {
    static constexpr int COUNT = 2, PRODUCTS = 4, LEFT[] = {1, 1, 0, 0}, RIGHT[] = {1, 0, 1, 0};
};
template <>
struct Parts<float> {  // the smallest first
    static constexpr int COUNT = 3, PRODUCTS = 6, LEFT[] = {2, 0, 1, 1, 0, 0}, RIGHT[] = {0, 2, 1, 0, 1, 0};
};

// What both engines do alike; each says of what a packed operand's depth is a multiple.
template <class S, int MULTIPLE>
struct PairedOperands {
    using Scalar = S;
    using Packed = BFloat16;

    static constexpr int PARTS = Parts<S>::COUNT;
    static constexpr int PANEL = 2 * WIDTH, DEPTH = MULTIPLE;

    // ---- the right operand: in a panel, rows by pairs, the two numbers of a column side by side; then the next part

    static int64_t right_size(int64_t depth, int64_t n) { return PARTS * round_up(depth, DEPTH) * round_up(n, PANEL); }

    static void pack_right(Packed* to, int64_t depth, const Scalar* source, int64_t stride, int64_t k, int64_t n,
                           const float* bias = nullptr) {
        constexpr int64_t STRETCH = 4 * PANEL;  // of a row at a time: whole lines, and few pages that are written
        auto used = [&](int64_t at) { return at < k && !(bias && bias[at] == -INFINITE); };
        for (int64_t first = 0; first < n; first += STRETCH)
            for (int64_t i = 0; i < depth; i += 2)
                for (int64_t j = first; j < smaller(n, first + STRETCH); j += PANEL)
                    pack_pair(right_row(to, depth, i, j), depth, source + i * stride + j, stride, used(i), used(i + 1),
                              n - j);
    }

    static void pack_right_transposed(Packed* to, const Scalar* source, int64_t stride, int64_t n, int64_t k,
                                      const float* bias = nullptr) {
        constexpr int STEP = PARTS == 1 ? 2 * WIDTH : WIDTH;  // a row's pairs of bfloat16 move as words
        const int64_t depth = round_up(k, DEPTH);
        for (int64_t j = 0; j < round_up(n, PANEL); j += WIDTH) {
            for (int64_t i = 0; i < depth; i += STEP) {
                Floats square[WIDTH];
                for (int lane = 0; lane < WIDTH; lane++) {
                    const bool used = j + lane < n && !(bias && bias[j + lane] == -INFINITE);
                    const Scalar* from = source + (j + lane) * stride + i;
                    __builtin_prefetch(from + WIDTH * stride, 0, 2);  // rows far apart are fetched by nothing else
                    if constexpr (PARTS == 1)
                        square[lane] = used ? reinterpret_cast<Floats>(load_some_words(from, k - i)) : Floats{};
                    else
                        square[lane] = used ? load_some(from, k - i) : Floats{};
                }
                transpose(square);
                if constexpr (PARTS == 1) {
                    for (int row = 0; row < smaller<int64_t>(WIDTH, (depth - i) / 2); row++)
                        __builtin_memcpy(right_row(to, depth, i + 2 * row, j), &square[row], sizeof square[row]);
                } else {
                    for (int row = 0; row < WIDTH; row += 2)
                        pair_rows<false>(right_row(to, depth, i + row, j), depth, square[row], square[row + 1]);
                }
            }
        }
    }

    static const Packed* right_at(const Packed* b, int64_t depth, int64_t k, int64_t n) {
        return b + n * round_up(depth, DEPTH) * PARTS + k * PANEL;
    }

    // ---- operands that the kernels compute

    static int64_t tile_size(int64_t m, int64_t k) { return PARTS * round_up(m, DEPTH) * round_up(k, DEPTH); }

    static FF_INLINE void put_left(Packed* to, int64_t m, int64_t width, int64_t i, int64_t j, Floats x) {
        split<true>(to + i * width + j, m * width, x);
    }

    static FF_INLINE void put_right(Packed* to, int64_t depth, int64_t i, int64_t j, Floats x, Floats below) {
        pair_rows<true>(right_row(to, depth, i, j), depth, x, below);
    }

    // Rows from `rows` to `depth` become 0: a tile is multiplied whole.
    static void clear_right(Packed* to, int64_t depth, int64_t rows, int64_t n) {
        for (int64_t i = round_up(rows, 2); i < depth; i += 2)
            for (int64_t j = 0; j < round_up(n, PANEL); j += WIDTH) put_right(to, depth, i, j, Floats{}, Floats{});
    }

  protected:
    static constexpr int64_t AHEAD = 16;  // rows, which are far apart: nothing else fetches them

    // A panel's part of two rows, of `count` columns; of those that are not used zeros.
    static FF_INLINE void pack_pair(Packed* to, int64_t depth, const Scalar* row, int64_t stride, bool first,
                                    bool second, int64_t count) {
        __builtin_prefetch(row + AHEAD * stride);
        __builtin_prefetch(row + (AHEAD + 1) * stride);
        if constexpr (PARTS == 1) {
            Words low, high;
            interleave(first ? load_some_words(row, count) : Words{},
                       second ? load_some_words(row + stride, count) : Words{}, low, high);
            store_words(to, low), store_words(to + 2 * WIDTH, high);
        } else {
            for (int64_t j = 0; j < PANEL; j += WIDTH)
                pair_rows<false>(to + 2 * j, depth, first ? load_some(row + j, count - j) : Floats{},
                                 second ? load_some(row + stride + j, count - j) : Floats{});
        }
    }

    static FF_INLINE Packed* right_row(Packed* to, int64_t depth, int64_t i, int64_t j) {  // i even
        return to + round_down(j, PANEL) * depth * PARTS + i * PANEL + j % PANEL * 2;
    }

    template <bool ROUND>
    static FF_INLINE void pair_rows(Packed* to, int64_t depth, Floats x, Floats below) {
#pragma GCC unroll 3
        for (int part = 0; part < PARTS; part++) {
            const Words low = part_bits<ROUND>(part, x), high = part_bits<ROUND>(part, below);
            const Words pairs = low >> 16 | (high & 0xffff0000u);
            __builtin_memcpy(to + part * depth * PANEL, &pairs, sizeof pairs);
        }
    }

    // The upper half of each lane holds the part; x becomes what is left of it. Parts are cut off, so that none
    // overflows and the rest is exact. A Scalar has nothing left after its last part; what is computed is rounded
    // there.
    template <bool ROUND>
    static FF_INLINE Words part_bits(int part, Floats& x) {
        if (ROUND && part == PARTS - 1) return __builtin_convertvector(to_bfloat16(x), Words) << 16;
        Words high = reinterpret_cast<Words>(x);
        if constexpr (PARTS > 2) {
            // Three of a float32's products are dropped: its parts are rounded, since those of cut off ones would add
            // up. But for the largest numbers, which would become infinite.
            const Words rounds = reinterpret_cast<Words>((high & 0x7fffffffu) < 0x7f7f8000u);
            high += rounds & 0x8000u;
        }
        high &= 0xffff0000u;
        x -= reinterpret_cast<Floats>(high);
        return high;
    }

    template <bool ROUND>
    static FF_INLINE void split(Packed* to, int64_t part_stride, Floats x) {
#pragma GCC unroll 3
        for (int part = 0; part < PARTS; part++) {
            Halves h;
            if (ROUND && part == PARTS - 1)
                h = to_bfloat16(x);
            else
                h = __builtin_convertvector(part_bits<ROUND>(part, x) >> 16, Halves);
            __builtin_memcpy(to + part * part_stride, &h, sizeof h);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
