#pragma once
// The tensor: a value-semantic handle to a strided view of a reference-counted buffer.
//
//   Tensor x = randn({64, 32});                       // f32, cpu
//   Tensor w = randn({32, 1}).requires_grad_();
//   Tensor loss = mean(square(matmul(x, w)));
//   loss.backward();                                  // w.grad() is (32, 1)
//
// Copying a Tensor copies the handle, not the elements. Shape and view operations are methods; mathematics are free
// functions with PyTorch's names (ops/). Including this header alone gives the declarations; a program that calls them
// includes <knock/knock.hpp> in at least one translation unit, or links knock::compiled.

#include <knock/core/backend.hpp>
#include <knock/core/device.hpp>
#include <knock/core/dtype.hpp>
#include <knock/core/error.hpp>
#include <knock/core/shape.hpp>
#include <knock/core/storage.hpp>
#include <knock/core/trace.hpp>
#include <knock/fwd.hpp>

#include <concepts>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace knock {

/// What the handles of one tensor share.
struct TensorImpl {
  std::shared_ptr<Storage> storage;
  Shape shape;
  Strides strides;
  int64_t offset = 0;  ///< of the first element, in elements
  DType dtype = DType::f32;
  bool requires_grad = false;
  std::shared_ptr<autograd::Meta> meta;  ///< gradient, history and view information; absent until needed
};

/// dtype and device of a factory's result.
struct TensorOptions {
  DType dtype = DType::f32;
  Device device = {};
};

/// How `backward` runs.
struct BackwardOptions {
  bool retain_graph = false;  ///< keep what the graph saved, so that backward can run again
  bool create_graph = false;  ///< record the backward pass, so that gradients can be differentiated
};

class Tensor {
 public:
  /// An undefined tensor: no shape, no elements.
  Tensor() = default;
  explicit Tensor(std::shared_ptr<TensorImpl> impl) : impl_(std::move(impl)) {}

  bool defined() const { return impl_ != nullptr; }
  const Shape& shape() const { return impl().shape; }
  const Strides& strides() const { return impl().strides; }
  int64_t rank() const { return impl().shape.rank(); }
  int64_t dim() const { return rank(); }
  /// Extent of one axis; negative axes count from the end.
  int64_t size(int64_t axis) const { return shape()[wrap_dim(axis, rank(), "size")]; }
  int64_t numel() const { return impl().shape.numel(); }
  DType dtype() const { return impl().dtype; }
  Device device() const { return impl().storage->device; }
  bool is_contiguous() const { return knock::is_contiguous(shape(), strides()); }

  /// Pointer to the first element, in the memory of the tensor's device: the program reads through it on the CPU alone.
  /// T must be the C++ type of `dtype()`. Writing through it is invisible to autograd.
  template <class T>
  T* data() const {
    check(dtype_of<T>() == dtype(), "data", "asked for ", dtype_of<T>(), " elements of a tensor ", *this);
    return static_cast<T*>(raw_data());
  }
  void* raw_data() const { return static_cast<char*>(impl().storage->data) + impl().offset * size_of(impl().dtype); }
  /// What kernels see of this tensor.
  Array array() const { return {raw_data(), dtype(), shape(), strides()}; }

  /// The only element, converted to T. Error unless numel() is 1.
  template <class T = double>
  T item() const {
    check(numel() == 1, "item", "needs a tensor of one element, got ", *this);
    T value{};
    read(&value, dtype_of<T>());
    return value;
  }
  /// All elements in logical (row-major) order, converted to T.
  template <class T>
  std::vector<T> to_vector() const {
    std::vector<T> values(static_cast<std::size_t>(numel()));
    if (!values.empty()) read(values.data(), dtype_of<T>());
    return values;
  }

