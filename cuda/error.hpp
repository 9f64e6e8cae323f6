#pragma once
// Calls of the CUDA runtime, checked.
//
// Kernels run later than the call that launched them, so what fails in one shows in some later call. The error then
// names the kernels launched since the last wait; with KNOCK_CUDA_SYNC=1 every launch waits, and the error names the
// one that failed.

#include <knock/core/error.hpp>

#include <cuda_runtime_api.h>

namespace knock::cuda {

/// Throws `Error` with CUDA's text, the call and the kernels that may have failed.
[[noreturn]] void fail_call(cudaError_t status, const char* call);

inline void check_call(cudaError_t status, const char* call) {
  if (status != cudaSuccess) [[unlikely]]
    fail_call(status, call);
}

/// Notes a launch on the current device; throws what it, or an earlier kernel, failed with.
void after_launch(const char* kernel);
/// Forgets the launches of a device: it has been waited for.
void forget_launches(int device);

}  // namespace knock::cuda

/// Makes a call of the CUDA runtime and throws when it fails.
#define KNOCK_CUDA(call) ::knock::cuda::check_call((call), #call)
