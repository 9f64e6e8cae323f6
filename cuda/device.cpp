// What the driver shows, asked for once, and the device of each thread.

#include "device.hpp"

#include "error.hpp"

#include <algorithm>
#include <array>
#include <mutex>

namespace knock::cuda {
namespace {

thread_local int current = -1;  // no device has been used by this thread yet

struct Found {
  int count = 0;
  std::string problem;  // of all devices
};

std::string version_text(int version) { return text(version / 1000, ".", version % 1000 / 10); }

Found find_devices() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
    return {0, "no NVIDIA driver is installed (libcuda.so is missing)"};
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {std::min(count, max_devices), ""};
  cudaGetLastError();  // it has been told
  if (status == cudaSuccess || status == cudaErrorNoDevice) return {0, "the NVIDIA driver shows no device"};
  if (status == cudaErrorInsufficientDriver)
    return {0, text("the NVIDIA driver supports CUDA ", version_text(driver), ", this program needs ",
                    version_text(CUDART_VERSION))};
  return {0, cudaGetErrorString(status)};
}

const Found& found() {
  static const Found devices = find_devices();
  return devices;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  KNOCK_CUDA(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

/// What is known of one device, asked for once.
struct Known {
  std::once_flag asked;
  std::string problem;
  Properties properties;

  void ask(int device) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    if (major < 8) problem = text("its compute capability is ", major, ".", minor, ", 8.0 is needed");
    properties.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    properties.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
};

Known& known(int device) {
  static std::array<Known, max_devices> all;
  Known& one = all[static_cast<std::size_t>(device)];
  std::call_once(one.asked, [&] { one.ask(device); });
  return one;
}

}  // namespace

int device_count() { return found().count; }

std::string problem(int device) {
  if (!found().problem.empty()) return found().problem;
  if (device < 0 || device >= found().count)
    return text("there ", found().count == 1 ? "is one device: cuda:0" : text("are ", found().count, " devices"));
  return known(device).problem;
}

const Properties& properties(int device) { return known(device).properties; }

int current_device() { return std::max(current, 0); }

void use_device(int device) {
  if (device == current) return;
  const std::string why = problem(device);
  check(why.empty(), "device", "cuda:", device, " asked for, but ", why);
  KNOCK_CUDA(cudaSetDevice(device));
  current = device;
}

DeviceGuard::~DeviceGuard() {
  if (before_ == current) return;
  cudaSetDevice(before_);  // a failure shows in the next call
  current = before_;
}

}  // namespace knock::cuda
