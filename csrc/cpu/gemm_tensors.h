// torch's tensors as the matrices of gemm_problem.h.
#pragma once

#include <array>

#include "gemm_problem.h"
#include "tensors.h"

namespace fusedformer {

inline Matrix matrix(const Tensor& x) { return {x.data_ptr(), x.stride(0)}; }

inline Matrix matrix(const MaybeTensor& x) { return x ? matrix(*x) : Matrix{}; }

inline void* pointer(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

// For what depends on no more than the size.
inline Type type_of_size(int64_t element_size) { return element_size == 4 ? Type::float32 : Type::float16; }

// ---- of calls without a gradient, which are checked in a hurry: what does not fit here is another way's to name

constexpr int64_t MAX_DIMS = 8;

// (..., features) that are rows at one distance from each other.
inline bool are_rows(const Tensor& x) {
    const int64_t dims = x.dim();
    if (dims < 1 || dims > MAX_DIMS || !is_computed(x) || x.numel() == 0) return false;
    return x.is_contiguous() || (dims == 2 && x.stride(1) == 1);
}

inline Matrix row_matrix(const Tensor& x) {
    const int64_t dims = x.dim();
    return {x.data_ptr(), dims == 2 ? x.stride(0) : x.size(dims - 1)};
}

inline bool is_matrix(const Tensor& x, const Tensor& like, int64_t rows, int64_t columns) {
    return x.dim() == 2 && x.scalar_type() == like.scalar_type() && x.size(0) == rows && x.size(1) == columns &&
           x.stride(1) == 1 && rows > 0 && columns > 0;
}

inline bool is_vector_or_none(const MaybeTensor& x, const Tensor& like, int64_t size) {
    return !x || (x->dim() == 1 && x->scalar_type() == like.scalar_type() && x->size(0) == size && x->stride(0) == 1);
}

inline bool is_like_or_none(const MaybeTensor& x, const Tensor& like) {
    if (!x) return true;
    if (x->dim() != like.dim() || x->scalar_type() != like.scalar_type() || !x->is_contiguous()) return false;
    for (int64_t i = 0; i < like.dim(); i++)
        if (x->size(i) != like.size(i)) return false;
    return true;
}

// (..., features) in the dtype of `rows`, for as many rows.
inline Tensor new_rows(const Tensor& rows, int64_t features) {
    std::array<int64_t, MAX_DIMS> sizes, strides;
    const int64_t last = rows.dim() - 1;
    int64_t stride = 1;
    for (int64_t i = last; i >= 0; stride *= sizes[i--])
        sizes[i] = i == last ? features : rows.size(i), strides[i] = stride;
    return new_tensor(rows, last + 1, sizes.data(), strides.data());
}

// ---- weights packed for good: bytes that begin with what they are

struct PackedWeight {
    const Kernels* level;
    Type type;
    int64_t rows, columns;

    static constexpr int64_t SIZE = 64;  // of this in memory: what follows is aligned

    bool operator==(const PackedWeight&) const = default;
};
static_assert(sizeof(PackedWeight) <= PackedWeight::SIZE);

// What the kernels of this level read of it; null where it was packed for another, or for another weight.
inline void* packed_for(const MaybeTensor& packed, const Tensor& weight, const Kernels& level) {
    if (!packed || packed->scalar_type() != torch::headeronly::ScalarType::Byte) return nullptr;
    if (packed->numel() < PackedWeight::SIZE) return nullptr;
    const PackedWeight expected = {&level, type_of(weight), weight.size(0), weight.size(1)};
    char* const data = static_cast<char*>(packed->data_ptr());
    return *reinterpret_cast<const PackedWeight*>(data) == expected ? data + PackedWeight::SIZE : nullptr;
}

}  // namespace fusedformer
