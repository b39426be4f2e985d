// Products of a few rows with the transpose of a matrix, as a weight lies: packing it would cost more than it gains. Of
// the fewest rows its reading bounds them.
#pragma once

#include "arena.h"
#include "gemm_problem.h"
#include "simd/chunk.h"
#ifdef FF_AVX512_BF16
#include "simd/pairs.h"
#endif

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
    void* packed = nullptr;   // a transposed right operand as Gemm::pack left it; null where it did not
};

struct Product {
    Operand left, right;
    int result = 0;              // which of the C it is added to
    const void* then = nullptr;  // what will be read after `right`, if that is known
};

struct Epilogue {
    // Rows [i, i + m) and columns [j, j + n) of each C, whose row i begins at c[r]; j is a multiple of 8. They may be
    // overwritten, up to whole vectors.
    virtual void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const = 0;
};

// Chunks of a type S as they are multiplied: rows as numbers of type Number, the weight as it is loaded.
template <class S>
struct ChunkProducts {
    using Number = float;
    // How many rows of the weight are multiplied at a time, by how many rows they are multiplied with.
    static constexpr int TOGETHER[] = {0, 1, 4, 3, 2};

    static FF_INLINE Chunk load(const S* from) { return load_chunk(from); }

    // Zeros from `count` on.
    static FF_INLINE Chunk load_some(const S* from, int64_t count) {
        if (count >= CHUNK) return load_chunk(from);
        S copy[CHUNK] = {};
        __builtin_memcpy(copy, from, count * sizeof(S));
        return load_chunk(copy);
    }

    static FF_INLINE void put(float* to, Chunk chunk) { store(to, chunk.low), store(to + WIDTH, chunk.high); }

    template <int M, int N, class Weights>
    static FF_INLINE void add(Floats* sums, const float* x, int64_t x_row, const Weights& weights) {
        if constexpr (M == 1) {  // each row of the weight is loaded once, whatever its halves are made of
            const Floats low = in_register(FF_LEVEL::load(x)), high = in_register(FF_LEVEL::load(x + WIDTH));
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const Chunk w = weights(j);
                sums[j] += w.low * low;
                sums[j] += w.high * high;
            }
        } else {
            add_half<M, N, 0>(sums, x, x_row, weights);
            add_half<M, N, 1>(sums, x, x_row, weights);
        }
    }

  private:
    // Half a chunk of all rows. What is used more than once is loaded once: loads are what bounds these sums.
    template <int M, int N, int HALF, class Weights>
    static FF_INLINE void add_half(Floats* sums, const float* x, int64_t x_row, const Weights& weights) {
        Floats w[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) w[j] = in_register(HALF ? weights(j).high : weights(j).low);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const Floats of_row = in_register(FF_LEVEL::load(x + i * x_row + HALF * WIDTH));
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) sums[i * N + j] += w[j] * of_row;
        }
    }
};

#ifdef FF_AVX512_BF16

template <>
struct ChunkProducts<BFloat16> {
    using Number = BFloat16;
    static constexpr int TOGETHER[] = {0, 1, 4, 4, 4};

    static FF_INLINE Words load(const BFloat16* from) { return load_words(from); }
    static FF_INLINE Words load_some(const BFloat16* from, int64_t count) { return load_some_words(from, count); }
    static FF_INLINE void put(BFloat16* to, Words chunk) { store_words(to, chunk); }

    template <int M, int N, class Weights>
    static FF_INLINE void add(Floats* sums, const BFloat16* x, int64_t x_row, const Weights& weights) {
        Words w[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) w[j] = weights(j);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const Words of_row = load_words(x + i * x_row);
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) sums[i * N + j] = add_dot(sums[i * N + j], w[j], of_row);
        }
    }
};

#endif

template <class S>
class FewRows {
    using Chunks = ChunkProducts<S>;
    using Number = typename Chunks::Number;

  public:
    static constexpr int64_t MOST = 64;

