#pragma once
// The CUDA devices of this machine, and the one that this thread works on.

#include <cstddef>
#include <string>

namespace knock::cuda {

/// Devices that a program can use, by their index.
inline constexpr int max_devices = 64;

/// Number of devices that the driver shows; 0 without a driver.
int device_count();
/// Why a device cannot be used: no driver, no device, no such index, too old. Empty when it can.
std::string problem(int device);

struct Properties {
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  ///< the most that a kernel can ask for
};
const Properties& properties(int device);

/// The device that this thread works on.
int current_device();
/// Makes it `device`; throws when it cannot be used.
void use_device(int device);

/// Works on another device until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(current_device()) { use_device(device); }
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

}  // namespace knock::cuda
