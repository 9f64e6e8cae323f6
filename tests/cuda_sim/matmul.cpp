// Products by Eigen: f32 and bf16 accumulate in f32, f64 in f64.

#include "matmul.hpp"

#include <Eigen/Core>

#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

namespace cuda_sim {
namespace {

constexpr unsigned has_relu = 2, has_bias = 4, has_bias_gradient = 16, has_gelu = 32, has_gelu_gradient = 64,
                   has_aux = 128;
constexpr unsigned sums_a = CUBLASLT_EPILOGUE_BGRADA, sums_b = CUBLASLT_EPILOGUE_BGRADB;

std::size_t size_of(cudaDataType type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }
const char* text_of(cudaDataType type) { return type == CUDA_R_64F ? "f64" : type == CUDA_R_32F ? "f32" : "bf16"; }

bool is_epilogue(cublasLtEpilogue_t epilogue) {
  switch (epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_RELU:
    case CUBLASLT_EPILOGUE_RELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB:
      return true;
    default:
      return false;
  }
}

bool uses_bias(unsigned epilogue) { return (epilogue & (has_bias | has_bias_gradient | sums_a | sums_b)) != 0; }

Verdict invalid(const std::string& why) { return {CUBLAS_STATUS_INVALID_VALUE, why}; }
Verdict unsupported(const std::string& why) { return {CUBLAS_STATUS_NOT_SUPPORTED, why}; }

bool types_fit(const MatmulDescription& of, cudaDataType a, cudaDataType b, cudaDataType c, cudaDataType d) {
  if (a != b || c != d) return false;
  if (of.compute == CUBLAS_COMPUTE_64F) return of.scale == CUDA_R_64F && a == CUDA_R_64F && d == CUDA_R_64F;
  if (of.scale != CUDA_R_32F) return false;
  if (of.compute == CUBLAS_COMPUTE_32F_FAST_TF32) return a == CUDA_R_32F && d == CUDA_R_32F;
  if (of.compute != CUBLAS_COMPUTE_32F) return false;
  if (a == CUDA_R_32F) return d == CUDA_R_32F;
  return a == CUDA_R_16BF && (d == CUDA_R_16BF || d == CUDA_R_32F);
}

bool layout_fits(const MatrixLayout& of) {
  const auto inner = of.order == CUBLASLT_ORDER_COL ? of.rows : of.columns;
  return of.rows > 0 && of.columns > 0 && of.batches > 0 && of.leading >= static_cast<int64_t>(inner);
}

Verdict check_epilogue(const MatmulDescription& of, const MatrixLayout& d) {
  if (of.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return {};
  const auto epilogue = static_cast<unsigned>(of.epilogue);
  if (!is_epilogue(of.epilogue)) return unsupported("epilogue " + std::to_string(epilogue) + " is not modelled");
  if (d.type == CUDA_R_64F) return unsupported("no epilogue with f64");
  if (d.order != CUBLASLT_ORDER_COL) return unsupported("no epilogue with rows in order");
  if (uses_bias(epilogue) && of.bias == nullptr) return invalid("an epilogue with a bias, without its pointer");
  if (uses_bias(epilogue) && of.bias_type >= 0 && of.bias_type != static_cast<int32_t>(d.type)) {
    return unsupported("a bias of another type than D");
  }
  if ((epilogue & has_aux) != 0) {
    if (of.aux == nullptr) return invalid("an epilogue with an auxiliary matrix, without its pointer");
    if (of.aux_leading < static_cast<int64_t>(d.rows) || of.aux_leading % 8 != 0) {
      return invalid("the leading dimension of the auxiliary matrix is below the rows of D or no multiple of 8");
    }
    if (of.aux_type >= 0 && of.aux_type != static_cast<int32_t>(d.type)) {
      return unsupported("an auxiliary matrix of another type than D");
    }
  }
  if ((epilogue & (has_bias_gradient | sums_a | sums_b)) != 0 && d.batches > 1) {
    return unsupported("bias gradients of a batch");
  }
  return {};
}

// ---- matrices in device memory ----

// One matrix of a batch; `inner` elements lie side by side.
struct Matrix {
  char* data = nullptr;
  cudaDataType type = CUDA_R_32F;
  int64_t inner = 0, outer = 0, leading = 0;

  std::size_t row_bytes() const { return static_cast<std::size_t>(inner) * size_of(type); }
  char* row(int64_t i) const { return data + static_cast<std::size_t>(i * leading) * size_of(type); }
};

Matrix matrix_of(const MatrixLayout& of, const void* data, int64_t batch) {
  const bool columns = of.order == CUBLASLT_ORDER_COL;
  auto* first = static_cast<char*>(const_cast<void*>(data)) +
                static_cast<std::size_t>(batch * of.batch_stride) * size_of(of.type);
  const auto rows = static_cast<int64_t>(of.rows), cols = static_cast<int64_t>(of.columns);
  return {first, of.type, columns ? rows : cols, columns ? cols : rows, of.leading};
}

// False, after a report and with a sticky error, when the matrix is not inside of a live range.
bool check_bounds(const Matrix& matrix, const char* operand) {
  const auto* range = find(matrix.data);
  const auto* end = matrix.row(matrix.outer - 1) + matrix.row_bytes();
  if (range != nullptr && end <= range->data + range->bytes) return true;
  report(std::string("cuBLAS: ") + operand + " of " + std::to_string(end - matrix.data) + " bytes from " +
         describe_address(matrix.data));
  set_sticky_error(cudaErrorIllegalAddress);
  return false;
}

// Whether all its bytes are one range.
bool is_dense(const Matrix& of) { return of.leading == of.inner || of.outer == 1; }

template <class Visit>
void for_each_range(const Matrix& of, Visit visit) {
  if (is_dense(of)) return visit(of.data, of.row_bytes() * static_cast<std::size_t>(of.outer));
  for (int64_t i = 0; i < of.outer; ++i) visit(of.row(i), of.row_bytes());
}

void note_read(const Matrix& of, const char* operand) {
  for_each_range(of, [&](char* data, std::size_t bytes) {
    read_range(data, bytes, (std::string("cuBLAS, as ") + operand + ",").c_str());
  });
}

void note_written(const Matrix& of) {
  for_each_range(of, [](char* data, std::size_t bytes) { write_range(data, bytes); });
}

template <class S>
using Values = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic>;

template <class T, class S>
void convert_in(const Matrix& from, Values<S>& to) {
  using Stored = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
  const auto* data = reinterpret_cast<const T*>(bytes_at(from.data));
  to = Eigen::Map<const Stored, 0, Eigen::OuterStride<>>(data, from.inner, from.outer,
                                                         Eigen::OuterStride<>(from.leading))
           .template cast<S>();
}

template <class T, class S>
void convert_out(const Values<S>& from, const Matrix& to) {
  using Stored = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
  auto* data = reinterpret_cast<T*>(bytes_at(to.data));
  Eigen::Map<Stored, 0, Eigen::OuterStride<>>(data, to.inner, to.outer, Eigen::OuterStride<>(to.leading)) =
      from.template cast<T>();
}

// `inner` x `outer`: the transpose of the matrix when its rows are in order.
template <class S>
Values<S> load(const Matrix& from) {
  Values<S> values;
  if (from.type == CUDA_R_64F) {
    convert_in<double>(from, values);
  } else if (from.type == CUDA_R_32F) {
    convert_in<float>(from, values);
  } else {
    convert_in<Eigen::bfloat16>(from, values);
  }
  return values;
}

template <class S>
void store(const Values<S>& values, const Matrix& to) {
  note_written(to);
  if (to.type == CUDA_R_64F) return convert_out<double>(values, to);
  if (to.type == CUDA_R_32F) return convert_out<float>(values, to);
  convert_out<Eigen::bfloat16>(values, to);
}

// The matrix as mathematics writes it, transposed where that is wanted.
template <class S>
Values<S> operand(const MatrixLayout& layout, const Matrix& from, cublasOperation_t operation) {
  auto values = load<S>(from);
  const bool flip = (layout.order == CUBLASLT_ORDER_ROW) != (operation != CUBLAS_OP_N);
  if (flip) values.transposeInPlace();
  return values;
}

// ---- epilogues ----

// To the 10 bits of a TF32 mantissa, halves away from zero: what tensor cores are fed.
float round_to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x1000u) & ~0x1fffu);
}

