// The only file of the CUDA core that knows Python. Imported lazily; loads on a machine without a driver. Tensors are
// torch's, read through their attributes: sts_fast.ops.cuda allocates and checks, this file only looks at types and
// places.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <sts/cuda/ops.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace sts::cuda;

#ifndef STS_CUDA_MODULE
#define STS_CUDA_MODULE _cuda
#endif

namespace {

#ifdef STS_EMULATOR
constexpr const char *kDeviceType = "cpu", *kAutomaticLoop = "sm80";  // which takes less time to emulate
#else
constexpr const char *kDeviceType = "cuda", *kAutomaticLoop = "sm90";
#endif

/// 0 where there is no driver or no device.
int device_count() {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

py::object missing_reason() {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) return py::str(std::string("no CUDA device can be used: ") + cudaGetErrorString(error));
    if (n == 0) return py::str("there is no CUDA device");
    return py::none();
}

void launched(cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("a CUDA kernel did not start: ") + cudaGetErrorString(error));
}

std::string text(const py::handle& object) {
    return py::str(object).cast<std::string>();
}

/// A torch tensor of this device, contiguous; null for None.
struct Tensor {
    void* data = nullptr;
    int64_t shape[2] = {0, 0};

    Tensor(const py::object& tensor, const char* dtype) {
        if (tensor.is_none()) return;
        if (text(tensor.attr("dtype")) != std::string("torch.") + dtype)
            throw std::invalid_argument("a workspace must be " + std::string(dtype) + ", got " +
                                        text(tensor.attr("dtype")));
        if (text(tensor.attr("device").attr("type")) != kDeviceType || !tensor.attr("is_contiguous")().cast<bool>())
            throw std::invalid_argument("a workspace must be contiguous on the " + std::string(kDeviceType) +
                                        " device");
        data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
        const auto sizes = tensor.attr("shape").cast<py::tuple>();
        for (size_t i = 0; i < 2 && i < sizes.size(); ++i) shape[i] = sizes[i].cast<int64_t>();
    }
};

template <class T>
T* data(const py::object& tensor, const char* dtype) {
    return static_cast<T*>(Tensor(tensor, dtype).data);
}

float* floats(const py::object& tensor) {
    return data<float>(tensor, "float32");
}
uint16_t* bfloat16s(const py::object& tensor) {
    return data<uint16_t>(tensor, "bfloat16");
}
int64_t* int64s(const py::object& tensor) {
    return data<int64_t>(tensor, "int64");
}
double* doubles(const py::object& tensor) {
    return data<double>(tensor, "float64");
}
int32_t* int32s(const py::object& tensor) {
    return data<int32_t>(tensor, "int32");
}

template <class T>
sts::Span<const T> span(const py::object& tensor, const char* dtype) {
    const Tensor given(tensor, dtype);
    return {static_cast<const T*>(given.data), given.shape[0]};
}

Device make_device(int index, uintptr_t stream, const std::string& loop) {
    Device device{};
    launched(find_device(index, reinterpret_cast<cudaStream_t>(stream), &device));
    if (loop == "sm90" && !device.sm90)
        throw std::invalid_argument("the main loop sm90 needs a Hopper GPU, a driver of CUDA 12, and a build for 90a");
    device.sm90 = device.sm90 && (loop == "automatic" ? kAutomaticLoop : loop) == std::string("sm90");
    return device;
}

/// The main loops that can run on a device.
py::tuple main_loops(int index) {
    Device device{};
    launched(find_device(index, nullptr, &device));
    if (device.sm90) return py::make_tuple("sm80", "sm90");
    return py::make_tuple("sm80");
}

/// [n_rows, depth], in bfloat16 parts or float32; keeps the tensors alive.
struct PreparedRows {
    const py::object hi_, lo_;
    Operand operand{};
    int64_t depth;
    bool is_float;

    PreparedRows(const py::object& hi, const py::object& lo)
        : hi_(hi), lo_(lo), is_float(text(hi.attr("dtype")) == "torch.float32") {
        const auto shape = hi.attr("shape").cast<std::pair<int64_t, int64_t>>();
        const auto strides = hi.attr("stride")().cast<std::pair<int64_t, int64_t>>();
        depth = shape.second;
        operand = {{bits_of(hi), lo.is_none() ? nullptr : bits_of(lo)}, shape.first, strides.first};
        if (depth % kDepth || strides.second != 1 || reinterpret_cast<uintptr_t>(operand.parts[0]) % 16 ||
            strides.first % 8 || (!lo.is_none() && !lo.attr("stride")().equal(hi.attr("stride")())))
            throw std::invalid_argument("prepared rows must be padded to a multiple of " + std::to_string(kDepth) +
                                        " and aligned, their parts alike");
    }

