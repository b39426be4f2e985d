// torch's tensors as the matrices of gemm_problem.h.
#pragma once

#include "gemm_problem.h"
#include "tensors.h"

namespace fusedformer {

inline Matrix matrix(const Tensor& x) { return {x.data_ptr(), x.stride(0)}; }

inline Matrix matrix(const MaybeTensor& x) { return x ? matrix(*x) : Matrix{}; }

inline void* pointer(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

// For what depends on no more than the size.
inline Type type_of_size(int64_t element_size) { return element_size == 4 ? Type::float32 : Type::float16; }

}  // namespace fusedformer