  // Views and shapes (ops/view.hpp); all share storage where strides allow, and all are differentiable.
  /// The i-th slice along the first axis.
  Tensor operator[](int64_t i) const { return select(0, i); }
  Tensor select(int64_t dim, int64_t index) const;
  /// Elements start, start + step, ... before end along dim; bounds beyond the extent are clipped, negative ones wrap.
  Tensor slice(int64_t dim, int64_t start, int64_t end, int64_t step = 1) const;
  Tensor narrow(int64_t dim, int64_t start, int64_t length) const;
  /// One extent may be -1. Shares storage where the strides allow, copies otherwise.
  Tensor reshape(const Shape& shape) const;
  /// As reshape, but an error where a copy would be needed.
  Tensor view(const Shape& shape) const;
  Tensor flatten(int64_t start_dim = 0, int64_t end_dim = -1) const;
  Tensor unflatten(int64_t dim, const Shape& extents) const;
  Tensor permute(const Shape& axes) const;
  Tensor transpose(int64_t a, int64_t b) const;
  /// Transpose of a matrix.
  Tensor t() const;
  /// Broadcasts axes of extent 1; -1 keeps an extent.
  Tensor expand(const Shape& shape) const;
  Tensor squeeze() const;
  Tensor squeeze(int64_t dim) const;
  Tensor unsqueeze(int64_t dim) const;
  Tensor diagonal(int64_t offset = 0, int64_t dim1 = 0, int64_t dim2 = 1) const;
  /// Itself when already row-major and dense, a copy otherwise.
  Tensor contiguous() const;

  // Copies and conversions (ops/view.hpp); differentiable.
  Tensor clone() const;
  Tensor to(DType dtype) const;
  Tensor to(Device device) const;
  template <class Name>
  requires std::convertible_to<Name, std::string_view> Tensor to(const Name& device)
  const { return to(Device(std::string_view(device))); }

  // In-place writes (ops/inplace.hpp). They count as a write for every view of the storage; autograd follows them or
  // refuses them, and refuses to use a value saved before the write.
  /// self += alpha other; the others likewise. Operands broadcast to self's shape and are converted to its dtype.
  Tensor& add_(const Tensor& other, Scalar alpha = 1);
  Tensor& add_(Scalar other);
  Tensor& sub_(const Tensor& other, Scalar alpha = 1);
  Tensor& sub_(Scalar other);
  Tensor& mul_(const Tensor& other);
  Tensor& mul_(Scalar other);
  Tensor& div_(const Tensor& other);
  Tensor& div_(Scalar other);
  template <class Other>
  Tensor& operator+=(const Other& other) {
    return add_(other);
  }
  template <class Other>
  Tensor& operator-=(const Other& other) {
    return sub_(other);
  }
  template <class Other>
  Tensor& operator*=(const Other& other) {
    return mul_(other);
  }
  template <class Other>
  Tensor& operator/=(const Other& other) {
    return div_(other);
  }
  /// self + weight (end - self)
  Tensor& lerp_(const Tensor& end, Scalar weight);
  /// The source may have any dtype.
  Tensor& copy_(const Tensor& source);
  Tensor& fill_(Scalar value);
  Tensor& zero_() { return fill_(0); }
  Tensor& masked_fill_(const Tensor& mask, Scalar value);
  Tensor& clamp_(Scalar low, Scalar high);
  Tensor& neg_();
  Tensor& abs_();
  Tensor& square_();
  Tensor& floor_();
  Tensor& ceil_();
  Tensor& round_();
  Tensor& relu_();
  Tensor& exp_();
  Tensor& log_();
  Tensor& sqrt_();
  Tensor& rsqrt_();
  Tensor& reciprocal_();
  Tensor& tanh_();
  Tensor& sigmoid_();
  /// Draws every element anew.
  Tensor& uniform_(double from = 0, double to = 1);
  Tensor& normal_(double mean = 0, double deviation = 1);

