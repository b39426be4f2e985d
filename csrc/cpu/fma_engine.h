// Products of small blocks in float32 by fused multiply-add; 16-bit operands are widened when they are packed.
//
// An engine multiplies C (m x n, float32) = or += A (m x k) B (k x n) for one Scalar. A is a `Left`. B is packed in panels
// of PANEL columns, each panel `depth` rows of PANEL consecutive floats.
#pragma once

#include "simd/vector.h"

namespace fusedformer::FF_LEVEL {

template <class S> struct FmaEngine {
  using Scalar = S;
  using Packed = float;  // an element of a packed operand

  static constexpr int PANEL = 2 * WIDTH;
  static constexpr int ROWS = WIDTH == 16 ? 12 : 6;  // times two vectors: accumulators that fill the registers
  static constexpr int BLOCK_Q = 48;
  static constexpr int SHORT_BLOCK_Q = 24;
  static constexpr int BLOCK_K = 64;

  struct Left {
    const float* data;
    int64_t row, column;  // strides
    Left from_column(int64_t k) const { return {data + k * column, row, column}; }
  };

  // ---- the left operand, and its transpose: float32 is read where it is

  static int64_t left_size(int64_t m, int64_t k) { return sizeof(Scalar) == 4 ? 0 : m * round_up(k, WIDTH); }

  static Left left(const Scalar* source, int64_t stride, int64_t m, int64_t k, Packed* buffer) {
    if constexpr (sizeof(Scalar) == 4) {
      return {source, stride, 1};
    } else {
      const int64_t width = round_up(k, WIDTH);
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < k; j += WIDTH) store(buffer + i * width + j, load_some(source + i * stride + j, k - j));
      return {buffer, width, 1};
    }
  }

  static Left transposed(Left a) { return {a.data, a.column, a.row}; }

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
    for (int64_t j = 0; j < n; j += WIDTH) {
      Packed* column = to + j / PANEL * k * PANEL + j % PANEL;
      for (int64_t i = 0; i < k; i += WIDTH) {
        Floats block[WIDTH];
        for (int lane = 0; lane < WIDTH; lane++) {
          const bool used = j + lane < n && !(bias && bias[j + lane] == -INFINITE);
          block[lane] = used ? load_some(source + (j + lane) * stride + i, k - i) : Floats{};
        }
        transpose(block);
        for (int64_t row = 0; row < smaller<int64_t>(WIDTH, k - i); row++) store(column + (i + row) * PANEL, block[row]);
      }
      if (j + WIDTH >= n && j % PANEL == 0)  // the panel's other half
        for (int64_t i = 0; i < k; i++) store(column + i * PANEL + WIDTH, Floats{});
    }
  }

  // Where row `k` of the panel that holds column `n` begins; n a multiple of PANEL.
  static const Packed* right_at(const Packed* b, int64_t depth, int64_t k, int64_t n) { return b + n * depth + k * PANEL; }

  // ---- a tile of attention weights: computed in place of the scores

  static int64_t weights_size(int64_t, int64_t) { return 0; }
  static Packed* weights(float* scores, Packed*) { return scores; }
  static FF_INLINE void put(Packed* weights, int64_t width, int64_t, int64_t i, int64_t j, Floats x) {
    store(weights + i * width + j, x);
  }
  static Left left_of_weights(const Packed* weights, int64_t width, int64_t) { return {weights, width, 1}; }

  // ---- the product; n is rounded up to whole panels

  static void multiply(float* c, int64_t stride, Left a, const Packed* b, int64_t depth, int64_t m, int64_t n, int64_t k,
                       bool accumulate) {
    for (int64_t j = 0; j < n; j += PANEL) {
      const Packed* panel = b + j * depth;
      int64_t i = 0;
      for (; i + ROWS <= m; i += ROWS) block<ROWS>(c + i * stride + j, stride, a.data + i * a.row, a, panel, k, accumulate);
      rest<ROWS - 1>(m - i, c + i * stride + j, stride, a.data + i * a.row, a, panel, k, accumulate);
    }
  }

 private:
  template <int M>
  static void rest(int64_t m, float* c, int64_t stride, const float* a, Left left, const Packed* panel, int64_t k,
                   bool accumulate) {
    if constexpr (M > 0) {
      if (m == M) block<M>(c, stride, a, left, panel, k, accumulate);
      else rest<M - 1>(m, c, stride, a, left, panel, k, accumulate);
    }
  }

  template <int M>
  static __attribute__((noinline)) void block(float* c, int64_t stride, const float* a, Left left, const Packed* panel,
                                              int64_t k, bool accumulate) {
    Floats sums[M][2];
    const int64_t row = left.row, column = left.column;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      sums[i][0] = accumulate ? load(c + i * stride) : Floats{};
      sums[i][1] = accumulate ? load(c + i * stride + WIDTH) : Floats{};
    }
    for (int64_t l = 0; l < k; l++, panel += PANEL, a += column) {
      const Floats b0 = load(panel), b1 = load(panel + WIDTH);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const float x = a[i * row];
        sums[i][0] += b0 * x;
        sums[i][1] += b1 * x;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) store(c + i * stride, sums[i][0]), store(c + i * stride + WIDTH, sums[i][1]);
  }
};

}  // namespace fusedformer::FF_LEVEL
