// Products of large matrices, C_r = the sum of left right over the products whose result is r, in float32; what becomes
// of C is an Epilogue's, which sees it a few finished rows at a time, while they are in cache.
//
// A task is a tile of C. Its depth is walked in blocks: the tile's columns of `right` are packed once for each, then,
// a few rows at a time, `left`, and multiplied (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008). An element's sum runs in the same order in every tile: threads change no bits. Few rows are
// multiplied as the weights lie, see gemm_rows.h. Some more are packed in the weight's place: the product is the
// transposed one, whose left operand the weight is as it lies.
#pragma once

#include "arena.h"
#include "gemm_rows.h"

namespace fusedformer::FF_LEVEL {

// E: GemmFma, GemmDot or GemmAmx.
template <class E>
class Gemm {
    using Scalar = typename E::Scalar;
    using Packed = typename E::Packed;
    static constexpr int64_t LARGEST = 512, SMALLEST = 64;  // rows and columns of a tile

  public:
    // All C are m x n, all products of depth k. Returns whether E computes what was given; else C is of no use.
    static bool run(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue& epilogue,
                    const Runtime& runtime) {
        if (m == 0 || n == 0) return true;
        if (has_few_rows(products, count, m, k)) {
            FewRows<Scalar>::run(products, count, m, n, k, epilogue, runtime);
            return true;
        }
        if (packs_rows(products, count, m)) {
            const Swapped swapped(products, count);
            return multiply_all(swapped.products, count, n, m, k, TransposedRows(count, epilogue), runtime);
        }
        return multiply_all(products, count, m, n, k, epilogue, runtime);
    }

    // Bytes of scratch of all threads that `run` takes.
    static int64_t memory(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Runtime& runtime) {
        if (has_few_rows(products, count, m, k)) return FewRows<Scalar>::memory(m, n, k, runtime);
        if (packs_rows(products, count, m)) {
            const Swapped swapped(products, count);
            return memory_of(swapped.products, count, n, m, k, runtime);
        }
        return memory_of(products, count, m, n, k, runtime);
    }

    // A right operand, the transpose of `weight` (n x k), can be packed once for all products that come.
    static int64_t packed_bytes(int64_t n, int64_t k) {
        return E::right_size(k, n) * static_cast<int64_t>(sizeof(Packed));
    }

    // Returns whether E computes what is in `weight`; else what was packed is of no use.
    static bool pack(void* to, const Matrix& weight, int64_t n, int64_t k, const Runtime& runtime) {
        const Product product = {{}, {weight, true, false, to}};
        Gemm gemm(&product, 1, LARGEST, n, k, nullptr, runtime);
        auto body = [](int64_t task, void* self) { static_cast<Gemm*>(self)->pack_columns(task * SMALLEST); };
        runtime.parallel((n + SMALLEST - 1) / SMALLEST, body, &gemm);
        return gemm.exact_;
    }

  private:
    static bool has_few_rows(const Product* products, int count, int64_t m, int64_t k) {
        return m <= E::FEW_ROWS && FewRows<Scalar>::takes(products, count, m, k);
    }

    // ---- the transposed product

    // Whether it saves more, by not packing the weight, than it costs: whole vectors of rows are computed.
    static bool packs_rows(const Product* products, int count, int64_t m) {
        for (int p = 0; p < count; p++) {
            const Operand &left = products[p].left, &right = products[p].right;
            if (left.transposed || !right.transposed || right.packed || products[p].result != p) return false;
        }
        return m <= E::PACKED_ROWS && round_up(m, E::COLUMNS) < round_up(m, E::ROW_MULTIPLE) + E::PACKING_ROWS;
    }

    struct Swapped {
        Product products[MOST_PRODUCTS];

        Swapped(const Product* of, int count) {
            for (int p = 0; p < count; p++) {
                products[p] = of[p];
                products[p].left = of[p].right, products[p].right = of[p].left;
                products[p].left.transposed = false, products[p].right.transposed = true;
            }
        }
    };

    // Gives an epilogue the rows of C that come as columns of its transpose.
    struct TransposedRows : Epilogue {
        static constexpr int64_t STRIDE = E::BLOCK_ROWS + 16;  // no power of two
        const int results;
        const Epilogue& epilogue;

        TransposedRows(int results, const Epilogue& epilogue) : results(results), epilogue(epilogue) {}

