// The primitives of ../primitives on the host: same names, same meaning.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cta.h"
#include "numbers.h"

#define DEVICE inline
#define HOST_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace fusedformer::cuda {

using std::max;
using std::min;

// ---- thread.h

inline int thread_index() { return emulator::block().fibers.current(); }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int warpgroup_index() { return thread_index() / 128; }
inline Index3 block_index() { return emulator::block().index; }
inline Index3 grid_size() { return emulator::block().grid; }

inline void block_barrier() { emulator::meet_named(0, emulator::block().threads, true); }
inline void warp_barrier() { emulator::meet_warp(); }
inline void named_barrier_sync(int id, int threads) { emulator::meet_named(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulator::meet_named(id, threads, false); }

inline uint32_t shuffle(uint32_t x, int lane) { return static_cast<uint32_t>(emulator::exchange(x, lane)); }
inline uint32_t shuffle_xor(uint32_t x, int mask) { return shuffle(x, lane_index() ^ mask); }
inline float shuffle(float x, int lane) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = shuffle(bits, lane);
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, lane_index() ^ mask); }

template <int REGISTERS>
void registers_increase() {
    emulator::change_registers(REGISTERS, true);
}
template <int REGISTERS>
void registers_decrease() {
    emulator::change_registers(REGISTERS, false);
}

// ---- memory.h

inline char* shared_memory() { return emulator::block().shared; }
inline uint32_t shared_address(const void* pointer) { return emulator::block().offset_of(pointer, 0); }

template <typename T>
void store_shared(void* destination, T value) {
    emulator::stored(destination, sizeof(T));
    std::memcpy(destination, &value, sizeof(T));
}
template <typename T>
T load_shared(const void* source) {
    emulator::block().offset_of(source, sizeof(T));
    T value;
    std::memcpy(&value, source, sizeof(T));
    return value;
}
inline void async_proxy_fence() { emulator::publish(); }

inline void store_matrix(void* row, const uint32_t (&r)[4]) {
    uint64_t rows[32];
    emulator::warp_exchange(reinterpret_cast<uint64_t>(row), rows);
    const int lane = lane_index();
    for (int matrix = 0; matrix < 4; ++matrix)
        store_shared(reinterpret_cast<char*>(rows[8 * matrix + lane / 4]) + lane % 4 * 4, r[matrix]);
}
inline void store_matrix_transposed(void* row, const uint32_t (&r)[4]) {
    uint64_t rows[32];
    emulator::warp_exchange(reinterpret_cast<uint64_t>(row), rows);
    const int lane = lane_index();
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int half = 0; half < 2; ++half)
            store_shared(reinterpret_cast<char*>(rows[8 * matrix + lane % 4 * 2 + half]) + lane / 4 * 2,
                         static_cast<uint16_t>(r[matrix] >> 16 * half));
}

struct alignas(16) Chunk {
    uint32_t words[4];
};

inline void flag_raise(uint32_t* flag, uint32_t value) {
    emulator::check_written();
    *flag = value;
}
inline uint32_t flag_read(const uint32_t* flag) { return *flag; }
inline void flag_wait(const uint32_t* flag, uint32_t value) { emulator::wait_for_flag(flag, value); }
inline uint32_t flag_increment(uint32_t* flag) { return (*flag)++; }

// ---- barrier.h

inline void barrier_init(uint64_t* bar, int count) { emulator::barrier_init(bar, count); }
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(uint64_t* bar) { emulator::barrier_arrive(bar, 0); }
inline void barrier_expect_bytes(uint64_t* bar, int bytes) { emulator::barrier_arrive(bar, bytes); }
inline void barrier_wait(uint64_t* bar, int parity) { emulator::barrier_wait(bar, parity); }

// ---- math.h

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
inline float log2_approx(float x) { return std::log2(x); }

inline float natural_log(float x) { return std::log(x); }

template <bool BF16>
uint32_t pack(float low, float high) {
    const auto round = [](float x) -> uint32_t { return BF16 ? to_bf16(x) : to_half(x); };
    return round(low) | round(high) << 16;
}
template <bool BF16>
float unpack(uint16_t number) {
    return BF16 ? from_bf16(number) : from_half(number);
}
template <bool BF16>
float unpack_low(uint32_t pair) {
    return unpack<BF16>(static_cast<uint16_t>(pair));
}
template <bool BF16>
float unpack_high(uint32_t pair) {
    return unpack<BF16>(static_cast<uint16_t>(pair >> 16));
}

// ---- mma.h

template <bool BF16>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    emulator::multiply({d, a, {b_low, b_high}, BF16});
}
inline void load_matrix(uint32_t (&r)[4], const void* row) { emulator::load_matrix(r, row, false); }
inline void load_matrix_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrix(r, row, true); }
inline void copy_async(void* destination, const void* source, bool exists) {
    emulator::copy_async(destination, source, exists);
}
inline void copy_commit() { emulator::commit_copies(); }
template <int PENDING>
void copy_wait() {
    emulator::wait_for_copies(PENDING);
}

// ---- tma.h

inline void tma_prefetch(const TensorMap&) {}
inline void tma_load(void* panel, const TensorMap& map, uint64_t* bar, int feature, int row, int head, int batch) {
    emulator::load(panel, map, bar, feature, row, head, batch);
}
inline void tma_store(const TensorMap& map, const void* panel, int feature, int row, int head, int batch) {
    emulator::store(map, panel, feature, row, head, batch);
}
inline void tma_store_commit() { emulator::commit_stores(); }
template <int PENDING>
void tma_store_wait() {
    emulator::wait_for_stores(PENDING);
}

// ---- bulk.h

inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* bar) {
    emulator::bulk_load(shared, global, bytes, bar);
}
inline void bulk_store(float* global, const void* shared, int bytes) {
    emulator::bulk_store(global, shared, bytes, false);
}
inline void bulk_add(float* global, const void* shared, int bytes) {
    emulator::bulk_store(global, shared, bytes, true);
}
inline void bulk_wait() { emulator::wait_for_writes(); }
inline void bulk_fence() {}

// ---- wgmma.h

template <typename T>
void pin(T&) {}
template <typename... Registers>
void wgmma_fence(Registers&...) {
    emulator::fence_products();
}
inline void wgmma_commit() { emulator::commit_products(); }
template <int PENDING, typename... Registers>
void wgmma_wait(Registers&...) {
    emulator::wait_for_products(PENDING);
}

template <int N>
inline constexpr bool has_wgmma = N % 8 == 0 && N >= 8 && N <= 256;

template <bool BF16, bool TRANSPOSE_A, bool TRANSPOSE_B, int ACCUMULATORS>
void wgmma(float (&acc)[ACCUMULATORS], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(has_wgmma<ACCUMULATORS * 2>);
    emulator::issue({acc, ACCUMULATORS, nullptr, a, b, BF16, TRANSPOSE_A, TRANSPOSE_B, accumulate, 0});
}
template <bool BF16, bool TRANSPOSE_B, int ACCUMULATORS>
void wgmma(float (&acc)[ACCUMULATORS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(has_wgmma<ACCUMULATORS * 2>);
    emulator::issue({acc, ACCUMULATORS, a, 0, b, BF16, false, TRANSPOSE_B, accumulate, 0});
}

}  // namespace fusedformer::cuda
