// cublasLt beside a plain triple loop: types, transposes, orders, leading dimensions, batches, epilogues, and what it
// refuses.

#include "child.hpp"
#include "counters.hpp"
#include "device_vector.cuh"
#include "report.hpp"

#include <cublasLt.h>

#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <string>
#include <vector>

namespace {

// ---- values as device memory holds them ----

float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
T encode(double value) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return to_bf16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
double decode(T value) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return from_bf16(value);
  } else {
    return value;
  }
}

template <class T>
constexpr cudaDataType type_of = std::is_same_v<T, double>  ? CUDA_R_64F
                                 : std::is_same_v<T, float> ? CUDA_R_32F
                                                            : CUDA_R_16BF;

// A batch of matrices in memory that has gaps between columns and between matrices.
template <class T>
struct Operand {
  int64_t rows, columns, batches;
  bool row_order;
  int64_t leading, stride;
  std::vector<T> values;

  Operand(int64_t rows_, int64_t columns_, int64_t batches_, bool row_order_, int64_t gap)
      : rows(rows_),
        columns(columns_),
        batches(batches_),
        row_order(row_order_),
        leading((row_order ? columns : rows) + gap),
        stride(leading * (row_order ? rows : columns) + gap),
        values(static_cast<std::size_t>(stride * batches)) {}

  std::size_t index(int64_t batch, int64_t row, int64_t column) const {
    return static_cast<std::size_t>(batch * stride + (row_order ? row * leading + column : column * leading + row));
  }
  double get(int64_t batch, int64_t row, int64_t column) const { return decode(values[index(batch, row, column)]); }
  void fill(unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (auto& value : values) value = encode<T>(uniform(random));
  }
};

// ---- cublasLt with its objects ----

struct Setup {
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t description = nullptr;
  std::vector<cublasLtMatrixLayout_t> layouts;

  Setup(cublasComputeType_t compute, cudaDataType scale) {
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&description, compute, scale);
  }
  ~Setup() {
    for (auto* layout : layouts) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(description);
    cublasLtDestroy(handle);
  }
  Setup(const Setup&) = delete;
  Setup& operator=(const Setup&) = delete;

  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, T value) {
    REQUIRE(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
  }

  template <class T>
  cublasLtMatrixLayout_t layout(const Operand<T>& of) {
    cublasLtMatrixLayout_t made = nullptr;
    cublasLtMatrixLayoutCreate(&made, type_of<T>, static_cast<uint64_t>(of.rows), static_cast<uint64_t>(of.columns),
                               of.leading);
    const int32_t order = of.row_order ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
    const auto batches = static_cast<int32_t>(of.batches);
    cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order);
    cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof batches);
    cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &of.stride, sizeof of.stride);
    layouts.push_back(made);
    return made;
  }
};

struct Case {
  int64_t m = 7, n = 5, k = 9, batches = 1, gap = 0;
  bool transpose_a = false, transpose_b = false;
  bool row_order = false;  // of all matrices
  double alpha = 1, beta = 0;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
};

// The largest difference, over the scale that k products of values up to 1 have.
template <class In, class Out>
double largest_error(const Case& of) {
  using Scale = std::conditional_t<std::is_same_v<In, double>, double, float>;
  Operand<In> a(of.transpose_a ? of.k : of.m, of.transpose_a ? of.m : of.k, of.batches, of.row_order, of.gap);
  Operand<In> b(of.transpose_b ? of.n : of.k, of.transpose_b ? of.k : of.n, of.batches, of.row_order, of.gap);
  Operand<Out> c(of.m, of.n, of.batches, of.row_order, of.gap), d(of.m, of.n, of.batches, of.row_order, of.gap);
  a.fill(1);
  b.fill(2);
  c.fill(3);
  const DeviceVector<In> a_data(a.values), b_data(b.values);
  const DeviceVector<Out> c_data(c.values), d_data(d.values);

  Setup setup(of.compute, type_of<Scale>);
  setup.set<int32_t>(CUBLASLT_MATMUL_DESC_TRANSA, of.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  setup.set<int32_t>(CUBLASLT_MATMUL_DESC_TRANSB, of.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  const auto alpha = static_cast<Scale>(of.alpha), beta = static_cast<Scale>(of.beta);
  REQUIRE(cublasLtMatmul(setup.handle, setup.description, &alpha, a_data.data(), setup.layout(a), b_data.data(),
                         setup.layout(b), &beta, c_data.data(), setup.layout(c), d_data.data(), setup.layout(d),
                         nullptr, nullptr, 0, nullptr) == CUBLAS_STATUS_SUCCESS);
  d.values = d_data.to_host();

  double largest = 0;
  for (int64_t batch = 0; batch < of.batches; ++batch) {
    for (int64_t i = 0; i < of.m; ++i) {
      for (int64_t j = 0; j < of.n; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < of.k; ++l) {
          sum += (of.transpose_a ? a.get(batch, l, i) : a.get(batch, i, l)) *
                 (of.transpose_b ? b.get(batch, j, l) : b.get(batch, l, j));
        }
        const double expected = of.alpha * sum + of.beta * c.get(batch, i, j);
        largest = std::max(largest, std::abs(d.get(batch, i, j) - expected));
      }
    }
  }
  return largest / static_cast<double>(of.k);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const bool a : {false, true}) {
    for (const bool b : {false, true}) {
      for (const bool rows : {false, true}) all.push_back({.transpose_a = a, .transpose_b = b, .row_order = rows});
    }
  }
  all.push_back({.m = 16, .n = 24, .k = 32, .batches = 3});
  all.push_back({.batches = 2, .gap = 3, .transpose_b = true, .alpha = 0.5, .beta = 2});
  all.push_back({.m = 1, .n = 33, .k = 64, .gap = 1, .row_order = true, .beta = 1});
  return all;
}

