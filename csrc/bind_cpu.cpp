// The only file of the CPU core that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <utility>

namespace py = pybind11;
using sts::check;
using sts::DType;
using sts::MatrixView;
using sts::Span;
using sts::Table;

namespace {

// The structs of the DLPack C ABI, version 0.x (its specification, "C API").
struct DLDevice {
    int32_t device_type, device_id;
};
struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDLCPU = 1, kDLCUDAHost = 3;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

std::string text(const py::handle& object) {
    return py::str(object).cast<std::string>();
}

/// Answers Ctrl-C, and every other signal that Python handles, while an op runs without the interpreter lock.
void answer_signals() {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

/// A numpy array without a mask, which its memory does not show.
void check_not_masked(const py::array& array, const std::string& name) {
    check(!py::hasattr(array, "mask"),
          name + " is a masked array, whose mask would be ignored: pass its filled(), or only rows without a mask");
}

/// The memory of an op's arguments, of which no accumulator may be a part.
class Memory {
  public:
    void read(const MatrixView& matrix, const char* name) {
        if (matrix.n_rows == 0 || matrix.n_cols == 0) return;
        const int64_t down = (matrix.n_rows - 1) * matrix.row_stride, along = (matrix.n_cols - 1) * matrix.col_stride;
        const int64_t size = matrix.dtype == DType::float32 ? 4 : 2;
        const char* data = static_cast<const char*>(matrix.data);
        add(data + size * (std::min<int64_t>(down, 0) + std::min<int64_t>(along, 0)),
            data + size * (std::max<int64_t>(down, 0) + std::max<int64_t>(along, 0) + 1), name);
    }
    void read(const Table<const double>& table, const char* name) {
        add(table.data, table.data + table.n_rows * table.n_cols, name);
    }
    template <class T>
    void write(const Span<T>& span, const char* name) {
        write(span.data, span.data + span.size, name);
    }
    void write(const Table<double>& table, const char* name) {
        write(table.data, table.data + table.n_rows * table.n_cols, name);
    }

  private:
    struct Part {
        const char *begin, *end, *name;
    };
    void add(const void* begin, const void* end, const char* name) {
        if (begin != end) parts_.push_back({static_cast<const char*>(begin), static_cast<const char*>(end), name});
    }
    void write(const void* begin, const void* end, const char* name) {
        for (const Part& part : parts_)
            check(begin == end || begin >= part.end || end <= part.begin,
                  std::string(name) + " lies in the memory of " + part.name + ": pass an array of its own");
        add(begin, end, name);
    }

    std::vector<Part> parts_;
};

/// A Python array of float32 or bfloat16 and what keeps its memory alive.
class Borrowed {
  public:
    Borrowed(const py::object& object, std::string name) : name_(std::move(name)) {
        if (py::isinstance<py::array>(object))
            take_numpy(py::reinterpret_borrow<py::array>(object));
        else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__"))
            take_dlpack(object);
        else
            fail("must be a numpy array or a tensor that speaks DLPack, got " +
                 text(py::type::of(object).attr("__name__")));
    }
    ~Borrowed() {
        if (managed_ && managed_->deleter) managed_->deleter(managed_);
    }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;

    MatrixView matrix(const char* shape) const {
        check_ndim(2, shape);
        return {data_, dtype_, shape_[0], shape_[1],
                // A dimension of one element, and any of an empty array, may carry any stride.
                several(0) ? strides_[0] : shape_[1], several(1) ? strides_[1] : 1};
    }

    std::vector<float> vector(const char* shape) const {
        check_ndim(1, shape);
        if (dtype_ != DType::float32) fail("must be float32, got bfloat16");
        std::vector<float> values(static_cast<size_t>(shape_[0]));
        for (int64_t i = 0; i < shape_[0]; ++i)
            values[static_cast<size_t>(i)] = static_cast<const float*>(data_)[i * strides_[0]];
        return values;
    }

  private:
    [[noreturn]] void fail(const std::string& what) const { throw std::invalid_argument(name_ + " " + what); }

    bool several(size_t i) const { return shape_[i] > 1 && shape_[1 - i] > 0; }

    void check_ndim(size_t n, const char* shape) const {
        if (shape_.size() != n)
            fail("must be " + std::string(shape) + ", got " + std::to_string(shape_.size()) + " dimension" +
                 (shape_.size() == 1 ? "" : "s"));
    }

    void take_numpy(const py::array& array) {
        check_not_masked(array, name_);
        if (!py::isinstance<py::array_t<float>>(array))
            fail("must be float32 or bfloat16, got " + text(array.dtype()) + ": convert it with astype('float32')");
        owner_ = array;
        data_ = array.data();
        constexpr py::ssize_t kSize = sizeof(float);
        check_aligned(alignof(float));
        for (py::ssize_t i = 0; i < array.ndim(); ++i) {
            if (array.strides(i) % kSize) fail("must have strides of whole elements");
            shape_.push_back(array.shape(i));
            strides_.push_back(array.strides(i) / kSize);
        }
    }

    void check_aligned(size_t alignment) const {
        if (reinterpret_cast<uintptr_t>(data_) % alignment) fail("must be aligned to its elements: pass a copy");
    }

    void take_dlpack(const py::object& object) {
        py::capsule capsule;
        try {
            const int device = object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
            if (device != kDLCPU && device != kDLCUDAHost)
                fail("must be on the CPU, where the other arguments are: pass its cpu()");
            capsule = object.attr("__dlpack__")();
        } catch (const py::error_already_set& error) {
            const bool needs_grad = py::hasattr(object, "requires_grad") && py::bool_(object.attr("requires_grad"));
            fail(needs_grad ? "requires grad: pass its detach()"
                            : "cannot be read through DLPack: " + text(error.value()));
        }
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (!managed) throw py::error_already_set();
        // From here on this object, and not the capsule, calls the deleter.
        PyCapsule_SetName(capsule.ptr(), "used_dltensor");
        managed_ = managed;
        owner_ = object;
        try {
            read(managed->dl_tensor);
        } catch (...) {
            if (managed->deleter) managed->deleter(managed);
            throw;
        }
    }

    void read(const DLTensor& tensor) {
        const DLDataType dtype = tensor.dtype;
        if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32)
            dtype_ = DType::float32;
        else if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16)
            dtype_ = DType::bfloat16;
        else
            fail("must be float32 or bfloat16, got " +
                 (py::hasattr(owner_, "dtype") ? text(owner_.attr("dtype")) : "another dtype") +
                 ": convert it with float()");
        data_ = static_cast<const char*>(tensor.data) + tensor.byte_offset;
        check_aligned(dtype_ == DType::float32 ? alignof(float) : alignof(uint16_t));
        int64_t contiguous = 1;
        shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
        strides_.resize(shape_.size());
        for (size_t i = shape_.size(); i-- > 0; contiguous *= shape_[i])
            strides_[i] = tensor.strides ? tensor.strides[i] : contiguous;
    }