  // Autograd (autograd/node.hpp)
  /// Whether gradients flow into this tensor.
  bool requires_grad() const;
  /// Marks a leaf of floating dtype as one whose gradient is wanted.
  Tensor& requires_grad_(bool requires_grad = true);
  /// Whether no recorded op made this tensor.
  bool is_leaf() const;
  /// The accumulated gradient of a leaf; undefined before the first backward.
  Tensor grad() const;
  void set_grad(const Tensor& grad);
  /// The same elements outside the graph.
  Tensor detach() const;
  /// Gradients of this scalar with respect to the leaves, added to their `grad()`.
  void backward(BackwardOptions options = {}) const;
  /// The same for any shape, weighted by `upstream`, which has this tensor's shape.
  void backward(const Tensor& upstream, BackwardOptions options = {}) const;
  /// Calls `hook(gradient)` when this tensor's gradient is complete; a defined Tensor it returns replaces the gradient.
  template <class Hook>
  void register_hook(Hook hook) const;

  TensorImpl& impl() const {
    check(defined(), "tensor", "undefined tensor used");
    return *impl_;
  }
  const std::shared_ptr<TensorImpl>& handle() const { return impl_; }
  /// Whether two handles denote one tensor.
  bool is(const Tensor& other) const { return impl_ == other.impl_; }

 private:
  void read(void* out, DType out_dtype) const;

  std::shared_ptr<TensorImpl> impl_;
};

/// Shape, dtype and device, as error messages show them: `(2, 3) f32 cpu`.
std::string to_text(const Tensor& tensor);

// Arithmetic with PyTorch's broadcasting (ops/binary.hpp). A number takes the tensor's dtype.
Tensor operator-(const Tensor& x);
Tensor operator+(const Tensor& a, const Tensor& b);
Tensor operator-(const Tensor& a, const Tensor& b);
Tensor operator*(const Tensor& a, const Tensor& b);
Tensor operator/(const Tensor& a, const Tensor& b);
Tensor operator+(const Tensor& a, Scalar b);
Tensor operator-(const Tensor& a, Scalar b);
Tensor operator*(const Tensor& a, Scalar b);
Tensor operator/(const Tensor& a, Scalar b);
Tensor operator+(Scalar a, const Tensor& b);
Tensor operator-(Scalar a, const Tensor& b);
Tensor operator*(Scalar a, const Tensor& b);
Tensor operator/(Scalar a, const Tensor& b);

// Factories -----------------------------------------------------------------------------------------------------------

/// Uninitialised elements.
Tensor empty(const Shape& shape, TensorOptions options = {});
Tensor full(const Shape& shape, Scalar value, TensorOptions options = {});
Tensor zeros(const Shape& shape, TensorOptions options = {});
Tensor ones(const Shape& shape, TensorOptions options = {});
/// start, start + step, ... before end. Integers give i64 and floating values f32 unless `options` say otherwise.
Tensor arange(Scalar start, Scalar end, Scalar step, TensorOptions options);
Tensor arange(Scalar start, Scalar end, Scalar step = 1);
Tensor arange(Scalar end);
/// `steps` values from start to end, both included.
Tensor linspace(double start, double end, int64_t steps, TensorOptions options = {});
/// Ones on the diagonal of an (n, m) matrix.
Tensor eye(int64_t n, int64_t m, TensorOptions options = {});
Tensor eye(int64_t n, TensorOptions options = {});
/// Uniform in [0, 1), and standard normal.
Tensor rand(const Shape& shape, TensorOptions options = {});
Tensor randn(const Shape& shape, TensorOptions options = {});
/// Uniform integers in [low, high).
Tensor randint(int64_t low, int64_t high, const Shape& shape, TensorOptions options = {.dtype = DType::i64});

Tensor empty_like(const Tensor& like);
Tensor full_like(const Tensor& like, Scalar value);
Tensor zeros_like(const Tensor& like);
Tensor ones_like(const Tensor& like);
Tensor rand_like(const Tensor& like);
Tensor randn_like(const Tensor& like);

namespace detail {
Tensor from_bytes(const void* data, int64_t count, DType dtype, const Shape& shape);
}

