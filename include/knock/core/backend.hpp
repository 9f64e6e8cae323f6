#pragma once
// What a device can compute: a table of kernel entry points, one per device kind.
//
// Kernels see raw pointers, dtypes, shapes and strides, never tensors or autograd. Outputs are allocated by the caller.
// An op fetches its kernel with `kernel(&Backend::name, "op", x)`; an absent entry is an error that names op, dtype and
// device. `cpu/backend.hpp` fills the CPU's table.

#include <knock/core/device.hpp>
#include <knock/core/dtype.hpp>
#include <knock/core/philox.hpp>
#include <knock/core/shape.hpp>

namespace knock {

/// What a kernel sees of a tensor. Strides are in elements; a broadcast axis has stride 0, a flipped one a negative
/// stride.
struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Strides strides;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t rank() const { return shape.rank(); }
  int64_t numel() const { return shape.numel(); }
  bool contiguous() const { return is_contiguous(shape, strides); }
  bool defined() const { return data != nullptr; }

  /// The same elements seen with the shape `to`, which this array's shape broadcasts to.
  Array expand(const Shape& to) const {
    Array out{data, dtype, to, Strides::filled(to.rank(), 0)};
    const int64_t shift = to.rank() - rank();
    for (int64_t i = 0; i < rank(); ++i) out.strides[i + shift] = shape[i] == 1 ? 0 : strides[i];
    return out;
  }
};

enum class Unary : uint8_t;   // ops/pointwise_functors.hpp
enum class Binary : uint8_t;  // ops/pointwise_functors.hpp

/// Parameters of a pointwise op, such as the slope of leaky_relu.
struct PointwiseParams {
  double a = 0, b = 0;
};

enum class Random : uint8_t { uniform, normal, integer };
enum class Reduce : uint8_t { sum, mean, prod, max, min, any, all };
enum class ArgReduce : uint8_t { max, min };
enum class Scan : uint8_t { sum, prod };

/// Kernel entry points of one device kind. `out...` arrays are written; the others are read. Unless said otherwise
/// arrays may have any strides and the arrays of one call have the same shape.
struct Backend {
  // Filling and copying (any dtype)
  void (*fill)(const Array& out, Scalar value) = nullptr;
  void (*copy)(const Array& out, const Array& in) = nullptr;  ///< converts; rounds floats to integers towards zero
  void (*arange)(const Array& out, Scalar start, Scalar step) = nullptr;  ///< out (N)
  /// uniform in [a, b), normal with mean a and deviation b, integers in [a, b). Element i uses Philox counter i of
  /// `state`.
  void (*random)(Random kind, RngState state, double a, double b, const Array& out) = nullptr;

  // Pointwise
  void (*unary)(Unary op, PointwiseParams params, const Array& x, const Array& out) = nullptr;
  void (*unary_backward)(Unary op, PointwiseParams params, const Array& x, const Array& y, const Array& dy,
                         const Array& out_dx) = nullptr;
  void (*binary)(Binary op, const Array& a, const Array& b, const Array& out) = nullptr;
  void (*where)(const Array& condition, const Array& a, const Array& b, const Array& out) = nullptr;

  // Reductions and scans. `reduce` reduces the last `axes` axes of x; out has the leading ones. The others work along
  // the last axis.
  void (*reduce)(Reduce op, const Array& x, int64_t axes, const Array& out) = nullptr;
  void (*arg_reduce)(ArgReduce op, const Array& x, const Array& out) = nullptr;
  void (*scan)(Scan op, const Array& x, const Array& out) = nullptr;

  // Products
  /// out = alpha a b + beta c, floating dtypes. a (..., M, K), b (..., K, N), out (..., M, N) dense; c as out, and not read
  /// when beta is 0; it may be out itself.
  void (*gemm)(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out) = nullptr;
};

/// The table of a device's kind; an error when no such back-end is linked in.
const Backend& backend(Device device);

}  // namespace knock
