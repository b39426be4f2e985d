// Small kernels by which tests check the emulator itself: one product in every form, and mistakes it has to notice.
#include "../device.h"
#include "../launch.h"

namespace fusedformer::cuda {
namespace {

// ---- D = A B of a warpgroup

enum Source { kFeatures, kRowsOfTile, kRegisters };  // A's tile is (64, k); (k, 64); read from it to registers

struct ProductParams {
    TensorMap a, b;
    float* d;  // (64, n)
    int depth, source;
    bool transpose_b;
};

template <bool BF16, int N>
void product_kernel(const ProductParams p) {
    const int a_rows = p.source == kRowsOfTile ? p.depth : 64, b_rows = p.transpose_b ? p.depth : N;
    const int a_features = p.source == kRowsOfTile ? 64 : p.depth, b_features = p.transpose_b ? N : p.depth;
    const auto bytes = [](int rows, int features) {
        return (features + kPanelFeatures - 1) / kPanelFeatures * rows * kPanelRowBytes;
    };
    char *a_tile = shared_memory(), *b_tile = a_tile + bytes(a_rows, a_features);
    auto* full = reinterpret_cast<uint64_t*>(b_tile + bytes(b_rows, b_features));
    if (thread_index() == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_expect_bytes(full, bytes(a_rows, a_features) + bytes(b_rows, b_features));
        for (int feature = 0; feature < a_features; feature += kPanelFeatures)
            tma_load(a_tile + bytes(a_rows, feature), p.a, full, feature, 0, 0, 0);
        for (int feature = 0; feature < b_features; feature += kPanelFeatures)
            tma_load(b_tile + bytes(b_rows, feature), p.b, full, feature, 0, 0, 0);
    }
    block_barrier();
    barrier_wait(full, 0);

    float d[N / 2];
    uint32_t fragments[8][4];
    const int lane = lane_index(), first = warp_index() * 16 + lane / 4;
    for (int k = 0; p.source == kRegisters && k < p.depth; k += kContracted)
        for (int pair = 0; pair < 4; ++pair) {
            const int row = first + pair % 2 * 8, feature = k + pair / 2 * 8 + lane % 4 * 2;
            fragments[k / kContracted][pair] = load_shared<uint32_t>(a_tile + swizzled(row, feature, a_rows));
        }
    wgmma_fence(d, fragments);
    for (int k = 0; k < p.depth; k += kContracted) {
        const uint64_t b = p.transpose_b ? contract_rows(b_tile, b_rows, k) : contract_features(b_tile, b_rows, k);
        const uint64_t a =
            p.source == kRowsOfTile ? contract_rows(a_tile, a_rows, k) : contract_features(a_tile, a_rows, k);
        if (p.source == kRegisters)
            p.transpose_b ? wgmma<BF16, true>(d, fragments[k / kContracted], b, k > 0)
                          : wgmma<BF16, false>(d, fragments[k / kContracted], b, k > 0);
        else if (p.source == kRowsOfTile)
            p.transpose_b ? wgmma<BF16, true, true>(d, a, b, k > 0) : wgmma<BF16, true, false>(d, a, b, k > 0);
        else
            p.transpose_b ? wgmma<BF16, false, true>(d, a, b, k > 0) : wgmma<BF16, false, false>(d, a, b, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(d, fragments);
    for (int i = 0; i < N / 2; ++i) p.d[(first + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <bool BF16, int N>
const char* product(void* a, void* b, const ProductParams& given) {
    ProductParams p = given;
    const int depth = p.depth;
    const auto map = [](TensorMap& to, void* x, int rows, int features) {
        return make_tensor_map(to, {x, rows * features, rows * features, features}, 1, 1, rows, features, BF16, rows);
    };
    const char* error = p.source == kRowsOfTile ? map(p.a, a, depth, 64) : map(p.a, a, 64, depth);
    if (error == nullptr) error = p.transpose_b ? map(p.b, b, depth, N) : map(p.b, b, N, depth);
    if (error != nullptr) return error;
    return launch<product_kernel<BF16, N>>({1}, 128, 64 * 1024 + 1024, nullptr, p);
}

// ---- mistakes

enum Mistake {
    kNone,
    kBarrierNeverReached,
    kWarpMissesNamedBarrier,
    kFlagOfLaterBlock,
    kWgmmaWithoutFence,
    kAccumulatorReadEarly,
    kAccumulatorWrittenEarly,
    kFragmentWrittenEarly,
    kTileOverwrittenEarly,
    kTileNotFencedForWgmma,
    kWgmmaNeverWaitedFor,
    kLoadNeverWaitedFor,
    kStoreOutsideSharedMemory,
    kBarrierNotInitialised,
    kBarrierNotFenced,
    kRegistersTheWrongWay,
    kFlagBeforeStoreIsWritten,
};

struct MistakeParams {
    TensorMap ones;  // (64, 64)
    float* result;
    uint32_t* flag;
    Mistake mistake;
};

// 64 x 64 ones times themselves, 64 everywhere but for the mistake.
void mistaken_kernel(const MistakeParams p) {
    char* tile = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(tile + 8192);
    const Mistake mistake = p.mistake;
    const auto load = [&] {
        barrier_expect_bytes(full, 8192);
        tma_load(tile, p.ones, full, 0, 0, 0, 0);
    };
    if (block_index().x > 0) {
        if (thread_index() == 0) flag_raise(p.flag, 1);
        return;
    }
    if (mistake == kFlagOfLaterBlock) flag_wait(p.flag, 1);
    if (thread_index() == 0) {
        if (mistake != kBarrierNotInitialised) barrier_init(full, mistake == kBarrierNeverReached ? 2 : 1);
        if (mistake != kBarrierNotFenced) barrier_init_fence();
        load();
    }
    block_barrier();
    barrier_wait(full, 0);
    if (mistake == kWarpMissesNamedBarrier && warp_index() < 3) named_barrier_sync(3, 128);
    if (mistake == kRegistersTheWrongWay) registers_increase<24>();
    if (mistake == kStoreOutsideSharedMemory) store_shared(tile + 16384, 1.0f);
    if (mistake == kTileNotFencedForWgmma) store_shared(tile + thread_index() * 4, 0u);
    float d[32];
    uint32_t a[4][4];
    for (auto& fragment : a)
        for (uint32_t& pair : fragment) pair = pack<true>(1.0f, 1.0f);
    if (mistake != kWgmmaWithoutFence) wgmma_fence(d, a);
    for (int k = 0; k < 64; k += kContracted)
        wgmma<true, false>(d, a[k / kContracted], contract_features(tile, 64, k), k > 0);
    wgmma_commit();
    const float early = d[0];
    if (mistake == kAccumulatorWrittenEarly) d[0] = 0.0f;
    if (mistake == kFragmentWrittenEarly) a[0][0] = 0;
    if (mistake == kTileOverwrittenEarly && thread_index() == 0) load();
    if (mistake == kWgmmaNeverWaitedFor) return;
    wgmma_wait<0>(d, a);
    if (mistake == kTileOverwrittenEarly) barrier_wait(full, 1);
    if (mistake == kFlagBeforeStoreIsWritten && thread_index() == 0) {
        bulk_store(p.result, tile, 16);
        tma_store_commit();
        tma_store_wait<0>();
        flag_raise(p.flag, 1);
    }
    if (mistake == kLoadNeverWaitedFor && thread_index() == 0) load();
    for (int i = 0; i < 32; ++i) p.result[thread_index() * 32 + i] = d[i];
    if (mistake == kAccumulatorReadEarly) p.result[thread_index() * 32] = early;
}

// ---- layouts

struct DescriptorParams {
    uint64_t* found;
    int rows, row, feature;
    bool over_rows;
};

void descriptor_kernel(const DescriptorParams p) {
    *p.found = p.over_rows ? contract_rows(shared_memory(), p.rows, p.row, p.feature)
                           : contract_features(shared_memory(), p.rows, p.feature, p.row);
}

}  // namespace
}  // namespace fusedformer::cuda

using namespace fusedformer::cuda;

#pragma GCC visibility push(default)
extern "C" {

// d (64, n) = a b, contracted over `depth`, with n = 64, 96 or 128.
const char* check_product(void* a, void* b, float* d, int n, int depth, int source, bool transpose_b, bool bf16) {
    const ProductParams p{{}, {}, d, depth, source, transpose_b};
    if (n == 64) return bf16 ? product<true, 64>(a, b, p) : product<false, 64>(a, b, p);
    if (n == 96) return bf16 ? product<true, 96>(a, b, p) : product<false, 96>(a, b, p);
    return bf16 ? product<true, 128>(a, b, p) : product<false, 128>(a, b, p);
}

// result: (128, 32)
const char* check_mistake(void* ones, float* result, int mistake) {
    uint32_t flag = 0;
    MistakeParams p{{}, result, &flag, static_cast<Mistake>(mistake)};
    const char* error = make_tensor_map(p.ones, {ones, 4096, 4096, 64}, 1, 1, 64, 64, true, 64);
    return error != nullptr ? error : launch<mistaken_kernel>({2}, 128, 9216, nullptr, p);
}

int check_swizzled(int row, int feature, int rows) { return swizzled(row, feature, rows); }

void check_place(bool operand, int thread, int i, int* place) {
    const emulator::Place at = operand ? emulator::of_operand(thread, i) : emulator::of_accumulator(thread, i);
    place[0] = at.row, place[1] = at.column;
}

// Of a tile of `rows` rows at address 0.
uint64_t check_descriptor(bool over_rows, int rows, int row, int feature) {
    uint64_t found = 0;
    launch<descriptor_kernel>({1}, 32, 1024, nullptr, DescriptorParams{&found, rows, row, feature, over_rows});
    return found;
}

const char* check_attention_forward(const AttentionProblem* problem) { return attention_forward(*problem, nullptr); }
const char* check_attention_backward(const AttentionProblem* problem, const AttentionGradients* gradients) {
    return attention_backward(*problem, *gradients, nullptr);
}
size_t check_attention_backward_workspace(const AttentionProblem* problem) {
    return attention_backward_workspace(*problem);
}

}  // extern "C"
#pragma GCC visibility pop
