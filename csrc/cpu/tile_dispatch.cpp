#include <sts/check.h>
#include <sts/sae_ops.h>

#include <atomic>

#include "cpu/tile.h"
#if defined(STS_X86_64)
#include <cpuid.h>
#endif

namespace sts {
namespace cpu {
namespace {

#if defined(STS_X86_64)
/// Vectors that the processor has and the operating system keeps. __builtin_cpu_supports tells them too, but not with
/// every compiler's run-time library: it says no to everything in zig's.
struct Vectors {
    bool avx2 = false, avx512 = false;

    Vectors() {
        constexpr unsigned kXmmYmm = 0x06, kZmm = 0xe0;
        constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
        unsigned a, b, c, d, kept, kept_high;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return;
        __asm__("xgetbv" : "=a"(kept), "=d"(kept_high) : "c"(0));
        if ((kept & kXmmYmm) != kXmmYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = b & bit_AVX2;
        constexpr unsigned kAvx512 = kF | kDq | kBw | kVl;
        avx512 = avx2 && (b & kAvx512) == kAvx512 && (kept & kZmm) == kZmm;
    }
};
#endif

/// Best first.
std::vector<const TileKernels*> supported() {
    std::vector<const TileKernels*> all;
#if defined(STS_X86_64)
    const Vectors vectors;
    if (vectors.avx512) all.push_back(&kTileAvx512);
    if (vectors.avx2) all.push_back(&kTileAvx2);
#endif
    all.push_back(&kTilePortable);
    return all;
}

std::atomic<const TileKernels*>& current() {
    static std::atomic<const TileKernels*> kernels{supported().front()};
    return kernels;
}

}  // namespace

const TileKernels& tile_kernels() {
    return *current().load();
}

}  // namespace cpu

std::string instruction_set() {
    return cpu::tile_kernels().name;
}

void set_instruction_set(const std::string& name) {
    std::string names;
    for (const cpu::TileKernels* kernels : cpu::supported()) {
        if (name == kernels->name) {
            cpu::current().store(kernels);
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    check(false, "name must be an instruction set that this machine has (" + names + "), got '" + name + "'");
}

}  // namespace sts