  private:
    static const uint16_t* bits_of(const py::object& tensor) {
        if (text(tensor.attr("device").attr("type")) != kDeviceType)
            throw std::invalid_argument("prepared rows must be on the " + std::string(kDeviceType) + " device");
        return reinterpret_cast<const uint16_t*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    }
};

Product make_product(const PreparedRows& W, const PreparedRows& base, const PreparedRows* other) {
    const PreparedRows& second = other ? *other : base;
    if (W.depth != base.depth || W.is_float != base.is_float || second.depth != base.depth ||
        second.is_float != base.is_float || second.operand.n_rows != base.operand.n_rows ||
        !second.operand.parts[1] != !base.operand.parts[1])
        throw std::invalid_argument("the operands of a product must be prepared alike");
    return {W.operand, base.operand, second.operand, terms_of(W.operand.parts[1], base.operand.parts[1]),
            W.depth,   W.is_float};
}

Vectors make_vectors(const py::object& scale, const py::object& bias, const py::object& gate, bool gated) {
    return {floats(scale), floats(bias), floats(gate), gated};
}

/// (tensor or None, ...), each float64 or int64 [n_features], or a column of a [n_features, K] table as (tensor,
/// column).
SumTargets make_targets(const py::tuple& given) {
    SumTargets targets{};
    for (size_t s = 0; s < given.size() && s < kMaxSums; ++s) {
        if (given[s].is_none()) continue;
        const bool in_table = py::isinstance<py::tuple>(given[s]);
        const py::object tensor = in_table ? py::object(given[s].cast<py::tuple>()[0]) : py::object(given[s]);
        const int64_t column = in_table ? given[s].cast<py::tuple>()[1].cast<int64_t>() : 0;
        targets.is_count[s] = text(tensor.attr("dtype")) == "torch.int64";
        const Tensor to(tensor, targets.is_count[s] ? "int64" : "float64");
        targets.stride[s] = in_table ? to.shape[1] : 1;
        targets.data[s] = static_cast<double*>(to.data) + column;
    }
    return targets;
}

int count_of(const py::object& tensor) {
    return static_cast<int>(Tensor(tensor, "int64").shape[0]);
}

RowLists make_lists(const py::object& lists) {
    if (lists.is_none()) return {};
    const auto given = lists.cast<py::tuple>();
    const Tensor columns(given[0], "int32");
    return {static_cast<int32_t*>(columns.data), floats(given[1]), int32s(given[2]), columns.shape[1]};
}

void prepare(const Device& device, const py::object& acts, const std::string& input_norm, const py::object& hi,
             const py::object& lo, int64_t depth, int64_t first_row, const py::object& status, int64_t word) {
    const std::string dtype = text(acts.attr("dtype"));
    const auto shape = acts.attr("shape").cast<py::tuple>();
    const Rows rows{reinterpret_cast<const void*>(acts.attr("data_ptr")().cast<uintptr_t>()),
                    dtype == "torch.float32"    ? Element::float32
                    : dtype == "torch.bfloat16" ? Element::bfloat16
                                                : Element::float16,
                    shape[0].cast<int64_t>(), shape[1].cast<int64_t>(), acts.attr("stride")(0).cast<int64_t>()};
    const sts::InputNorm norm = input_norm == "layer_norm" ? sts::InputNorm::layer_norm
                                : input_norm == "none"     ? sts::InputNorm::none
                                                           : sts::InputNorm::constant_norm_rescale;
    const bool as_float = !hi.is_none() && text(hi.attr("dtype")) == "torch.float32";
    launched(prepare_rows(device, rows, norm, as_float ? nullptr : bfloat16s(hi), bfloat16s(lo),
                          as_float ? floats(hi) : nullptr, depth, first_row, int64s(status) + word));
}

/// (indptr, indices, values)
sts::SparseView make_rows(const py::tuple& given) {
    return {span<int64_t>(given[0], "int64"), span<int32_t>(given[1], "int32"), span<float>(given[2], "float32")};
}