// cuBLAS computes GELU by tanh.
template <class S>
S gelu(S x) {
  const S inner = std::sqrt(2 / std::numbers::pi_v<S>) * (x + S(0.044715) * x * x * x);
  return x / 2 * (1 + std::tanh(inner));
}

template <class S>
S gelu_gradient(S x) {
  const S scale = std::sqrt(2 / std::numbers::pi_v<S>), cubic = S(0.044715);
  const S t = std::tanh(scale * (x + cubic * x * x * x));
  return (1 + t) / 2 + x / 2 * (1 - t * t) * scale * (1 + 3 * cubic * x * x);
}

template <class S>
Values<S> sum_of_rows(const Values<S>& of) {
  return of.rowwise().sum();
}

Matrix bias_of(const Matmul& matmul, int64_t batch, int64_t size) {
  const auto type = matmul.d.type;
  auto* first =
      static_cast<char*>(matmul.of.bias) + static_cast<std::size_t>(batch * matmul.of.bias_stride) * size_of(type);
  return {first, type, size, 1, size};
}

Matrix aux_of(const Matmul& matmul, int64_t batch) {
  const auto type = matmul.d.type;
  auto* first =
      static_cast<char*>(matmul.of.aux) + static_cast<std::size_t>(batch * matmul.of.aux_stride) * size_of(type);
  return {first, type, matmul.m(), matmul.n(), matmul.of.aux_leading};
}

