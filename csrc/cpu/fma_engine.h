// Products of small blocks in float32 by fused multiply-add; 16-bit operands are widened when they are packed.
//
// An engine multiplies C (m x n, float32) = or += A (m x k) B (k x n) for tensors of one Scalar. A is a `Left`. B is
// packed in panels of PANEL columns, each `depth` rows of PANEL consecutive numbers; n is rounded up to a multiple of
// COLUMNS.
#pragma once

#include "simd/vector.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct FmaEngine {
    using Scalar = S;
    using Packed = float;  // an element of a packed operand
    struct Session {};     // what a thread holds while it multiplies

    static constexpr int PANEL = 2 * WIDTH;
    static constexpr int ROWS = WIDTH == 16 ? 12 : 6;  // times two vectors: accumulators that fill the registers
    static constexpr int PARTS = 1;                    // numbers kept for each element
    static constexpr int DEPTH = 1;                    // a packed operand's depth is a multiple of this
    static constexpr int ROW_MULTIPLE = 1;             // so many rows of C are written at a time,
    static constexpr int COLUMNS = WIDTH;              // and so many columns

    // Tiles of scores, of forward and of backward. Measured on AVX2: twice the keys or queries are 5% faster there;
    // with wider vectors the panels that go with them would fill the first cache.
    static constexpr int BLOCK_Q = 24, BLOCK_K = WIDTH == 16 ? 64 : 128;
    static constexpr int BACKWARD_BLOCK_Q = WIDTH == 16 ? 24 : 48;  // even
    static constexpr int SHORT = 256, SHORT_BLOCK_Q = 12;  // few queries: smaller ones waste less at the diagonal
    static constexpr int CHUNK_Q = 512;                    // queries that share what was packed
    static constexpr int CACHE = 256 << 10;                // bytes of packed keys and values at a time

    static constexpr int64_t LONGEST_SUM = 128;

    struct Left {
        const float* data;
        int64_t row, column;  // strides
    };

    // ---- the left operand: float32 is read where it is

    static int64_t left_size(int64_t m, int64_t k) { return sizeof(Scalar) == 4 ? 0 : m * round_up(k, WIDTH); }

    static Left left(const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        if constexpr (sizeof(Scalar) == 4) {
            return {source, stride, 1};
        } else {
            const int64_t width = round_up(k, WIDTH);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < k; j += WIDTH)
                    store(buffer + i * width + j, load_some(source + i * stride + j, k - j));
            return {buffer, width, 1};
        }
    }

    // The transpose (k x m) of the same source, of which `a` has been made.
    static Left left_transposed(Left a, const Scalar*, int64_t, int64_t, int64_t, Packed*) {
        return {a.data, a.column, a.row};
    }

    // ---- the right operand

    static int64_t right_size(int64_t depth, int64_t n) { return depth * round_up(n, PANEL); }

    // B = source (k x n). Rows from k to depth, and rows whose `bias` is -infinity, are 0.
    static void pack_right(Packed* to, int64_t depth, const Scalar* source, int64_t stride, int64_t k, int64_t n,
                           const float* bias = nullptr) {
        for (int64_t j = 0; j < n; j += PANEL, to += depth * PANEL) {
            for (int64_t i = 0; i < depth; i++) {
                const bool used = i < k && !(bias && bias[i] == -INFINITE);
                const Scalar* row = source + i * stride + j;
                store(to + i * PANEL, used ? load_some(row, n - j) : Floats{});
                store(to + i * PANEL + WIDTH, used ? load_some(row + WIDTH, n - j - WIDTH) : Floats{});
            }
        }
    }

    // B = the transpose of source (n x k), depth k. Columns from n on, and those whose `bias` is -infinity, are 0.
    static void pack_right_transposed(Packed* to, const Scalar* source, int64_t stride, int64_t n, int64_t k,
                                      const float* bias = nullptr) {
        for (int64_t j = 0; j < round_up(n, PANEL); j += WIDTH) {
            Packed* column = to + round_down(j, PANEL) * k + j % PANEL;
            for (int64_t i = 0; i < k; i += WIDTH) {
                Floats square[WIDTH];
                for (int lane = 0; lane < WIDTH; lane++) {
                    const bool used = j + lane < n && !(bias && bias[j + lane] == -INFINITE);
                    square[lane] = used ? load_some(source + (j + lane) * stride + i, k - i) : Floats{};
                }
                transpose(square);
                for (int64_t row = 0; row < smaller<int64_t>(WIDTH, k - i); row++)
                    store(column + (i + row) * PANEL, square[row]);
            }
        }
    }

    // Where row k of the panel that begins with column n stands.
    static const Packed* right_at(const Packed* b, int64_t depth, int64_t k, int64_t n) {
        return b + n * depth + k * PANEL;
    }

    // ---- operands that the kernels compute, written by vectors into tiles

    static int64_t tile_size(int64_t m, int64_t k) { return m * k; }

    static FF_INLINE void put_left(Packed* to, int64_t, int64_t width, int64_t i, int64_t j, Floats x) {
        store(to + i * width + j, x);
    }

    static Left left_of(const Packed* a, int64_t, int64_t width) { return {a, width, 1}; }

    // Rows i and i + 1 of a right operand; the tile has both, also where m is odd.
    static FF_INLINE void put_right(Packed* to, int64_t depth, int64_t i, int64_t j, Floats x, Floats below) {
        Packed* at = to + round_down(j, PANEL) * depth + i * PANEL + j % PANEL;
        store(at, x), store(at + PANEL, below);
    }

    static void clear_right(Packed*, int64_t, int64_t, int64_t) {}  // no row is read but those that were put

    // ---- the product

    static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
        // Long sums by pieces: their rounding errors grow with the piece.
        for (int64_t done = 0; done == 0 || done < k; done += LONGEST_SUM, a.data += LONGEST_SUM * a.column) {
            const int64_t length = smaller(LONGEST_SUM, k - done);
            for (int64_t j = 0; j < n; j += PANEL) {
                const Packed* panel = b + j * depth + done * PANEL;
                float* to = c + j;
                if (n - j > WIDTH)
                    rows<2>(to, stride, a, panel, m, length, accumulate);
                else
                    rows<1>(to, stride, a, panel, m, length, accumulate);
            }
            accumulate = true;
        }
    }

    static void multiply_packed(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                                int64_t k, bool accumulate) {
        multiply(c, stride, a, b, depth, m, n, k, accumulate);
    }

  private:
    // N: the vectors of a panel that are computed.
    template <int N>
    static void rows(float* c, int64_t stride, Left a, const Packed* panel, int64_t m, int64_t k, bool accumulate) {
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS) block<ROWS, N>(c + i * stride, stride, a, i, panel, k, accumulate);
        rest<ROWS - 1, N>(m - i, c + i * stride, stride, a, i, panel, k, accumulate);
    }

    template <int M, int N>
    static void rest(int64_t m, float* c, int64_t stride, Left a, int64_t i, const Packed* panel, int64_t k,
                     bool accumulate) {
        if constexpr (M > 0) {
            if (m == M)
                block<M, N>(c, stride, a, i, panel, k, accumulate);
            else
                rest<M - 1, N>(m, c, stride, a, i, panel, k, accumulate);
        }
    }

    template <int M, int N>
    static FF_INLINE void add(Floats (*sums)[N], const float* a, int64_t row, const Packed* panel) {
        Floats b[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) b[j] = load(panel + j * WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const float x = a[i * row];
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) sums[i][j] += b[j] * x;
        }
    }

    template <int M, int N>
    static __attribute__((noinline)) void block(float* c, int64_t stride, Left left, int64_t first, const Packed* panel,
                                                int64_t k, bool accumulate) {
        const float* a = left.data + first * left.row;
        const int64_t row = left.row, column = left.column;
        // Few rows leave registers for sums of every SPLIT-th term: these wait less for each other, and round less.
        constexpr int SPLIT = 4 * M <= ROWS ? 4 : 2 * M <= ROWS ? 2 : 1;
        Floats sums[M * SPLIT][N];
#pragma GCC unroll 16
        for (int i = 0; i < M * SPLIT; i++)
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) sums[i][j] = Floats{};
        int64_t l = 0;
        for (; l + SPLIT <= k; l += SPLIT) {
#pragma GCC unroll 4
            for (int part = 0; part < SPLIT; part++, panel += PANEL, a += column)
                add<M, N>(sums + part * M, a, row, panel);
        }
        for (; l < k; l++, panel += PANEL, a += column) add<M, N>(sums, a, row, panel);
#pragma GCC unroll 2
        for (int half = SPLIT / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < M * half; i++)
#pragma GCC unroll 2
                for (int j = 0; j < N; j++) sums[i][j] += sums[i + M * half][j];
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {  // added to C last: the sum of a block rounds as its own size does
            float* to = c + i * stride;
#pragma GCC unroll 2
            for (int j = 0; j < N; j++, to += WIDTH) store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
