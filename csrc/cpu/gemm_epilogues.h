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
    static constexpr int64_t COLUMNS = 8 * WIDTH;
    static constexpr int64_t LONGEST_SUM = 64;

    Matrix x_;
    int64_t rows_, columns_;
    float* sums_;
    S* out_;
    bool first_, last_;

    ColumnSums(Matrix x, int64_t rows, int64_t columns, float* sums, S* out, bool first, bool last)
        : x_(x), rows_(rows), columns_(columns), sums_(sums), out_(out), first_(first), last_(last) {}

    void compute(int64_t j) const {
        Floats totals[8];
        for (int v = 0; v < 8; v++)
            totals[v] = first_ ? Floats{} : load_some(sums_ + j + v * WIDTH, columns_ - j - v * WIDTH);
        for (int64_t i = 0; i < rows_; i += LONGEST_SUM) {
            Floats piece[8] = {};
            for (int64_t r = i; r < smaller(i + LONGEST_SUM, rows_); r++)
                for (int v = 0; v < 8; v++)
                    piece[v] += load_some(at<S>(x_, r, j + v * WIDTH), columns_ - j - v * WIDTH);
            for (int v = 0; v < 8; v++) totals[v] += piece[v];
        }
        for (int v = 0; v < 8; v++) {
            const int64_t at = j + v * WIDTH;
            if (last_)
                store_some(out_ + at, totals[v], columns_ - at);
            else
                store_some(sums_ + at, totals[v], columns_ - at);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
