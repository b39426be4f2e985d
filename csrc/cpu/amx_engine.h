// Products of small blocks on the tile unit, which multiplies bfloat16 and adds in float32. The interface is that of
// fma_engine.h.
//
// A float16 is the exact sum of two bfloat16 and a float32 of three, so that products of those are sums of products of
// parts: all four of them, or the six largest of nine (the others are below float32's last place).
#pragma once

#include "simd/tiles.h"

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

template <class S>
struct AmxEngine {
    using Scalar = S;
    using Packed = BFloat16;
    using Session = TileSession;

    static constexpr int PARTS = Parts<S>::COUNT;
    static constexpr int PANEL = 2 * TILE_ROWS, DEPTH = TILE_DEPTH, ROW_MULTIPLE = TILE_ROWS;
    static constexpr int BLOCK_Q = 32, BLOCK_K = 64;
    static constexpr int SHORT = 0, SHORT_BLOCK_Q = 32;
    static constexpr int BACKWARD_BLOCK_Q = 32;
    static constexpr int CHUNK_Q = 512;
    static constexpr int CACHE = 512 << 10;

    struct Left {
        const BFloat16* data;  // row-major, whole tiles
        int64_t row, part;     // strides
    };

    // ---- the left operand: whole tiles of bfloat16 are read where they are

    static int64_t left_size(int64_t m, int64_t k) { return PARTS * round_up(m, TILE_ROWS) * round_up(k, DEPTH); }

