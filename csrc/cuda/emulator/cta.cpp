#include "cta.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace fusedformer::cuda::emulator {
namespace {

constexpr int kGuard = 4096;                    // bytes before and after shared memory that nobody may touch
constexpr char kNaN = static_cast<char>(0xFF);  // bytes that are NaN in every type
constexpr int kRegisterFile = 65536;
constexpr int kMostRegisters = 255;
constexpr int kMostShared = 227 * 1024;

thread_local Block* running = nullptr;

// A barrier's word: what the hardware keeps there too, and a mark of the initialised.
struct BarrierWord {
    uint64_t pending : 12, count : 12, phase : 1, mark : 15;
    int64_t bytes : 24;
};
static_assert(sizeof(BarrierWord) == sizeof(uint64_t));
constexpr unsigned kMark = 0x2BAD;

BarrierWord load_barrier(const uint64_t* bar) {
    block().offset_of(bar, sizeof(*bar));
    BarrierWord word;
    std::memcpy(&word, bar, sizeof(word));
    if (word.mark != kMark)
        fail("a barrier at %u of shared memory that was not initialised", block().offset_of(bar, 8));
    const Initialised& by = block().barriers.at(block().offset_of(bar, 8));
    if (by.thread != block().fibers.current() && (!by.fenced || by.round == block().named[0].round))
        fail("a barrier at %u that was not shown to the others since its initialisation", block().offset_of(bar, 8));
    return word;
}

void store_barrier(uint64_t* bar, BarrierWord word) {
    if (word.pending == 0 && word.bytes == 0) word.phase ^= 1, word.pending = word.count;
    std::memcpy(bar, &word, sizeof(word));
}

void start_block(Block& b, int threads, size_t shared_bytes) {
    b.threads = threads;
    b.shared_bytes = static_cast<uint32_t>(shared_bytes);
    b.allocation.assign(shared_bytes + 2 * kGuard + 1024, kNaN);
    const auto start = reinterpret_cast<uintptr_t>(b.allocation.data()) + kGuard;
    b.shared = reinterpret_cast<char*>((start + 1023) / 1024 * 1024);
    b.async_view.assign(shared_bytes, kNaN);
    b.thread.assign(threads, {});
    b.warps.assign((threads + 31) / 32, {});
    b.warpgroups.assign((threads + 127) / 128, {});
    for (Meeting& meeting : b.named) meeting = {};
    b.loads.clear();
    b.barriers.clear();
    int each = kRegisterFile / threads / 8 * 8;
    each = each > kMostRegisters ? kMostRegisters : each;
    for (Thread& thread : b.thread) thread.registers = each;
    b.free_registers = 0;  // the pool of a block is what it was launched with
}

// What is left undone or overwritten at a block's end; "" if nothing.
std::string left_behind(const Block& b) {
    if (!b.loads.empty()) return "a TMA load that nobody waited for";
    for (const Thread& thread : b.thread)
        if (!thread.products.empty())
            return "a WGMMA that nobody waited for";
        else if (!thread.copies.copies.empty())
            return "a copy to shared memory that nobody waited for";
    for (int id = 0; id < 16; ++id)
        if (b.named[id].arrived != 0) return "threads arrived at barrier " + std::to_string(id) + " in vain";
    const char* end = b.allocation.data() + b.allocation.size();
    for (const char* p = b.allocation.data(); p < end; ++p) {
        if (p == b.shared) p += b.shared_bytes;
        if (*p != kNaN) return "a write at " + std::to_string(p - b.shared) + ", outside shared memory";
    }
    return "";
}

}  // namespace

Block& block() { return *running; }

uint32_t Block::offset_of(const void* pointer, size_t size) const {
    const long offset = static_cast<const char*>(pointer) - shared;
    check_range(offset, size, "an access");
    return static_cast<uint32_t>(offset);
}

void Block::check_range(long offset, size_t size, const char* what) const {
    if (offset < 0 || offset + size > shared_bytes)
        fail("%s of %zu bytes at %ld of %u bytes of shared memory", what, size, offset, shared_bytes);
}

const char* run_grid(int x, int y, int z, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    static thread_local std::unique_ptr<Block> storage;
    static thread_local std::string error;
    if (x < 1 || y < 1 || z < 1 || y > 65535 || z > 65535) return "invalid grid";
    if (threads < 1 || threads > kMostThreads || threads % 32 != 0) return "invalid number of threads";
    if (shared_bytes > kMostShared) return "too much shared memory";
    if (storage == nullptr) storage = std::make_unique<Block>();
    Block& b = *storage;
    running = &b;
    const char* text = std::getenv("FUSEDFORMER_EMULATED_SEED");
    uint64_t seed = text == nullptr ? 0 : std::strtoull(text, nullptr, 10) * 0x9E3779B97F4A7C15u;
    b.grid = {x, y, z};
    for (int i = 0; i < x * y * z; ++i) {
        b.index = {i % x, i / x % y, i / x / y};
        start_block(b, threads, shared_bytes);
        error = b.fibers.run(threads, seed, [&] {
            kernel();
            finish_stores();
        });
        if (error.empty()) error = left_behind(b);
        if (!error.empty()) {
            error = "block (" + std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " +
                    std::to_string(b.index.z) + "), " + error;
            return error.c_str();
        }
    }
    return nullptr;
}

