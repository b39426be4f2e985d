#include "mma.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cta.h"
#include "numbers.h"

namespace fusedformer::cuda::emulator {
namespace {

constexpr int kChunk = 16;

void land(const PendingCopy& copy) {
    char* to = block().shared + copy.destination;
    if (copy.source != nullptr)
        std::memcpy(to, copy.source, kChunk);
    else
        std::memset(to, 0, kChunk);
}

float number(uint32_t word, int half, bool bf16) {
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    return bf16 ? from_bf16(bits) : from_half(bits);
}

// The tensor cores' rounding, as Fasi, Higham, Mikaitis and Pranesh measured it (2021): products are exact, and a sum
// of some is cut, not rounded.
float toward_zero(double x) {
    const auto rounded = static_cast<float>(x);
    return std::abs(rounded) > std::abs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

// d += a b of a warp. Whose element is whose: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void multiply_fragments(const uint64_t (&parts)[32]) {
    float a[16][16], b[16][8];
    const auto part = [&](int lane) -> const FragmentProduct& {
        return *reinterpret_cast<const FragmentProduct*>(parts[lane]);
    };
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const FragmentProduct& p = part(lane);
            if (p.bf16 != part(0).bf16) fail("lanes 0 and %d of a warp call different products", lane);
            for (int i = 0; i < 4; ++i)
                a[lane / 4 + 8 * (i % 2)][lane % 4 * 2 + 8 * (i / 2) + half] = number(p.a[i], half, p.bf16);
            for (int i = 0; i < 2; ++i) b[lane % 4 * 2 + 8 * i + half][lane / 4] = number(p.b[i], half, p.bf16);
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            double sum = part(lane).d[i];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            part(lane).d[i] = toward_zero(sum);
        }
}

}  // namespace

void copy_async(void* destination, const void* source, bool exists) {
    Block& b = block();
    CopyQueue& queue = b.self().copies;
    const PendingCopy copy{b.offset_of(destination, kChunk), exists ? source : nullptr, queue.groups};
    if (copy.destination % kChunk != 0 || reinterpret_cast<uintptr_t>(source) % kChunk != 0)
        fail("a copy from %p to %u of shared memory, not multiples of 16", source, copy.destination);
    std::memset(destination, 0xFF, kChunk);  // from here on what was there may be gone
    if (b.fibers.coin())
        land(copy);
    else
        queue.copies.push_back(copy);
}

void commit_copies() { ++block().self().copies.groups; }

void wait_for_copies(int pending) {
    CopyQueue& queue = block().self().copies;
    queue.done_below = std::max(queue.done_below, queue.groups - pending);
}

void land_copies() {
    CopyQueue& queue = block().self().copies;
    const auto waited = [&](const PendingCopy& copy) { return copy.group < queue.done_below; };
    for (const PendingCopy& copy : queue.copies)
        if (waited(copy)) land(copy);
    std::erase_if(queue.copies, waited);
}

void multiply(FragmentProduct mine) {
    Block& b = block();
    Warp& warp = b.warp();
    const long round = warp.meeting.round;
    uint64_t (&parts)[32] = warp.slots[round % 2];
    parts[b.fibers.current() % 32] = reinterpret_cast<uint64_t>(&mine);
    if (warp.meeting.arrived == 31) multiply_fragments(parts);
    if (!warp.meeting.arrive(32))
        b.fibers.wait_until([&] { return warp.meeting.round != round; }, {"their warp's product", 0, 0});
}

// PTX ISA, "ldmatrix": lane l has the address of row l % 8 of matrix l / 8.
void load_matrix(uint32_t (&r)[4], const void* row, bool transposed) {
    uint64_t rows[32];
    warp_exchange(reinterpret_cast<uint64_t>(row), rows);
    const int lane = block().fibers.current() % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        r[matrix] = 0;
        for (int half = 0; half < 2; ++half) {
            const int first = lane / 4, second = lane % 4 * 2 + half;
            const int at_row = transposed ? second : first, column = transposed ? first : second;
            const auto* from = reinterpret_cast<const char*>(rows[8 * matrix + at_row]);
            if (block().offset_of(from, kChunk) % kChunk != 0) fail("a row of ldmatrix that is not a multiple of 16");
            uint16_t element;
            std::memcpy(&element, from + 2 * column, 2);
            r[matrix] |= static_cast<uint32_t>(element) << 16 * half;
        }
    }
}

}  // namespace fusedformer::cuda::emulator
