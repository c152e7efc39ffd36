// The place of the CUDA ops. Imported lazily; loads on a machine without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

/// 0 where there is no driver or no device.
int device_count() {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

std::string missing_reason() {
    return "this version has no CUDA ops yet (" + std::to_string(device_count()) +
           " CUDA device(s) seen): move the activations to the CPU";
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.def("device_count", &device_count);
    m.def("missing_reason", &missing_reason);
}
