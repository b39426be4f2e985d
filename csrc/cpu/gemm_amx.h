// Products of large blocks on the tile unit, for gemm.h.
#pragma once

#include "amx_engine.h"
#include "range.h"

namespace fusedformer::FF_LEVEL {

template <class S>
struct GemmAmx : AmxEngine<S> {
    static constexpr int64_t BLOCK_DEPTH = round_down(1024 / Parts<S>::COUNT, TILE_DEPTH);
    static constexpr int64_t BLOCK_ROWS = 128;
    // As in gemm_fma.h, not measured. Several products of parts hide the packing, and would be added in another order.
    static constexpr int64_t FEW_ROWS = 8, PACKED_ROWS = Parts<S>::COUNT == 1 ? 64 : 0, PACKING_ROWS = 48;
    static constexpr bool KEEPS_WEIGHTS = true;
    static constexpr bool LOSES_TINY = sizeof(S) == sizeof(float);

    static bool has_tiny(const float* row, int64_t columns) { return FF_LEVEL::has_tiny(row, columns); }
};

}  // namespace fusedformer::FF_LEVEL
