// What both linear and feed-forward do with finished rows of a product, and the sums of columns.
#pragma once

#include "gemm.h"
#include "simd/philox.h"

namespace fusedformer::FF_LEVEL {

// A vector of a row of parameters, zeros where there are none.
template <class S>
FF_INLINE Floats parameters(const void* of, int64_t j, int64_t count) {
    return of ? load_some(static_cast<const S*>(of) + j, count) : Floats{};
}

struct Dropout {
    const uint32_t* seed;
    uint32_t threshold;  // 16-bit lanes below it are dropped
    float scale;
    uint32_t stream;

    explicit operator bool() const { return threshold > 0; }

    // Of `count` elements of a row, at most 512; `of` then scales or drops vectors of them.
    struct Lanes {
        uint16_t bits[512];
    };
    void draw(Lanes& lanes, int64_t token, int64_t j, int64_t count) const {
        philox_lanes(lanes.bits, seed, j, count, static_cast<uint32_t>(token), 0, stream);
    }
    FF_INLINE Floats of(const Lanes& lanes, int64_t column, Floats x) const {
        return keep(kept(lanes.bits + column, threshold), x * scale);
    }
};

// out = C + bias
template <class S>
struct Store : Epilogue {
    Matrix out;
    const void* bias;

    explicit Store(Matrix out, const void* bias = nullptr) : out(out), bias(bias) {}

    void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
        for (int64_t r = 0; r < m; r++)
            for (int64_t column = 0; column < n; column += WIDTH)
                store_some(at<S>(out, i + r, j + column),
                           load(c[0] + r * stride + column) + parameters<S>(bias, j + column, n - column), n - column);
    }
};

// Adds blocks' C up in float32: in `sums`, until the last block's.
template <class S>
struct AddUp : Epilogue {
    Matrix out, sums;
    bool first, last;

    AddUp(Matrix out, Matrix sums, bool first, bool last) : out(out), sums(sums), first(first), last(last) {}

    void finish(float* const* c, int64_t stride, int64_t i, int64_t m, int64_t j, int64_t n) const override {
        for (int64_t r = 0; r < m; r++)
            for (int64_t column = 0; column < n; column += WIDTH) {
                Floats x = load(c[0] + r * stride + column);
                float* sum = sums.data ? at<float>(sums, i + r, j + column) : nullptr;
                if (!first) x += load_some(sum, n - column);
                if (last)
                    store_some(at<S>(out, i + r, j + column), x, n - column);
                else
                    store_some(sum, x, n - column);
            }
    }
};

// The sums of the columns of rows that come by blocks; in one order, whatever the threads.
template <class S>
class ColumnSums {
  public:
    // `sums`, (columns), between the blocks; the last ends in `out`.
    static void add(Matrix x, int64_t rows, int64_t columns, float* sums, void* out, bool first, bool last,
                    const Runtime& runtime) {
        const ColumnSums task{x, rows, columns, sums, static_cast<S*>(out), first, last};
        auto body = [](int64_t index, void* self) { static_cast<const ColumnSums*>(self)->compute(index * COLUMNS); };
        runtime.parallel((columns + COLUMNS - 1) / COLUMNS, body, const_cast<ColumnSums*>(&task));
    }

  private:
    static constexpr int VECTORS = 8;
    static constexpr int64_t COLUMNS = VECTORS * WIDTH, AHEAD = 16;  // rows
    // The sum of many rows is rounded once in float64, and an infinity stays one, as it would not in a sum that carries
    // its own error along. By four rows: conversions are slow.
    typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));

    Matrix x_;
    int64_t rows_, columns_;
    float* sums_;
    S* out_;
    bool first_, last_;

    ColumnSums(Matrix x, int64_t rows, int64_t columns, float* sums, S* out, bool first, bool last)
        : x_(x), rows_(rows), columns_(columns), sums_(sums), out_(out), first_(first), last_(last) {}

    void compute(int64_t j) const {
        Doubles totals[VECTORS] = {};
        for (int64_t i = 0; i < rows_; i += 4) {
            for (int64_t row = i; row < i + 4; row++)
                for (int64_t column = j; column < j + COLUMNS; column += 64 / sizeof(S))
                    __builtin_prefetch(at<S>(x_, row + AHEAD, column));  // rows far apart are fetched by nothing else
            for (int v = 0; v < VECTORS; v++) {
                const int64_t column = j + v * WIDTH;
                auto x = [&](int64_t row) {
                    return row < rows_ ? load_some(at<S>(x_, row, column), columns_ - column) : Floats{};
                };
                totals[v] += __builtin_convertvector((x(i) + x(i + 1)) + (x(i + 2) + x(i + 3)), Doubles);
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            const int64_t column = j + v * WIDTH, n = columns_ - column;
            Floats total = __builtin_convertvector(totals[v], Floats);
            if (!first_) total += load_some(sums_ + column, n);
            if (last_)
                store_some(out_ + column, total, n);
            else
                store_some(sums_ + column, total, n);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