// ---- one product with an epilogue ----

struct EpilogueResult {
  cublasStatus_t status;
  std::vector<float> d, bias, aux;
};

constexpr int64_t rows = 8, columns = 6, inner = 10;

Operand<float> filled(int64_t r, int64_t c, unsigned seed) {
  Operand<float> made(r, c, 1, false, 0);
  made.fill(seed);
  return made;
}

double plain_product(int64_t i, int64_t j) {
  static const auto a = filled(rows, inner, 1), b = filled(inner, columns, 2);
  double sum = 0;
  for (int64_t l = 0; l < inner; ++l) sum += a.get(0, i, l) * b.get(0, l, j);
  return sum;
}

// The bias starts as 0, 1, 2, ..., the auxiliary matrix as the third random one.
EpilogueResult run_epilogue(cublasLtEpilogue_t epilogue) {
  const auto a = filled(rows, inner, 1), b = filled(inner, columns, 2), aux = filled(rows, columns, 3);
  const Operand<float> d(rows, columns, 1, false, 0);
  const DeviceVector<float> a_data(a.values), b_data(b.values), d_data(d.values), aux_data(aux.values),
      bias_data(counting<float>(rows));
  Setup setup(CUBLAS_COMPUTE_32F, CUDA_R_32F);
  setup.set<int32_t>(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
  setup.set<void*>(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias_data.data());
  setup.set<void*>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux_data.data());
  setup.set<int64_t>(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, rows);
  const float alpha = 1, beta = 0;
  const auto status = cublasLtMatmul(setup.handle, setup.description, &alpha, a_data.data(), setup.layout(a),
                                     b_data.data(), setup.layout(b), &beta, d_data.data(), setup.layout(d),
                                     d_data.data(), setup.layout(d), nullptr, nullptr, 0, nullptr);
  return {status, d_data.to_host(), bias_data.to_host(), aux_data.to_host()};
}

double gelu(double x) { return x / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x))); }

// What `expected(i, j)` says of each element of D.
template <class Expected>
double largest_difference(const std::vector<float>& d, Expected expected) {
  double largest = 0;
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      largest =
          std::max(largest, std::abs(static_cast<double>(d[static_cast<std::size_t>(j * rows + i)]) - expected(i, j)));
    }
  }
  return largest;
}

constexpr double f32_limit = 1e-6;

}  // namespace

TEST_CASE("cublasLt: products equal a triple loop") {
  for (const auto& of : cases()) {
    CAPTURE(of.transpose_a);
    CAPTURE(of.transpose_b);
    CAPTURE(of.row_order);
    CAPTURE(of.batches);
    CHECK(largest_error<float, float>(of) < 1e-7);
    CHECK(largest_error<uint16_t, float>(of) < 1e-7);
    CHECK(largest_error<uint16_t, uint16_t>(of) < 0x1p-9);  // half a unit of bf16, of values up to k
    auto in_f64 = of;
    in_f64.compute = CUBLAS_COMPUTE_64F;
    CHECK(largest_error<double, double>(in_f64) < 1e-15);
  }
  CHECK(cuda_sim::take_reports().empty());
}

TEST_CASE("cublasLt: TF32 only where it is asked for") {
  const Case in_f32{.m = 16, .n = 16, .k = 64},
      in_tf32{.m = 16, .n = 16, .k = 64, .compute = CUBLAS_COMPUTE_32F_FAST_TF32};
  CHECK(largest_error<float, float>(in_f32) < 1e-7);
  CHECK(largest_error<float, float>(in_tf32) > 1e-6);
  CHECK(largest_error<float, float>(in_tf32) < 1e-3);
}

