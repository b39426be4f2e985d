// Warpgroup matrix products (PTX ISA, "wgmma.mma_async"): D (64 x N, fp32) = or += A (64 x 16) B (16 x N).
//
// Each of a warpgroup's 128 threads calls the same. Thread t of warp w (in its group) has lane l = t % 32 and holds
//   D   acc[i]: row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2
//   A   pair a[j]: row 16 w + l / 4 + 8 (j % 2), columns 8 (j / 2) + 2 (l % 4) and the next
// so that four pairs of neighbouring accumulators, rounded, are the A of a next product.
//
// The products run on after the call. Between it and the wgmma_wait that covers them, registers of `acc` and `a` may
// not be touched, nor the shared memory of the descriptors be written; the arrays must live as long. Write registers,
// then wgmma_fence(them), products, wgmma_commit (a group), and at last wgmma_wait<groups that still run>(what ended).
//
// Where a wait really stands is up to the compiler: in one basic block with arithmetic that was to run under the
// products it may come first. Read the machine code.
#pragma once

#include <cstdint>

#include "memory.h"

namespace fusedformer::cuda {

// The compiler may move no access to these registers across this point: it does not know that a product runs on.
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
DEVICE void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, int COUNT>
DEVICE void pin(T (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) pin(registers[i]);
}

// Both name the accumulators and fragments that change hands: from the thread to the tensor cores, and back.
template <typename... Registers>
DEVICE void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING, typename... Registers>
DEVICE void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    (pin(registers), ...);
}

// Operand lists of the instruction, eight accumulators a piece: their names %0, %1 ... and what stands behind these.
#define NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_1 NAMES_0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_2 NAMES_1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_3 NAMES_2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_4 NAMES_3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_5 NAMES_4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_6 NAMES_5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_7 NAMES_6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_8 NAMES_7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define NAMES_9 NAMES_8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES_10 NAMES_9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES_11 NAMES_10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define EIGHT(i)                                                                                            \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define VALUES_0 EIGHT(0)
#define VALUES_1 VALUES_0, EIGHT(8)
#define VALUES_2 VALUES_1, EIGHT(16)
#define VALUES_3 VALUES_2, EIGHT(24)
#define VALUES_4 VALUES_3, EIGHT(32)
#define VALUES_5 VALUES_4, EIGHT(40)
#define VALUES_6 VALUES_5, EIGHT(48)
#define VALUES_7 VALUES_6, EIGHT(56)
#define VALUES_8 VALUES_7, EIGHT(64)
#define VALUES_9 VALUES_8, EIGHT(72)
#define VALUES_10 VALUES_9, EIGHT(80)
#define VALUES_11 VALUES_10, EIGHT(88)

// One instruction. `p` says whether D is added to; the ones that follow leave the signs of A and B as they are.
#define WGMMA_SHARED(N, TYPE, LAST, A, B, P, TA, TB)                                                                  \
    asm volatile("{.reg .pred p;setp.ne.b32 p,%" P ",0;wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                 " {" NAMES_##LAST "},%" A ",%" B ",p,1,1,%" TA ",%" TB ";}"                                          \
                 : VALUES_##LAST                                                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B)              \
                 : "memory")
#define WGMMA_REGISTERS(N, TYPE, LAST, A0, A1, A2, A3, B, P, TB)                                                      \
    asm volatile("{.reg .pred p;setp.ne.b32 p,%" P ",0;wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                 " {" NAMES_##LAST "},{%" A0 ",%" A1 ",%" A2 ",%" A3 "},%" B ",p,1,1,%" TB ";}"                       \
                 : VALUES_##LAST                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),             \
                   "n"(TRANSPOSE_B)                                                                                   \
                 : "memory")
#define WGMMA_CASES(FORM, N, LAST, ...)                   \
    if constexpr (sizeof(acc) / sizeof(float) * 2 == N) { \
        if constexpr (BF16)                               \
            FORM(N, "bf16", LAST, __VA_ARGS__);           \
        else                                              \
            FORM(N, "f16", LAST, __VA_ARGS__);            \
    }

template <int N>
inline constexpr bool has_wgmma =
    N == 16 || N == 32 || N == 64 || N == 80 || N == 96 || N == 128 || N == 160 || N == 176 || N == 192;

// A and B in shared memory. A transposed operand is one whose tile's rows are contracted.
template <bool BF16, bool TRANSPOSE_A, bool TRANSPOSE_B, int ACCUMULATORS>
DEVICE void wgmma(float (&acc)[ACCUMULATORS], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(has_wgmma<ACCUMULATORS * 2>);
    WGMMA_CASES(WGMMA_SHARED, 16, 0, "8", "9", "10", "11", "12")
    WGMMA_CASES(WGMMA_SHARED, 32, 1, "16", "17", "18", "19", "20")
    WGMMA_CASES(WGMMA_SHARED, 64, 3, "32", "33", "34", "35", "36")
    WGMMA_CASES(WGMMA_SHARED, 80, 4, "40", "41", "42", "43", "44")
    WGMMA_CASES(WGMMA_SHARED, 96, 5, "48", "49", "50", "51", "52")
    WGMMA_CASES(WGMMA_SHARED, 128, 7, "64", "65", "66", "67", "68")
    WGMMA_CASES(WGMMA_SHARED, 160, 9, "80", "81", "82", "83", "84")
    WGMMA_CASES(WGMMA_SHARED, 176, 10, "88", "89", "90", "91", "92")
    WGMMA_CASES(WGMMA_SHARED, 192, 11, "96", "97", "98", "99", "100")
}

// A in registers.
template <bool BF16, bool TRANSPOSE_B, int ACCUMULATORS>
DEVICE void wgmma(float (&acc)[ACCUMULATORS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(has_wgmma<ACCUMULATORS * 2>);
    WGMMA_CASES(WGMMA_REGISTERS, 16, 0, "8", "9", "10", "11", "12", "13", "14")
    WGMMA_CASES(WGMMA_REGISTERS, 32, 1, "16", "17", "18", "19", "20", "21", "22")
    WGMMA_CASES(WGMMA_REGISTERS, 64, 3, "32", "33", "34", "35", "36", "37", "38")
    WGMMA_CASES(WGMMA_REGISTERS, 80, 4, "40", "41", "42", "43", "44", "45", "46")
    WGMMA_CASES(WGMMA_REGISTERS, 96, 5, "48", "49", "50", "51", "52", "53", "54")
    WGMMA_CASES(WGMMA_REGISTERS, 128, 7, "64", "65", "66", "67", "68", "69", "70")
    WGMMA_CASES(WGMMA_REGISTERS, 160, 9, "80", "81", "82", "83", "84", "85", "86")
    WGMMA_CASES(WGMMA_REGISTERS, 176, 10, "88", "89", "90", "91", "92", "93", "94")
    WGMMA_CASES(WGMMA_REGISTERS, 192, 11, "96", "97", "98", "99", "100", "101", "102")
}

}  // namespace fusedformer::cuda
