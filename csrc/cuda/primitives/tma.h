// The copy engine: boxes of a (features, rows, heads, batch) tensor to and from swizzled panels in shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../problem.h"
#include "memory.h"

namespace fusedformer::cuda {

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// Boxes of `box_rows` rows (at most 256) by 64 features; loads give 0 and stores leave alone what lies outside the
// tensor. nullptr, or why not: data and strides must be multiples of 16 bytes.
inline const char* make_tensor_map(TensorMap& map, const Tensor4& x, int batch, int heads, int rows, int features,
                                   bool bf16, int box_rows) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t error =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                            : nullptr;
    }();
    if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
    const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(elements) * 2; };
    const cuuint64_t sizes[4] = {cuuint64_t(features), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
    const cuuint64_t strides[3] = {bytes(x.row_stride), bytes(x.head_stride), bytes(x.batch_stride)};
    const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap encoded;
    const CUresult result =
        encode(&encoded, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, x.data, sizes,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled refused a tensor: its data or strides are not aligned";
    std::memcpy(&map, &encoded, sizeof(map));
    return nullptr;
}

DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// By one thread. A box is box_rows x 128 bytes and counts in full on `bar`, also where it hangs over the tensor's end.
DEVICE void tma_load(void* panel, const TensorMap& map, uint64_t* bar, int feature, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(panel)),
        "l"(&map), "r"(shared_address(bar)), "r"(feature), "r"(row), "r"(head), "r"(batch)
        : "memory");
}
// By one thread, and ended by tma_store_commit and tma_store_wait of the same thread.
DEVICE void tma_store(const TensorMap& map, const void* panel, int feature, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared_address(panel)), "r"(feature), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but PENDING groups have read their panels, which may then be written again.
template <int PENDING>
DEVICE void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fusedformer::cuda
