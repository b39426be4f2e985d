// The tile unit (AMX): eight registers of 16 rows of 64 bytes, numbered by constants. Where FF_EMULATE is defined
// the same operations are plain code, so that everything built on them is tested on any machine.
#pragma once

#include "pairs.h"

namespace fusedformer::FF_LEVEL {

constexpr int TILE_ROWS = 16;   // also the columns of float32
constexpr int TILE_DEPTH = 32;  // bfloat16 numbers in a row

#ifdef FF_EMULATE

struct TileRegisters {
    alignas(64) uint8_t bytes[8][1024];
};
inline thread_local TileRegisters tile_registers;

struct TileSession {};

inline void tile_load(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; row++)
        __builtin_memcpy(tile_registers.bytes[tile] + 64 * row, static_cast<const char*>(from) + row * stride, 64);
}

inline void tile_store(int tile, void* to, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; row++)
        __builtin_memcpy(static_cast<char*>(to) + row * stride, tile_registers.bytes[tile] + 64 * row, 64);
}

inline void tile_zero(int tile) { __builtin_memset(tile_registers.bytes[tile], 0, 1024); }

inline void tile_multiply(int c, int a, int b) {
    auto* sums = reinterpret_cast<float*>(tile_registers.bytes[c]);
    const auto* left = reinterpret_cast<const BFloat16*>(tile_registers.bytes[a]);
    const auto* right = reinterpret_cast<const BFloat16*>(tile_registers.bytes[b]);
    for (int m = 0; m < TILE_ROWS; m++) {
        Floats row = load(sums + m * TILE_ROWS);
        for (int k = 0; k < TILE_DEPTH; k += 2)
            row = add_dot(row, broadcast_word(left + m * TILE_DEPTH + k), load_words(right + k * TILE_ROWS));
        store(sums + m * TILE_ROWS, row);
    }
}

#define FF_TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define FF_TILE_STREAM(tile, from, stride) tile_load(tile, from, stride)
#define FF_TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define FF_TILE_ZERO(tile) tile_zero(tile)
#define FF_TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

#else

// In assembly, whose numbers of registers are part of the instruction. While a session lives, the calling thread's
// tiles have their full shape; then they are released, so that the operating system has no tile state to save.
struct TileSession {
    struct alignas(64) Shape {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

    TileSession() {
        const Shape shape;
        asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~TileSession() { asm volatile("tilerelease" : : : "memory"); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

#define FF_TILE_READ(instruction, tile, from, stride)                                  \
    asm volatile(instruction " (%0,%1,1), %%tmm" #tile                                 \
                 :                                                                     \
                 : "r"(static_cast<const void*>(from)), "r"(static_cast<long>(stride)) \
                 : "memory")
#define FF_TILE_LOAD(tile, from, stride) FF_TILE_READ("tileloadd", tile, from, stride)
#define FF_TILE_STREAM(tile, from, stride) FF_TILE_READ("tileloaddt1", tile, from, stride)
#define FF_TILE_STORE(tile, to, stride)                                        \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                        \
                 :                                                             \
                 : "r"(static_cast<void*>(to)), "r"(static_cast<long>(stride)) \
                 : "memory")
#define FF_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : :)
#define FF_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

#endif

}  // namespace fusedformer::FF_LEVEL