    static Left left(const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        if constexpr (PARTS == 1)
            if (m % TILE_ROWS == 0 && k % DEPTH == 0) return {source, stride, 0};
        const int64_t rows = round_up(m, TILE_ROWS), width = round_up(k, DEPTH);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j += WIDTH)
                split<false>(buffer + i * width + j, rows * width,
                             i < m ? load_some(source + i * stride + j, k - j) : Floats{});
        return {buffer, width, rows * width};
    }

    // The transpose (k x m) of the source (m x k) in tiles.
    static Left left_transposed(Left, const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        const int64_t rows = round_up(k, TILE_ROWS), width = round_up(m, DEPTH);
        for (int64_t j = 0; j < width; j += WIDTH) {
            for (int64_t i = 0; i < rows; i += WIDTH) {
                Floats square[WIDTH];
                for (int lane = 0; lane < WIDTH; lane++)
                    square[lane] = j + lane < m ? load_some(source + (j + lane) * stride + i, k - i) : Floats{};
                transpose(square);
                for (int row = 0; row < WIDTH; row++)
                    split<false>(buffer + (i + row) * width + j, rows * width, square[row]);
            }
        }
        return {buffer, width, rows * width};
    }

    // ---- the right operand: in a panel, rows by pairs, the two numbers of a column side by side; then the next part

    static int64_t right_size(int64_t depth, int64_t n) { return PARTS * round_up(depth, DEPTH) * round_up(n, PANEL); }

    static void pack_right(Packed* to, int64_t depth, const Scalar* source, int64_t stride, int64_t k, int64_t n,
                           const float* bias = nullptr) {
        for (int64_t j = 0; j < round_up(n, PANEL); j += WIDTH) {
            auto row = [&](int64_t at) {
                const bool used = at < k && !(bias && bias[at] == -INFINITE);
                return used ? load_some(source + at * stride + j, n - j) : Floats{};
            };
            for (int64_t i = 0; i < depth; i += 2)
                pair_rows<false>(right_row(to, depth, i, j), depth, row(i), row(i + 1));
        }
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
                    if constexpr (PARTS == 1)
                        square[lane] = used ? load_pairs(from, k - i) : Floats{};
                    else
                        square[lane] = used ? load_some(from, k - i) : Floats{};
                }
                transpose(square);
                if constexpr (PARTS == 1) {
                    for (int row = 0; row < WIDTH; row++)
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

    static Left left_of(const Packed* a, int64_t m, int64_t width) { return {a, width, m * width}; }

    static FF_INLINE void put_right(Packed* to, int64_t depth, int64_t i, int64_t j, Floats x, Floats below) {
        pair_rows<true>(right_row(to, depth, i, j), depth, x, below);
    }

    // Rows from `rows` to `depth` become 0: a tile is multiplied whole.
    static void clear_right(Packed* to, int64_t depth, int64_t rows, int64_t n) {
        for (int64_t i = round_up(rows, 2); i < depth; i += 2)
            for (int64_t j = 0; j < round_up(n, PANEL); j += WIDTH) put_right(to, depth, i, j, Floats{}, Floats{});
    }

    // ---- the product

    static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
        product<false>(c, stride, a, b, depth, m, n, k, accumulate);
    }

    // B is used once while C's tile is: it shall not push the scores out of the first cache.
    static void multiply_packed(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                                int64_t k, bool accumulate) {
        product<true>(c, stride, a, b, depth, m, n, k, accumulate);
    }

  private:
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

    // 2 * WIDTH numbers, zeros from `count` on.
    static FF_INLINE Floats load_pairs(const Scalar* from, int64_t count) {
        Floats pairs = {};
        if (count >= 2 * WIDTH)
            __builtin_memcpy(&pairs, from, sizeof pairs);
        else
            __builtin_memcpy(&pairs, from, larger<int64_t>(count, 0) * sizeof(Scalar));
        return pairs;
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

    template <bool STREAM>
    static void product(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                        int64_t k, bool accumulate) {
        depth = round_up(depth, DEPTH);
        for (int64_t j = 0; j < n; j += PANEL) {
            const Packed* panel = b + j * depth * PARTS;
            int64_t i = 0;
            for (; i + TILE_ROWS < m; i += 2 * TILE_ROWS)
                block<2, STREAM>(c + i * stride + j, stride, a, i, panel, depth, k, accumulate);
            if (i < m) block<1, STREAM>(c + i * stride + j, stride, a, i, panel, depth, k, accumulate);
        }
    }

    // Two tiles of columns; tiles 0 to 3 add up C, 4 and 5 hold A, 6 and 7 hold B.
    template <int TILES, bool STREAM>
    static void block(float* c, int64_t stride, Left a, int64_t i, const Packed* panel, int64_t depth, int64_t k,
                      bool accumulate) {
        constexpr int64_t FLOAT = sizeof(float), NUMBER = sizeof(Packed), RIGHT_STRIDE = 2 * PANEL * NUMBER;
        // Added to C, each of a float32's products would round as C's size does: they are summed apart.
        constexpr bool APART = PARTS > 2;
        alignas(64) float sums[APART ? TILES * TILE_ROWS * PANEL : 1];
        float* const total = c;
        const int64_t total_stride = stride;
        if (APART && accumulate) c = sums, stride = PANEL;
        float* below = c + TILE_ROWS * stride;
        if (!APART && accumulate) {
            FF_TILE_LOAD(0, c, stride * FLOAT);
            FF_TILE_LOAD(1, c + TILE_ROWS, stride * FLOAT);
            if constexpr (TILES == 2) {
                FF_TILE_LOAD(2, below, stride * FLOAT);
                FF_TILE_LOAD(3, below + TILE_ROWS, stride * FLOAT);
            }
        } else {
            FF_TILE_ZERO(0);
            FF_TILE_ZERO(1);
            if constexpr (TILES == 2) {
                FF_TILE_ZERO(2);
                FF_TILE_ZERO(3);
            }
        }
        for (int which = 0; which < Parts<S>::PRODUCTS; which++) {
            const BFloat16* left = a.data + Parts<S>::LEFT[which] * a.part + i * a.row;
            const Packed* right = panel + Parts<S>::RIGHT[which] * depth * PANEL;
            for (int64_t l = 0; l < k; l += DEPTH, left += DEPTH, right += DEPTH * PANEL) {
                FF_TILE_LOAD(4, left, a.row * NUMBER);
                if constexpr (STREAM)
                    FF_TILE_STREAM(6, right, RIGHT_STRIDE);
                else
                    FF_TILE_LOAD(6, right, RIGHT_STRIDE);
                FF_TILE_MULTIPLY(0, 4, 6);
                if constexpr (TILES == 2) {
                    FF_TILE_LOAD(5, left + TILE_ROWS * a.row, a.row * NUMBER);
                    FF_TILE_MULTIPLY(2, 5, 6);
                }
                if constexpr (STREAM)
                    FF_TILE_STREAM(7, right + PANEL, RIGHT_STRIDE);
                else
                    FF_TILE_LOAD(7, right + PANEL, RIGHT_STRIDE);
                FF_TILE_MULTIPLY(1, 4, 7);
                if constexpr (TILES == 2) FF_TILE_MULTIPLY(3, 5, 7);
            }
        }
        // In the order in which the sums are finished.
        FF_TILE_STORE(0, c, stride * FLOAT);
        if constexpr (TILES == 2) FF_TILE_STORE(2, below, stride * FLOAT);
        FF_TILE_STORE(1, c + TILE_ROWS, stride * FLOAT);
        if constexpr (TILES == 2) FF_TILE_STORE(3, below + TILE_ROWS, stride * FLOAT);
        if (c == total) return;
        for (int64_t row = 0; row < TILES * TILE_ROWS; row++)
            for (int64_t column = 0; column < PANEL; column += WIDTH) {
                float* to = total + row * total_stride + column;
                store(to, load(to) + load(c + row * PANEL + column));
            }
    }
};

}  // namespace fusedformer::FF_LEVEL
