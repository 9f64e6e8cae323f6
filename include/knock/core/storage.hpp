#pragma once
// Buffers: reference-counted storage from a caching allocator.
//
// The allocator keeps freed memory, in size classes (at most 12.5% above the request) or, above 1 MiB, as ranges that
// it cuts and joins, so a steady training step reaches the system's allocator never. Blocks are 64-byte aligned.

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
  std::unique_ptr<Storage> rounded;                     ///< a bf16 copy of f32 elements (core/rounded.hpp)
  uint32_t rounded_version = 0;                         ///< the version that `rounded` is a copy of

  /// Notes an in-place write by `op`, a string literal.
  void bump(const char* op) {
    last_write.store(op, std::memory_order_relaxed);
    version.fetch_add(1, std::memory_order_relaxed);
  }
};

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_STORAGE)
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace knock {
namespace detail {

/// Large blocks: ranges of a piece of address space that is reserved once and given memory at its end as it is needed.
/// A request takes the free range of lowest address that holds it; free neighbours are one range. So the room of one
/// large tensor serves several smaller ones later, and the other way round, and what is used stays at low addresses.
class LargeHeap {
 public:
  /// Sizes are rounded up to this.
  static constexpr int64_t granule = int64_t{1} << 16;

  struct Block {
    void* data = nullptr;  ///< none when the system has no more
    int64_t reused = 0;    ///< bytes that were used before; the others are fresh from the system
  };

  Block allocate(int64_t bytes) {
    auto range = free_.begin();
    while (range != free_.end() && range->second.bytes < bytes) ++range;
    if (range == free_.end()) range = grow(bytes);
    if (range == free_.end()) return {};
    const auto [begin, found] = *range;
    free_.erase(range);
    const int64_t reused = std::min(bytes, found.used);
    if (found.bytes > bytes) free_[begin + bytes] = {found.bytes - bytes, found.used - reused};
    poison(begin, bytes, false);
    return {begin, reused};
  }

  void release(void* data, int64_t bytes) {
    char* const begin = static_cast<char*>(data);
    poison(begin, bytes, true);
    merge(begin, {bytes, bytes});
  }

  /// Gives the memory of the free ranges back, not their addresses.
  void trim() {
    for (auto& [begin, range] : free_) {
      madvise(begin, static_cast<std::size_t>(range.bytes), MADV_DONTNEED);
      range.used = 0;
    }
  }

 private:
  struct Range {
    int64_t bytes = 0, used = 0;  // used before, and not given back since
  };
  using Ranges = std::map<char*, Range>;
  struct Region {
    char *top, *end;  // memory was asked for up to top
  };
  static constexpr int64_t huge_page = int64_t{1} << 21;

  static int64_t padded(int64_t bytes) { return (bytes + huge_page - 1) / huge_page * huge_page; }

  Ranges::iterator merge(char* begin, Range range) {
    auto at = free_.try_emplace(begin, range).first;
    if (const auto next = std::next(at); next != free_.end() && begin + range.bytes == next->first) {
      at->second.bytes += next->second.bytes;
      at->second.used += next->second.used;
      free_.erase(next);
    }
    if (at == free_.begin()) return at;
    const auto before = std::prev(at);
    if (before->first + before->second.bytes != begin) return at;
    before->second.bytes += at->second.bytes;
    before->second.used += at->second.used;
    free_.erase(at);
    return before;
  }

  /// A free range of `bytes` at the end of the last region, or in a new one; end() when the system refuses.
  Ranges::iterator grow(int64_t bytes) {
    int64_t free_before = 0;  // at the end of the last region already
    if (!regions_.empty()) {
      if (const auto after = free_.lower_bound(regions_.back().top); after != free_.begin()) {
        const auto& [begin, range] = *std::prev(after);
        if (begin + range.bytes == regions_.back().top) free_before = range.bytes;
      }
    }
    if (regions_.empty() || regions_.back().end - regions_.back().top < padded(bytes - free_before)) {
      if (!reserve(bytes)) return free_.end();
      free_before = 0;
    }
    return extend(padded(bytes - free_before));
  }

  Ranges::iterator extend(int64_t bytes) {
    char* const begin = regions_.back().top;
    if (mprotect(begin, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0) return free_.end();
    regions_.back().top += bytes;
    poison(begin, bytes, true);
    return merge(begin, {bytes, 0});
  }

  /// Twice the machine's memory, so that one region is enough, or what the system allows of it; `bytes` at least.
  bool reserve(int64_t bytes) {
    const int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    const int64_t least = padded(bytes) + huge_page;
    for (int64_t size = std::max(2 * memory, least);; size = std::max(size / 2, least)) {
      void* const made =
          mmap(nullptr, static_cast<std::size_t>(size), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (made != MAP_FAILED) {
        char* const start = static_cast<char*>(made);
        char* const top = start + (huge_page - reinterpret_cast<intptr_t>(start) % huge_page) % huge_page;
#ifdef MADV_HUGEPAGE
        madvise(top, static_cast<std::size_t>(start + size - top), MADV_HUGEPAGE);
#endif
        regions_.push_back({top, start + size});
        return true;
      }
      if (size == least) return false;
    }
  }

  /// Tells the address sanitizer what is free.
  static void poison([[maybe_unused]] const char* begin, [[maybe_unused]] int64_t bytes,
                     [[maybe_unused]] bool is_free) {
#ifdef __SANITIZE_ADDRESS__
    if (is_free) {
      ASAN_POISON_MEMORY_REGION(begin, static_cast<std::size_t>(bytes));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(begin, static_cast<std::size_t>(bytes));
    }
#endif
  }

  Ranges free_;
  std::vector<Region> regions_;
};

/// Caching allocator of the CPU: small blocks in size classes, eight per power of two, large ones in a heap.
class CachingAllocator {
 public:
  static CachingAllocator& instance() {
    static auto* allocator = new CachingAllocator;  // never destroyed: tensors of static duration may outlive it
    return *allocator;
  }

  void* allocate(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const int64_t size = block_bytes(bytes);
    void* const block = is_large(bytes) ? allocate_large(size) : allocate_small(size_class(bytes));
    check(block != nullptr, "memory", "out of memory: asked for ", size, " bytes with ", stats_.bytes_in_use,
          " in use (peak ", stats_.peak_bytes, ")");
    ++stats_.allocations;
    stats_.bytes_in_use += size;
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.bytes_in_use);
    return block;
  }

  void release(void* block, int64_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    const int64_t size = block_bytes(bytes);
    stats_.bytes_in_use -= size;
    try {
      if (is_large(bytes)) {
        large_.release(block, size);
      } else {
        small_[size_class(bytes)].push_back(block);
      }
      stats_.bytes_cached += size;
    } catch (...) {  // no memory to note it: the block is lost
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
  static constexpr std::size_t alignment = 64;
  static constexpr int classes = 8 + 8 * 11;  // up to 1 MiB

  static bool is_large(int64_t bytes) { return bytes > class_bytes(classes - 1); }
  static int64_t block_bytes(int64_t bytes) {
    constexpr int64_t granule = LargeHeap::granule;
    return is_large(bytes) ? (bytes + granule - 1) / granule * granule : class_bytes(size_class(bytes));
  }

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

  void* allocate_small(int index) {
    auto& blocks = small_[index];
    if (!blocks.empty()) {
      void* const block = blocks.back();
      blocks.pop_back();
      stats_.bytes_cached -= class_bytes(index);
      return block;
    }
    ++stats_.system_allocations;
    const auto size = static_cast<std::size_t>(class_bytes(index));
    void* block = nullptr;
    if (posix_memalign(&block, alignment, size) == 0) return block;
    release_cached_locked();
    return posix_memalign(&block, alignment, size) == 0 ? block : nullptr;
  }

  void* allocate_large(int64_t size) {
    LargeHeap::Block block = large_.allocate(size);
    if (!block.data) {
      release_cached_locked();
      block = large_.allocate(size);
    }
    stats_.bytes_cached -= block.reused;
    if (block.reused < size) ++stats_.system_allocations;
    return block.data;
  }

  void release_cached_locked() {
    for (auto& blocks : small_) {
      for (void* block : blocks) std::free(block);
      blocks.clear();
    }
    large_.trim();
    stats_.bytes_cached = 0;
  }

  std::mutex mutex_;
  memory::Stats stats_;
  std::vector<void*> small_[classes];
  LargeHeap large_;
};

}  // namespace detail

namespace memory {
KNOCK_FUNC Stats stats(Device device) {
  if (device.kind != DeviceKind::cpu) return detail::device_kind(device).stats(device.index);
  return detail::CachingAllocator::instance().stats();
}
KNOCK_FUNC void reset_peak(Device device) {
  if (device.kind != DeviceKind::cpu) return detail::device_kind(device).reset_peak(device.index);
  detail::CachingAllocator::instance().reset_peak();
}
KNOCK_FUNC void release_cached(Device device) {
  if (device.kind != DeviceKind::cpu) return detail::device_kind(device).release_cached(device.index);
  detail::CachingAllocator::instance().release_cached();
}
}  // namespace memory

KNOCK_FUNC Storage::Storage(int64_t byte_count, Device where) : bytes(byte_count), device(where) {
  data = where.kind == DeviceKind::cpu ? detail::CachingAllocator::instance().allocate(bytes)
                                       : detail::device_kind(where).allocate(bytes, where.index);
}

KNOCK_FUNC Storage::~Storage() {
  if (device.kind == DeviceKind::cpu) {
    detail::CachingAllocator::instance().release(data, bytes);
  } else {
    detail::device_kind(device).release(data, bytes, device.index);
  }
}

}  // namespace knock
#endif
