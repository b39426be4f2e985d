#include "tensor_core.h"

#include <algorithm>
#include <cstring>

#include "cta.h"
#include "numbers.h"

namespace fusedformer::cuda::emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
constexpr uint32_t kPoison = 0x7FC0DEAD;  // NaN, in registers of a product under way

float number(uint16_t bits, bool bf16) { return bf16 ? from_bf16(bits) : from_half(bits); }

// Tensor cores add exactly what one instruction multiplies, or nearly so, and cut the sum off to a float.
float cut(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    bits &= ~uint64_t{0x1FFFFFFF};
    std::memcpy(&x, &bits, 8);
    return static_cast<float>(x);
}

// Element (k, i) of a described operand of `extent` columns or rows, i running over these: read as hardware would, from
// the descriptor's bits. With the 128-byte swizzle an atom is 8 rows of 128 bytes.
//   K-major:  rows are i, 16 k in a row's bytes; the stride leads to the next 8 i.
//   MN-major: rows are k, 64 i in a row's bytes; the stride leads to the next 8 k, the leading offset to the next 64 i.
class Described {
  public:
    Described(uint64_t bits, bool transposed, bool bf16) : transposed_(transposed), bf16_(bf16) {
        const auto field = [&](int low) { return static_cast<uint32_t>((bits >> low & 0x3FFF) << 4); };
        start_ = field(0), leading_ = field(16), stride_ = field(32);
        if (bits >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
        if ((bits >> 49 & 7) != 0) fail("a descriptor with a base offset");
    }
    float operator()(int k, int i) const {
        const uint32_t plain = transposed_ ? start_ + i / 64 * leading_ + k / 8 * stride_ + k % 8 * 128 + i % 64 * 2
                                           : start_ + i / 8 * stride_ + i % 8 * 128 + k * 2;
        const uint32_t address = plain ^ ((plain >> 7 & 7) << 4);
        block().check_range(address, 2, "a read of WGMMA");
        uint16_t bits;
        std::memcpy(&bits, block().async_view.data() + address, 2);
        return number(bits, bf16_);
    }

  private:
    uint32_t start_, leading_, stride_;
    bool transposed_, bf16_;
};

Held& held_by(TensorCoreQueue& queue, const float* acc) {
    return *std::find_if(queue.held.begin(), queue.held.end(), [&](const Held& held) { return held.acc == acc; });
}

bool alike(const Product& x, const Product& y) {
    return x.accumulators == y.accumulators && (x.a == nullptr) == (y.a == nullptr) &&
           x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor && x.accumulate == y.accumulate &&
           x.group == y.group && x.bf16 == y.bf16 && x.transpose_a == y.transpose_a && x.transpose_b == y.transpose_b;
}

// One product of 128 threads, on what their accumulators hold.
void multiply(Thread* threads, size_t index) {
    const Product& first = threads[0].products.products[index];
    const int columns = first.accumulators * 2;
    static thread_local float a[kRows][kDepth], b[kDepth][kMostColumns], d[kRows][kMostColumns];
    const Described a_tile(first.a == nullptr ? first.a_descriptor : uint64_t{1} << 62, first.transpose_a, first.bf16);
    const Described b_tile(first.b_descriptor, first.transpose_b, first.bf16);
    for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < columns; ++column) b[k][column] = b_tile(k, column);
        if (first.a == nullptr)
            for (int row = 0; row < kRows; ++row) a[row][k] = a_tile(k, row);
    }
    for (int t = 0; t < 128; ++t) {
        const Product& mine = threads[t].products.products[index];
        if (!alike(mine, first)) fail("threads 0 and %d of a warpgroup call different WGMMAs", t);
        const Held& held = held_by(threads[t].products, mine.acc);
        for (int i = 0; i < mine.accumulators; ++i) {
            const Place at = of_accumulator(t, i);
            d[at.row][at.column] = mine.accumulate ? held.values[i] : 0.0f;
        }
        for (int pair = 0; mine.a != nullptr && pair < 4; ++pair) {
            const Place at = of_operand(t, pair);
            a[at.row][at.column] = number(static_cast<uint16_t>(mine.a[pair]), mine.bf16);
            a[at.row][at.column + 1] = number(static_cast<uint16_t>(mine.a[pair] >> 16), mine.bf16);
        }
    }
    for (int row = 0; row < kRows; ++row) {
        double sums[kMostColumns];
        std::copy(d[row], d[row] + columns, sums);
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < columns; ++column) sums[column] += double{a[row][k]} * b[k][column];
        for (int column = 0; column < columns; ++column) d[row][column] = cut(sums[column]);
    }
    for (int t = 0; t < 128; ++t) {
        const Product& mine = threads[t].products.products[index];
        Held& held = held_by(threads[t].products, mine.acc);
        for (int i = 0; i < mine.accumulators; ++i) {
            const Place at = of_accumulator(t, i);
            held.values[i] = d[at.row][at.column];
        }
    }
}