    const std::string name_;
    py::object owner_;
    DLManagedTensor* managed_ = nullptr;
    const void* data_ = nullptr;
    DType dtype_ = DType::float32;
    std::vector<int64_t> shape_, strides_;
};

class Encoder {
  public:
    Encoder(const py::object& W_enc, const py::object& bias, const std::string& activation, const py::object& scale,
            const py::object& threshold, const py::object& gate_bias, int64_t k, const std::string& input_norm)
        : activation_name(activation),
          activation_(activation_named(activation)),
          W_enc_(W_enc, "W_enc"),
          core(W_enc_.matrix("[d_in, d_sae]"), activation_, values(bias, "bias", true), values(scale, "scale", false),
               values(threshold, "threshold", activation == "jumprelu", activation),
               values(gate_bias, "gate_bias", activation == "gated", activation), k, input_norm_named(input_norm)) {
        check(core.selects_top_k() || k == 0, "k must be 0 for " + activation + ", got " + std::to_string(k));
    }

    const std::string activation_name;

  private:
    static sts::Activation activation_named(const std::string& name) {
        if (name == "relu") return sts::Activation::relu;
        if (name == "jumprelu") return sts::Activation::jumprelu;
        if (name == "gated") return sts::Activation::gated;
        if (name == "topk") return sts::Activation::topk;
        if (name == "abstopk") return sts::Activation::abstopk;
        throw std::invalid_argument("activation must be 'relu', 'jumprelu', 'gated', 'topk' or 'abstopk', got '" +
                                    name + "'");
    }

    static sts::InputNorm input_norm_named(const std::string& name) {
        if (name == "none") return sts::InputNorm::none;
        if (name == "layer_norm") return sts::InputNorm::layer_norm;
        if (name == "constant_norm_rescale") return sts::InputNorm::constant_norm_rescale;
        throw std::invalid_argument("input_norm must be 'none', 'layer_norm' or 'constant_norm_rescale', got '" + name +
                                    "'");
    }