/// A tensor that copies `values`; their number must match the shape. `bool` becomes u8.
template <class T>
requires Element<std::remove_const_t<T>> Tensor from_data(std::span<T> values, const Shape& shape) {
  return detail::from_bytes(values.data(), static_cast<int64_t>(values.size()), dtype_of<T>(), shape);
}
template <Element T>
Tensor from_data(const std::vector<T>& values, const Shape& shape) {
  return from_data(std::span<const T>(values), shape);
}
template <Element T>
Tensor from_data(std::initializer_list<T> values, const Shape& shape) {
  return from_data(std::span<const T>(values.begin(), values.size()), shape);
}
/// A tensor of rank 0.
inline Tensor scalar_tensor(Scalar value, TensorOptions options = {}) { return full({}, value, options); }

/// The kernel of an op on the tensor's device, ready to be called; an error when that device has none.
template <class Entry>
trace::Call<Entry> kernel(Entry Backend::*entry, std::string_view op, const Tensor& x) {
  const Backend& table = backend(x.device());
  check(table.*entry != nullptr, op, "no kernel for ", x.dtype(), " on ", x.device());
  return {table, table.*entry, op};
}

/// Error unless all tensors are on one device.
void check_same_device(std::string_view op, std::initializer_list<Tensor> tensors);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_TENSOR)
#include <cmath>
#include <cstring>

