// By which tests run the decode kernel, and small kernels by which they check the emulation of its primitives.
#include "../device.h"
#include "../launch.h"
#include "../problem.h"

namespace fusedformer::cuda {
namespace {

struct FragmentParams {
    const uint32_t *a, *b;  // (32, 4) and (32, 2): of each lane
    float* d;               // (32, 4)
};

template <bool BF16>
void fragment_kernel(const FragmentParams& p) {
    const int lane = lane_index();
    uint32_t a[4];
    float d[4];
    for (int i = 0; i < 4; i++) a[i] = p.a[4 * lane + i], d[i] = p.d[4 * lane + i];
    mma<BF16>(d, a, p.b[2 * lane], p.b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) p.d[4 * lane + i] = d[i];
}

struct MatrixParams {
    const uint16_t* tile;  // (16, 16)
    uint32_t* fragments;   // (32, 4)
    bool transposed;
};

// Matrices 0 to 3 are the tile's quarters: top left, bottom left, top right, bottom right.
void matrix_kernel(const MatrixParams& p) {
    const int lane = lane_index(), offset = lane % 16 * 16 + lane / 16 * 8;
    copy_async(shared_memory() + 2 * offset, p.tile + offset, true);
    copy_commit();
    copy_wait<0>();
    warp_barrier();
    uint32_t r[4];
    if (p.transposed)
        load_matrix_transposed(r, shared_memory() + 2 * offset);
    else
        load_matrix(r, shared_memory() + 2 * offset);
    for (int i = 0; i < 4; i++) p.fragments[4 * lane + i] = r[i];
}

enum Mistake {
    kNone,
    kReadWithoutWait,
    kReadWithoutBarrier,
    kOverwrittenWithoutBarrier,
    kNeverWaitedFor,
    kOddSource,
    kOddRow,
    kWaitForFewer,
};

struct CopyParams {
    const float* source;  // (2, 32, 4)
    float* result;        // (2, 32)
    Mistake mistake;
};

// Twice through the same 16 bytes for each lane, a lane reading what the next one copied.
void copy_kernel(const CopyParams& p) {
    const int lane = lane_index(), next = (lane + 1) % 32;
    float* const tile = reinterpret_cast<float*>(shared_memory());
    const int away = p.mistake == kOddSource ? 1 : 0;
    for (int turn = 0; turn < 2; turn++) {
        copy_async(tile + 4 * lane, p.source + (turn * 32 + lane) * 4 + away, true);
        copy_commit();
        if (p.mistake == kNeverWaitedFor && turn == 1) return;
        if (p.mistake == kWaitForFewer)
            copy_wait<1>();
        else if (p.mistake != kReadWithoutWait)
            copy_wait<0>();
        if (p.mistake != kReadWithoutBarrier) warp_barrier();
        p.result[turn * 32 + lane] = tile[4 * next];
        if (p.mistake != kOverwrittenWithoutBarrier) warp_barrier();
    }
    uint32_t r[4];
    if (p.mistake == kOddRow) load_matrix(r, tile + lane);
}

}  // namespace
}  // namespace fusedformer::cuda

using namespace fusedformer::cuda;

#pragma GCC visibility push(default)
extern "C" {

const char* check_attention_decode(const DecodeProblem* problem, int processors) {
    return attention_decode(*problem, processors, nullptr);
}
size_t check_attention_decode_workspace(const DecodeProblem* problem, int processors) {
    return attention_decode_workspace(*problem, processors);
}

const char* check_fragments(const uint32_t* a, const uint32_t* b, float* d, bool bf16) {
    const FragmentParams p{a, b, d};
    return bf16 ? launch<fragment_kernel<true>>({1}, 32, 0, nullptr, p)
                : launch<fragment_kernel<false>>({1}, 32, 0, nullptr, p);
}
const char* check_matrices(const uint16_t* tile, uint32_t* fragments, bool transposed) {
    return launch<matrix_kernel>({1}, 32, 512, nullptr, MatrixParams{tile, fragments, transposed});
}
const char* check_copies(const float* source, float* result, int mistake) {
    return launch<copy_kernel>({1}, 32, 1024, nullptr, CopyParams{source, result, static_cast<Mistake>(mistake)});
}

}  // extern "C"
#pragma GCC visibility pop
