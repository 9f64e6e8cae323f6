// Segments, blocks and pools of the caching allocator; which device an address belongs to.

#include "allocator.hpp"

#include "device.hpp"
#include "error.hpp"
#include "graph.hpp"
#include "lifetime.hpp"
#include "stream.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace knock::cuda {

class Heap;

namespace {

thread_local PrivatePool* open_pool = nullptr;

/// The address ranges that the system gave, of all devices.
class AddressMap {
 public:
  static AddressMap& instance() {
    static auto* map = new AddressMap;  // never destroyed: tensors of static duration may outlive it
    return *map;
  }

  void add(const char* begin, int64_t bytes, int device) {
    const std::unique_lock lock(mutex_);
    ranges_[begin] = {begin + bytes, device};
  }

  void remove(const char* begin) {
    const std::unique_lock lock(mutex_);
    ranges_.erase(begin);
  }

  int device_of(const char* address) {
    const std::shared_lock lock(mutex_);
    auto range = ranges_.upper_bound(address);
    if (range == ranges_.begin()) return -1;
    --range;
    return address < range->second.end ? range->second.device : -1;
  }

 private:
  struct Range {
    const char* end;
    int device;
  };
  std::shared_mutex mutex_;
  std::map<const char*, Range> ranges_;
};

bool caches() {
  static const bool on = [] {
    const char* value = std::getenv("KNOCK_CUDA_CACHE");
    return !value || std::strcmp(value, "0") != 0;
  }();
  return on;
}

int64_t round_up(int64_t bytes, int64_t step) { return (bytes + step - 1) / step * step; }

constexpr int64_t kib = 1024, mib = 1024 * kib;

struct Pool;

/// A part of a segment: one that is handed out, or a free one.
struct Block {
  char* begin;
  int64_t bytes;
  Pool* pool;
  Block *before = nullptr, *after = nullptr;  // neighbours in the segment
  bool free = true;

  bool is_segment() const { return !before && !after; }
};

struct SmallerFirst {
  bool operator()(const Block* a, const Block* b) const {
    return a->bytes != b->bytes ? a->bytes < b->bytes : a->begin < b->begin;
  }
};

/// The free blocks of one stream, or of a graph: small or large ones.
struct Pool {
  cudaStream_t stream;  // null for a graph
  const PrivatePool* owner;
  bool small;
  bool retired = false;  // the owner has gone: segments go back to the system as they become free
  std::set<Block*, SmallerFirst> free_blocks = {};
};

}  // namespace

/// The allocator of one device.
class Heap {
 public:
  explicit Heap(int device) : device_(device) {}

