#include <sts/check.h>
#include <sts/sae_ops.h>

#include <atomic>

#include "cpu/tile.h"

namespace sts {
namespace cpu {
namespace {

/// Best first.
std::vector<const TileKernels*> supported() {
    std::vector<const TileKernels*> all;
#if defined(STS_X86_64)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        all.push_back(&kTileAvx512);
    if (avx2) all.push_back(&kTileAvx2);
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