// ---- threads that meet

void warp_exchange(uint64_t mine, uint64_t (&all)[32]) {
    Warp& warp = block().warp();
    const long round = warp.meeting.round;
    uint64_t (&slots)[32] = warp.slots[round % 2];
    slots[block().fibers.current() % 32] = mine;
    if (!warp.meeting.arrive(32))
        block().fibers.wait_until([&] { return warp.meeting.round != round; }, {"their warp", 0, 0});
    std::memcpy(all, slots, sizeof(all));
}

uint64_t exchange(uint64_t mine, int lane) {
    uint64_t all[32];
    warp_exchange(mine, all);
    return all[lane & 31];
}

void meet_warp() {
    land_copies();
    exchange(0, 0);
}

void meet_named(int id, int threads, bool wait) {
    Block& b = block();
    if (id < 0 || id > 15 || threads % 32 != 0 || threads < 32 || threads > b.threads)
        fail("barrier %d for %d threads", id, threads);
    land_copies();
    Meeting& meeting = b.named[id];
    if (meeting.arrived != 0 && meeting.expected != threads)
        fail("barrier %d for %d threads, where others came for %d", id, threads, meeting.expected);
    const long round = meeting.round;
    if (!meeting.arrive(threads) && wait)
        b.fibers.wait_until([&] { return meeting.round != round; }, {"barrier %ld of %ld threads", id, threads});
}

void meet_warpgroup(const std::function<void()>& work, const char* what) {
    Block& b = block();
    Meeting& meeting = b.warpgroups[b.fibers.current() / 128];
    const long round = meeting.round;
    if (meeting.arrived == 127) {
        b.fibers.rest();  // as late as it may be: who was let go too early has gone
        work();
    }
    if (!meeting.arrive(128)) b.fibers.wait_until([&] { return meeting.round != round; }, {what, 0, 0});
}

void change_registers(int count, bool increase) {
    Block& b = block();
    Thread& self = b.self();
    const int more = count - self.registers;
    if (count % 8 != 0 || count < 24 || count > 256) fail("setmaxnreg %d", count);
    if (more != 0 && (more > 0) != increase) fail("setmaxnreg to %d from %d", count, self.registers);
    b.fibers.wait_until([&] { return b.free_registers >= more; }, {"%ld registers", more, 0});
    b.free_registers -= more;
    self.registers = count;
}

void wait_for_flag(const uint32_t* flag, uint32_t value) {
    const volatile uint32_t* shown = flag;
    block().fibers.wait_until([&] { return *shown == value; }, {"a flag to become %ld", static_cast<long>(value), 0});
}

// ---- shared memory's two views

void stored(const void* destination, size_t size) {
    const uint32_t offset = block().offset_of(destination, size);
    if (offset % size != 0) fail("a store of %zu bytes at %u", size, offset);
    std::memset(block().async_view.data() + offset, kNaN, size);  // either value may be read until it is fenced
    block().self().unpublished.push_back({offset, static_cast<uint32_t>(size)});
}

void publish() {
    Block& b = block();
    for (const Range& range : b.self().unpublished)
        std::memcpy(b.async_view.data() + range.offset, b.shared + range.offset, range.size);
    b.self().unpublished.clear();
}

// ---- barriers in shared memory

void barrier_init(uint64_t* bar, int count) {
    block().offset_of(bar, sizeof(*bar));
    if (reinterpret_cast<uintptr_t>(bar) % 8 != 0 || count < 1 || count > 4095) fail("a barrier of count %d", count);
    BarrierWord word{};
    word.pending = word.count = static_cast<unsigned>(count), word.mark = kMark;
    std::memcpy(bar, &word, sizeof(word));
    block().barriers[block().offset_of(bar, 8)] = {block().fibers.current(), block().named[0].round, false};
}

void barrier_init_fence() {
    for (auto& [offset, by] : block().barriers) by.fenced |= by.thread == block().fibers.current();
}

void barrier_arrive(uint64_t* bar, int bytes) {
    BarrierWord word = load_barrier(bar);
    word.bytes += bytes;
    --word.pending;  // never from 0: the phase would have ended, but for bytes that are still to come
    if (word.pending == 4095) fail("one arrival too many at the barrier at %u", block().offset_of(bar, 8));
    store_barrier(bar, word);
}

void barrier_bytes_came(uint64_t* bar, int bytes) {
    BarrierWord word = load_barrier(bar);
    word.bytes -= bytes;
    store_barrier(bar, word);
}

void barrier_wait(uint64_t* bar, int parity) {
    block().fibers.wait_until(
        [&] {
            if (load_barrier(bar).phase != static_cast<unsigned>(parity)) return true;
            land_loads(bar);
            return load_barrier(bar).phase != static_cast<unsigned>(parity);
        },
        {"the barrier at %ld of shared memory to end a phase of parity %ld", block().offset_of(bar, 8), parity});
}

}  // namespace fusedformer::cuda::emulator
