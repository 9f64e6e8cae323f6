#pragma once
// Device memory. A device address is only a name, out of a reserved range that nothing can read or write: host code
// that dereferences one is caught at once. The bytes lie `address_span` further, where only the simulator looks.

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_sim {

struct Shadow;  // what is known of the range's bytes: shadow.cpp

/// A live range of device memory.
struct Allocation {
  char* data = nullptr;  ///< its device address
  std::size_t bytes = 0;
  uint64_t id = 0;  ///< in the order of allocation, from 1
  int device = 0;
  bool owned_by_module = false;  ///< a module's variable: lives as long as the program
  mutable Shadow* shadow = nullptr;
};

inline constexpr std::size_t address_span = std::size_t{1} << 39;

/// Where the simulator reads and writes the bytes of a device address that it has checked.
inline char* bytes_at(const void* address) {
  return const_cast<char*>(static_cast<const char*>(address)) + address_span;
}

/// Aligned to 256; filled with 0xff, which reads as NaN. Null when the simulated device's memory is exhausted. Between
/// two ranges lie at least 4096 addresses that belong to none.
void* allocate(std::size_t bytes, int device = 0);
/// The same for a __device__ or __constant__ variable of a module, filled with `initial`.
void* allocate_variable(std::size_t bytes, const void* initial);
/// False when `data` is not the start of a live range. Addresses are never used again.
bool release(void* data);
/// The live range that holds the address, or null.
const Allocation* find(const void* address);
/// Whether the address lies where device memory comes from, live or not.
bool is_device_address(const void* address);
/// "byte 12 of an allocation of 128 bytes", "4 bytes past the end of ...", "freed memory: ...": for findings.
std::string describe_address(const void* address);

struct MemoryUse {
  std::size_t capacity = 0, used = 0, peak = 0;  ///< bytes; a module's variables do not count
  uint64_t allocations = 0;                      ///< made so far
};
MemoryUse memory_use(int device = 0);
/// Sets the capacity of each device; 0: KNOCK_CUDA_SIM_MEMORY in MiB, or 4 GiB.
void set_memory_capacity(std::size_t bytes);

}  // namespace cuda_sim
