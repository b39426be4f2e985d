// WGMMA: products of fragments and described tiles, done when they are waited for.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedformer::cuda::emulator {

struct Place {
    int row, column;
};

// Whose element is whose: PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16". Of thread 0..127 of a warpgroup,
// the place of accumulator i, and of the first of the two numbers in register `pair` of the first operand.
Place of_accumulator(int thread, int i);
Place of_operand(int thread, int pair);

// One thread's part in a product of its warpgroup.
struct Product {
    float* acc;
    int accumulators;
    const uint32_t* a;  // registers, or null: described
    uint64_t a_descriptor, b_descriptor;
    bool bf16, transpose_a, transpose_b, accumulate;
    long group;
};

// What accumulators hold while their registers may not be looked at.
struct Held {
    float* acc;
    std::vector<float> values;
};

struct TensorCoreQueue {
    std::vector<Product> products;
    std::vector<Held> held;
    long groups = 0;  // committed
    bool fenced = false;
    long done_below = 0;  // groups that the present wait ends

    bool empty() const { return products.empty(); }
};

void issue(Product product);
void fence_products();
void commit_products();
void wait_for_products(int pending);

}  // namespace fusedformer::cuda::emulator
