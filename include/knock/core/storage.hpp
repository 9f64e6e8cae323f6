#pragma once
// Buffers: reference-counted storage from a caching allocator.
//
// The allocator keeps freed blocks in size classes (at most 12.5% above the request) and hands them out again, so a
// steady training step reaches the system's allocator never. Blocks are 64-byte aligned.

#include <knock/core/device.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace knock {

namespace memory {

/// Counters of the caching allocator of a device, in bytes and calls.
struct Stats {
  int64_t bytes_in_use = 0;        ///< handed out now
  int64_t peak_bytes = 0;          ///< most ever handed out since `reset_peak`
  int64_t bytes_cached = 0;        ///< freed by tensors, kept for the next ones
  int64_t allocations = 0;         ///< requests served
  int64_t system_allocations = 0;  ///< requests that reached the system
};

/// The counters as they stand.
Stats stats(Device device = {});
/// Restarts `peak_bytes` from what is in use now.
void reset_peak(Device device = {});
/// Gives cached blocks back to the system.
void release_cached(Device device = {});

}  // namespace memory

/// One buffer on one device, and what in-place writes leave for autograd to check.
struct Storage {
  Storage(int64_t byte_count, Device where);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data = nullptr;
  int64_t bytes = 0;
  Device device;
  std::atomic<uint32_t> version{0};                     ///< number of in-place writes so far
  std::atomic<const char*> last_write{"construction"};  ///< the op that wrote last

  /// Notes an in-place write by `op`, a string literal.
  void bump(const char* op) {
    last_write.store(op, std::memory_order_relaxed);
    version.fetch_add(1, std::memory_order_relaxed);
  }
};

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_STORAGE)
#include <bit>
#include <cstdlib>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace knock {
namespace detail {

/// Caching allocator of the CPU: free blocks in eight size classes per power of two.
class CachingAllocator {
 public:
  static CachingAllocator& instance() {
    static auto* allocator = new CachingAllocator;  // never destroyed: tensors of static duration may outlive it
    return *allocator;
  }

  void* allocate(int64_t bytes) {
    const int index = size_class(bytes);
    const std::lock_guard lock(mutex_);
    auto& blocks = free_[index];
    void* block = nullptr;
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
      stats_.bytes_cached -= class_bytes(index);
    } else {
      block = from_system(class_bytes(index));
    }
    ++stats_.allocations;
    stats_.bytes_in_use += class_bytes(index);
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.bytes_in_use);
    return block;
  }

  void release(void* block, int64_t bytes) noexcept {
    const int index = size_class(bytes);
    const std::lock_guard lock(mutex_);
    stats_.bytes_in_use -= class_bytes(index);
    try {
      free_[index].push_back(block);
      stats_.bytes_cached += class_bytes(index);
    } catch (...) {
      std::free(block);
    }
  }

  memory::Stats stats() {
    const std::lock_guard lock(mutex_);
    return stats_;
  }

  void reset_peak() {
    const std::lock_guard lock(mutex_);
    stats_.peak_bytes = stats_.bytes_in_use;
  }

  void release_cached() {
    const std::lock_guard lock(mutex_);
    release_cached_locked();
  }

 private:
  static constexpr std::size_t alignment = 64, huge_page = std::size_t{1} << 21;

  // Classes 0..7 hold 64..512 bytes in steps of 64; every further power of two has eight classes.
  static int size_class(int64_t bytes) {
    const auto units = static_cast<uint64_t>((std::max<int64_t>(bytes, 1) + 63) / 64);
    if (units <= 8) return static_cast<int>(units) - 1;
    const int power = static_cast<int>(std::bit_width(units - 1)) - 1;  // 2^power < units <= 2^(power + 1)
    const uint64_t step = uint64_t{1} << (power - 3);
    const uint64_t steps = (units - (uint64_t{1} << power) + step - 1) / step;  // 1..8
    return 8 + (power - 3) * 8 + static_cast<int>(steps) - 1;
  }

  static int64_t class_bytes(int index) {
    if (index < 8) return 64 * (index + 1);
    const int power = (index - 8) / 8 + 3, steps = (index - 8) % 8 + 1;
    return 64 * ((int64_t{1} << power) + steps * (int64_t{1} << (power - 3)));
  }

  void* from_system(int64_t bytes) {
    ++stats_.system_allocations;
    void* block = system_block(bytes);
    if (!block) {
      release_cached_locked();
      block = system_block(bytes);
    }
    check(block != nullptr, "memory", "out of memory: asked for ", bytes, " bytes with ", stats_.bytes_in_use,
          " in use (peak ", stats_.peak_bytes, ")");
    return block;
  }

  /// Large blocks lie in huge pages where the system grants them: fewer page faults, and fewer misses of the TLB when
  /// matrices are walked across their rows.
  static void* system_block(int64_t bytes) {
    const auto size = static_cast<std::size_t>(bytes);
    void* block = nullptr;
    if (posix_memalign(&block, size >= huge_page ? huge_page : alignment, size) != 0) return nullptr;
#ifdef __linux__
    if (size >= huge_page) madvise(block, size / huge_page * huge_page, MADV_HUGEPAGE);
#endif
    return block;
  }

  void release_cached_locked() {
    for (auto& blocks : free_) {
      for (void* block : blocks) std::free(block);
      blocks.clear();
    }
    stats_.bytes_cached = 0;
  }

  std::mutex mutex_;
  memory::Stats stats_;
  std::vector<void*> free_[8 + 8 * 58];
};

inline void check_cpu(Device device) {
  check(device.kind == DeviceKind::cpu, "device", device,
        " asked for, but no CUDA back-end is linked into this program");
}

}  // namespace detail

namespace memory {
KNOCK_FUNC Stats stats(Device device) {
  detail::check_cpu(device);
  return detail::CachingAllocator::instance().stats();
}
KNOCK_FUNC void reset_peak(Device device) {
  detail::check_cpu(device);
  detail::CachingAllocator::instance().reset_peak();
}
KNOCK_FUNC void release_cached(Device device) {
  detail::check_cpu(device);
  detail::CachingAllocator::instance().release_cached();
}
}  // namespace memory

KNOCK_FUNC Storage::Storage(int64_t byte_count, Device where) : bytes(byte_count), device(where) {
  detail::check_cpu(where);
  data = detail::CachingAllocator::instance().allocate(bytes);
}

KNOCK_FUNC Storage::~Storage() { detail::CachingAllocator::instance().release(data, bytes); }

}  // namespace knock
#endif