    static bool takes(const Product* products, int count, int64_t m, int64_t k) {
        constexpr int64_t SMALL = 8, LARGEST = 1 << 17;  // rows that are never too long, numbers that stay in cache
        bool all = m <= SMALL || (m <= MOST && m * k <= LARGEST);
        for (int p = 0; p < count; p++)
            all = all && !products[p].left.transposed && products[p].right.transposed && products[p].result == p &&
                  products[p].left.matrix.data == products[0].left.matrix.data;
        return all;
    }

    static void run(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue& epilogue,
                    const Runtime& runtime) {
        const FewRows rows{products, count, m, n, k, epilogue, runtime};
        auto body = [](int64_t task, void* self) { static_cast<const FewRows*>(self)->compute(task); };
        runtime.parallel(tasks(n, runtime), body, const_cast<FewRows*>(&rows));
    }

    static int64_t memory(int64_t m, int64_t n, int64_t k, const Runtime& runtime) {
        Arena measure;
        lay_out(measure, m, k);
        return smaller<int64_t>(runtime.threads, tasks(n, runtime)) * static_cast<int64_t>(measure.used());
    }

  private:
    static constexpr int64_t COLUMNS = 48;         // of C at a time, whole vectors
    static constexpr int64_t BLOCK_DEPTH = 1024;   // of the rows of `dots`: so much of them stays in the first cache
    static constexpr int64_t TASKS_OF_THREAD = 4;  // of several: each task widens the rows
    static constexpr int64_t AHEAD = 16 * 1024;    // bytes, between what is multiplied and what is fetched

    const Product* products_;
    int count_;
    int64_t m_, n_, k_;
    const Epilogue& epilogue_;
    const Runtime& runtime_;

    FewRows(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue& epilogue,
            const Runtime& runtime)
        : products_(products), count_(count), m_(m), n_(n), k_(k), epilogue_(epilogue), runtime_(runtime) {}

    static int64_t columns_of_task(int64_t n, const Runtime& runtime) {
        return runtime.threads == 1 ? n + 1 : round_up(n / (TASKS_OF_THREAD * runtime.threads) + 1, COLUMNS);
    }

    static int64_t tasks(int64_t n, const Runtime& runtime) {
        const int64_t columns = columns_of_task(n, runtime);
        return (n + columns - 1) / columns;
    }

    // The rows, in the order of chunks.
    static Number* lay_out(Arena& arena, int64_t m, int64_t k) { return arena.take<Number>(m * row_size(k)); }

    // No power of two: rows would share the first cache's sets.
    static int64_t row_size(int64_t k) { return round_up(k, CHUNK) + 64 / static_cast<int64_t>(sizeof(Number)); }

    void compute(int64_t task) const {
        Arena measure;
        lay_out(measure, m_, k_);
        Arena arena(runtime_.scratch(measure.used()));
        Number* const x = lay_out(arena, m_, k_);
        for (int64_t i = 0; i < m_; i++) {
            const S* row = at<S>(products_[0].left.matrix, i);
            for (int64_t l = 0; l < k_; l += CHUNK)
                Chunks::put(x + i * row_size(k_) + l, Chunks::load_some(row + l, k_ - l));
        }
        float c[MOST_PRODUCTS][MOST * COLUMNS];
        float* results[MOST_PRODUCTS] = {c[0], c[1]};
        const int64_t columns = columns_of_task(n_, runtime_), end = smaller(n_, (task + 1) * columns);
        for (int64_t j = task * columns; j < end; j += COLUMNS) {
            const int64_t n = smaller(COLUMNS, end - j);
            for (int p = 0; p < count_; p++) multiply(x, products_[p], j, n, c[p]);
            epilogue_.finish(results, COLUMNS, 0, m_, j, n);
        }
    }

    void multiply(const Number* x, const Product& product, int64_t j, int64_t n, float* c) const {
        const Matrix& weight = product.right.matrix;
        // The fewest rows wait for memory, which is read fastest in long stretches.
        const int64_t depth = m_ < 4 ? k_ : BLOCK_DEPTH;
        for (int64_t l = 0; l < k_; l += depth) {
            const int64_t k = smaller(depth, k_ - l);
            const S* const first = at<S>(weight, j, l);
            const S* const then = product.then ? static_cast<const S*>(product.then) : first;
            const Block block = {first, weight.row, n, k, row_size(k_), l > 0, ahead(k), n_ - j, then};
            int64_t groups = (m_ + 3) / 4;
            for (int64_t i = 0, m; i < m_; i += m, groups--) {
                m = (m_ - i + groups - 1) / groups;
                const Number* rows = x + i * row_size(k_) + l;
                float* to = c + i * COLUMNS;
                if (m == 4) columns<4>(block, rows, to);
                if (m == 3) columns<3>(block, rows, to);
                if (m == 2) columns<2>(block, rows, to);
                if (m == 1) columns<1>(block, rows, to);
            }
        }
    }

