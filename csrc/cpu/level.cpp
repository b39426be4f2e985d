#include "level.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>

namespace fusedformer {

namespace amx {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}
#ifdef FUSEDFORMER_EMULATED
namespace emulated {
extern const Kernels kernels;
}
namespace emulated_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

std::string missing(bool present, const char* name) {
    return present ? "" : std::string("this processor has no ") + name;
}

std::string avx2_refusal() {
    if (!__builtin_cpu_supports("avx2")) return missing(false, "AVX2");
    if (!__builtin_cpu_supports("fma")) return missing(false, "FMA");
    unsigned a, b, c = 0, d;
    __get_cpuid(1, &a, &b, &c, &d);
    return missing(c & bit_F16C, "F16C");
}

std::string avx512_refusal() {
    for (auto refusal : {avx2_refusal(), missing(__builtin_cpu_supports("avx512f"), "AVX-512F"),
                         missing(__builtin_cpu_supports("avx512bw"), "AVX-512BW"),
                         missing(__builtin_cpu_supports("avx512vl"), "AVX-512VL"),
                         missing(__builtin_cpu_supports("avx512dq"), "AVX-512DQ")})
        if (!refusal.empty()) return refusal;
    return "";
}

std::string avx512_bf16_refusal() {
    if (auto refusal = avx512_refusal(); !refusal.empty()) return refusal;
    unsigned a = 0, b, c, d;
    return missing(__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16) != 0, "AVX512-BF16");
}

std::string amx_refusal() {
    if (auto refusal = avx512_bf16_refusal(); !refusal.empty()) return refusal;
    unsigned a, b, c, d = 0;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX_BF16) == 0 || (d & AMX_TILE) == 0)
        return missing(false, "AMX-BF16");
    // Tile state is large, so Linux grants it to a process only on request.
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0)
        return "the operating system grants this process no AMX tile state";
    return "";
}

std::atomic<const Kernels*> asked_for{nullptr};

}  // namespace

const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        __builtin_cpu_init();
        std::vector<Level> found = {{&amx::kernels, amx_refusal()},
                                    {&avx512_bf16::kernels, avx512_bf16_refusal()},
                                    {&avx512::kernels, avx512_refusal()},
                                    {&avx2::kernels, avx2_refusal()},
                                    {&portable::kernels, ""}};
#ifdef FUSEDFORMER_EMULATED
        found.push_back({&emulated::kernels, avx2_refusal()});
        found.push_back({&emulated_bf16::kernels, avx2_refusal()});
#endif
        return found;
    }();
    return all;
}

const Kernels& chosen_kernels() {
    if (const Kernels* kernels = asked_for.load()) return *kernels;
    static const Kernels& best = [&]() -> const Kernels& {
        for (const Level& level : levels())
            if (level.refusal.empty()) return *level.kernels;
        throw std::logic_error("no instruction set level");
    }();
    return best;
}

void choose_level(const std::string& name) {
    if (name.empty()) return asked_for.store(nullptr);
    std::string known;
    for (const Level& level : levels()) {
        known += (known.empty() ? "" : ", ") + std::string(level.kernels->level);
        if (name != level.kernels->level) continue;
        if (!level.refusal.empty()) throw std::invalid_argument("level: got " + name + ", but " + level.refusal);
        return asked_for.store(level.kernels);
    }
    throw std::invalid_argument("level: got " + name + ", expected one of " + known);
}

}  // namespace fusedformer
