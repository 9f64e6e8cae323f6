// Matrix products by cublasLt: out = alpha a b + beta c.
//
// cublasLt stores matrices by columns, so it is asked for the transpose: out^T = b^T a^T, in which rows and columns
// change their names and nothing moves. An operand whose rows or columns are dense is used where it lies; any other one
// is copied first. f32 is computed in f32, in TF32 by choice alone (allow_tf32); bf16 is accumulated in f32. A bias, an
// activation and a matrix to add are parts of the product (epilogues). The algorithm that the library proposes for a
// shape is asked for once.

#include "allocator.hpp"
#include "cublas.hpp"
#include "error.hpp"
#include "kernels.hpp"
#include "stream.hpp"

#include <knock/core/loop_nest.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <cublasLt.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace knock::cuda {
namespace {

void check_lt(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    fail("gemm", "cublasLt: ", cublasLtGetStatusString(status), " in ", call);
}
#define KNOCK_LT(call) check_lt((call), #call)

cublasLtHandle_t handle() {
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  const cublasLtHandle_t own = Handles<cublasLtHandle_t, cublasLtCreate, cublasLtDestroy>::get(status);
  check_lt(status, "cublasLtCreate");
  return own;
}

// What cublasLt is told
// --------------------------------------------------------------------------------------------------------------------

/// A matrix as it is stored: rows of `columns` dense elements, `pitch` apart, or the transpose of that.
struct Stored {
  const void* data;
  int64_t rows, columns, pitch;
  bool transposed;  ///< the matrix meant is the transpose
  int64_t batch_stride = 0;
};

/// What becomes of a product before it is written.
struct Epilogue {
  const void* bias = nullptr;  ///< a number for each column, in the result's dtype
  std::optional<Unary> activation = {};
  void* before = nullptr;  ///< keeps what the activation is given: dense, rows of a multiple of 8
};

/// One call: out (M, N) = activation(alpha a b + beta c + bias) for every matrix of a batch; c may be out.
struct Product {
  DType in, out_type;
  cublasComputeType_t compute;
  int64_t m, n, k, batch;
  Stored a, b, c, out;
  double alpha, beta;
  Epilogue epilogue = {};
};

/// A description that cublasLt keeps.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
class Description {
 public:
  Description() = default;
  ~Description() {
    if (handle_) destroy(handle_);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;
  Handle get() const { return handle_; }
  Handle* place() { return &handle_; }

 private:
  Handle handle_ = nullptr;
};

class Layout {
 public:
  /// By columns, as cublasLt sees it: what we call a row is a column there.
  Layout(const Stored& matrix, DType dtype, int64_t batch) {
    KNOCK_LT(cublasLtMatrixLayoutCreate(description_.place(), type_of(dtype), static_cast<uint64_t>(matrix.columns),
                                        static_cast<uint64_t>(matrix.rows), matrix.pitch));
    if (batch == 1) return;
    const auto count = static_cast<int32_t>(batch);
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, matrix.batch_stride);
  }
  cublasLtMatrixLayout_t get() const { return description_.get(); }

 private:
  template <class Value>
  void set(cublasLtMatrixLayoutAttribute_t which, const Value& value) {
    KNOCK_LT(cublasLtMatrixLayoutSetAttribute(get(), which, &value, sizeof value));
  }
  Description<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> description_;
};

cublasLtEpilogue_t kind_of(const Epilogue& e) {
  if (!e.activation) return e.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  if (*e.activation == Unary::relu) return e.bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
  if (e.before) return e.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  return e.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;  // by tanh
}

class Operation {
 public:
  explicit Operation(const Product& p) {
    const cudaDataType scale = p.in == DType::f64 ? CUDA_R_64F : CUDA_R_32F;
    KNOCK_LT(cublasLtMatmulDescCreate(description_.place(), p.compute, scale));
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    const Epilogue& e = p.epilogue;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, kind_of(e));
    if (e.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, e.bias);
    if (!e.before) return;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, e.before);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.n);
  }
  cublasLtMatmulDesc_t get() const { return description_.get(); }

 private:
  template <class Value>
  void set(cublasLtMatmulDescAttributes_t which, const Value& value) {
    KNOCK_LT(cublasLtMatmulDescSetAttribute(get(), which, &value, sizeof value));
  }
  Description<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> description_;
};

/// The largest power of two that divides an address, at most 256.
uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<std::uintptr_t>(address) | 256U;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