TEST_CASE("cublasLt: epilogues") {
  const auto aux = filled(rows, columns, 3);
  const auto check = [&](cublasLtEpilogue_t epilogue, auto expected) {
    const auto result = run_epilogue(epilogue);
    REQUIRE(result.status == CUBLAS_STATUS_SUCCESS);
    CHECK(largest_difference(result.d, expected) < f32_limit);
    return result;
  };
  const auto bias = [](int64_t i) { return static_cast<double>(i); };
  check(CUBLASLT_EPILOGUE_BIAS, [&](auto i, auto j) { return plain_product(i, j) + bias(i); });
  check(CUBLASLT_EPILOGUE_RELU, [](auto i, auto j) { return std::max(plain_product(i, j), 0.0); });
  check(CUBLASLT_EPILOGUE_RELU_BIAS, [&](auto i, auto j) { return std::max(plain_product(i, j) + bias(i), 0.0); });
  check(CUBLASLT_EPILOGUE_GELU, [](auto i, auto j) { return gelu(plain_product(i, j)); });
  check(CUBLASLT_EPILOGUE_GELU_BIAS, [&](auto i, auto j) { return gelu(plain_product(i, j) + bias(i)); });
  const auto with_aux =
      check(CUBLASLT_EPILOGUE_GELU_AUX_BIAS, [&](auto i, auto j) { return gelu(plain_product(i, j) + bias(i)); });
  CHECK(largest_difference(with_aux.aux, [&](auto i, auto j) { return plain_product(i, j) + bias(i); }) < f32_limit);

  const auto slope = [](double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; };
  const auto backward = [&](auto i, auto j) { return plain_product(i, j) * slope(aux.get(0, i, j)); };
  check(CUBLASLT_EPILOGUE_DGELU, backward);
  const auto sums = check(CUBLASLT_EPILOGUE_DGELU_BGRAD, backward);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += backward(i, j);
    CHECK(static_cast<double>(sums.bias[static_cast<std::size_t>(i)]) == doctest::Approx(sum).epsilon(1e-5));
  }
  CHECK(cuda_sim::take_reports().empty());
}

TEST_CASE("cublasLt: bias gradients of the operands") {
  const auto a = filled(rows, inner, 1), b = filled(inner, columns, 2);
  const auto of_a = run_epilogue(CUBLASLT_EPILOGUE_BGRADA).bias, of_b = run_epilogue(CUBLASLT_EPILOGUE_BGRADB).bias;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t l = 0; l < inner; ++l) sum += a.get(0, i, l);
    CHECK(std::abs(static_cast<double>(of_a[static_cast<std::size_t>(i)]) - sum) < f32_limit);
  }
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t l = 0; l < inner; ++l) sum += b.get(0, l, j);
    CHECK(std::abs(static_cast<double>(of_b[static_cast<std::size_t>(j)]) - sum) < f32_limit);
  }
}

