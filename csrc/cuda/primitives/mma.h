// The tensor cores as of sm_80: a warp's product of fragments, their loads, and copies that do not pass by registers.
#pragma once

#include <cstdint>

#include "memory.h"
#include "thread.h"

namespace fusedformer::cuda {

// d (16 x 8) += a (16 x 16) b (16 x 8), sums in float32. Lane l holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type"), two numbers to a word, the first in the low half:
//     d[2 i + j]   row l / 4 + 8 i,                   column 2 (l % 4) + j
//     a[i]         row l / 4 + 8 (i % 2),             columns 2 (l % 4) + 8 (i / 2) and the next
//     b_low/high   rows 2 (l % 4) (+ 8 in b_high) and the next,   column l / 4
// so that two d next to each other, rounded, are an a.
template <bool BF16>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Four 8 x 8 matrices of 16-bit numbers in shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix row l / 4, columns 2 (l % 4) and the next (PTX ISA, "ldmatrix").
DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each matrix transposed on its way.
DEVICE void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, both addresses multiples of 16; zeros, and nothing is read, unless `exists`.
// A thread's copies since its last commit are a group; copy_wait<N> returns once all but its N latest groups have
// landed (PTX ISA, "cp.async"). Other threads see them after a barrier with it.
DEVICE void copy_async(void* destination, const void* source, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(destination)),
                 "l"(source), "r"(exists ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fusedformer::cuda
