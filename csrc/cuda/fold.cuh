#pragma once
#include <cuda_runtime.h>
#include <sts/cuda/ops.h>

namespace sts::cuda {

/// Adds the slab's rows to the targets in the order of slots, in float64.
cudaError_t fold_slab(const Device& device, const double* slab, SlabShape shape, int64_t n_features,
                      const SumTargets& targets, const int64_t* status, int n_status);

}  // namespace sts::cuda