    struct Block {
        const S* weight;
        int64_t row, n, k;
        int64_t x_row;
        bool accumulate;
        int64_t ahead, rows;  // which row is fetched; the weight's from here on
        const S* then;        // what is fetched where they end
    };

    // Rows of k numbers: none waits for its beginning, nor for a page's.
    static int64_t ahead(int64_t k) { return larger<int64_t>(8, 1 + AHEAD / (k * static_cast<int64_t>(sizeof(S)))); }

    template <int M>
    static void columns(const Block& b, const Number* x, float* c) {
        constexpr int N = Chunks::TOGETHER[M], GROUP = larger(N, WIDTH / M / N * N);
        int64_t j = 0;
        for (; j + GROUP <= b.n; j += GROUP) dots<M, N, GROUP>(b, j, x, c + j);
        for (; j < b.n; j++) dots<M, 1, 1>(b, j, x, c + j);
    }

    // M rows times GROUP rows of the weight, N of them at a time. One by one they are read as memory is read fastest,
    // in one stretch, by as many chains of sums as hide what they wait for; several at a time are fetched. Nothing is
    // between one loop and the next, so little stands there.
    template <int M, int N, int GROUP>
    static __attribute__((noinline)) void dots(const Block& b, int64_t j, const Number* x, float* c) {
        constexpr int CHAINS = M == 1 ? 8 : 1, LINE = 64 / sizeof(S), COUNT = round_up(GROUP * M, WIDTH);
        constexpr int64_t STEP = larger<int64_t>(LINE, CHAINS * CHUNK);
        const S* weight = b.weight + j * b.row;
        const int64_t row = b.row, x_row = b.x_row, k = b.k, beyond = j + b.ahead - b.rows;
        const S* const next = beyond < 0 ? weight + b.ahead * row : b.then + beyond * row;
        Floats all[COUNT];
#pragma GCC unroll 16
        for (int i = GROUP * M; i < COUNT; i++) all[i] = Floats{};
        for (int g = 0; g < GROUP; g += N, weight += N * row) {
            Floats sums[CHAINS * M * N] = {};
            int64_t l = 0;
            for (; l + STEP <= k; l += STEP) {
                if constexpr (M > 1)
#pragma GCC unroll 8
                    for (int i = 0; i < N; i++)
#pragma GCC unroll 8
                        for (int64_t at = l; at < l + STEP; at += LINE)
                            __builtin_prefetch(next + (g + i) * row + at, 0, 2);
#pragma GCC unroll 8
                for (int64_t at = 0; at < STEP; at += CHUNK)
                    Chunks::template add<M, N>(sums + at / CHUNK % CHAINS * M * N, x + l + at, x_row,
                                               [&](int i) { return Chunks::load(weight + i * row + l + at); });
            }
            for (; l < k; l += CHUNK)
                Chunks::template add<M, N>(sums, x + l, x_row,
                                           [&](int i) { return Chunks::load_some(weight + i * row + l, k - l); });
#pragma GCC unroll 16
            for (int i = 0; i < M * N; i++) {
                Floats sum = sums[i];
#pragma GCC unroll 8
                for (int chain = 1; chain < CHAINS; chain++) sum += sums[chain * M * N + i];
                all[g * M + i % N * M + i / N] = sum;
            }
        }
        float lanes[COUNT];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i += WIDTH) store(lanes + i, sums_of_lanes<WIDTH>(all + i));
#pragma GCC unroll 16
        for (int i = 0; i < GROUP * M; i++) {
            float& to = c[i % M * COLUMNS + i / M];
            to = b.accumulate ? to + lanes[i] : lanes[i];
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
