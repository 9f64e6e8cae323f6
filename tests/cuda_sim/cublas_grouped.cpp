// cuBLAS's own handles and cublasGemmGroupedBatchedEx: products of several extents in one call. The extents lie on the
// host, the places of the matrices on the device. Each product is one of cublasLt's (matmul.cpp).

#include "cublas_objects.hpp"
#include "matmul.hpp"
#include "memory.hpp"
#include "shadow.hpp"

#include <cublas_v2.h>

#include <vector>

#if CUBLAS_VERSION >= 120500

namespace cuda_sim {
namespace {

struct Handle {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

constexpr const char* call = "cublasGemmGroupedBatchedEx";

cublasStatus_t refuse_group(cublasStatus_t status, const std::string& why) {
  report(std::string(call) + ": " + why);
  return status;
}

/// What the library takes: one type for A, B and C.
bool is_supported(cudaDataType a, cudaDataType b, cudaDataType c, cublasComputeType_t compute) {
  if (a != b || a != c) return false;
  if (a == CUDA_R_64F) return compute == CUBLAS_COMPUTE_64F;
  if (a == CUDA_R_32F) return compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  return a == CUDA_R_16BF && compute == CUBLAS_COMPUTE_32F;
}

MatrixLayout layout(cudaDataType type, int rows, int columns, int leading) {
  MatrixLayout of;
  of.type = type;
  of.rows = static_cast<uint64_t>(rows), of.columns = static_cast<uint64_t>(columns), of.leading = leading;
  return of;
}

/// An array of pointers, read as the device does: null, after a report, where it is not in device memory.
const void* const* read_pointers(const void* const* places, std::size_t count, const char* operand) {
  const auto* range = find(places);
  const auto bytes = count * sizeof(void*);
  if (range == nullptr || reinterpret_cast<const char*>(places) + bytes > range->data + range->bytes) {
    report(std::string(call) + ": pointers of " + operand + ", " + std::to_string(bytes) + " bytes from " +
           describe_address(places));
    set_sticky_error(cudaErrorIllegalAddress);
    return nullptr;
  }
  read_range(places, bytes, (std::string(call) + ", as pointers of " + operand + ",").c_str());
  return reinterpret_cast<const void* const*>(bytes_at(places));
}

/// Tensor cores read pieces of 16 bytes.
bool is_aligned(const void* data, const MatrixLayout& of) {
  const auto bytes = static_cast<uintptr_t>(of.leading) * (of.type == CUDA_R_32F ? 4 : 2);
  return of.type == CUDA_R_64F || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0);
}

void run_group(std::vector<Matmul> products, const void* const* a, const void* const* b, void* const* c) {
  const auto count = products.size();
  const auto* const a_data = read_pointers(a, count, "A");
  const auto* const b_data = read_pointers(b, count, "B");
  const auto* const c_data = read_pointers(const_cast<const void* const*>(c), count, "C");
  if (a_data == nullptr || b_data == nullptr || c_data == nullptr) return;
  for (std::size_t i = 0; i < count && sticky_error() == cudaSuccess; ++i) {
    auto& product = products[i];
    product.a_data = a_data[i], product.b_data = b_data[i], product.c_data = c_data[i];
    product.d_data = const_cast<void*>(c_data[i]);
    if (!is_aligned(a_data[i], product.a) || !is_aligned(b_data[i], product.b) || !is_aligned(c_data[i], product.c)) {
      report(std::string(call) + ": a matrix whose columns do not begin at multiples of 16 bytes");
      set_sticky_error(cudaErrorMisalignedAddress);
      return;
    }
    run(product);
  }
}

}  // namespace
}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cublasStatus_t CUBLASWINAPI cublasCreate_v2(cublasHandle_t* handle) { return create_handle(handle, Handle{}); }

cublasStatus_t CUBLASWINAPI cublasDestroy_v2(cublasHandle_t handle) { return destroy_handle<Handle>(handle); }

/// The workspace is the library's own again.
cublasStatus_t CUBLASWINAPI cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  const std::lock_guard lock(runtime_mutex());
  auto* own = object_of<Handle>(handle);
  if (own == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  *own = {stream};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  const std::lock_guard lock(runtime_mutex());
  auto* own = object_of<Handle>(handle);
  if (own == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!is_device_address(workspace) || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    report("cublasSetWorkspace: no device memory, or not aligned to 256 bytes");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  own->workspace = workspace, own->workspace_bytes = bytes;
  return CUBLAS_STATUS_SUCCESS;
}

const char* CUBLASWINAPI cublasGetStatusString(cublasStatus_t status) { return cublasLtGetStatusString(status); }

cublasStatus_t CUBLASWINAPI cublasGemmGroupedBatchedEx(
    cublasHandle_t handle, const cublasOperation_t op_a[], const cublasOperation_t op_b[], const int m[], const int n[],
    const int k[], const void* alpha, const void* const a[], cudaDataType_t a_type, const int lda[],
    const void* const b[], cudaDataType_t b_type, const int ldb[], const void* beta, void* const c[],
    cudaDataType_t c_type, const int ldc[], int groups, const int group_size[], cublasComputeType_t compute) {
  const std::lock_guard lock(runtime_mutex());
  if (sticky_error() != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  const auto* own = object_of<Handle>(handle);
  if (own == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!is_supported(a_type, b_type, c_type, compute)) {
    return refuse_group(CUBLAS_STATUS_NOT_SUPPORTED, "these types with this compute type");
  }
  std::vector<Matmul> products;
  for (int g = 0; g < groups; ++g) {
    const auto scalar = [&](const void* of) {
      return a_type == CUDA_R_64F ? static_cast<const double*>(of)[g]
                                  : static_cast<double>(static_cast<const float*>(of)[g]);
    };
    const bool flip_a = op_a[g] != CUBLAS_OP_N, flip_b = op_b[g] != CUBLAS_OP_N;
    Matmul product;
    product.of.compute = compute;
    product.of.scale = a_type == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F;
    product.of.transpose_a = op_a[g], product.of.transpose_b = op_b[g];
    product.a = layout(a_type, flip_a ? k[g] : m[g], flip_a ? m[g] : k[g], lda[g]);
    product.b = layout(b_type, flip_b ? n[g] : k[g], flip_b ? k[g] : n[g], ldb[g]);
    product.c = product.d = layout(c_type, m[g], n[g], ldc[g]);
    product.alpha = scalar(alpha), product.beta = scalar(beta);
    const auto verdict = check(product.of, product.a, product.b, product.c, product.d);
    if (verdict.status != CUBLAS_STATUS_SUCCESS) return refuse_group(verdict.status, verdict.why);
    products.insert(products.end(), static_cast<std::size_t>(group_size[g]), product);
  }
  if (products.empty()) return refuse_group(CUBLAS_STATUS_INVALID_VALUE, "no products");
  for (std::size_t i = 1; i < products.size(); ++i) products[i].is_launch = false;
  const auto error = submit(own->stream, {call, [=, workspace = own->workspace, bytes = own->workspace_bytes] {
                                            use_workspace(call, workspace, bytes);
                                            if (sticky_error() == cudaSuccess) run_group(products, a, b, c);
                                          }});
  return noted(error) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // extern "C"

#endif
