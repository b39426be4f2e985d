// Products of a few rows with the transpose of a matrix, as a weight lies: its reading bounds them, so it is read once
// and never packed.
#pragma once

#include "arena.h"
#include "gemm_problem.h"
#include "simd/chunk.h"

namespace fusedformer::FF_LEVEL {

constexpr int MOST_PRODUCTS = 2;

template <class S>
FF_INLINE S* at(const Matrix& x, int64_t i, int64_t j = 0) {
    return static_cast<S*>(x.data) + i * x.row + j;
}

struct Operand {
    Matrix matrix;
    bool transposed = false;  // whether the operand is the matrix's transpose
    bool computed = false;    // on the way, not given by the caller
};

struct Product {
    Operand left, right;
    int result = 0;  // which of the C it is added to
};

struct Epilogue {
    // Rows [i, i + m) and columns [j, j + n) of each C, whose row i begins at c[r]; j is a multiple of 8. They may be
    // overwritten, up to whole vectors.
    virtual void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const = 0;
};

template <class S>
class FewRows {
  public:
    static constexpr int64_t MOST = 8;

    static bool takes(const Product* products, int count, int64_t m) {
        bool all = m <= MOST;
        for (int p = 0; p < count; p++)
            all = all && !products[p].left.transposed && products[p].right.transposed && products[p].result == p &&
                  products[p].left.matrix.data == products[0].left.matrix.data;
        return all;
    }

    static void run(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue& epilogue,
                    const Runtime& runtime) {
        const FewRows rows{products, count, m, n, k, epilogue, runtime};
        auto body = [](int64_t task, void* self) { static_cast<const FewRows*>(self)->compute(task); };
        runtime.parallel(tasks(n), body, const_cast<FewRows*>(&rows));
    }

    static int64_t memory(int64_t m, int64_t n, int64_t k, const Runtime& runtime) {
        Arena measure;
        lay_out(measure, m, k);
        return smaller<int64_t>(runtime.threads, tasks(n)) * static_cast<int64_t>(measure.used());
    }

  private:
    static constexpr int64_t COLUMNS = 64;  // of a task

    const Product* products_;
    int count_;
    int64_t m_, n_, k_;
    const Epilogue& epilogue_;
    const Runtime& runtime_;

    FewRows(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue& epilogue,
            const Runtime& runtime)
        : products_(products), count_(count), m_(m), n_(n), k_(k), epilogue_(epilogue), runtime_(runtime) {}

    static int64_t tasks(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

    // The rows in float32, in the order of chunks.
    static float* lay_out(Arena& arena, int64_t m, int64_t k) { return arena.take<float>(m * round_up(k, CHUNK)); }

    void compute(int64_t task) const {
        const int64_t width = round_up(k_, CHUNK);
        Arena measure;
        lay_out(measure, m_, k_);
        Arena arena(runtime_.scratch(measure.used()));
        float* x = lay_out(arena, m_, k_);
        for (int64_t i = 0; i < m_; i++) {
            const S* row = at<S>(products_[0].left.matrix, i);
            for (int64_t l = 0; l < k_; l += CHUNK) {
                const Chunk chunk = some_chunk(row + l, k_ - l);
                store(x + i * width + l, chunk.low), store(x + i * width + l + WIDTH, chunk.high);
            }
        }
        float c[MOST_PRODUCTS][MOST * COLUMNS];
        float* results[MOST_PRODUCTS];
        const int64_t j = task * COLUMNS, n = smaller(COLUMNS, n_ - j);
        for (int p = 0; p < count_; p++) {
            const Matrix& weight = products_[p].right.matrix;
            multiply(x, width, at<S>(weight, j), weight.row, n, c[p]);
            results[p] = c[p];
        }
        epilogue_.finish(results, COLUMNS, 0, m_, j, n);
    }

    void multiply(const float* x, int64_t width, const S* weight, int64_t row, int64_t n, float* c) const {
        int64_t j = 0;
        auto columns = [&]<int N>() {
            int64_t i = 0;
            for (; i + 4 <= m_; i += 4) dots<4, N>(x + i * width, width, weight + j * row, row, c + i * COLUMNS + j);
            if (i + 2 <= m_) dots<2, N>(x + i * width, width, weight + j * row, row, c + i * COLUMNS + j), i += 2;
            if (i < m_) dots<1, N>(x + i * width, width, weight + j * row, row, c + i * COLUMNS + j);
        };
        if (m_ < 4)
            for (; j + 4 <= n; j += 4) columns.template operator()<4>();
        for (; j + 2 <= n; j += 2) columns.template operator()<2>();
        if (j < n) columns.template operator()<1>();
    }

    // M rows times N rows of the weight; each sum is a vector of partial sums, of few products two.
    template <int M, int N>
    __attribute__((noinline)) void dots(const float* x, int64_t width, const S* weight, int64_t row, float* c) const {
        constexpr int HALVES = M * N <= 4 ? 2 : 1;
        constexpr int64_t LINE = 64 / sizeof(S), STEP = larger(LINE, CHUNK);
        Floats sums[M][N][HALVES] = {};
        int64_t l = 0;
        for (; l + STEP <= k_; l += STEP)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
#pragma GCC unroll 4
                for (int64_t at = l; at < l + STEP;
                     at += LINE)  // the rows that follow: no row's beginning is waited for
                    __builtin_prefetch(weight + (j + N) * row + at, 0, 2);
#pragma GCC unroll 4
                for (int64_t at = l; at < l + STEP; at += CHUNK) {
                    const Chunk weights = load_chunk(weight + j * row + at);
#pragma GCC unroll 4
                    for (int i = 0; i < M; i++) add<HALVES>(sums[i][j], weights, x + i * width + at);
                }
            }
        for (; l < k_; l += CHUNK)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                const Chunk weights = some_chunk(weight + j * row + l, k_ - l);
#pragma GCC unroll 4
                for (int i = 0; i < M; i++) add<HALVES>(sums[i][j], weights, x + i * width + l);
            }
#pragma GCC unroll 4
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++)
                c[i * COLUMNS + j] = sum(HALVES == 2 ? sums[i][j][0] + sums[i][j][HALVES - 1] : sums[i][j][0]);
    }

    template <int HALVES>
    static FF_INLINE void add(Floats (&sums)[HALVES], const Chunk& weights, const float* x) {
        sums[0] += weights.low * load(x);
        sums[HALVES - 1] += weights.high * load(x + WIDTH);
    }

    // Zeros from `count` on.
    static FF_INLINE Chunk some_chunk(const S* from, int64_t count) {
        if (count >= CHUNK) return load_chunk(from);
        S copy[CHUNK] = {};
        __builtin_memcpy(copy, from, count * sizeof(S));
        return load_chunk(copy);
    }
};

}  // namespace fusedformer::FF_LEVEL
