// Pageable host memory passes two pinned buffers, in parts, so that both sides work at once.

#include "transfer.hpp"

#include "allocator.hpp"
#include "device.hpp"
#include "error.hpp"
#include "graph.hpp"
#include "lifetime.hpp"
#include "stream.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>

namespace knock::cuda {
namespace {

/// Two pinned buffers of a device, so that the host fills (or empties) one while the device reads (or writes) the
/// other.
class Staging {
 public:
  static constexpr int64_t bytes_each = int64_t{1} << 22;

  void to_device(char* device, const char* host, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    for (int64_t begin = 0; begin < bytes; begin += bytes_each) {
      const auto n = static_cast<std::size_t>(std::min(bytes_each, bytes - begin));
      Buffer& buffer = next_free();
      std::memcpy(buffer.memory.data(), host + begin, n);
      KNOCK_CUDA(cudaMemcpyAsync(device + begin, buffer.memory.data(), n, cudaMemcpyHostToDevice, current_stream()));
      buffer.used.record(current_stream());
    }
  }

  void to_host(char* host, const char* device, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    Part before;
    for (int64_t begin = 0; begin < bytes; begin += bytes_each) {
      const auto n = static_cast<std::size_t>(std::min(bytes_each, bytes - begin));
      Buffer& buffer = next_free();
      KNOCK_CUDA(cudaMemcpyAsync(buffer.memory.data(), device + begin, n, cudaMemcpyDeviceToHost, current_stream()));
      buffer.used.record(current_stream());
      before.finish();
      before = {&buffer, host + begin, n};
    }
    synchronize_stream();
    before.finish();
  }

  void release() {
    for (auto& buffer : buffers_) buffer.reset();
  }

 private:
  struct Buffer {
    PinnedBuffer memory{static_cast<std::size_t>(bytes_each)};
    Event used;
  };
  /// What a buffer holds, and where it belongs.
  struct Part {
    Buffer* buffer = nullptr;
    char* host = nullptr;
    std::size_t bytes = 0;

    void finish() const {
      if (!buffer) return;
      buffer->used.synchronize();
      std::memcpy(host, buffer->memory.data(), bytes);
    }
  };

  Buffer& next_free() {
    auto& buffer = buffers_[next_++ % buffers_.size()];
    if (!buffer) {
      buffer = std::make_unique<Buffer>();
    } else {
      buffer->used.synchronize();
    }
    return *buffer;
  }

  std::mutex mutex_;
  std::array<std::unique_ptr<Buffer>, 2> buffers_;
  std::size_t next_ = 0;
};

std::array<Staging, max_devices>& all_staging() {
  static auto* all = new std::array<Staging, max_devices>;
  static std::once_flag noted;
  std::call_once(noted, [] {
    at_shut_down([] {
      for (Staging& staging : all_staging()) staging.release();
    });
  });
  return *all;
}

Staging& staging() { return all_staging()[static_cast<std::size_t>(current_device())]; }

}  // namespace

void to_device(void* device, const void* host, int64_t bytes) {
  refuse_in_graph("a copy from the host's memory, which is another one in each replay,");
  staging().to_device(static_cast<char*>(device), static_cast<const char*>(host), bytes);
}

void to_host(void* host, const void* device, int64_t bytes) {
  refuse_in_graph(
      "reading a tensor on the host (item, to_vector, to(\"cpu\"), "
      "nonzero, ...)");
  staging().to_host(static_cast<char*>(host), static_cast<const char*>(device), bytes);
}

void from_device(void* here, const void* there, int64_t bytes, int other_device) {
  refuse_in_graph("a copy between devices");
  const int device = current_device();
  const cudaStream_t stream = current_stream();
  const DeviceGuard guard(other_device);
  const cudaStream_t other = current_stream();
  Event written;
  written.record(other);
  written.block(stream);
  KNOCK_CUDA(cudaMemcpyPeerAsync(here, device, there, other_device, static_cast<std::size_t>(bytes), stream));
  const DeviceGuard back(device);
  Event done;
  done.record(stream);
  done.block(other);
}

}  // namespace knock::cuda
