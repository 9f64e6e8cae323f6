#pragma once
// D = epilogue(alpha * op(A) op(B) + beta * C) on device memory, as cublasLtMatmul defines it.

#include "runtime.hpp"

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <string>

namespace cuda_sim {

/// What a cublasLtMatrixLayout_t points to.
struct MatrixLayout {
  cudaDataType type = CUDA_R_32F;
  cublasLtOrder_t order = CUBLASLT_ORDER_COL;
  uint64_t rows = 0, columns = 0;
  int64_t leading = 0;  ///< elements from a column (of ORDER_ROW: a row) to the next
  int32_t batches = 1;
  int64_t batch_stride = 0;
};

/// What a cublasLtMatmulDesc_t points to.
struct MatmulDescription {
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cudaDataType scale = CUDA_R_32F;
  cublasLtPointerMode_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
  cublasOperation_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void* bias = nullptr;
  int32_t bias_type = -1;  ///< -1: as D
  int64_t bias_stride = 0;
  void* aux = nullptr;
  int64_t aux_leading = 0, aux_stride = 0;
  int32_t aux_type = -1;  ///< -1: as D
};

struct Matmul {
  MatmulDescription of;
  MatrixLayout a, b, c, d;
  const void *a_data = nullptr, *b_data = nullptr, *c_data = nullptr;
  void* d_data = nullptr;
  double alpha = 1, beta = 0;
  bool is_launch = true;  ///< false: a part of one that has been counted

  int64_t m() const { return static_cast<int64_t>(d.rows); }
  int64_t n() const { return static_cast<int64_t>(d.columns); }
  int64_t k() const { return static_cast<int64_t>(of.transpose_a == CUBLAS_OP_N ? a.columns : a.rows); }
};

/// What the library would answer, short of looking at the data; anything but success with the reason.
struct Verdict {
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  std::string why;
};
Verdict check(const MatmulDescription& of, const MatrixLayout& a, const MatrixLayout& b, const MatrixLayout& c,
              const MatrixLayout& d);

/// Computes, in the present work of a stream. What it reads and writes is checked and counted.
void run(const Matmul& matmul);

/// "cublasLt bf16 512x64x128" (m, n, k), " x 4" for a batch.
std::string name_of(const Matmul& matmul);

}  // namespace cuda_sim