    /// Empty where it was not given; `activation` is named where the parameter belongs to one activation
    /// only.
    static std::vector<float> values(const py::object& given, const char* name, bool required,
                                     const std::string& activation = "") {
        if (given.is_none()) {
            check(!required, std::string(name) + " must be given" + (activation.empty() ? "" : " for " + activation));
            return {};
        }
        check(required || activation.empty(), std::string(name) + " does not belong to " + activation);
        std::vector<float> result = Borrowed(given, name).vector("[d_sae]");
        check(!result.empty(), std::string(name) + " must have d_sae entries, got 0");
        return result;
    }

    const sts::Activation activation_;
    const Borrowed W_enc_;

  public:
    const sts::Encoder core;
};

template <class T>
py::array_t<T> accumulator(const py::object& object, const char* name, int ndim) {
    check(py::isinstance<py::array_t<T>>(object),
          std::string(name) + " must be a numpy array of " + text(py::dtype::of<T>()) + ", got " +
              (py::isinstance<py::array>(object) ? text(object.attr("dtype"))
                                                 : text(py::type::of(object).attr("__name__"))));
    auto array = py::reinterpret_borrow<py::array_t<T>>(object);
    check_not_masked(array, name);
    check(array.ndim() == ndim, std::string(name) + " must have " + std::to_string(ndim) +
                                    (ndim == 1 ? " dimension" : " dimensions") + ", got " +
                                    std::to_string(array.ndim()));
    check(array.flags() & py::array::c_style, std::string(name) + " must be C-contiguous");
    check(array.writeable(), std::string(name) + " must be writeable");
    return array;
}

template <class T>
Span<T> sums(const py::object& object, const char* name) {
    if (object.is_none()) return {};
    auto array = accumulator<T>(object, name, 1);
    return {array.mutable_data(), array.size()};
}

Table<double> sum_table(const py::object& object, const char* name) {
    if (object.is_none()) return {};
    auto array = accumulator<double>(object, name, 2);
    return {array.mutable_data(), array.shape(0), array.shape(1)};
}

/// [n_tokens, K] float64, copied only where it is not contiguous; `owner` keeps a copy alive.
Table<const double> row_table(const py::object& object, const char* name, py::object& owner) {
    if (object.is_none()) return {};
    check(py::isinstance<py::array_t<double>>(object),
          std::string(name) + " must be a numpy array of float64, got " +
              (py::isinstance<py::array>(object) ? text(object.attr("dtype"))
                                                 : text(py::type::of(object).attr("__name__"))));
    check_not_masked(py::reinterpret_borrow<py::array>(object), name);
    auto array = py::array_t<double, py::array::c_style>::ensure(object);
    check(array.ndim() == 2, std::string(name) + " must be [n_tokens, K], got " + std::to_string(array.ndim()) +
                                 (array.ndim() == 1 ? " dimension" : " dimensions"));
    owner = array;
    return {array.data(), array.shape(0), array.shape(1)};
}

Span<const int64_t> column_numbers(const py::object& object, py::object& owner) {
    if (object.is_none()) return {};
    if (py::isinstance<py::array>(object)) check_not_masked(py::reinterpret_borrow<py::array>(object), "columns");
    auto array = py::array::ensure(object);
    if (!array) {
        PyErr_Clear();
        throw std::invalid_argument("columns must be a 1-dimensional array of integers");
    }
    const char kind = array.dtype().kind();
    check(array.ndim() == 1 && (kind == 'i' || kind == 'u' || array.size() == 0),
          "columns must be a 1-dimensional array of integers, got " + std::to_string(array.ndim()) +
              (array.ndim() == 1 ? " dimension of " : " dimensions of ") + text(array.dtype()));
    auto numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    owner = numbers;
    // Even without columns the pointer is not null, which would mean all of them.
    static const int64_t none = 0;
    return {numbers.size() ? numbers.data() : &none, numbers.size()};
}