namespace knock {

KNOCK_FUNC std::string to_text(const Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  return text(tensor.shape(), " ", tensor.dtype(), " ", tensor.device());
}

KNOCK_FUNC void check_same_device(std::string_view op, std::initializer_list<Tensor> tensors) {
  const Tensor* first = nullptr;
  for (const Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    if (!first) first = &tensor;
    check(tensor.device() == first->device(), op, "tensors are on ", first->device(), " and ", tensor.device(),
          "; move one with .to(\"", first->device(), "\")");
  }
}

KNOCK_FUNC void Tensor::read(void* out, DType out_dtype) const {
  const Array target{out, out_dtype, shape(), contiguous_strides(shape())};
  kernel(&Backend::copy, "to_vector", *this)(target, array());
}

KNOCK_FUNC Tensor empty(const Shape& shape, TensorOptions options) {
  const int64_t n = checked_numel(shape, "empty");
  auto impl = std::make_shared<TensorImpl>();
  impl->storage = std::make_shared<Storage>(n * size_of(options.dtype), options.device);
  impl->shape = shape;
  impl->strides = contiguous_strides(shape);
  impl->dtype = options.dtype;
  return Tensor(std::move(impl));
}

KNOCK_FUNC Tensor full(const Shape& shape, Scalar value, TensorOptions options) {
  Tensor out = empty(shape, options);
  kernel(&Backend::fill, "full", out)(out.array(), value);
  return out;
}

KNOCK_FUNC Tensor zeros(const Shape& shape, TensorOptions options) { return full(shape, 0, options); }
KNOCK_FUNC Tensor ones(const Shape& shape, TensorOptions options) { return full(shape, 1, options); }

KNOCK_FUNC Tensor arange(Scalar start, Scalar end, Scalar step, TensorOptions options) {
  check(step.real != 0 && std::isfinite(step.real), "arange", "step must be finite and not 0, got ", step.real);
  check((end.real - start.real) / step.real >= 0, "arange", "start ", start.real, ", end ", end.real, " and step ",
        step.real, " lead away from the end");
  const bool integral = start.integral && end.integral && step.integral;
  const int64_t sign = step.real > 0 ? 1 : -1;
  const int64_t n = integral ? (end.integer - start.integer + step.integer - sign) / step.integer
                             : static_cast<int64_t>(std::ceil((end.real - start.real) / step.real));
  Tensor out = empty({n}, options);
  kernel(&Backend::arange, "arange", out)(out.array(), start, step);
  return out;
}

KNOCK_FUNC Tensor arange(Scalar start, Scalar end, Scalar step) {
  const bool integral = start.integral && end.integral && step.integral;
  return arange(start, end, step, {.dtype = integral ? DType::i64 : DType::f32});
}

KNOCK_FUNC Tensor arange(Scalar end) { return arange(end.integral ? Scalar(0) : Scalar(0.0), end, 1); }

KNOCK_FUNC Tensor linspace(double start, double end, int64_t steps, TensorOptions options) {
  check(steps >= 0, "linspace", "number of steps must not be negative, got ", steps);
  check(is_float(options.dtype), "linspace", "needs a floating dtype, got ", options.dtype);
  std::vector<double> values(static_cast<std::size_t>(steps));
  const double step = steps > 1 ? (end - start) / static_cast<double>(steps - 1) : 0;
  for (int64_t i = 0; i < steps; ++i) {
    const bool upper_half = i >= steps - steps / 2 && steps > 1;  // counted from the end, so that the end is exact
    values[static_cast<std::size_t>(i)] =
        upper_half ? end - step * static_cast<double>(steps - 1 - i) : start + step * static_cast<double>(i);
  }
  const Tensor wide = from_data(values, {steps});
  Tensor out = empty({steps}, options);
  kernel(&Backend::copy, "linspace", out)(out.array(), wide.array());
  return out;
}

KNOCK_FUNC Tensor eye(int64_t n, int64_t m, TensorOptions options) {
  Tensor out = zeros({n, m}, options);
  const Array diagonal{out.raw_data(), out.dtype(), {std::min(n, m)}, {m + 1}};
  kernel(&Backend::fill, "eye", out)(diagonal, 1);
  return out;
}
KNOCK_FUNC Tensor eye(int64_t n, TensorOptions options) { return eye(n, n, options); }

namespace detail {
KNOCK_FUNC Tensor random(const char* op, Random kind, double a, double b, const Shape& shape, TensorOptions options) {
  check(kind == Random::integer || is_float(options.dtype), op, "needs a floating dtype, got ", options.dtype);
  Tensor out = empty(shape, options);
  kernel(&Backend::random, op, out)(kind, next_random(), a, b, out.array());
  return out;
}

KNOCK_FUNC Tensor from_bytes(const void* data, int64_t count, DType dtype, const Shape& shape) {
  check(checked_numel(shape, "from_data") == count, "from_data", count, " values do not fill shape ", shape);
  Tensor out = empty(shape, {.dtype = dtype});
  if (count > 0) std::memcpy(out.raw_data(), data, static_cast<std::size_t>(count * size_of(dtype)));
  return out;
}
}  // namespace detail

KNOCK_FUNC Tensor rand(const Shape& shape, TensorOptions options) {
  return detail::random("rand", Random::uniform, 0, 1, shape, options);
}
KNOCK_FUNC Tensor randn(const Shape& shape, TensorOptions options) {
  return detail::random("randn", Random::normal, 0, 1, shape, options);
}
KNOCK_FUNC Tensor randint(int64_t low, int64_t high, const Shape& shape, TensorOptions options) {
  check(low < high, "randint", "low ", low, " must be below high ", high);
  return detail::random("randint", Random::integer, static_cast<double>(low), static_cast<double>(high), shape,
                        options);
}

KNOCK_FUNC Tensor empty_like(const Tensor& like) { return empty(like.shape(), {like.dtype(), like.device()}); }
KNOCK_FUNC Tensor full_like(const Tensor& like, Scalar value) {
  return full(like.shape(), value, {like.dtype(), like.device()});
}
KNOCK_FUNC Tensor zeros_like(const Tensor& like) { return full_like(like, 0); }
KNOCK_FUNC Tensor ones_like(const Tensor& like) { return full_like(like, 1); }
KNOCK_FUNC Tensor rand_like(const Tensor& like) { return rand(like.shape(), {like.dtype(), like.device()}); }
KNOCK_FUNC Tensor randn_like(const Tensor& like) { return randn(like.shape(), {like.dtype(), like.device()}); }

}  // namespace knock
#endif