class Preference {
 public:
  explicit Preference(const Product& p) {
    KNOCK_LT(cublasLtMatmulPreferenceCreate(description_.place()));
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{32} << 20);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b.data));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a.data));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c.data));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.out.data));
  }
  cublasLtMatmulPreference_t get() const { return description_.get(); }

 private:
  template <class Value>
  void set(cublasLtMatmulPreferenceAttributes_t which, const Value& value) {
    KNOCK_LT(cublasLtMatmulPreferenceSetAttribute(get(), which, &value, sizeof value));
  }
  Description<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> description_;
};

/// The algorithms that were proposed, by all that they depend on.
class Algorithms {
 public:
  using Key = std::array<int64_t, 26>;
  using Choice = cublasLtMatmulHeuristicResult_t;

  static Algorithms& instance() {
    static auto* algorithms = new Algorithms;
    return *algorithms;
  }

  template <class Ask>
  Choice find(const Key& key, Ask&& ask) {
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(key);
    return found != known_.end() ? found->second : known_.emplace(key, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Choice> known_;
};

Algorithms::Key key_of(const Product& p) {
  return {current_device(),
          static_cast<int64_t>(p.in),
          static_cast<int64_t>(p.out_type),
          p.compute,
          p.m,
          p.n,
          p.k,
          p.batch,
          p.a.pitch,
          p.a.transposed,
          p.a.batch_stride,
          p.b.pitch,
          p.b.transposed,
          p.b.batch_stride,
          p.out.pitch,
          p.out.batch_stride,
          p.c.pitch,
          p.c.batch_stride,
          kind_of(p.epilogue),
          p.beta == 0,
          alignment_of(p.a.data),
          alignment_of(p.b.data),
          alignment_of(p.c.data),
          alignment_of(p.out.data),
          alignment_of(p.epilogue.bias),
          alignment_of(p.epilogue.before)};
}

std::string product_text(const Product& p) {
  return text("(", p.m, ", ", p.k, ") x (", p.k, ", ", p.n, ") ", p.in, " -> ", p.out_type, ", ", p.batch, " matrices");
}

void run(const Product& p) {
  const Operation operation(p);
  const Layout a(p.a, p.in, p.batch), b(p.b, p.in, p.batch), c(p.c, p.out_type, p.batch),
      out(p.out, p.out_type, p.batch);
  const auto choice = Algorithms::instance().find(key_of(p), [&] {
    const Preference preference(p);
    cublasLtMatmulHeuristicResult_t proposed{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle(), operation.get(), b.get(), a.get(), c.get(),
                                                                 out.get(), preference.get(), 1, &proposed, &count);
    check(status == CUBLAS_STATUS_SUCCESS && count > 0, "gemm", "cublasLt has no algorithm for ", product_text(p));
    return proposed;
  });
  const Scratch workspace(static_cast<int64_t>(choice.workspaceSize));
  const auto alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  const bool wide = p.in == DType::f64;
  const void* const alpha_place = wide ? static_cast<const void*>(&p.alpha) : &alpha;
  const void* const beta_place = wide ? static_cast<const void*>(&p.beta) : &beta;
  void* const to = const_cast<void*>(p.out.data);
  KNOCK_LT(cublasLtMatmul(handle(), operation.get(), alpha_place, p.b.data, b.get(), p.a.data, a.get(), beta_place,
                          p.c.data, c.get(), to, out.get(), &choice.algo, workspace.as<void>(), choice.workspaceSize,
                          current_stream()));
  after_launch("gemm");
}

// From arrays to products
// --------------------------------------------------------------------------------------------------------------------

/// How a matrix (the last two axes) is stored, if its rows or its columns are dense.
std::optional<Stored> stored_matrix(const Array& x) {
  const int64_t rank = x.rank(), rows = x.shape[rank - 2], columns = x.shape[rank - 1];
  const int64_t row_step = x.strides[rank - 2], column_step = x.strides[rank - 1];
  if ((column_step == 1 || columns == 1) && (row_step >= columns || rows == 1))
    return Stored{x.data, rows, columns, rows == 1 ? columns : row_step, false};
  if ((row_step == 1 || rows == 1) && (column_step >= rows || columns == 1))
    return Stored{x.data, columns, rows, columns == 1 ? rows : column_step, true};
  return {};
}

bool stored_by_rows(const Array& x) {
  const auto stored = stored_matrix(x);
  return stored && !stored->transposed;
}

/// An operand in the dtype of the product with dense rows or columns: as it is, or a copy.
class Prepared {
 public:
  Prepared(const Array& x, DType dtype) : array(x) {
    if (x.dtype == dtype && stored_matrix(x)) return;
    array.strides = contiguous_strides(x.shape);
    for (int64_t axis = 0; axis < x.rank() - 2; ++axis)  // what is broadcast stays so
      if (x.strides[axis] == 0) array.shape[axis] = 1;
    array.strides = contiguous_strides(array.shape);
    memory_.emplace(array.numel() * size_of(dtype));
    array.data = memory_->as<void>();
    array.dtype = dtype;
    Array from = x;
    from.shape = array.shape;
    copy(array, from);
    array = array.expand(x.shape);
  }

  Array array;

 private:
  std::optional<Scratch> memory_;
};

/// x without its last two axes.
Array leading_axes(const Array& x) {
  Array out = x;
  for (int i = 0; i < 2; ++i) {
    out.shape.erase(out.shape.rank() - 1);
    out.strides.erase(out.strides.rank() - 1);
  }
  return out;
}

bool is_one_matrix(const Array& x) {
  for (int64_t axis = 0; axis < x.rank() - 2; ++axis)
    if (x.shape[axis] != 1 && x.strides[axis] != 0) return false;
  return true;
}

/// Merges the leading axes into the rows where their strides step evenly; false when they do not.
bool merge_rows(Array& x) {
  const int64_t rank = x.rank();
  int64_t rows = x.shape[rank - 2], stride = x.strides[rank - 2];
  for (int64_t axis = rank - 3; axis >= 0; --axis) {
    if (x.shape[axis] == 1) continue;
    if (rows != 1 && x.strides[axis] != rows * stride) return false;
    if (rows == 1) stride = x.strides[axis];
    rows *= x.shape[axis];
  }
  x = {x.data, x.dtype, {rows, x.shape[rank - 1]}, {stride, x.strides[rank - 1]}};
  return true;
}

Array last_matrix(const Array& x) {
  const int64_t rank = x.rank();
  return {x.data, x.dtype, {x.shape[rank - 2], x.shape[rank - 1]}, {x.strides[rank - 2], x.strides[rank - 1]}};
}

char* at_element(const Array& x, int64_t offset) { return static_cast<char*>(x.data) + offset * size_of(x.dtype); }

/// out = activation(alpha a b + beta c + bias), for operands that are stored as products want them: in strided batches
/// along the innermost axis that all leading axes merge into, one call for each index of the others.
void run_batches(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Epilogue& epilogue,
                 const Array& out) {
  const Array leading_a = leading_axes(a), leading_b = leading_axes(b), leading_c = leading_axes(c),
              leading_out = leading_axes(out);
  const LoopNest<4> nest = merge_axes<4>({&leading_out, &leading_a, &leading_b, &leading_c});
  const int64_t inner = nest.shape.rank() - 1, batch = nest.shape[inner];
  const int64_t rank = a.rank();
  Product p{.in = a.dtype,
            .out_type = out.dtype,
            .compute = compute_type(a.dtype),
            .m = a.shape[rank - 2],
            .n = b.shape[rank - 1],
            .k = a.shape[rank - 1],
            .batch = batch,
            .a = *stored_matrix(a),
            .b = *stored_matrix(b),
            .c = *stored_matrix(c),
            .out = *stored_matrix(out),
            .alpha = alpha,
            .beta = beta,
            .epilogue = epilogue};
  p.out.batch_stride = nest.strides[0][inner];
  p.a.batch_stride = nest.strides[1][inner];
  p.b.batch_stride = nest.strides[2][inner];
  p.c.batch_stride = nest.strides[3][inner];
  const int64_t calls = nest.shape.numel() / batch;
  for (int64_t call = 0; call < calls; ++call) {
    std::array<int64_t, 4> offset{};
    for (int64_t axis = inner - 1, rest = call; axis >= 0; --axis) {
      for (std::size_t k = 0; k < 4; ++k) offset[k] += rest % nest.shape[axis] * nest.strides[k][axis];
      rest /= nest.shape[axis];
    }
    p.out.data = at_element(out, offset[0]);
    p.a.data = at_element(a, offset[1]);
    p.b.data = at_element(b, offset[2]);
    p.c.data = at_element(c, offset[3]);
    run(p);
  }
}

/// A bias, one number for each column, as the library adds it: dense and in the result's dtype, converted if need be.
class Bias {
 public:
  /// c: what is added to a result of `dtype`, whatever it is.
  Bias(const Array& c, DType dtype) {
    if (!c.defined() || dtype == DType::f64) return;
    for (int64_t axis = 0; axis < c.rank() - 1; ++axis)
      if (c.shape[axis] != 1 && c.strides[axis] != 0) return;
    if (c.dtype != dtype && dtype != DType::bf16) return;
    const Array row{c.data, c.dtype, {c.shape.back()}, {c.strides.back()}};
    data_ = row.data;
    if (row.dtype == dtype && row.contiguous()) return;
    memory_.emplace(row.numel() * size_of(dtype));
    data_ = memory_->as<void>();
    copy({memory_->as<void>(), dtype, row.shape, {1}}, row);
  }
  /// Null when c is no bias.
  const void* data() const { return data_; }

 private:
  const void* data_ = nullptr;
  std::optional<Scratch> memory_;
};

/// The result of a product in a dtype that cublasLt writes: the given array, or memory that is converted at the end.
class Target {
 public:
  Target(const Array& given, DType dtype) : array(given), given_(given) {
    if (given.dtype == dtype) return;
    memory_.emplace(given.numel() * size_of(dtype));
    array.data = memory_->as<void>();
    array.dtype = dtype;
    array.strides = contiguous_strides(given.shape);
  }
  void write_back() const {
    if (memory_) copy(given_, array);
  }

  Array array;

 private:
  Array given_;
  std::optional<Scratch> memory_;
};

/// out = beta c, where there is nothing to add up.
void scale(double beta, const Array& c, const Array& out) {
  if (beta == 0) return fill(out, 0);
  binary_scalar(Binary::mul, c, beta, false, out);
}

}  // namespace

void gemm(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out) {
  if (out.numel() == 0) return;
  if (a.shape.back() == 0) return scale(beta, c, out);
  const bool narrow = a.dtype == DType::bf16 || b.dtype == DType::bf16;
  const DType in = narrow ? DType::bf16 : a.dtype;
  const DType natural = narrow ? out.dtype : in;
  const Bias bias(beta == 1 ? c : Array{}, natural);
  const bool adds = beta != 0 && !bias.data();
  const Target target(out, adds && c.dtype != natural ? compute_dtype(in) : natural);  // c is added, then it is rounded
  const bool takes_c = adds && c.dtype == target.array.dtype && c.rank() == 2 && stored_by_rows(c);
  if (adds && !takes_c && c.data != target.array.data) copy(target.array, c);

  const Prepared left(a, in), right(b, in);
  Array x = left.array, y = right.array, z = target.array;
  if (x.rank() > 2 && is_one_matrix(y) && merge_rows(x)) {
    merge_rows(z);
    y = last_matrix(y);
    if (!stored_matrix(x)) x = left.array, y = right.array, z = target.array;
  }
  run_batches(alpha, x, y, adds ? beta : 0, takes_c ? c : z, {.bias = bias.data()}, z);
  target.write_back();
}

void gemm_activation(const Array& a, const Array& b, const Array& bias, Unary activation, const Array& out_before,
                     const Array& out) {
  if (out.numel() == 0) return;
  const DType dtype = out.dtype;
  const Bias row(a.shape.back() == 0 || a.dtype != dtype ? Array{} : bias, dtype);
  const bool known = activation == Unary::relu || activation == Unary::gelu_tanh;
  if (!known || dtype == DType::f64 || a.dtype != dtype || a.shape.back() == 0 || (bias.defined() && !row.data()) ||
      (out_before.defined() && out.shape[1] % 8 != 0)) {
    const Array before = out_before.defined() ? out_before : out;
    gemm(1, a, b, bias.defined() ? 1 : 0, bias, before);
    return unary(activation, {}, before, out);
  }
  const Prepared left(a, dtype), right(b, dtype);
  run_batches(1, left.array, right.array, 0, out,
              {.bias = row.data(), .activation = activation, .before = out_before.data}, out);
}

void gemm_many(const Array& a, std::span<const Array> b, std::span<const Array> out) {
  for (std::size_t i = 0; i < b.size(); ++i) gemm(1, a, b[i], 0, {}, out[i]);
}

}  // namespace knock::cuda
