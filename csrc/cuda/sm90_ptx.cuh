#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"

/// The instructions of sm_90a that C++ has no words for; the tests' emulator has its own version of this file.
namespace sts::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Clusters: thread blocks that reach each other's shared memory.

__device__ __forceinline__ int block_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers move from the warpgroup that loads to those that multiply. All warps of a warpgroup call it.

template <int N>
__device__ __forceinline__ void give_registers_above() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void take_registers_up_to() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// A barrier in shared memory: its phase ends when the expected arrivals and bytes are in.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals));
}

/// Makes initialised barriers visible to the other block and to the tensor memory accelerator.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

/// Arrives at the barrier of the same name in a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

/// Returns once the phase of this parity has ended; a barrier starts in phase 0, and phase "-1" has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t ended;
    do {
        asm volatile(
            "{\n.reg .pred ended;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (ended == 0);
}

// The tensor memory accelerator copies the box at (column, row) and adds its bytes to the barrier.

__device__ __forceinline__ void load_box(const CUtensorMap* map, void* destination, uint64_t* barrier, int column,
                                         int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

/// The same, to the same place, and barrier, of every block in the mask.
__device__ __forceinline__ void load_box_multicast(const CUtensorMap* map, void* destination, uint64_t* barrier,
                                                   int column, int row, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
        : "memory");
}

// The asynchronous product of a warpgroup.

/// Keeps the compiler from moving uses of the accumulators across the start or the end of the products.
__device__ __forceinline__ void pin_accumulators(float (&accumulators)[128]) {
#pragma unroll
    for (float& value : accumulators) asm volatile("" : "+f"(value)::"memory");
}

__device__ __forceinline__ void product_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void product_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `n` committed groups of products are still running.
template <int n>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

/// d [64, 256] = a [64, 16] · b [16, 256] (+ d where accumulate), bf16 operands named by shared memory descriptors.
/// d[4 * i + 2 * j + e] is row 16 * warp + lane / 4 + 8 * j, column 8 * i + 2 * (lane % 4) + e of the warpgroup.
__device__ __forceinline__ void product_m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
#define STS_8(i)                                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define STS_32(i) STS_8(i), STS_8(i + 8), STS_8(i + 16), STS_8(i + 24)
    asm volatile(
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, accumulate, 1, 1, 0, 0;\n}"
        : STS_32(0), STS_32(32), STS_32(64), STS_32(96)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
#undef STS_32
#undef STS_8
}

/// For a kernel whose __cluster_dims__ are n_blocks.
template <unsigned n_blocks, class Params>
cudaError_t launch_clusters(void (*kernel)(Params), unsigned n_clusters, unsigned n_threads, size_t shared_bytes,
                            cudaStream_t stream, const Params& params) {
    return launch(kernel, n_blocks * n_clusters, n_threads, shared_bytes, stream, params);
}

}  // namespace sts::cuda::sm90