        void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
            alignas(64) float rows[MOST_PRODUCTS][WIDTH * STRIDE];
            float* to[MOST_PRODUCTS] = {rows[0], rows[1]};
            for (int64_t column = 0; column < n; column += WIDTH) {
                for (int r = 0; r < results; r++)
                    for (int64_t row = 0; row < m; row += WIDTH) {
                        Floats square[WIDTH];
                        for (int64_t lane = 0; lane < WIDTH; lane++)
                            square[lane] = load(c[r] + smaller(row + lane, m - 1) * stride + column);
                        transpose(square);
                        for (int64_t lane = 0; lane < WIDTH; lane++) store(to[r] + lane * STRIDE + row, square[lane]);
                    }
                epilogue.finish(to, STRIDE, j + column, smaller<int64_t>(WIDTH, n - column), i, m);
            }
        }
    };

    // ---- any product

    static bool multiply_all(const Product* products, int count, int64_t m, int64_t n, int64_t k,
                             const Epilogue& epilogue, const Runtime& runtime) {
        Gemm gemm(products, count, m, n, k, &epilogue, runtime);
        auto body = [](int64_t task, void* self) { static_cast<Gemm*>(self)->compute(task); };
        runtime.parallel(gemm.tiles_down_ * gemm.tiles_across_, body, &gemm);
        return gemm.exact_;
    }

    static int64_t memory_of(const Product* products, int count, int64_t m, int64_t n, int64_t k,
                             const Runtime& runtime) {
        const Gemm gemm(products, count, m, n, k, nullptr, runtime);
        Arena measure;
        gemm.lay_out(measure);
        const int64_t tiles = gemm.tiles_down_ * gemm.tiles_across_;
        return smaller<int64_t>(runtime.threads, tiles) * static_cast<int64_t>(measure.used());
    }

    const Product* products_;
    int count_, results_ = 1;
    int64_t m_, n_, k_;
    const Epilogue* epilogue_;
    const Runtime& runtime_;
    int64_t rows_, columns_, tiles_down_, tiles_across_, stride_;
    bool exact_ = true;  // written by any thread, false only

    Gemm(const Product* products, int count, int64_t m, int64_t n, int64_t k, const Epilogue* epilogue,
         const Runtime& runtime)
        : products_(products), count_(count), m_(m), n_(n), k_(k), epilogue_(epilogue), runtime_(runtime) {
        for (int i = 0; i < count; i++) results_ = larger(results_, products[i].result + 1);
        rows_ = smaller(LARGEST, round_up(m, SMALLEST));
        columns_ = smaller(LARGEST / results_, round_up(n, SMALLEST));
        // Every thread shall have something to do, but larger tiles pack less.
        const int64_t wanted = runtime.threads == 1 ? 1 : 2 * runtime.threads;
        while (tiles() < wanted && larger(rows_, columns_) > SMALLEST) {
            int64_t& longer = rows_ > columns_ ? rows_ : columns_;
            longer = round_up(longer / 2, SMALLEST);
        }
        tiles();
        stride_ = columns_ + 16;  // no power of two: its rows would share the first cache's sets
    }

    int64_t tiles() {
        tiles_down_ = (m_ + rows_ - 1) / rows_, tiles_across_ = (n_ + columns_ - 1) / columns_;
        return tiles_down_ * tiles_across_;
    }

    struct Scratch {
        Packed *left, *right[MOST_PRODUCTS];  // null where packed before
        float* sums[MOST_PRODUCTS];
    };

    bool one_block() const { return k_ <= E::BLOCK_DEPTH; }

    Scratch lay_out(Arena& arena) const {
        Scratch s;
        s.left = arena.take<Packed>(E::left_size(E::BLOCK_ROWS, E::BLOCK_DEPTH));
        const int64_t depth = smaller<int64_t>(k_, E::BLOCK_DEPTH);
        const int64_t rows = one_block() ? E::BLOCK_ROWS : round_up(rows_, E::ROW_MULTIPLE);
        for (int i = 0; i < count_; i++)
            if (!products_[i].right.packed) s.right[i] = arena.take<Packed>(E::right_size(depth, columns_));
        for (int i = 0; i < results_; i++) s.sums[i] = arena.take<float>(rows * stride_);
        return s;
    }

