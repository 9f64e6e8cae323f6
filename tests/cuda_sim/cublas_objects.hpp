#pragma once
// What cublasLt and cuBLAS hand out: pointers to objects that are known as long as they live.

#include "report.hpp"
#include "runtime.hpp"

#include <cublas_api.h>

#include <cstddef>
#include <mutex>
#include <set>

namespace cuda_sim {

std::set<const void*>& cublas_objects();
std::size_t& live_cublas_handles();

/// Work of a stream: a product writes its workspace, so two streams must not share one.
void use_workspace(const char* call, void* workspace, std::size_t bytes);

template <class Object, class Handle>
cublasStatus_t create(Handle* handle, const Object& object) {
  if (handle == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  auto* made = new Object(object);
  const std::lock_guard lock(runtime_mutex());
  cublas_objects().insert(made);
  *handle = reinterpret_cast<Handle>(made);
  return CUBLAS_STATUS_SUCCESS;
}

template <class Object>
cublasStatus_t destroy(const void* handle) {
  const std::lock_guard lock(runtime_mutex());
  if (cublas_objects().erase(handle) == 0) {
    report("cuBLAS: an object is destroyed that is none, or was destroyed before");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  delete static_cast<const Object*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}

/// The same for the handle of a library, which may live as long as the program.
template <class Object, class Handle>
cublasStatus_t create_handle(Handle* handle, const Object& object) {
  const auto status = device_count() == 0 ? CUBLAS_STATUS_NOT_INITIALIZED : create(handle, object);
  if (status == CUBLAS_STATUS_SUCCESS) ++live_cublas_handles();
  return status;
}

template <class Object>
cublasStatus_t destroy_handle(const void* handle) {
  const auto status = destroy<Object>(handle);
  if (status == CUBLAS_STATUS_SUCCESS) --live_cublas_handles();
  return status;
}

/// Null, after a report, for what is none.
template <class Object, class Handle>
Object* object_of(Handle handle) {
  if (cublas_objects().contains(handle)) return reinterpret_cast<Object*>(handle);
  report("cuBLAS: use of an object that is none, or was destroyed");
  return nullptr;
}

}  // namespace cuda_sim