PromptTokens make_tokens(const py::tuple& base, const py::object& base_starts, const py::tuple& other,
                         const py::object& other_starts, const py::object& pair_at, int64_t d_sae, int window) {
    const auto starts = span<int64_t>(base_starts, "int64");
    if (window <= 0 || window % 32) throw std::invalid_argument("a window must be a multiple of 32 features");
    return {make_rows(base), make_rows(other), starts.data, int64s(other_starts),
            int64s(pair_at), starts.size - 1,  d_sae,       window};
}

py::tuple as_tuple(const SlabShape& shape) {
    return py::make_tuple(shape.n_slots, shape.n_sums);
}

}  // namespace

// The docstrings are in _cuda.pyi. Classes are this module's own: the tests load it beside its emulated twin.
PYBIND11_MODULE(STS_CUDA_MODULE, m) {
#ifdef STS_EMULATOR
    // Another order in which threads take turns.
    m.def(
        "set_order",
        [](uint64_t seed, bool warp_is_late) {
            emulator::Machine::get().seed = seed;
            emulator::Machine::get().warp_is_late = warp_is_late;
        },
        py::arg("seed") = 1, py::arg("warp_is_late") = false);
#endif
    m.def("device_count", &device_count);
    m.def("missing_reason", &missing_reason);
    m.def("main_loops", &main_loops, py::arg("index"));
    m.attr("depth_multiple") = kDepth;
    m.attr("row_weights") = kRowWeights;
    m.attr("fine") = kFine;
    py::class_<Device>(m, "Device", py::module_local())
        .def(py::init(&make_device), py::arg("index"), py::arg("stream"), py::arg("loop"))
        .def_readonly("n_multiprocessors", &Device::n_multiprocessors);
    py::class_<PreparedRows>(m, "PreparedRows", py::module_local())
        .def(py::init<const py::object&, const py::object&>(), py::arg("hi"), py::arg("lo") = py::none());
    py::class_<Product>(m, "Product", py::module_local())
        .def(py::init(&make_product), py::arg("W"), py::arg("base"), py::arg("other") = nullptr)
        .def_property_readonly("n_tokens", &Product::n_tokens);
    py::class_<Vectors>(m, "Vectors", py::module_local())
        .def(py::init(&make_vectors), py::arg("scale"), py::arg("bias"), py::arg("gate"), py::arg("gated"));
    m.def("prepare_rows", &prepare, py::arg("device"), py::arg("acts"), py::arg("input_norm"), py::arg("hi"),
          py::arg("lo"), py::arg("depth"), py::arg("first_row"), py::arg("status"), py::arg("word"));
    m.def(
        "shift_slab",
        [](const Device& device, const Product& product, bool weighted) {
            return as_tuple(shift_slab(device, product, weighted));
        },
        py::arg("device"), py::arg("product"), py::arg("weighted"));
    m.def(
        "moments_slab",
        [](const Device& device, const Product& product) { return as_tuple(moments_slab(device, product)); },
        py::arg("device"), py::arg("product"));
    m.def(
        "accumulate_shift",
        [](const Device& device, const Product& product, const Vectors& vectors, const py::object& weights,
           const py::object& slab, const py::tuple& targets, const py::object& status) {
            launched(accumulate_shift(device, product, vectors, floats(weights), doubles(slab), make_targets(targets),
                                      int64s(status), count_of(status)));
        },
        py::arg("device"), py::arg("product"), py::arg("vectors"), py::arg("weights"), py::arg("slab"),
        py::arg("targets"), py::arg("status"));
    m.def(
        "accumulate_moments",
        [](const Device& device, const Product& product, const Vectors& vectors, const py::object& weights,
           const py::object& slab, const py::tuple& targets, const py::object& status) {
            launched(accumulate_moments(device, product, vectors, floats(weights), doubles(slab), make_targets(targets),
                                        int64s(status), count_of(status)));
        },
        py::arg("device"), py::arg("product"), py::arg("vectors"), py::arg("weights"), py::arg("slab"),
        py::arg("targets"), py::arg("status"));
    m.def(
        "encode_sparse",
        [](const Device& device, const Product& product, const Vectors& vectors, int64_t first_token,
           const py::object& keys, const py::object& values, const py::object& count) {
            launched(encode_sparse(device, product, vectors, first_token, int64s(keys), floats(values),
                                   Tensor(keys, "int64").shape[0],
                                   reinterpret_cast<unsigned long long*>(int64s(count))));
        },
        py::arg("device"), py::arg("product"), py::arg("vectors"), py::arg("first_token"), py::arg("keys"),
        py::arg("values"), py::arg("count"));
    m.def(
        "encode_dense",
        [](const Device& device, const Product& product, const Vectors& vectors, const py::object& pre) {
            launched(encode_dense(device, product, vectors, floats(pre)));
        },
        py::arg("device"), py::arg("product"), py::arg("vectors"), py::arg("pre"));
    m.def(
        "append_candidates",
        [](const Device& device, const Product& product, const Vectors& vectors, bool absolute,
           const py::object& bounds, const py::object& lists, int64_t first_feature) {
            launched(append_candidates(device, product, vectors, absolute, floats(bounds), make_lists(lists),
                                       first_feature));
        },
        py::arg("device"), py::arg("product"), py::arg("vectors"), py::arg("absolute"), py::arg("bounds"),
        py::arg("lists"), py::arg("first_feature"));
    m.def(
        "select_top_k",
        [](const Device& device, int64_t n_rows, int64_t k, bool absolute, const py::object& lists,
           const py::object& pre, int64_t first_feature, const py::object& selected, const py::object& bounds,
           const py::object& status, int64_t word) {
            launched(select_top_k(device, n_rows, k, absolute, make_lists(lists), floats(pre),
                                  pre.is_none() ? 0 : Tensor(pre, "float32").shape[1], first_feature,
                                  make_lists(selected), floats(bounds), int64s(status) + word));
        },
        py::arg("device"), py::arg("n_rows"), py::arg("k"), py::arg("absolute"), py::arg("lists"), py::arg("pre"),
        py::arg("first_feature"), py::arg("selected"), py::arg("bounds"), py::arg("status"), py::arg("word"));
    m.def(
        "fold_entries",
        [](const Device& device, bool paired, const py::object& keys, const py::object& values,
           const py::object& starts, const py::object& rows, const py::object& weighted, const py::tuple& targets,
           const py::object& status) {
            launched(fold_entries(device, paired, int64s(keys), floats(values), int64s(starts),
                                  Tensor(starts, "int64").shape[0] - 1, doubles(rows),
                                  rows.is_none() ? 0 : Tensor(rows, "float64").shape[1], doubles(weighted),
                                  make_targets(targets), int64s(status), count_of(status)));
        },
        py::arg("device"), py::arg("paired"), py::arg("keys"), py::arg("values"), py::arg("starts"), py::arg("rows"),
        py::arg("weighted"), py::arg("targets"), py::arg("status"));
    py::class_<PromptTokens>(m, "PromptTokens", py::module_local())
        .def(py::init(&make_tokens), py::arg("base"), py::arg("base_starts"), py::arg("other"), py::arg("other_starts"),
             py::arg("pair_at"), py::arg("d_sae"), py::arg("window"))
        .def_property_readonly("n_windows", &PromptTokens::n_windows);
    m.def(
        "check_sparse",
        [](const Device& device, const py::tuple& rows, int64_t d_sae, const py::object& status, int64_t word) {
            launched(check_sparse(device, make_rows(rows), d_sae, int64s(status) + word));
        },
        py::arg("device"), py::arg("rows"), py::arg("d_sae"), py::arg("status"), py::arg("word"));
    m.def(
        "count_by_prompt",
        [](const Device& device, const PromptTokens& tokens, const py::object& counts, const py::object& status) {
            launched(count_by_prompt(device, tokens, int64s(counts), int64s(status), count_of(status)));
        },
        py::arg("device"), py::arg("tokens"), py::arg("counts"), py::arg("status"));
    m.def(
        "sum_by_prompt",
        [](const Device& device, const PromptTokens& tokens, const py::object& first_entries, const py::tuple& sums) {
            const PromptSums to{int32s(sums[0]),  int32s(sums[1]),  doubles(sums[2]), doubles(sums[3]),
                                doubles(sums[4]), doubles(sums[5]), floats(sums[6]),  int32s(sums[7])};
            launched(sum_by_prompt(device, tokens, int64s(first_entries), to));
        },
        py::arg("device"), py::arg("tokens"), py::arg("first_entries"), py::arg("sums"));
}