template <class S>
void add_bias(const Matrix& bias, Values<S>& result) {
  if (!check_bounds(bias, "bias")) return;
  note_read(bias, "bias");
  result.colwise() += load<S>(bias).col(0);
}

template <class S>
void multiply_by_gelu_gradient(const Matrix& aux, Values<S>& result) {
  note_read(aux, "auxiliary matrix");
  result.array() *= load<S>(aux).array().unaryExpr([](S x) { return gelu_gradient(x); });
}

// What happens to alpha * A B + beta * C before it becomes D.
template <class S>
void apply_epilogue(const Matmul& matmul, int64_t batch, Values<S>& result) {
  const auto epilogue = static_cast<unsigned>(matmul.of.epilogue);
  const auto has = [&](unsigned part) { return (epilogue & part) != 0; };
  const auto aux = aux_of(matmul, batch);
  if (has(has_bias)) add_bias(bias_of(matmul, batch, matmul.m()), result);
  if (has(has_aux) && !check_bounds(aux, "auxiliary matrix")) return;
  if (has(has_aux) && has(has_gelu)) store(result, aux);
  if (has(has_gelu)) result = result.unaryExpr([](S x) { return gelu(x); }).eval();
  if (has(has_relu)) result = result.cwiseMax(S(0)).eval();
  if (has(has_gelu_gradient)) multiply_by_gelu_gradient(aux, result);
}

// The gradient of a bias: sums over the rows of what the epilogue says.
template <class S>
void store_bias_gradient(const Matmul& matmul, int64_t batch, const Values<S>& a, const Values<S>& b,
                         const Values<S>& result) {
  const auto epilogue = static_cast<unsigned>(matmul.of.epilogue);
  Values<S> sums;
  if ((epilogue & has_bias_gradient) != 0) sums = result.rowwise().sum();
  if ((epilogue & sums_a) != 0) sums = a.rowwise().sum();
  if ((epilogue & sums_b) != 0) sums = b.colwise().sum().transpose();
  if (sums.size() == 0) return;
  const auto gradient = bias_of(matmul, batch, sums.rows());
  if (check_bounds(gradient, "bias gradient")) store(sums, gradient);
}