void accumulate_shift(const Encoder& encoder, const py::object& base, const py::object& other,
                      const py::object& sum_sq_shift, const py::object& sum_base, const py::object& sum_other,
                      const py::object& sum_sq_base, const py::object& sum_sq_other, const py::object& n_fired_base,
                      const py::object& n_fired_other, const py::object& columns, const py::object& row_weights,
                      const py::object& weighted_sq_shift) {
    const Borrowed base_acts(base, "base"), other_acts(other, "other");
    const MatrixView base_view = base_acts.matrix("[n_tokens, d_in]"),
                     other_view = other_acts.matrix("[n_tokens, d_in]");
    py::object columns_owner, weights_owner;
    const Span<const int64_t> numbers = column_numbers(columns, columns_owner);
    const Table<const double> weights = row_table(row_weights, "row_weights", weights_owner);
    const sts::ShiftSums accumulators{
        sums<double>(sum_sq_shift, "sum_sq_shift"),    sums<double>(sum_base, "sum_base"),
        sums<double>(sum_other, "sum_other"),          sums<double>(sum_sq_base, "sum_sq_base"),
        sums<double>(sum_sq_other, "sum_sq_other"),    sums<int64_t>(n_fired_base, "n_fired_base"),
        sums<int64_t>(n_fired_other, "n_fired_other"), sum_table(weighted_sq_shift, "weighted_sq_shift")};
    Memory memory;
    memory.read(encoder.core.W_enc, "W_enc");
    memory.read(base_view, "base");
    memory.read(other_view, "other");
    memory.read(weights, "row_weights");
    memory.write(accumulators.sum_sq_shift, "sum_sq_shift");
    memory.write(accumulators.sum_base, "sum_base");
    memory.write(accumulators.sum_other, "sum_other");
    memory.write(accumulators.sum_sq_base, "sum_sq_base");
    memory.write(accumulators.sum_sq_other, "sum_sq_other");
    memory.write(accumulators.n_fired_base, "n_fired_base");
    memory.write(accumulators.n_fired_other, "n_fired_other");
    memory.write(accumulators.weighted_sq_shift, "weighted_sq_shift");
    const py::gil_scoped_release release;
    sts::accumulate_shift(encoder.core, base_view, other_view, numbers, weights, accumulators);
}

void accumulate_moments(const Encoder& encoder, const py::object& acts, const py::object& targets,
                        const py::object& sum_h, const py::object& sum_sq_h, const py::object& n_fired,
                        const py::object& sum_hy, const py::object& columns) {
    const Borrowed borrowed(acts, "acts");
    const MatrixView view = borrowed.matrix("[n_tokens, d_in]");
    py::object columns_owner, targets_owner;
    const Span<const int64_t> numbers = column_numbers(columns, columns_owner);
    const Table<const double> target_rows = row_table(targets, "targets", targets_owner);
    const sts::MomentSums accumulators{sums<double>(sum_h, "sum_h"), sums<double>(sum_sq_h, "sum_sq_h"),
                                       sums<int64_t>(n_fired, "n_fired"), sum_table(sum_hy, "sum_hy")};
    Memory memory;
    memory.read(encoder.core.W_enc, "W_enc");
    memory.read(view, "acts");
    memory.read(target_rows, "targets");
    memory.write(accumulators.sum_h, "sum_h");
    memory.write(accumulators.sum_sq_h, "sum_sq_h");
    memory.write(accumulators.n_fired, "n_fired");
    memory.write(accumulators.sum_hy, "sum_hy");
    const py::gil_scoped_release release;
    sts::accumulate_moments(encoder.core, view, numbers, target_rows, accumulators);
}

