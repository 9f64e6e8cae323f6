#pragma once
// Device memory: ranges that host code cannot touch and that end where the program asked them to.

#include <cstddef>
#include <cstdint>

namespace cuda_sim {

/// A live range of device memory.
struct Allocation {
  char* data = nullptr;
  std::size_t bytes = 0;
  uint64_t id = 0;  ///< in the order of allocation, from 1
};

/// Aligned to 256; filled with 0xff, which reads as NaN. Null when the simulated device's memory is exhausted.
void* allocate(std::size_t bytes);
/// False when `data` is not the start of a live range. Addresses are never used again.
bool release(void* data);
/// The live range that holds the address, or null.
const Allocation* find(const void* address);
/// Whether the address lies where device memory comes from, live or not.
bool is_device_address(const void* address);

/// In this scope the process may touch device memory.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

}  // namespace cuda_sim
