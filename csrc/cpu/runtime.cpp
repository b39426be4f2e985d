#include "runtime.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace fusedformer {
namespace {

constexpr size_t ALIGNMENT = 64;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Grows and is kept: fresh pages cost more than the kernels that use them.
struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;

    void* at_least(size_t bytes) {
        if (bytes > size) {
            memory.reset();
            size = 0;
            memory.reset(std::aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT));
            if (!memory) throw std::bad_alloc();
            size = bytes;
        }
        return memory.get();
    }
};

void* scratch(size_t bytes) {
    thread_local Buffer buffer;
    return buffer.at_least(bytes);
}

void* workspace(size_t bytes) {
    thread_local Buffer buffer;
    return buffer.at_least(bytes);
}

// Tasks differ in length (causality), so that each thread takes the next one when it is free. A task's result does not
// depend on who runs it.
void parallel(int64_t tasks, void (*body)(int64_t, void*), void* context) {
    const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; task++) body(task, context);
        return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, context);
    });
}

}  // namespace

Runtime runtime() { return {static_cast<int>(torch::stable::get_num_threads()), parallel, scratch, workspace}; }

}  // namespace fusedformer
