#pragma once
// Streams and events. What is launched on one stream runs in order; an event is a place in that order.
//
// Every thread works on one stream of each device, by default on the device's own, which all threads share: so tensors
// pass between threads without more ado. A StreamGuard puts a thread on another stream.

#include <cuda_runtime_api.h>

namespace knock::cuda {

/// A place in a stream.
class Event {
 public:
  /// On the current device.
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  Event(Event&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }

  /// Puts the event behind all that was launched on the stream so far.
  void record(cudaStream_t stream);
  /// Lets what is launched on the stream from now on wait for the event.
  void block(cudaStream_t stream) const;
  void synchronize() const;
  bool done() const;

 private:
  cudaEvent_t event_ = nullptr;
};

/// A stream of its own: no other Stream has it meanwhile. It is lent and comes back; nothing destroys it before the
/// process ends, since memory that was allotted on it may be given back later.
class Stream {
 public:
  /// Numbers on the device by which the blocks of one kernel count one another. They are 0 between kernels.
  static constexpr int counters = 1024;

  /// What there is of the driver's.
  struct Parts {
    cudaStream_t stream = nullptr;
    unsigned* counters = nullptr;
  };

  /// On the current device.
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return parts_.stream; }
  unsigned* counters_on_device() const { return parts_.counters; }

 private:
  int device_;
  Parts parts_;
};

/// This thread's stream of the current device.
cudaStream_t current_stream();
/// Its counters.
unsigned* current_counters();
/// Waits for it; throws what failed on the device, asynchronous errors and the ops' own findings.
void synchronize_stream();
/// The same for all streams of the current device.
void synchronize_device();

/// Works on another stream of the current device until the end of the scope. It waits for what was launched before, and
/// what is launched afterwards waits for it.
class StreamGuard {
 public:
  explicit StreamGuard(const Stream& stream);
  ~StreamGuard();
  StreamGuard(const StreamGuard&) = delete;
  StreamGuard& operator=(const StreamGuard&) = delete;

 private:
  int device_;
  const Stream *before_, *inside_;
};

}  // namespace knock::cuda