/// Hands a vector's memory to numpy without copying it.
template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* data) { delete static_cast<std::vector<T>*>(data); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple encode_sparse(const Encoder& encoder, const py::object& acts, const py::object& columns) {
    const Borrowed borrowed(acts, "acts");
    const MatrixView view = borrowed.matrix("[n_tokens, d_in]");
    py::object columns_owner;
    const Span<const int64_t> numbers = column_numbers(columns, columns_owner);
    sts::SparseRows rows;
    {
        const py::gil_scoped_release release;
        rows = sts::encode_sparse(encoder.core, view, numbers);
    }
    return py::make_tuple(to_numpy(std::move(rows.indptr)), to_numpy(std::move(rows.indices)),
                          to_numpy(std::move(rows.values)));
}

template <class T>
Span<const T> borrowed_numbers(const py::object& object, const char* name) {
    check(py::isinstance<py::array_t<T>>(object),
          std::string(name) + " must be a numpy array of " + text(py::dtype::of<T>()) + ", got " +
              (py::isinstance<py::array>(object) ? text(object.attr("dtype"))
                                                 : text(py::type::of(object).attr("__name__"))));
    const auto array = py::reinterpret_borrow<py::array_t<T>>(object);
    check_not_masked(array, name);
    check(array.ndim() == 1 && (array.flags() & py::array::c_style),
          std::string(name) + " must have 1 contiguous dimension");
    static const T none{};
    return {array.size() ? array.data() : &none, array.size()};
}

sts::SparseView sparse_rows(const py::tuple& rows, const std::string& name) {
    check(rows.size() == 3, name + " must be (indptr, indices, values)");
    return {borrowed_numbers<int64_t>(rows[0], (name + "_indptr").c_str()),
            borrowed_numbers<int32_t>(rows[1], (name + "_indices").c_str()),
            borrowed_numbers<float>(rows[2], (name + "_values").c_str())};
}

py::tuple sum_by_prompt(const py::tuple& base, const py::object& base_starts, const py::tuple& other,
                        const py::object& other_starts, const py::object& pair_at, int64_t d_sae) {
    const sts::SparseView base_rows = sparse_rows(base, "base"), other_rows = sparse_rows(other, "other");
    const auto base_of = borrowed_numbers<int64_t>(base_starts, "base_starts");
    const auto other_of = borrowed_numbers<int64_t>(other_starts, "other_starts");
    const auto pairs = borrowed_numbers<int64_t>(pair_at, "pair_at");
    sts::PromptRows rows;
    {
        const py::gil_scoped_release release;
        rows = sts::sum_by_prompt(base_rows, base_of, other_rows, other_of, pairs, d_sae);
    }
    return py::make_tuple(to_numpy(std::move(rows.indptr)), to_numpy(std::move(rows.indices)),
                          to_numpy(std::move(rows.n_fired)), to_numpy(std::move(rows.sum_h)),
                          to_numpy(std::move(rows.sum_sq_h)), to_numpy(std::move(rows.sum_shift)),
                          to_numpy(std::move(rows.sum_sq_shift)), to_numpy(std::move(rows.strongest)),
                          to_numpy(std::move(rows.strongest_at)));
}

}  // namespace

// The docstrings are in _cpu.pyi.
PYBIND11_MODULE(_cpu, m) {
    sts::set_poll(&answer_signals);
    const py::none none;
    py::class_<Encoder>(m, "Encoder")
        .def(py::init<const py::object&, const py::object&, const std::string&, const py::object&, const py::object&,
                      const py::object&, int64_t, const std::string&>(),
             py::arg("W_enc"), py::arg("bias"), py::kw_only(), py::arg("activation"), py::arg("scale") = none,
             py::arg("threshold") = none, py::arg("gate_bias") = none, py::arg("k") = 0, py::arg("input_norm") = "none")
        .def_property_readonly("d_in", [](const Encoder& self) { return self.core.d_in(); })
        .def_property_readonly("d_sae", [](const Encoder& self) { return self.core.d_sae(); })
        .def_readonly("activation", &Encoder::activation_name)
        .def_property_readonly("k", [](const Encoder& self) { return self.core.k; });
    m.def("accumulate_shift", &accumulate_shift, py::arg("encoder"), py::arg("base"), py::arg("other"), py::kw_only(),
          py::arg("sum_sq_shift").none(false), py::arg("sum_base") = none, py::arg("sum_other") = none,
          py::arg("sum_sq_base") = none, py::arg("sum_sq_other") = none, py::arg("n_fired_base") = none,
          py::arg("n_fired_other") = none, py::arg("columns") = none, py::arg("row_weights") = none,
          py::arg("weighted_sq_shift") = none);
    m.def("accumulate_moments", &accumulate_moments, py::arg("encoder"), py::arg("acts"), py::arg("targets") = none,
          py::kw_only(), py::arg("sum_h").none(false), py::arg("sum_sq_h").none(false), py::arg("n_fired").none(false),
          py::arg("sum_hy") = none, py::arg("columns") = none);
    m.def("encode_sparse", &encode_sparse, py::arg("encoder"), py::arg("acts"), py::arg("columns") = none);
    m.def("sum_by_prompt", &sum_by_prompt, py::arg("base"), py::arg("base_starts"), py::arg("other"),
          py::arg("other_starts"), py::arg("pair_at"), py::kw_only(), py::arg("d_sae"));
    m.def("set_num_threads", &sts::set_num_threads, py::arg("n"));
    m.def("get_num_threads", &sts::get_num_threads);
    m.def("instruction_set", &sts::instruction_set);
    m.def("set_instruction_set", &sts::set_instruction_set, py::arg("name"));
}
