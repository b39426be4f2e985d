// Products of small blocks of bfloat16 by dot products of pairs (AVX512-BF16), added in float32. The interface is that
// of fma_engine.h.
#pragma once

#include "paired_operands.h"

namespace fusedformer::FF_LEVEL {

struct DotEngine : PairedOperands<BFloat16, 2> {
    struct Session {};

    static constexpr int ROWS = 12;  // times two vectors: accumulators that fill the registers
    static constexpr int ROW_MULTIPLE = 1, COLUMNS = WIDTH;
    static constexpr int BLOCK_Q = 24, BLOCK_K = 128;
    static constexpr int SHORT = 0, SHORT_BLOCK_Q = 24;
    static constexpr int BACKWARD_BLOCK_Q = 24;
    static constexpr int CHUNK_Q = 512;
    static constexpr int CACHE = 256 << 10;

    struct Left {
        const BFloat16* data;
        int64_t row, pair;  // strides: of a row, of two columns
    };

    // ---- the left operand

    static int64_t left_size(int64_t m, int64_t k) { return round_up(m, WIDTH) * round_up(k, 2 * WIDTH); }

    static Left left(const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        const int64_t width = round_up(k, 2 * WIDTH);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < k; j += 2 * WIDTH) {
                const Scalar* from = source + i * stride + j;
                __builtin_prefetch(from + AHEAD * stride);
                store_words(buffer + i * width + j, load_some_words(from, k - j));
            }
        return {buffer, width, 2};
    }

    // The transpose (k x m) of the source (m x k): of two rows, the numbers of a column side by side.
    static Left left_transposed(Left, const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        const int64_t width = 2 * round_up(k, WIDTH);
        for (int64_t i = 0; i < m; i += 2, source += 2 * stride)
            for (int64_t j = 0; j < k; j += 2 * WIDTH) {
                const Scalar* row = source + j;
                __builtin_prefetch(row + AHEAD * stride);
                __builtin_prefetch(row + (AHEAD + 1) * stride);
                Packed* to = buffer + i / 2 * width + 2 * j;
                Words low, high;
                interleave(load_some_words(row, k - j), i + 1 < m ? load_some_words(row + stride, k - j) : Words{}, low,
                           high);
                store_words(to, low);
                if (j + WIDTH < k) store_words(to + 2 * WIDTH, high);
            }
        return {buffer, 2, width};
    }

    // ---- operands that the kernels compute

    static Left left_of(const Packed* a, int64_t, int64_t width) { return {a, width, 2}; }

    static void clear_right(Packed*, int64_t, int64_t, int64_t) {}  // no row is read but those that were put

    // ---- the product

    static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
        product<true>(c, stride, a, b, depth, m, n, k, accumulate);
    }

    static void multiply_packed(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                                int64_t k, bool accumulate) {
        product<true>(c, stride, a, b, depth, m, n, k, accumulate);
    }

  protected:
    // Few rows leave registers for sums of every other or every fourth term: where it SPLITS, these wait less for each
    // other, but a row's bits depend on how many follow it.
    template <bool SPLITS>
    static void product(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                        int64_t k, bool accumulate) {
        depth = round_up(depth, DEPTH);
        const int64_t pairs = (k + 1) / 2;
        for (int64_t j = 0; j < n; j += PANEL) {
            if (n - j > WIDTH)
                rows<2, SPLITS>(c + j, stride, a, b + j * depth, m, pairs, accumulate);
            else
                rows<1, SPLITS>(c + j, stride, a, b + j * depth, m, pairs, accumulate);
        }
    }

  private:
    // N: the vectors of a panel that are computed.
    template <int N, bool SPLITS>
    static void rows(float* c, int64_t stride, Left a, const Packed* panel, int64_t m, int64_t pairs, bool accumulate) {
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS) block<ROWS, N, 1>(c + i * stride, stride, a, i, panel, pairs, accumulate);
        rest<ROWS - 1, N, SPLITS>(m - i, c + i * stride, stride, a, i, panel, pairs, accumulate);
    }

    template <int M, int N, bool SPLITS>
    static void rest(int64_t m, float* c, int64_t stride, Left a, int64_t i, const Packed* panel, int64_t pairs,
                     bool accumulate) {
        if constexpr (M > 0) {
            if (m == M)
                block<M, N, SPLITS ? SPLIT<M> : 1>(c, stride, a, i, panel, pairs, accumulate);
            else
                rest<M - 1, N, SPLITS>(m, c, stride, a, i, panel, pairs, accumulate);
        }
    }

    template <int M, int N>
    static FF_INLINE void add(Floats (*sums)[N], const BFloat16* a, int64_t row, const Packed* panel) {
        Words b[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) b[j] = load_words(panel + j * 2 * WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const Words x = broadcast_word(a + i * row);
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) sums[i][j] = add_dot(sums[i][j], x, b[j]);
        }
    }

    template <int M>
    static constexpr int SPLIT = 4 * M <= ROWS   ? 4
                                 : 2 * M <= ROWS ? 2
                                                 : 1;

    template <int M, int N, int SPLIT>
    static __attribute__((noinline)) void block(float* c, int64_t stride, Left left, int64_t first, const Packed* panel,
                                                int64_t pairs, bool accumulate) {
        const BFloat16* a = left.data + first * left.row;
        const int64_t row = left.row, pair = left.pair;
        Floats sums[M * SPLIT][N];
#pragma GCC unroll 16
        for (int i = 0; i < M * SPLIT; i++)
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) {
                if (i < M) __builtin_prefetch(c + i * stride + j * WIDTH);
                sums[i][j] = Floats{};
            }
        int64_t l = 0;
        for (; l + SPLIT <= pairs; l += SPLIT) {
#pragma GCC unroll 4
            for (int part = 0; part < SPLIT; part++, panel += 2 * PANEL, a += pair)
                add<M, N>(sums + part * M, a, row, panel);
        }
        for (; l < pairs; l++, panel += 2 * PANEL, a += pair) add<M, N>(sums, a, row, panel);
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
