// The API of cublasLt: its objects, attributes and the heuristic. The product itself: matmul.cpp.

#include "cublas_objects.hpp"
#include "matmul.hpp"

#include <algorithm>
#include <cstring>

namespace cuda_sim {
namespace {

constexpr std::size_t wanted_workspace = 64 << 10;

struct Handle {};

struct Preference {
  uint64_t most_workspace = 0;
  std::array<uint32_t, 4> alignment{256, 256, 256, 256};  // that A, B, C and D will have
};

// What is kept in a cublasLtMatmulAlgo_t.
struct Algorithm {
  uint64_t magic, workspace;
  std::array<uint32_t, 4> alignment;
  cublasComputeType_t compute;
};
constexpr uint64_t algorithm_magic = 0x6b6e6f636b2d6c74;
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

uint64_t asked_for_algorithms = 0;

template <class T>
cublasStatus_t set(T& attribute, const void* value, std::size_t bytes) {
  if (value == nullptr || bytes != sizeof attribute) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&attribute, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t unknown_attribute(const char* of, int attribute) {
  fatal(std::string("cublasLt: attribute ") + std::to_string(attribute) + " of a " + of + " is not modelled");
}

cublasStatus_t set_attribute(MatmulDescription& of, cublasLtMatmulDescAttributes_t attribute, const void* value,
                             std::size_t bytes) {
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
      return set(of.compute, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
      return set(of.scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      return set(of.pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(of.transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(of.transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(of.epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(of.bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return set(of.bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
      return set(of.bias_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return set(of.aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return set(of.aux_leading, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
      return set(of.aux_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
      return set(of.aux_type, value, bytes);
    default:
      return unknown_attribute("cublasLtMatmulDesc_t", attribute);
  }
}

cublasStatus_t set_attribute(MatrixLayout& of, cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                             std::size_t bytes) {
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
      return set(of.type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      return set(of.order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      return set(of.rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      return set(of.columns, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
      return set(of.leading, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      return set(of.batches, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
      return set(of.batch_stride, value, bytes);
    default:
      return unknown_attribute("cublasLtMatrixLayout_t", attribute);
  }
}

cublasStatus_t set_attribute(Preference& of, cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                             std::size_t bytes) {
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return set(of.most_workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      return set(of.alignment[0], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      return set(of.alignment[1], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
      return set(of.alignment[2], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return set(of.alignment[3], value, bytes);
    default:
      return unknown_attribute("cublasLtMatmulPreference_t", attribute);
  }
}

cublasStatus_t refuse_matmul(cublasStatus_t status, const std::string& why) {
  report("cublasLtMatmul: " + why);
  return status;
}

double scalar(const void* value, cudaDataType type) {
  if (type == CUDA_R_64F) return *static_cast<const double*>(value);
  return *static_cast<const float*>(value);
}

bool is_aligned(const void* data, uint32_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

// What the algorithm was chosen for must hold of what it is given.
cublasStatus_t check_algorithm(const Matmul& matmul, const Algorithm& algorithm, void* workspace, std::size_t bytes) {
  if (algorithm.magic != algorithm_magic) {
    return refuse_matmul(CUBLAS_STATUS_INVALID_VALUE, "the algorithm is not one that the heuristic gave");
  }
  if (algorithm.compute != matmul.of.compute) {
    return refuse_matmul(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was chosen for another compute type");
  }
  if (bytes < algorithm.workspace || (algorithm.workspace > 0 && !is_device_address(workspace))) {
    return refuse_matmul(CUBLAS_STATUS_INVALID_VALUE,
                         "the algorithm needs a workspace of " + std::to_string(algorithm.workspace) + " bytes");
  }
  const std::array<const void*, 4> data{matmul.a_data, matmul.b_data, matmul.c_data, matmul.d_data};
  for (std::size_t i = 0; i < data.size(); ++i) {
    const bool is_used = i != 2 || matmul.beta != 0;
    if (!is_used || is_aligned(data[i], algorithm.alignment[i])) continue;
    return refuse_matmul(CUBLAS_STATUS_INVALID_VALUE, std::string(1, "ABCD"[i]) + " is not aligned to " +
                                                          std::to_string(algorithm.alignment[i]) +
                                                          " bytes, as the heuristic was told");
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t submit_matmul(const Matmul& matmul, const Algorithm* algorithm, void* workspace, std::size_t bytes,
                             cudaStream_t stream) {
  if (matmul.of.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
    fatal("cublasLt: only alpha and beta of the host are modelled");
  const auto verdict = check(matmul.of, matmul.a, matmul.b, matmul.c, matmul.d);
  if (verdict.status != CUBLAS_STATUS_SUCCESS) return refuse_matmul(verdict.status, verdict.why);
  std::size_t used = 0;
  if (algorithm != nullptr) {
    used = algorithm->workspace;
    const auto status = check_algorithm(matmul, *algorithm, workspace, bytes);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  const auto error = submit(stream, {name_of(matmul), [=] {
                                       use_workspace("cublasLtMatmul", workspace, used);
                                       if (sticky_error() == cudaSuccess) run(matmul);
                                     }});
  return noted(error) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace

std::set<const void*>& cublas_objects() {
  static auto* all = new std::set<const void*>;
  return *all;
}

std::size_t& live_cublas_handles() {
  static std::size_t count = 0;
  return count;
}

// Handles do not count: programs keep them to the end, as the library may be gone by then.
std::size_t live_cublas_objects() { return cublas_objects().size() - live_cublas_handles(); }

void use_workspace(const char* call, void* workspace, std::size_t bytes) {
  if (bytes == 0) return;
  const auto* range = find(workspace);
  if (range != nullptr && static_cast<char*>(workspace) + bytes <= range->data + range->bytes) {
    return write_range(workspace, bytes);
  }
  report(std::string(call) + ": workspace of " + std::to_string(bytes) + " bytes from " + describe_address(workspace));
  set_sticky_error(cudaErrorIllegalAddress);
}

uint64_t algorithm_requests() { return asked_for_algorithms; }

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cublasStatus_t CUBLASWINAPI cublasLtCreate(cublasLtHandle_t* handle) { return create_handle(handle, Handle{}); }

cublasStatus_t CUBLASWINAPI cublasLtDestroy(cublasLtHandle_t handle) { return destroy_handle<Handle>(handle); }

size_t CUBLASWINAPI cublasLtGetVersion() { return CUBLAS_VERSION; }
size_t CUBLASWINAPI cublasLtGetCudartVersion() { return CUDART_VERSION; }

const char* CUBLASWINAPI cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    default:
      return "unknown cublasStatus_t";
  }
}

const char* CUBLASWINAPI cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* handle, cublasComputeType_t compute,
                                                     cudaDataType_t scale) {
  MatmulDescription of;
  of.compute = compute;
  of.scale = scale;
  return create(handle, of);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t handle) {
  return destroy<MatmulDescription>(handle);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle,
                                                           cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                           size_t bytes) {
  const std::lock_guard lock(runtime_mutex());
  auto* of = object_of<MatmulDescription>(handle);
  return of == nullptr ? CUBLAS_STATUS_INVALID_VALUE : set_attribute(*of, attribute, value, bytes);
}

cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* handle, cudaDataType type, uint64_t rows,
                                                       uint64_t columns, int64_t leading) {
  MatrixLayout of;
  of.type = type;
  of.rows = rows;
  of.columns = columns;
  of.leading = leading;
  return create(handle, of);
}

cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t handle) {
  return destroy<MatrixLayout>(handle);
}

cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t handle,
                                                             cublasLtMatrixLayoutAttribute_t attribute,
                                                             const void* value, size_t bytes) {
  const std::lock_guard lock(runtime_mutex());
  auto* of = object_of<MatrixLayout>(handle);
  return of == nullptr ? CUBLAS_STATUS_INVALID_VALUE : set_attribute(*of, attribute, value, bytes);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* handle) {
  return create(handle, Preference{});
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t handle) {
  return destroy<Preference>(handle);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle,
                                                                 cublasLtMatmulPreferenceAttributes_t attribute,
                                                                 const void* value, size_t bytes) {
  const std::lock_guard lock(runtime_mutex());
  auto* of = object_of<Preference>(handle);
  return of == nullptr ? CUBLAS_STATUS_INVALID_VALUE : set_attribute(*of, attribute, value, bytes);
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                                           cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                           cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                           cublasLtMatmulPreference_t preference, int requested,
                                                           cublasLtMatmulHeuristicResult_t results[], int* found) {
  const std::lock_guard lock(runtime_mutex());
  const auto* of = object_of<MatmulDescription>(description);
  const auto* wish = object_of<Preference>(preference);
  const auto *a_of = object_of<MatrixLayout>(a), *b_of = object_of<MatrixLayout>(b);
  const auto *c_of = object_of<MatrixLayout>(c), *d_of = object_of<MatrixLayout>(d);
  if (object_of<Handle>(handle) == nullptr || of == nullptr || wish == nullptr || a_of == nullptr || b_of == nullptr ||
      c_of == nullptr || d_of == nullptr || requested < 1) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  *found = 0;
  const auto verdict = check(*of, *a_of, *b_of, *c_of, *d_of);
  if (verdict.status != CUBLAS_STATUS_SUCCESS) return verdict.status;
  results[0] = {};
  const Algorithm algorithm{algorithm_magic, std::min<uint64_t>(wish->most_workspace, wanted_workspace),
                            wish->alignment, of->compute};
  std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
  results[0].workspaceSize = algorithm.workspace;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  results[0].wavesCount = 1;
  *found = 1;
  ++asked_for_algorithms;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
                                           const void* a_data, cublasLtMatrixLayout_t a, const void* b_data,
                                           cublasLtMatrixLayout_t b, const void* beta, const void* c_data,
                                           cublasLtMatrixLayout_t c, void* d_data, cublasLtMatrixLayout_t d,
                                           const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes,
                                           cudaStream_t stream) {
  const std::lock_guard lock(runtime_mutex());
  if (sticky_error() != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  const auto* of = object_of<MatmulDescription>(description);
  const auto *a_of = object_of<MatrixLayout>(a), *b_of = object_of<MatrixLayout>(b);
  const auto *c_of = object_of<MatrixLayout>(c), *d_of = object_of<MatrixLayout>(d);
  if (object_of<Handle>(handle) == nullptr || of == nullptr || a_of == nullptr || b_of == nullptr || c_of == nullptr ||
      d_of == nullptr || alpha == nullptr || beta == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const Matmul matmul{*of,
                      *a_of,
                      *b_of,
                      *c_of,
                      *d_of,
                      a_data,
                      b_data,
                      c_data,
                      d_data,
                      scalar(alpha, of->scale),
                      scalar(beta, of->scale)};
  Algorithm algorithm{};
  if (algo != nullptr) std::memcpy(&algorithm, algo, sizeof algorithm);
  return submit_matmul(matmul, algo != nullptr ? &algorithm : nullptr, workspace, workspace_bytes, stream);
}

}  // extern "C"
