// Which float32 tensors the tile unit may take as sums of bfloat16 parts. It counts denormal factors as 0, so the parts
// of tiny numbers would be lost.
#pragma once

#include "scores.h"

namespace fusedformer::FF_LEVEL {

// Whether a number of the row is tiny: neither 0 nor at least 2^-100.
inline bool has_tiny(const float* row, int64_t columns) {
    constexpr uint32_t SMALLEST = (127u - 100u) << 23;
    Ints tiny = {};
    for (int64_t j = 0; j < columns; j += WIDTH) {
        const Words magnitude = reinterpret_cast<Words>(load_some(row + j, columns - j)) & 0x7fffffffu;
        tiny |= reinterpret_cast<Ints>(magnitude - 1 < SMALLEST - 1);
    }
    return any(tiny);
}

class PartsAreExact {
  public:
    // Whether no number of the (B, H, rows, columns) tensor is tiny, but for the rows that all of
    // the heads that share them exclude by `key_mask`: those are not read.
    static bool of(const Problem& p, const Rows& x, int64_t heads, int64_t rows, int64_t columns, bool masked,
                   const Runtime& runtime) {
        const int64_t batch = p.batch;
        PartsAreExact scan(p, x, heads, rows, columns, masked && p.key_mask.data);
        auto body = [](int64_t task, void* self) { static_cast<PartsAreExact*>(self)->matrix(task); };
        if (batch * heads * rows * columns > SMALL)
            runtime.parallel(batch * heads, body, &scan);
        else
            for (int64_t task = 0; task < batch * heads; task++) body(task, &scan);
        return scan.all_;
    }

  private:
    static constexpr int64_t SMALL = 1 << 15;  // numbers: read sooner than threads are woken

    const Problem& p_;
    const Rows& x_;
    int64_t heads_, rows_, columns_;
    bool masked_;
    bool all_ = true;  // written by any thread, false only

    PartsAreExact(const Problem& p, const Rows& x, int64_t heads, int64_t rows, int64_t columns, bool masked)
        : p_(p), x_(x), heads_(heads), rows_(rows), columns_(columns), masked_(masked) {}

    bool is_read(int64_t b, int64_t head_kv, int64_t row) const {
        const int64_t first = head_kv * p_.group();
        for (int64_t h = first; h < first + (p_.key_mask.head ? p_.group() : 1); h++) {
            const void* terms = mask_row(p_.key_mask, b, h, 0);
            if (mask_terms(p_.key_mask.type, terms, p_.key_mask.key, row, 1)[0] != -INFINITE) return true;
        }
        return false;
    }

    void matrix(int64_t index) {
        const auto* row = static_cast<const float*>(x_.data) + index / heads_ * x_.batch + index % heads_ * x_.head;
        for (int64_t i = 0; i < rows_; i++, row += x_.row)
            if (has_tiny(row, columns_) && (!masked_ || is_read(index / heads_, index % heads_, i)))
                return __atomic_store_n(&all_, false, __ATOMIC_RELAXED);
    }
};

}  // namespace fusedformer::FF_LEVEL
