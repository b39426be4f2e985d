// Products of small blocks on the tile unit, which multiplies bfloat16 and adds in float32. The interface is that of
// fma_engine.h.
#pragma once

#include "paired_operands.h"
#include "simd/tiles.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct AmxEngine : PairedOperands<S, TILE_DEPTH> {
    using Base = PairedOperands<S, TILE_DEPTH>;
    using Base::PARTS, Base::PANEL, Base::DEPTH;
    using typename Base::Packed, typename Base::Scalar;
    using Session = TileSession;

    static constexpr int ROW_MULTIPLE = TILE_ROWS, COLUMNS = Base::PANEL;
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
                Base::template split<false>(buffer + i * width + j, rows * width,
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
                    Base::template split<false>(buffer + (i + row) * width + j, rows * width, square[row]);
            }
        }
        return {buffer, width, rows * width};
    }

    // ---- operands that the kernels compute

    static Left left_of(const Packed* a, int64_t m, int64_t width) { return {a, width, m * width}; }

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