// Gives back the registers of accumulators that no product is using any more.
void give_back(TensorCoreQueue& queue) {
    for (size_t i = queue.held.size(); i-- > 0;) {
        const Held& held = queue.held[i];
        const auto uses = [&](const Product& product) { return product.acc == held.acc; };
        if (std::any_of(queue.products.begin(), queue.products.end(), uses)) continue;
        for (size_t j = 0; j < held.values.size(); ++j) {
            uint32_t bits;
            std::memcpy(&bits, held.acc + j, 4);
            if (bits != kPoison) fail("an accumulator was written while a WGMMA was under way");
        }
        std::memcpy(held.acc, held.values.data(), held.values.size() * sizeof(float));
        queue.held.erase(queue.held.begin() + i);
    }
}

void complete(Thread* threads) {
    const TensorCoreQueue& first = threads[0].products;
    for (int t = 1; t < 128; ++t)
        if (threads[t].products.products.size() != first.products.size() ||
            threads[t].products.done_below != first.done_below)
            fail("threads 0 and %d of a warpgroup wait for different WGMMAs", t);
    size_t ended = 0;
    while (ended < first.products.size() && first.products[ended].group < first.done_below) multiply(threads, ended++);
    for (int t = 0; t < 128; ++t) {
        TensorCoreQueue& queue = threads[t].products;
        queue.products.erase(queue.products.begin(), queue.products.begin() + ended);
        if (ended > 0) give_back(queue);
    }
}

}  // namespace

Place of_accumulator(int thread, int i) {
    const int warp = thread / 32, lane = thread % 32;
    return {16 * warp + lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}

Place of_operand(int thread, int pair) {
    const int warp = thread / 32, lane = thread % 32;
    return {16 * warp + lane / 4 + 8 * (pair % 2), 8 * (pair / 2) + 2 * (lane % 4)};
}

void issue(Product product) {
    TensorCoreQueue& queue = block().self().products;
    if (!queue.fenced) fail("a WGMMA without a wgmma_fence since registers were last in the threads' hands");
    product.group = queue.groups;
    const auto mine = [&](const Held& held) { return held.acc == product.acc; };
    if (std::none_of(queue.held.begin(), queue.held.end(), mine)) {
        queue.held.push_back({product.acc, {product.acc, product.acc + product.accumulators}});
        for (int i = 0; i < product.accumulators; ++i) std::memcpy(product.acc + i, &kPoison, 4);
    }
    queue.products.push_back(product);
}

void fence_products() { block().self().products.fenced = true; }

void commit_products() { ++block().self().products.groups; }

void wait_for_products(int pending) {
    TensorCoreQueue& queue = block().self().products;
    queue.done_below = queue.groups - pending;
    const int first = block().fibers.current() / 128 * 128;
    meet_warpgroup([&] { complete(&block().thread[first]); }, "their warpgroup's wgmma_wait");
    queue.fenced = false;
}

}  // namespace fusedformer::cuda::emulator
