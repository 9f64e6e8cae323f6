#pragma once
// Memory of the devices, from a caching allocator, and pinned memory of the host.
//
// cudaMalloc and cudaFree wait for the device, so freed blocks are kept. A block belongs to the stream that it was
// allocated on: there the next kernel that is given the block runs after all that used it before, without a wait.
// Blocks are cut out of segments of at least 2 MiB (small ones up to 1 MiB together) and joined again with free
// neighbours; the smallest that fits is taken. That is PyTorch's scheme. The CPU's, one reserved range of addresses
// that grows, would need the driver's virtual memory calls; cudaMallocAsync keeps no figures of what programs hold and
// can give memory to another stream only after waiting.
//
// KNOCK_CUDA_CACHE=0 asks the system for every block, so that compute-sanitizer sees each one's bounds.

#include <knock/core/storage.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace knock::cuda {

/// A block for the current stream of the device. Error with the figures when the device has no more memory.
void* allocate(int64_t bytes, int device);
void release(void* block, int64_t bytes, int device) noexcept;

memory::Stats stats(int device);
void reset_peak(int device);
void release_cached(int device);

/// The memory of a graph. What its thread allocates while the pool is open belongs to the pool until the pool goes, and
/// is used again within that time alone. Blocks from elsewhere that are released meanwhile are kept as long: what was
/// recorded may read them.
class PrivatePool {
 public:
  explicit PrivatePool(int device) : device_(device) {}
  ~PrivatePool();
  PrivatePool(const PrivatePool&) = delete;
  PrivatePool& operator=(const PrivatePool&) = delete;

  void open();
  void close();

 private:
  friend class Heap;
  const int device_;
  std::vector<void*> kept_;
};

/// The device whose memory this is an address of; -1 for the host's.
int device_of(const void* address);

/// Device memory that a kernel needs for itself, released in the order of the stream.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch() { release(data_, bytes_, device_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  int64_t bytes_;
  int device_;
  void* data_;
};

/// Host memory that devices copy from and to without the driver's detour.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(std::size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

}  // namespace knock::cuda
