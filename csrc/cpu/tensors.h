// torch's tensors as the pointers, strides and types that the kernels read.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>

#include "problem.h"

namespace fusedformer {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& x) {
    using torch::headeronly::ScalarType;
    switch (x.scalar_type()) {
        case ScalarType::Bool:
            return Type::boolean;
        case ScalarType::Float:
            return Type::float32;
        case ScalarType::Half:
            return Type::float16;
        case ScalarType::BFloat16:
            return Type::bfloat16;
        case ScalarType::Double:
            return Type::float64;
        default:
            throw std::invalid_argument("a tensor's dtype is none that the kernels read");
    }
}

// A dimension of size 1 may have any stride; 0 broadcasts it.
inline int64_t stride(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

inline Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline Rows rows(const MaybeTensor& x) { return x ? rows(*x) : Rows{}; }

// Whether the kernels compute in this dtype.
inline bool is_computed(const Tensor& x) {
    using torch::headeronly::ScalarType;
    const ScalarType dtype = x.scalar_type();
    return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

using Sizes = std::array<int64_t, 4>;

// Dense, its dimensions in memory in the order of the query's (`empty_in_order_of` in kernels/common/library.py).
inline Sizes dense_strides(const Sizes& sizes, const Sizes& like) {
    std::array<int, 3> order = {0, 1, 2};
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like[a] > like[b]; });
    Sizes strides = {0, 0, 0, 1};
    int64_t stride = sizes[3];
    for (int i = 2; i >= 0; i--) strides[order[i]] = stride, stride *= sizes[order[i]];
    return strides;
}

// Uninitialised, on the CPU, of the dtype of `like`.
inline Tensor new_tensor(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dims, sizes, strides, static_cast<int32_t>(like.scalar_type()), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

inline Tensor new_bytes(int64_t size) {
    const int64_t stride = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride,
                                                           static_cast<int32_t>(torch::headeronly::ScalarType::Byte),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

inline Mask per_head(const MaybeTensor& x) {  // (B, H)
    if (!x) return {};
    return {type_of(*x), x->data_ptr(), stride(*x, 0), stride(*x, 1), 0, 0};
}

}  // namespace fusedformer
