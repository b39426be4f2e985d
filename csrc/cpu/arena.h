// Hands out pieces of one block of scratch memory. On a null base it only measures how large the block must be.
#pragma once

#include "simd/vector.h"

namespace fusedformer::FF_LEVEL {

class Arena {
  public:
    explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        const size_t at = used_;
        used_ += round_up(count * sizeof(T) + OVERRUN, 64);
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }

    size_t used() const { return used_; }

  private:
    static constexpr size_t OVERRUN = 64;  // whole vectors are read and written, also at a piece's end
    char* base_;
    size_t used_ = 0;
};

}  // namespace fusedformer::FF_LEVEL
