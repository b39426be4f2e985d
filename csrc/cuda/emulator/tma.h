// The copy engine: boxes between a tensor and swizzled panels, and plain bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"

namespace fusedformer::cuda {

struct alignas(64) TensorMap {
    char* data;
    int64_t strides[4];  // in bytes, feature first
    int sizes[4];
    int box_rows;
};

const char* make_tensor_map(TensorMap& map, const Tensor4& x, int batch, int heads, int rows, int features, bool bf16,
                            int box_rows);

namespace emulator {

struct PendingLoad {
    uint64_t* bar;
    TensorMap map;
    uint32_t panel;                // where to, in shared memory
    int place[4];                  // feature, row, head, batch
    const char* source = nullptr;  // or plain bytes
    int bytes = 0;
};

struct PendingStore {
    TensorMap map;
    uint32_t panel;
    int place[4];
    char* destination = nullptr;  // or plain bytes
    int bytes = 0;
    bool add = false;  // float32 to float32
};
using StoreGroup = std::vector<PendingStore>;

// Read from shared memory, not yet to be seen in global memory.
struct PendingWrite {
    char* destination;
    std::vector<char> bytes;
    bool add;
};

void load(void* panel, const TensorMap& map, uint64_t* bar, int feature, int row, int head, int batch);
// All on their way to this barrier.
void land_loads(const uint64_t* bar);

void store(const TensorMap& map, const void* panel, int feature, int row, int head, int batch);
void commit_stores();
void bulk_load(void* destination, const void* source, int bytes, uint64_t* bar);
void bulk_store(void* destination, const void* source, int bytes, bool add);
// Until all of the thread's committed groups but `pending` are read; until all are written; at its end all are.
void wait_for_stores(int pending);
void wait_for_writes();
// A flag is raised for what is written.
void check_written();
void finish_stores();

}  // namespace emulator
}  // namespace fusedformer::cuda