  void* allocate(int64_t asked) {
    const std::lock_guard lock(mutex_);
    const PrivatePool* owner = opened();
    const bool pooled = caches() || owner;
    const int64_t bytes = round_up(std::max<int64_t>(asked, 1), pooled ? granule : 1);
    Block* block = pooled ? take(pool_of(owner ? nullptr : current_stream(), owner, bytes <= small_limit), bytes)
                          : make_segment(nullptr, bytes);
    if (!block) fail_out_of_memory(bytes);
    block->free = false;
    used_[block->begin] = block;
    ++stats_.allocations;
    stats_.bytes_in_use += block->bytes;
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.bytes_in_use);
    return block->begin;
  }

  void release(void* address) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(address);
    Block* block = found->second;
    const PrivatePool* owner = block->pool ? block->pool->owner : nullptr;
    if (PrivatePool* open = opened(); open && open != owner) return open->kept_.push_back(address);
    used_.erase(found);
    stats_.bytes_in_use -= block->bytes;
    if (!block->pool) return free_segment(block);
    if (const cudaStream_t own = block->pool->stream, user = current_stream(); own && user != own) {
      Event used;  // by another stream than its own: that one is to wait
      used.record(user);
      used.block(own);
    }
    stats_.bytes_cached += block->bytes;
    block->free = true;
    block = join_neighbours(block);
    put_back(block);
    if (block->pool->retired) free_segments(*block->pool);
  }

  /// The owner of private pools goes.
  void retire(const PrivatePool& owner) {
    for (void* address : owner.kept_) release(address);
    const std::lock_guard lock(mutex_);
    for (const auto& pool : pools_) {
      if (pool->owner != &owner) continue;
      pool->owner = nullptr;
      pool->retired = true;
      free_segments(*pool);
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
    free_segments();
  }

 private:
  static constexpr int64_t granule = 512, small_limit = mib;

  /// What this thread has opened here.
  PrivatePool* opened() const { return open_pool && open_pool->device_ == device_ ? open_pool : nullptr; }

  Pool& pool_of(cudaStream_t stream, const PrivatePool* owner, bool small) {
    for (const auto& pool : pools_)
      if (pool->stream == stream && pool->owner == owner && pool->small == small) return *pool;
    pools_.push_back(std::make_unique<Pool>(Pool{stream, owner, small}));
    return *pools_.back();
  }

  /// The smallest free block that holds `bytes`, cut to size; none when the system has no more.
  Block* take(Pool& pool, int64_t bytes) {
    Block wanted{nullptr, bytes, nullptr};
    auto found = pool.free_blocks.lower_bound(&wanted);
    Block* block = found != pool.free_blocks.end() ? *found : nullptr;
    if (block) {
      pool.free_blocks.erase(found);
      stats_.bytes_cached -= block->bytes;
    } else {
      block = make_segment(&pool, segment_bytes(bytes));
      if (!block) return nullptr;
    }
    cut(block, bytes);
    return block;
  }

  static int64_t segment_bytes(int64_t bytes) {
    if (bytes <= small_limit) return 2 * mib;
    return bytes < 10 * mib ? 20 * mib : round_up(bytes, 2 * mib);
  }

  /// Gives what is left of a block back, when it is worth keeping.
  void cut(Block* block, int64_t bytes) {
    const int64_t rest = block->bytes - bytes;
    if (rest < (block->pool->small ? granule : small_limit)) return;
    auto* other = new Block{block->begin + bytes, rest, block->pool, block, block->after};
    if (block->after) block->after->before = other;
    block->after = other;
    block->bytes = bytes;
    stats_.bytes_cached += rest;
    put_back(other);
  }

  static void put_back(Block* block) { block->pool->free_blocks.insert(block); }

  Block* join_neighbours(Block* block) {
    if (block->after && block->after->free) absorb_next(block, block->after);
    if (Block* before = block->before; before && before->free) {
      before->pool->free_blocks.erase(before);
      absorb(before, block);
      return before;
    }
    return block;
  }

  static void absorb_next(Block* block, Block* next) {
    next->pool->free_blocks.erase(next);
    absorb(block, next);
  }

  static void absorb(Block* block, Block* next) {
    block->bytes += next->bytes;
    block->after = next->after;
    if (next->after) next->after->before = block;
    delete next;
  }

  Block* make_segment(Pool* pool, int64_t bytes) {
    const DeviceGuard guard(device_);
    void* address = nullptr;
    cudaError_t status = cudaMalloc(&address, static_cast<std::size_t>(bytes));
    if (status == cudaErrorMemoryAllocation && !opened()) {
      cudaGetLastError();  // it is dealt with here
      free_segments();
      status = cudaMalloc(&address, static_cast<std::size_t>(bytes));
    }
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    check_call(status, "cudaMalloc");
    ++stats_.system_allocations;
    AddressMap::instance().add(static_cast<char*>(address), bytes, device_);
    return new Block{static_cast<char*>(address), bytes, pool};
  }

  void free_segment(Block* block) {
    AddressMap::instance().remove(block->begin);
    cudaFree(block->begin);  // waits for the device; what failed there shows in the next call
    delete block;
  }

  /// Gives the segments that are free as a whole back to the system, but for those of graphs.
  void free_segments() {
    for (const auto& pool : pools_)
      if (!pool->owner) free_segments(*pool);
  }

  void free_segments(Pool& pool) {
    for (auto at = pool.free_blocks.begin(); at != pool.free_blocks.end();) {
      Block* block = *at;
      const bool whole = block->is_segment();
      at = whole ? pool.free_blocks.erase(at) : std::next(at);
      if (!whole) continue;
      stats_.bytes_cached -= block->bytes;
      free_segment(block);
    }
  }

  [[noreturn]] void fail_out_of_memory(int64_t bytes) {
    std::size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    fail("memory", "out of memory on cuda:", device_, ": asked for ", bytes, " bytes with ", stats_.bytes_in_use,
         " in use (peak ", stats_.peak_bytes, ") and ", stats_.bytes_cached, " cached in pieces; the device has ",
         free_bytes, " free of ", total);
  }

  const int device_;
  std::mutex mutex_;
  memory::Stats stats_;
  std::vector<std::unique_ptr<Pool>> pools_;
  std::unordered_map<void*, Block*> used_;
};

namespace {

/// One for each device that was used; never destroyed, as above.
struct OwnHeap {
  std::once_flag made;
  Heap* heap = nullptr;
};
std::array<OwnHeap, max_devices> heaps;

void release_all_cached() {
  for (OwnHeap& own : heaps)
    if (own.heap) own.heap->release_cached();
}

Heap& heap(int device) {
  static std::once_flag noted;
  std::call_once(noted, [] { at_shut_down(release_all_cached); });
  OwnHeap& own = heaps[static_cast<std::size_t>(device)];
  std::call_once(own.made, [&] { own.heap = new Heap(device); });
  return *own.heap;
}

}  // namespace

void* allocate(int64_t bytes, int device) {
  const DeviceGuard guard(device);
  return heap(device).allocate(bytes);
}

void release(void* block, int64_t, int device) noexcept {
  try {
    const DeviceGuard guard(device);
    heap(device).release(block);
  } catch (...) {  // the device has failed, or there is no memory to note the block: it is lost
  }
}

memory::Stats stats(int device) {
  use_device(device);
  return heap(device).stats();
}

void reset_peak(int device) {
  use_device(device);
  heap(device).reset_peak();
}

void release_cached(int device) {
  use_device(device);
  refuse_in_graph("giving cached memory back");
  heap(device).release_cached();
}

void PrivatePool::open() { open_pool = this; }
void PrivatePool::close() { open_pool = nullptr; }

PrivatePool::~PrivatePool() {
  try {
    const DeviceGuard guard(device_);
    heap(device_).retire(*this);
  } catch (...) {  // as in release
  }
}

int device_of(const void* address) { return AddressMap::instance().device_of(static_cast<const char*>(address)); }

Scratch::Scratch(int64_t bytes) : bytes_(bytes), device_(current_device()), data_(allocate(bytes, device_)) {}

PinnedBuffer::PinnedBuffer(std::size_t bytes) { KNOCK_CUDA(cudaMallocHost(&data_, bytes)); }
PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }

}  // namespace knock::cuda
