// Tiles in shared memory, and the descriptors by which WGMMA reads them.
//
// A panel is `rows` rows of 64 16-bit features, 128 bytes a row, laid down by TMA with the 128-byte swizzle: the
// 16-byte chunk c of row r lies at chunk c ^ (r % 8). A wider tile is several panels, one after the other. Panels start
// at multiples of 1024 bytes, so that the swizzle is a function of the address alone: bits 4-6 are XORed with bits 7-9.
//
// A product contracts over the features of a tile (Q Kᵀ: "K-major" in the PTX ISA) or over its rows (P V: "MN-major",
// what the transposition flags of the instruction say). Either way one WGMMA contracts 16 of them.
#pragma once

#include "device.h"

namespace fusedformer::cuda {

inline constexpr int kPanelFeatures = 64;
inline constexpr int kPanelRowBytes = 128;
inline constexpr int kContracted = 16;  // by one WGMMA of 16-bit numbers

// Byte offset of (row, feature) in a tile of panels; a multiple of 16 where the feature is one of 8.
DEVICE constexpr int swizzled(int row, int feature, int rows) {
    const int chunk = feature % kPanelFeatures / 8;
    return feature / kPanelFeatures * (rows * kPanelRowBytes) + row * kPanelRowBytes + ((chunk ^ (row % 8)) * 16) +
           feature % 8 * 2;
}

// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout", matrix descriptor: address in bits 0-13, leading
// byte offset in 16-29, stride byte offset in 32-45, all in units of 16 bytes; swizzle mode in 62-63, 1 = 128 bytes.
// What is `offset` bytes into the tile differs in one addition: in shared memory the address never carries into bit 14.
DEVICE uint64_t descriptor(const void* tile, int offset, int leading_bytes, int stride_bytes) {
    const uint32_t start = (shared_address(tile) & 0x3FFFF) >> 4 | static_cast<uint32_t>(leading_bytes >> 4) << 16;
    const uint32_t high = static_cast<uint32_t>(stride_bytes >> 4) | 1u << 30;
    return static_cast<uint64_t>(high) << 32 | (start + static_cast<uint32_t>(offset >> 4));
}

// 16 features from `feature` of all the rows from `row` (a multiple of 8) that the instruction's shape asks for.
// Groups of 8 rows are 1024 bytes apart; the leading offset is not used.
DEVICE uint64_t contract_features(const void* tile, int rows, int feature, int row = 0) {
    const int panel = rows * kPanelRowBytes;
    const int offset = feature / kPanelFeatures * panel + row * kPanelRowBytes + feature % kPanelFeatures * 2;
    return descriptor(tile, offset, 0, 8 * kPanelRowBytes);
}

// 16 rows from `row` (a multiple of 8) of all the features from `feature` (a multiple of 64) that the instruction's
// shape asks for. Panels are the leading offset apart, groups of 8 rows the stride.
DEVICE uint64_t contract_rows(const void* tile, int rows, int row, int feature = 0) {
    const int panel = rows * kPanelRowBytes;
    const int offset = feature / kPanelFeatures * panel + row * kPanelRowBytes;
    return descriptor(tile, offset, panel, 8 * kPanelRowBytes);
}

}  // namespace fusedformer::cuda
