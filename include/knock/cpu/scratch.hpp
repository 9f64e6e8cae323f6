#pragma once
// Temporary memory of kernels.
//
// For kernels to build on: included in their bodies only.

#include <knock/core/storage.hpp>

#include <new>

namespace knock::cpu {

/// A buffer for the length of a kernel, from the caching allocator.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : storage_(count * static_cast<int64_t>(sizeof(T)), Device{}) {}
  T* data() const { return static_cast<T*>(storage_.data); }

 private:
  Storage storage_;
};

/// Scratch memory of this thread, 64-byte aligned; `slot` tells apart what is in use at the same time. It lasts until
/// the next call with the slot.
enum class Slot : uint8_t { left, right, tile, edge, user0, user1, user2, user3, user4, user5, count };
template <class C>
C* thread_scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { ::operator delete (data, std::align_val_t{64}); }
  };
  thread_local Buffer buffers[static_cast<int>(Slot::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const int64_t bytes = count * static_cast<int64_t>(sizeof(C));
  if (buffer.bytes < bytes) {
    ::operator delete (buffer.data, std::align_val_t{64});
    buffer = {};
    buffer.data = ::operator new (static_cast<std::size_t>(bytes), std::align_val_t{64});
    buffer.bytes = bytes;
  }
  return static_cast<C*>(buffer.data);
}

}  // namespace knock::cpu