TEST_CASE("cublasLt: what it refuses") {
  const auto status = [](cublasComputeType_t compute, int64_t b_rows, auto zero) {
    using T = decltype(zero);
    const Operand<T> a(4, 6, 1, false, 0), b(b_rows, 5, 1, false, 0), d(4, 5, 1, false, 0);
    Setup setup(compute, CUDA_R_32F);
    const float one = 1;
    return cublasLtMatmul(setup.handle, setup.description, &one, nullptr, setup.layout(a), nullptr, setup.layout(b),
                          &one, nullptr, setup.layout(d), nullptr, setup.layout(d), nullptr, nullptr, 0, nullptr);
  };
  CHECK(status(CUBLAS_COMPUTE_32F, 7, 0.f) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(cuda_sim::take_reports().at(0).find("op(A) is 4x6, op(B) 7x5") != std::string::npos);
  CHECK(status(CUBLAS_COMPUTE_64F, 6, 0.f) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(status(CUBLAS_COMPUTE_32F, 6, 0.0) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(status(CUBLAS_COMPUTE_16F, 6, 0.f) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(cuda_sim::take_reports().size() == 3);
  CHECK(run_epilogue(CUBLASLT_EPILOGUE_DRELU).status == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(cuda_sim::take_reports().size() == 1);
}

namespace {

// A product by the heuristic's algorithm, with something changed.
struct Planned {
  std::size_t a_offset = 0;    // elements that A lies off its allocation's start
  uint32_t a_alignment = 256;  // that the heuristic is told
  std::size_t a_size = 64;     // elements that there are; 64 are needed
  bool written = true, workspace = true;
};

cublasLtMatmulHeuristicResult_t plan(const Setup& setup, cublasLtMatrixLayout_t layout, uint32_t a_alignment,
                                     uint64_t most_workspace) {
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulPreferenceCreate(&preference);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most_workspace,
                                       sizeof most_workspace);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a_alignment,
                                       sizeof a_alignment);
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  cublasLtMatmulAlgoGetHeuristic(setup.handle, setup.description, layout, layout, layout, layout, preference, 1,
                                 &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  return result;
}

cublasStatus_t run_planned(const Planned& of) {
  const Operand<float> square(8, 8, 1, false, 0);
  const DeviceVector<float> a(of.a_offset + of.a_size), b(std::vector<float>(64)), d(64), workspace(1 << 18);
  if (of.written) cudaMemset(a.data(), 0, a.bytes());
  Setup setup(CUBLAS_COMPUTE_32F, CUDA_R_32F);
  auto* layout = setup.layout(square);
  const auto result = plan(setup, layout, of.a_alignment, workspace.bytes());
  const float alpha = 1, beta = 0;
  const auto status =
      cublasLtMatmul(setup.handle, setup.description, &alpha, a.data() + of.a_offset, layout, b.data(), layout, &beta,
                     nullptr, layout, d.data(), layout, &result.algo, of.workspace ? workspace.data() : nullptr,
                     of.workspace ? result.workspaceSize : 0, nullptr);
  cudaDeviceSynchronize();
  return status;
}

bool finds(const Planned& of, const char* finding) {
  const auto outcome = run_in_child([&] { run_planned(of); });
  INFO(outcome.findings);
  return outcome.exit_code == 1 && outcome.findings.find(finding) != std::string::npos;
}

}  // namespace

TEST_CASE("cublasLt: its operands are checked") {
  const auto clean = run_in_child([] { run_planned({}); });
  CHECK(clean.findings == "");
  CHECK(clean.exit_code == 0);
  CHECK(run_in_child([] { run_planned({.a_offset = 4, .a_alignment = 16}); }).findings == "");
  CHECK(finds({.a_offset = 4}, "A is not aligned to 256 bytes"));
  CHECK(finds({.a_size = 63}, "A of 256 bytes from byte 0 of"));
  CHECK(finds({.written = false}, "as A, reads byte 0"));
  CHECK(finds({.workspace = false}, "needs a workspace"));
}

namespace {

// Two products on two streams that nothing orders, each with its workspace or both with one.
void run_beside(bool share) {
  const Operand<float> square(8, 8, 1, false, 0);
  const DeviceVector<float> a(std::vector<float>(64)), first(64), second(64), workspace(1 << 16), other(1 << 16);
  cudaDeviceSynchronize();
  std::array<cudaStream_t, 2> streams{};
  for (auto& stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  {
    Setup setup(CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const auto result = plan(setup, setup.layout(square), 256, workspace.bytes());
    const float alpha = 1, beta = 0;
    for (int i = 0; i < 2; ++i) {
      const auto& d = i == 0 ? first : second;
      const auto& scratch = i == 0 || share ? workspace : other;
      auto* layout = setup.layouts.front();
      cublasLtMatmul(setup.handle, setup.description, &alpha, a.data(), layout, a.data(), layout, &beta, d.data(),
                     layout, d.data(), layout, &result.algo, scratch.data(), result.workspaceSize,
                     streams[static_cast<std::size_t>(i)]);
    }
  }
  cudaDeviceSynchronize();
  for (auto* stream : streams) cudaStreamDestroy(stream);
}

}  // namespace

TEST_CASE("cublasLt: two streams must not share a workspace") {
  CHECK(run_in_child([] { run_beside(false); }).findings == "");
  const auto shared = run_in_child([] { run_beside(true); });
  CHECK(shared.exit_code == 1);
  CHECK(shared.findings.find("no event or wait orders them") != std::string::npos);
}

TEST_CASE("cublasLt: launches, operations and bytes are counted") {
  cuda_sim::reset_kernel_counters();
  largest_error<float, float>({.m = 4, .n = 8, .k = 16, .batches = 2, .beta = 1});
  const auto& counters = cuda_sim::kernel_counters().at("cublasLt f32 4x8x16 x 2");
  CHECK(counters.launches == 1);
  CHECK(counters.fma_lanes == 2 * 4 * 8 * 16);
  CHECK(counters.global_bytes_read == 2 * 4 * (4 * 16 + 16 * 8 + 4 * 8));
  CHECK(counters.global_bytes_written == 2 * 4 * 4 * 8);
}
