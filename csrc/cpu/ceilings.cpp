// What this machine reaches at best on as many threads as torch uses: FLOP/s of multiply-add, of dot products of
// pairs or of tile products, bytes/s read from a working set. And reading by itself, of memory that something else
// reads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "level.h"
#include "runtime.h"

namespace {

using namespace fusedformer;

constexpr int64_t LEAST_BYTES = 16384;  // of each thread
constexpr double SAMPLE_SECONDS = 4e-3;
constexpr int SAMPLES = 10;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

struct Measurement {
    Ceiling kind;
    const Kernels& kernels;
    char* data;
    int64_t bytes;  // of each thread
    int64_t rounds;
    double work = 0.0;
};

Ceiling kind_of(const std::string& name) {
    if (name == "fma") return Ceiling::fma;
    if (name == "dot") return Ceiling::dot;
    if (name == "amx") return Ceiling::amx;
    if (name == "read") return Ceiling::read;
    throw std::invalid_argument("kind: got " + name + ", expected one of fma, dot, amx, read");
}

// Pairs of bfloat16 numbers in [1, 2) of either sign: as float32 they are just as ordinary.
void fill(int64_t thread, void* context) {
    const auto& m = *static_cast<Measurement*>(context);
    auto* words = reinterpret_cast<uint32_t*>(m.data + thread * m.bytes);
    uint32_t state = static_cast<uint32_t>(thread) + 1;
    for (int64_t i = 0; i < m.bytes / 4; i++) {
        state = state * 1664525u + 1013904223u;
        words[i] = (state & 0x807f807fu) | 0x3f803f80u;
    }
}

void work(int64_t thread, void* context) {
    auto& m = *static_cast<Measurement*>(context);
    const double done = m.kernels.ceiling(m.kind, m.data + thread * m.bytes, m.bytes, m.rounds);
    if (thread == 0) m.work = done;
}

double cpu_ceiling(std::string kind, int64_t bytes) {
    const Runtime threads = runtime();
    Measurement m{kind_of(kind), chosen_kernels(), nullptr, std::max(bytes / threads.threads, LEAST_BYTES) / 64 * 64,
                  1};
    const size_t size = static_cast<size_t>(m.bytes) * threads.threads;
    const std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(64, size)));
    if (!memory) throw std::bad_alloc();
    m.data = memory.get();
    threads.parallel(threads.threads, fill, &m);

    auto seconds = [&](int64_t tasks) {
        const auto start = std::chrono::steady_clock::now();
        threads.parallel(tasks, work, &m);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    // How often, by this thread alone: where others wait for a core, threads that wait for each other take anything.
    double alone = seconds(1);
    if (m.work == 0.0)
        throw std::invalid_argument("kind: got " + kind + ", which level " + m.kernels.level + " has not");
    for (; alone < SAMPLE_SECONDS; alone = std::min(seconds(1), seconds(1))) m.rounds *= 2;
    double least = seconds(threads.threads);
    for (int i = 1; i < SAMPLES; i++) least = std::min(least, seconds(threads.threads));
    return threads.threads * m.work / least;
}

// Reads contiguous tensors of bytes once; returns how many. Each thread leaves out what is less than a loop reads.
int64_t cpu_read(std::vector<torch::stable::Tensor> tensors) {
    const Runtime threads = runtime();
    double read = 0.0;
    for (const auto& tensor : tensors) {
        if (tensor.element_size() != 1 || !tensor.is_contiguous())
            throw std::invalid_argument("tensors: got one that is not contiguous or not of bytes");
        Measurement m{Ceiling::read, chosen_kernels(), static_cast<char*>(tensor.data_ptr()),
                      tensor.numel() / threads.threads / 64 * 64, 1};
        threads.parallel(threads.threads, work, &m);
        read += threads.threads * m.work;
    }
    return static_cast<int64_t>(read);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
    m.def("cpu_ceiling(str kind, int bytes) -> float");
    m.def("cpu_read(Tensor[] tensors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CompositeExplicitAutograd, m) {
    m.impl("cpu_ceiling", TORCH_BOX(&cpu_ceiling));
    m.impl("cpu_read", TORCH_BOX(&cpu_read));
}
