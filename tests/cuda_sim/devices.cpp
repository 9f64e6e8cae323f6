// The simulated devices: as many as KNOCK_CUDA_SIM_DEVICES says (else one), with the figures of an A100, and of its
// compute capability (8.0) but where KNOCK_CUDA_SIM_CAPABILITY says otherwise.

#include "streams.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_sim {
namespace {

thread_local int selected_device = 0;
std::array<std::array<bool, max_devices>, max_devices> peers{};  // peers[a][b]: a may use b's memory

constexpr int processors = 108, threads_per_processor = 2048, registers = 65536, blocks_per_processor = 32;
constexpr int runtime_version = CUDART_VERSION;

/// The CUDA version of the driver, 0 where there is none.
int driver_version() {
  const char* value = std::getenv("KNOCK_CUDA_SIM_DRIVER");
  return value == nullptr ? runtime_version : std::atoi(value);
}

/// A driver runs programs of its own major version and of those before.
bool driver_is_too_old() { return driver_version() / 1000 < runtime_version / 1000; }

bool is_device_number(int device) { return device >= 0 && device < device_count(); }

// KNOCK_CUDA_SIM_PROCESSORS: numbers of the devices, the last one also of those that follow.
int processors_of(int device) {
  const char* text = std::getenv("KNOCK_CUDA_SIM_PROCESSORS");
  if (text == nullptr) return processors;
  const char* comma = std::strchr(text, ',');
  for (; device > 0 && comma != nullptr; --device) {
    text = comma + 1;
    comma = std::strchr(text, ',');
  }
  return std::max(std::atoi(text), 1);
}

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp of{};
  std::snprintf(of.name, sizeof of.name, "cuda_sim device %d", device);
  const char* capability = std::getenv("KNOCK_CUDA_SIM_CAPABILITY");
  std::sscanf(capability == nullptr ? "8.0" : capability, "%d.%d", &of.major, &of.minor);
  of.totalGlobalMem = memory_use(device).capacity;
  of.totalConstMem = 64 << 10;
  of.sharedMemPerBlock = default_shared_bytes;
  of.sharedMemPerBlockOptin = most_shared_bytes();
  of.sharedMemPerMultiprocessor = shared_bytes_of_processor;
  of.reservedSharedMemPerBlock = 1024;
  of.regsPerBlock = of.regsPerMultiprocessor = registers;
  of.warpSize = 32;
  of.memPitch = 0x7fffffff;
  of.maxThreadsPerBlock = 1024;
  of.maxThreadsDim[0] = of.maxThreadsDim[1] = 1024;
  of.maxThreadsDim[2] = 64;
  of.maxGridSize[0] = 0x7fffffff;
  of.maxGridSize[1] = of.maxGridSize[2] = 65535;
  of.maxThreadsPerMultiProcessor = threads_per_processor;
  of.maxBlocksPerMultiProcessor = blocks_per_processor;
  of.multiProcessorCount = processors_of(device);
  of.memoryBusWidth = 5120;
  of.l2CacheSize = 40 << 20;
  of.persistingL2CacheMaxSize = 30 << 20;
  of.textureAlignment = 512;
  of.concurrentKernels = of.unifiedAddressing = of.streamPrioritiesSupported = of.memoryPoolsSupported = 1;
  of.globalL1CacheSupported = of.localL1CacheSupported = of.ECCEnabled = 1;
  of.asyncEngineCount = 3;
  of.pciBusID = device + 1;
  return of;
}

// False for an attribute that nobody has needed.
bool attribute_of(const cudaDeviceProp& of, cudaDeviceAttr attribute, int& value) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      value = of.major;
      return true;
    case cudaDevAttrComputeCapabilityMinor:
      value = of.minor;
      return true;
    case cudaDevAttrMultiProcessorCount:
      value = of.multiProcessorCount;
      return true;
    case cudaDevAttrMaxThreadsPerBlock:
      value = of.maxThreadsPerBlock;
      return true;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      value = of.maxThreadsPerMultiProcessor;
      return true;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      value = of.maxBlocksPerMultiProcessor;
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      value = static_cast<int>(of.sharedMemPerBlock);
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      value = static_cast<int>(of.sharedMemPerBlockOptin);
      return true;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      value = static_cast<int>(of.sharedMemPerMultiprocessor);
      return true;
    case cudaDevAttrMaxRegistersPerBlock:
      value = of.regsPerBlock;
      return true;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      value = of.regsPerMultiprocessor;
      return true;
    case cudaDevAttrWarpSize:
      value = of.warpSize;
      return true;
    case cudaDevAttrMaxGridDimX:
      value = of.maxGridSize[0];
      return true;
    case cudaDevAttrMaxGridDimY:
      value = of.maxGridSize[1];
      return true;
    case cudaDevAttrMaxGridDimZ:
      value = of.maxGridSize[2];
      return true;
    case cudaDevAttrL2CacheSize:
      value = of.l2CacheSize;
      return true;
    case cudaDevAttrGlobalMemoryBusWidth:
      value = of.memoryBusWidth;
      return true;
    case cudaDevAttrClockRate:
      value = 1410000;
      return true;  // kHz
    case cudaDevAttrMemoryClockRate:
      value = 1215000;
      return true;  // kHz
    case cudaDevAttrMemoryPoolsSupported:
      value = 1;
      return true;
    case cudaDevAttrConcurrentKernels:
      value = 1;
      return true;
    case cudaDevAttrUnifiedAddressing:
      value = 1;
      return true;
    case cudaDevAttrAsyncEngineCount:
      value = of.asyncEngineCount;
      return true;
    default:
      return false;
  }
}

}  // namespace

