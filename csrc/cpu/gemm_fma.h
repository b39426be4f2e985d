// Products of large blocks in float32 by fused multiply-add, for gemm.h: FmaEngine with both operands packed. The
// interface is that of amx_engine.h.
#pragma once

#include "fma_engine.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct GemmFma : FmaEngine<S> {
    using Base = FmaEngine<S>;
    using Scalar = S;
    using Packed = float;
    using Base::PANEL, Base::ROWS;

    static constexpr int64_t BLOCK_DEPTH = 256;  // of a product at a time: a panel stays in the first cache,
    static constexpr int64_t BLOCK_ROWS = 96;    // so many rows in the second

    // Measured: to so many rows, products are faster as the weights lie; to so many, where the rows are packed and not
    // the weight, which takes the time of so many rows' products.
    static constexpr int64_t FEW_ROWS = WIDTH == 16 ? 40 : 64;
    static constexpr int64_t PACKED_ROWS = WIDTH == 16 ? 256 : 0;
    static constexpr int64_t PACKING_ROWS = 6;
    static constexpr bool KEEPS_WEIGHTS = false;  // whether packing for good pays: more rows hide it
    static constexpr bool LOSES_TINY = false;     // whether numbers below 2^-100 may count as 0

    static constexpr int64_t AHEAD = 16;  // rows

    // Panels of ROWS rows, each as long as BLOCK_DEPTH, then room for a vector.
    static constexpr int64_t LEFT_PANEL = ROWS * BLOCK_DEPTH + WIDTH;

    struct Left {
        const float* data;
        bool transposed;  // in a panel: whether the numbers of a column, or those of a row, are side by side
    };

    static int64_t left_size(int64_t m, int64_t) { return round_up(m, ROWS) / ROWS * LEFT_PANEL; }

    static Left left(const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
        for (int64_t i = 0; i < m; i++, source += stride) {
            Packed* to = buffer + i / ROWS * LEFT_PANEL + i % ROWS * BLOCK_DEPTH;
            int64_t j = 0;
            for (; j + WIDTH <= k; j += WIDTH) {
                __builtin_prefetch(source + AHEAD * stride + j);  // rows far apart are fetched by nothing else
                store(to + j, load(source + j));
            }
            if (j < k) store(to + j, load_some(source + j, k - j));
        }
        return {buffer, false};
    }

    // The transpose (m x k) of the source (k x m).
    static Left left_transposed(Left, const Scalar* source, int64_t stride, int64_t k, int64_t m, Packed* buffer) {
        for (int64_t j = 0; j < k; j++, source += stride) {
            Packed* to = buffer + j * ROWS;
            int64_t i = 0;
            // A store's surplus is overwritten by the next row's.
            for (; i + round_up(ROWS, WIDTH) <= m; i += ROWS, to += LEFT_PANEL)
                for (int64_t lane = 0; lane < ROWS; lane += WIDTH) store(to + lane, load(source + i + lane));
            for (; i < m; i += ROWS, to += LEFT_PANEL)
                for (int64_t lane = 0; lane < ROWS; lane += WIDTH)
                    store(to + lane, load_some(source + i + lane, m - i - lane));
        }
        return {buffer, true};
    }

    // As in FmaEngine, by stretches of rows that are long enough for the processor to fetch them ahead.
    static void pack_right(Packed* to, int64_t depth, const Scalar* source, int64_t stride, int64_t k, int64_t n) {
        constexpr int64_t STRETCH = 8 * PANEL;
        for (int64_t first = 0; first < n; first += STRETCH) {
            const int64_t end = smaller(n, first + STRETCH);
            for (int64_t i = 0; i < k; i++) {
                const Scalar* row = source + i * stride;
                Packed* at = to + first * depth + i * PANEL;
                int64_t j = first;
                for (; j + PANEL <= end; j += PANEL, at += depth * PANEL)
                    store(at, load(row + j)), store(at + WIDTH, load(row + j + WIDTH));
                if (j < end)
                    store(at, load_some(row + j, end - j)),
                        store(at + WIDTH, load_some(row + j + WIDTH, end - j - WIDTH));
            }
        }
    }

    static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                         int64_t k, bool accumulate) {
        if (a.transposed)
            product<true>(c, stride, a.data, b, depth, m, n, k, accumulate);
        else
            product<false>(c, stride, a.data, b, depth, m, n, k, accumulate);
    }

  private:
    static constexpr int64_t SHORT_SUM = 16;

    template <bool TRANSPOSED>
    static void product(float* c, int64_t stride, const float* a, const Packed* b, int64_t depth, int64_t m, int64_t n,
                        int64_t k, bool accumulate) {
        for (int64_t j = 0; j < n; j += PANEL) {
            // Torch sums a column or two by vectors, many short sums: so short are the pieces of few columns.
            const int64_t piece = n - j < PANEL / 2 ? SHORT_SUM : larger<int64_t>(k, 1);
            for (int64_t l = 0; l == 0 || l < k; l += piece) {
                const float* left = a + l * (TRANSPOSED ? ROWS : 1);
                const Packed* panel = b + j * depth + l * PANEL;
                if (n - j > WIDTH)
                    rows<2, TRANSPOSED>(c + j, stride, left, panel, m, smaller(piece, k - l), accumulate || l > 0);
                else
                    rows<1, TRANSPOSED>(c + j, stride, left, panel, m, smaller(piece, k - l), accumulate || l > 0);
            }
        }
    }

    // N: the vectors of a panel that are computed.
    template <int N, bool TRANSPOSED>
    static void rows(float* c, int64_t stride, const float* a, const Packed* panel, int64_t m, int64_t k,
                     bool accumulate) {
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS, c += ROWS * stride, a += LEFT_PANEL)
            block<ROWS, N, TRANSPOSED>(c, stride, a, panel, k, accumulate);
        rest<ROWS - 1, N, TRANSPOSED>(m - i, c, stride, a, panel, k, accumulate);
    }

    template <int M, int N, bool TRANSPOSED>
    static void rest(int64_t m, float* c, int64_t stride, const float* a, const Packed* panel, int64_t k,
                     bool accumulate) {
        if constexpr (M > 0) {
            if (m == M)
                block<M, N, TRANSPOSED>(c, stride, a, panel, k, accumulate);
            else
                rest<M - 1, N, TRANSPOSED>(m, c, stride, a, panel, k, accumulate);
        }
    }

    template <int M, int N, bool TRANSPOSED>
    static __attribute__((noinline)) void block(float* c, int64_t stride, const float* a, const Packed* panel,
                                                int64_t k, bool accumulate) {
        constexpr int64_t ROW = TRANSPOSED ? 1 : BLOCK_DEPTH, COLUMN = TRANSPOSED ? ROWS : 1;
        Floats sums[M][N];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) {
                __builtin_prefetch(c + i * stride + j * WIDTH);
                sums[i][j] = Floats{};
            }
        for (int64_t l = 0; l < k; l++, panel += PANEL, a += COLUMN) {
            Floats b[N];
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) b[j] = load(panel + j * WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) {
                const float x = a[i * ROW];
#pragma GCC unroll 2
                for (int j = 0; j < N; j++) sums[i][j] += b[j] * x;
            }
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
