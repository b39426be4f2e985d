// Which float32 tensors the tile unit may take as sums of bfloat16 parts. It counts denormal factors as 0, so the parts
// of tiny numbers would be lost; and the parts of an infinity are NaN.
#pragma once

#include "problem.h"
#include "simd/vector.h"

namespace fusedformer::FF_LEVEL {

class PartsAreExact {
  public:
    // Whether every number of the (B, H, rows, columns) tensor is 0 or finite and at least 2^-100.
    static bool of(const Rows& x, int64_t batch, int64_t heads, int64_t rows, int64_t columns, const Runtime& runtime) {
        PartsAreExact scan{x, heads, rows, columns, true};
        auto body = [](int64_t task, void* self) { static_cast<PartsAreExact*>(self)->matrix(task); };
        if (batch * heads * rows * columns > SMALL)
            runtime.parallel(batch * heads, body, &scan);
        else
            for (int64_t task = 0; task < batch * heads; task++) body(task, &scan);
        return scan.all_;
    }

  private:
    static constexpr int64_t SMALL = 1 << 15;  // numbers: read sooner than threads are woken

    const Rows& x_;
    int64_t heads_, rows_, columns_;
    bool all_;  // written by any thread, false only

    PartsAreExact(const Rows& x, int64_t heads, int64_t rows, int64_t columns, bool all)
        : x_(x), heads_(heads), rows_(rows), columns_(columns), all_(all) {}

    void matrix(int64_t index) {
        const auto* row = static_cast<const float*>(x_.data) + index / heads_ * x_.batch + index % heads_ * x_.head;
        constexpr uint32_t SMALLEST = (127u - 100u) << 23, INFINITY_BITS = 0x7f800000u;
        for (int64_t i = 0; i < rows_; i++, row += x_.row) {
            Ints outside = {};
            for (int64_t j = 0; j < columns_; j += WIDTH) {
                const Words magnitude = reinterpret_cast<Words>(load_some(row + j, columns_ - j)) & 0x7fffffffu;
                outside |= reinterpret_cast<Ints>((magnitude - 1 < SMALLEST - 1) | (magnitude >= INFINITY_BITS));
            }
            if (any(outside)) return __atomic_store_n(&all_, false, __ATOMIC_RELAXED);
        }
    }
};

}  // namespace fusedformer::FF_LEVEL