std::size_t most_shared_bytes() {
  const char* kibibytes = std::getenv("KNOCK_CUDA_SIM_SHARED");
  return kibibytes == nullptr ? std::size_t{163} << 10 : std::strtoull(kibibytes, nullptr, 10) << 10;
}

int device_count() {
  if (driver_is_too_old()) return 0;
  const char* value = std::getenv("KNOCK_CUDA_SIM_DEVICES");
  return value == nullptr ? 1 : std::clamp(std::atoi(value), 0, max_devices);
}

int current_device() { return selected_device; }

// Only on demand: programs may keep caches, streams and staging buffers to the end, as the driver may be gone by then.
void report_leaks() {
  const char* wanted = std::getenv("KNOCK_CUDA_SIM_LEAKS");
  if (wanted == nullptr || std::string(wanted) == "0") return;
  if (sticky_error() != cudaSuccess) return;  // nothing can be freed after a kernel's fault
  for (const auto* range : live_allocations()) {
    report("leak: allocation " + std::to_string(range->id) + " of " + std::to_string(range->bytes) +
           " bytes was never freed");
  }
  const auto report_count = [](std::size_t count, const char* of) {
    if (count > 0) report("leak: " + std::to_string(count) + " " + of);
  };
  report_count(pinned_ranges(), "ranges of pinned memory were never freed");
  report_count(live_streams(), "streams were never destroyed");
  report_count(live_events(), "events were never destroyed");
  report_count(live_graphs(), "graphs were never destroyed");
  report_count(live_cublas_objects(), "objects of cublasLt were never destroyed");
}

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  return api([&] {
    *count = device_count();
    if (driver_is_too_old()) return cudaErrorInsufficientDriver;
    return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    if (!is_device_number(device)) return cudaErrorInvalidDevice;
    selected_device = device;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  return api([&] {
    *device = selected_device;
    return device_count() > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return api([&] {
    if (!is_device_number(device)) return cudaErrorInvalidDevice;
    *properties = properties_of(device);
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return api([&] {
    if (!is_device_number(device)) return cudaErrorInvalidDevice;
    if (attribute_of(properties_of(device), attribute, *value)) return cudaSuccess;
    fatal("cudaDeviceGetAttribute: attribute " + std::to_string(attribute) + " is not modelled");
  });
}

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  *version = driver_version();
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
  *version = runtime_version;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return api([&] {
    if (!is_device_number(device) || !is_device_number(peer)) return cudaErrorInvalidDevice;
    *can = device != peer ? 1 : 0;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return api([&] {
    if (!is_device_number(peer) || peer == selected_device) return cudaErrorInvalidDevice;
    if (flags != 0) return cudaErrorInvalidValue;
    auto& enabled = peers[static_cast<std::size_t>(selected_device)][static_cast<std::size_t>(peer)];
    if (enabled) return cudaErrorPeerAccessAlreadyEnabled;
    enabled = true;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaDeviceDisablePeerAccess(int peer) {
  return api([&] {
    if (!is_device_number(peer)) return cudaErrorInvalidDevice;
    auto& enabled = peers[static_cast<std::size_t>(selected_device)][static_cast<std::size_t>(peer)];
    if (!enabled) return cudaErrorPeerAccessNotEnabled;
    enabled = false;
    return cudaSuccess;
  });
}

// Ends a sticky error. Memory, streams and what is queued are gone; of all devices, which share one error.
cudaError_t CUDARTAPI cudaDeviceReset() {
  const std::lock_guard lock(runtime_mutex());
  if (sticky_error() == cudaSuccess) run_everything();
  set_sticky_error(cudaSuccess);
  cudaGetLastError();
  reset_streams();
  for (const auto* range : live_allocations()) release(range->data);
  return cudaSuccess;
}

}  // extern "C"
