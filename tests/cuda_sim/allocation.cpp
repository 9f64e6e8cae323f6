// cudaMalloc and its relatives.

#include "streams.hpp"

namespace cuda_sim {
namespace {

std::string text_of(const void* address) { return describe_address(address); }

cudaError_t allocate_device(void** data, std::size_t bytes) {
  if (data == nullptr) return cudaErrorInvalidValue;
  *data = nullptr;
  if (device_count() == 0) return cudaErrorNoDevice;
  if (bytes == 0) return cudaSuccess;
  *data = allocate(bytes, current_device());
  if (*data != nullptr) return cudaSuccess;
  run_everything();  // there may be queued cudaFreeAsync
  *data = allocate(bytes, current_device());
  return *data != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

bool is_start(const void* data) {
  const auto* range = find(data);
  return range != nullptr && range->data == data && !range->owned_by_module;
}

cudaError_t free_now(void* data, const char* function) {
  if (is_start(data) && release(data)) return cudaSuccess;
  return refuse(cudaErrorInvalidValue, std::string(function) + " of " + text_of(data));
}

}  // namespace
}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaMalloc(void** data, size_t bytes) {
  return api([&] {
    if (const auto error = refuse_unsafe_in_capture("cudaMalloc"); error != cudaSuccess) return error;
    return allocate_device(data, bytes);
  });
}

// Waits for the device, as the real one does.
cudaError_t CUDARTAPI cudaFree(void* data) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    if (data == nullptr) return cudaSuccess;
    if (const auto error = refuse_unsafe_in_capture("cudaFree"); error != cudaSuccess) return error;
    wait_for_device(current_device());
    if (sticky_error() != cudaSuccess) return sticky_error();
    return free_now(data, "cudaFree");
  });
}

cudaError_t CUDARTAPI cudaMallocAsync(void** data, size_t bytes, cudaStream_t handle) {
  return api([&] {
    const auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (is_capturing(*stream)) return refuse_in_capture("cudaMallocAsync");
    return allocate_device(data, bytes);
  });
}

cudaError_t CUDARTAPI cudaFreeAsync(void* data, cudaStream_t handle) {
  return api([&] {
    const auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (data == nullptr) return cudaSuccess;
    if (is_capturing(*stream)) return refuse_in_capture("cudaFreeAsync");
    if (!is_start(data)) return refuse(cudaErrorInvalidValue, "cudaFreeAsync of " + text_of(data));
    return submit(handle, {"cudaFreeAsync", [=] {
                             if (is_start(data)) check_unused(*find(data));
                             free_now(data, "cudaFreeAsync");
                           }});
  });
}

cudaError_t CUDARTAPI cudaHostAlloc(void** data, size_t bytes, unsigned flags) {
  return api([&] {
    if (data == nullptr) return cudaErrorInvalidValue;
    *data = nullptr;
    if (device_count() == 0) return cudaErrorNoDevice;
    if ((flags & cudaHostAllocMapped) != 0) fatal("kernels that use host memory are not modelled");
    if (bytes == 0) return cudaSuccess;
    *data = allocate_pinned(bytes);
    return *data != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}

cudaError_t CUDARTAPI cudaMallocHost(void** data, size_t bytes) { return cudaHostAlloc(data, bytes, 0); }

cudaError_t CUDARTAPI cudaFreeHost(void* data) {
  return api([&] {
    if (data == nullptr) return cudaSuccess;
    if (const auto error = refuse_in_capture("cudaFreeHost"); error != cudaSuccess) return error;
    run_everything();
    if (release_pinned(data)) return cudaSuccess;
    return refuse(cudaErrorInvalidValue, "cudaFreeHost of what cudaMallocHost did not give, or has been freed");
  });
}

cudaError_t CUDARTAPI cudaMemGetInfo(size_t* available, size_t* total) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    const auto use = memory_use(current_device());
    *total = use.capacity;
    *available = use.capacity - use.used;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    if (const auto* range = find(address)) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->device = range->device;
      attributes->devicePointer = const_cast<void*>(address);
    } else if (is_pinned(address)) {
      attributes->type = cudaMemoryTypeHost;
      attributes->device = current_device();
      attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
    }
    return cudaSuccess;
  });
}

}  // extern "C"