    void compute(int64_t task) {
        Arena measure;
        lay_out(measure);
        Arena arena(runtime_.scratch(measure.used()));
        const Scratch s = lay_out(arena);
        [[maybe_unused]] const typename E::Session session;
        // Neighbours share columns of `right`, which is the weight.
        const int64_t i = task % tiles_down_ * rows_, j = task / tiles_down_ * columns_;
        const int64_t m = smaller(rows_, m_ - i), n = smaller(columns_, n_ - j);
        int64_t l = 0;
        do {
            const int64_t k = smaller<int64_t>(E::BLOCK_DEPTH, k_ - l);
            const Packed* right[MOST_PRODUCTS];
            for (int p = 0; p < count_; p++) right[p] = packed_right(s.right[p], products_[p].right, i, l, k, j, n);
            for (int64_t row = 0; row < m; row += E::BLOCK_ROWS) {
                const int64_t rows = smaller<int64_t>(E::BLOCK_ROWS, m - row);
                float* sums[MOST_PRODUCTS];
                for (int r = 0; r < results_; r++) sums[r] = s.sums[r] + (one_block() ? 0 : row * stride_);
                multiply(s.left, right, sums, i + row, rows, j, n, l, k);
                if (l + k == k_) epilogue_->finish(sums, stride_, i + row, rows, j, n);
            }
            l += k;
        } while (l < k_);
    }

    void multiply(Packed* buffer, const Packed* const* right, float* const* sums, int64_t i, int64_t m, int64_t j,
                  int64_t n, int64_t l, int64_t k) {
        const void* packed = nullptr;
        typename E::Left left;
        bool begun[MOST_PRODUCTS] = {};
        for (int p = 0; p < count_; p++) {
            const Product& product = products_[p];
            if (p == 0 || product.left.matrix.data != packed) left = pack_left(buffer, product.left, i, m, j, l, k);
            packed = product.left.matrix.data;
            E::multiply(sums[product.result], stride_, left, right[p], round_up(k, E::DEPTH), m, n, k,
                        l > 0 || begun[product.result]);
            begun[product.result] = true;
        }
    }

    typename E::Left pack_left(Packed* to, const Operand& left, int64_t i, int64_t m, int64_t j, int64_t l, int64_t k) {
        const Matrix& x = left.matrix;
        if (left.transposed) {
            if (j == 0) check(left, l, k, i, m);
            return E::left_transposed({}, at<Scalar>(x, l, i), x.row, k, m, to);
        }
        if (j == 0) check(left, i, m, l, k);
        return E::left(at<Scalar>(x, i, l), x.row, m, k, to);
    }

    // Where a block's columns from j on stand: packed for good, the blocks of the depth follow each other.
    Packed* packed_at(const Operand& right, int64_t l, int64_t k, int64_t j) const {
        return static_cast<Packed*>(right.packed) + E::right_size(l, n_) + E::right_size(k, j);
    }

    const Packed* packed_right(Packed* buffer, const Operand& right, int64_t i, int64_t l, int64_t k, int64_t j,
                               int64_t n) {
        if (right.packed) return packed_at(right, l, k, j);
        pack_right(buffer, right, i, l, k, j, n);
        return buffer;
    }

    void pack_columns(int64_t j) {
        const Operand& right = products_[0].right;
        for (int64_t l = 0; l < k_; l += E::BLOCK_DEPTH) {
            const int64_t k = smaller<int64_t>(E::BLOCK_DEPTH, k_ - l);
            pack_right(packed_at(right, l, k, j), right, 0, l, k, j, smaller(SMALLEST, n_ - j));
        }
    }

    void pack_right(Packed* to, const Operand& right, int64_t i, int64_t l, int64_t k, int64_t j, int64_t n) {
        const Matrix& x = right.matrix;
        if (right.transposed) {
            if (i == 0) check(right, j, n, l, k);
            E::pack_right_transposed(to, at<Scalar>(x, j, l), x.row, n, k);
        } else {
            if (i == 0) check(right, l, k, j, n);
            E::pack_right(to, round_up(k, E::DEPTH), at<Scalar>(x, l, j), x.row, k, n);
        }
    }

    // Each number is looked at once, when it is on its way through the cache anyway.
    void check(const Operand& x, int64_t i, int64_t rows, int64_t j, int64_t columns) {
        if constexpr (E::LOSES_TINY) {
            if (x.computed) return;
            for (int64_t r = 0; r < rows; r++)
                if (E::has_tiny(at<Scalar>(x.matrix, i + r, j), columns))
                    return __atomic_store_n(&exact_, false, __ATOMIC_RELAXED);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
