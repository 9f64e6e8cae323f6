#pragma once
// What all that calls cuBLAS or cublasLt needs: a handle for each device, and their names of our types.

#include "device.hpp"
#include "lifetime.hpp"

#include <knock/core/dtype.hpp>
#include <knock/core/products.hpp>

#include <cublas_v2.h>

#include <mutex>

namespace knock::cuda {

/// A library's handles, by device, made when they are first asked for.
template <class Handle, cublasStatus_t (*create)(Handle*), cublasStatus_t (*destroy)(Handle)>
class Handles {
 public:
  /// The current device's; `status` says why there is none.
  static Handle get(cublasStatus_t& status) {
    static std::once_flag noted;
    std::call_once(noted, [] { at_shut_down(destroy_all); });
    const std::lock_guard lock(mutex_);
    Handle& own = all_[static_cast<std::size_t>(current_device())];
    status = own ? CUBLAS_STATUS_SUCCESS : create(&own);
    return own;
  }

 private:
  static void destroy_all() {
    for (Handle& own : all_)
      if (own) destroy(own);
  }

  static inline std::mutex mutex_;
  static inline Handle all_[max_devices] = {};
};

inline cudaDataType type_of(DType dtype) {
  return dtype == DType::f64 ? CUDA_R_64F : dtype == DType::f32 ? CUDA_R_32F : CUDA_R_16BF;
}
/// What products of `in` are computed in.
inline cublasComputeType_t compute_type(DType in) {
  if (in == DType::f64) return CUBLAS_COMPUTE_64F;
  return in == DType::f32 && allow_tf32() ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

}  // namespace knock::cuda