template <class S>
void run_one(const Matmul& matmul, int64_t batch) {
  const auto& of = matmul.of;
  const auto a_matrix = matrix_of(matmul.a, matmul.a_data, batch), b_matrix = matrix_of(matmul.b, matmul.b_data, batch);
  const auto c_matrix = matrix_of(matmul.c, matmul.c_data, batch), d_matrix = matrix_of(matmul.d, matmul.d_data, batch);
  if (!check_bounds(a_matrix, "A") || !check_bounds(b_matrix, "B") || !check_bounds(d_matrix, "D")) return;
  note_read(a_matrix, "A");
  note_read(b_matrix, "B");
  auto a = operand<S>(matmul.a, a_matrix, of.transpose_a);
  auto b = operand<S>(matmul.b, b_matrix, of.transpose_b);
  if constexpr (std::is_same_v<S, float>) {
    if (of.compute == CUBLAS_COMPUTE_32F_FAST_TF32) {
      a = a.unaryExpr([](float x) { return round_to_tf32(x); }).eval();
      b = b.unaryExpr([](float x) { return round_to_tf32(x); }).eval();
    }
  }
  Values<S> result = a * b;
  result *= static_cast<S>(matmul.alpha);
  if (matmul.beta != 0) {
    if (!check_bounds(c_matrix, "C")) return;
    note_read(c_matrix, "C");
    result += static_cast<S>(matmul.beta) * operand<S>(matmul.c, c_matrix, CUBLAS_OP_N);
  }
  apply_epilogue<S>(matmul, batch, result);
  store_bias_gradient<S>(matmul, batch, a, b, result);
  if (matmul.d.order == CUBLASLT_ORDER_ROW) result.transposeInPlace();
  if (sticky_error() == cudaSuccess) store(result, d_matrix);
}

void count(const Matmul& matmul) {
  const auto elements = [](const MatrixLayout& of) { return of.rows * of.columns * static_cast<uint64_t>(of.batches); };
  Counters counters;
  counters.launches = matmul.is_launch ? 1 : 0;
  counters.fma_lanes = static_cast<uint64_t>(matmul.m() * matmul.n() * matmul.k() * matmul.d.batches);
  counters.global_bytes_read = elements(matmul.a) * size_of(matmul.a.type) +
                               elements(matmul.b) * size_of(matmul.b.type) +
                               (matmul.beta != 0 ? elements(matmul.c) * size_of(matmul.c.type) : 0);
  counters.global_bytes_written = elements(matmul.d) * size_of(matmul.d.type);
  counters.touched_bytes_read = counters.global_bytes_read;
  counters.touched_bytes_written = counters.global_bytes_written;
  note_work(name_of(matmul), counters);
}

}  // namespace

Verdict check(const MatmulDescription& of, const MatrixLayout& a, const MatrixLayout& b, const MatrixLayout& c,
              const MatrixLayout& d) {
  if (!types_fit(of, a.type, b.type, c.type, d.type)) return unsupported("these types with this compute type");
  for (const auto* layout : {&a, &b, &c, &d}) {
    if (!layout_fits(*layout)) return invalid("an empty matrix, or a leading dimension below its rows or columns");
    if (layout->batches != d.batches) return invalid("the batch counts differ");
  }
  const bool flip_a = of.transpose_a != CUBLAS_OP_N, flip_b = of.transpose_b != CUBLAS_OP_N;
  const auto m = flip_a ? a.columns : a.rows, k = flip_a ? a.rows : a.columns;
  const auto k_of_b = flip_b ? b.columns : b.rows, n = flip_b ? b.rows : b.columns;
  if (k != k_of_b || d.rows != m || d.columns != n || c.rows != m || c.columns != n) {
    return invalid("op(A) is " + std::to_string(m) + "x" + std::to_string(k) + ", op(B) " + std::to_string(k_of_b) +
                   "x" + std::to_string(n) + ", C " + std::to_string(c.rows) + "x" + std::to_string(c.columns) +
                   ", D " + std::to_string(d.rows) + "x" + std::to_string(d.columns));
  }
  if (c.order != d.order) return unsupported("C and D in different orders");
  return check_epilogue(of, d);
}

void run(const Matmul& matmul) {
  count(matmul);
  if (!is_executing()) return;
  for (int64_t batch = 0; batch < matmul.d.batches && sticky_error() == cudaSuccess; ++batch) {
    if (matmul.d.type == CUDA_R_64F) {
      run_one<double>(matmul, batch);
    } else {
      run_one<float>(matmul, batch);
    }
  }
}

std::string name_of(const Matmul& matmul) {
  auto name = std::string("cublasLt ") + text_of(matmul.a.type) + " " + std::to_string(matmul.m()) + "x" +
              std::to_string(matmul.n()) + "x" + std::to_string(matmul.k());
  if (matmul.d.batches > 1) name += " x " + std::to_string(matmul.d.batches);
  return name;
}

}  // namespace cuda_sim
