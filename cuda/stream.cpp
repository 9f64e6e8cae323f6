// The devices' own streams, and what a thread has put in their place.

#include "stream.hpp"

#include "device.hpp"
#include "error.hpp"
#include "findings.hpp"
#include "graph.hpp"
#include "lifetime.hpp"

#include <array>
#include <mutex>
#include <optional>
#include <vector>

namespace knock::cuda {
namespace {

/// The streams of one device that no Stream has.
struct Idle {
  std::mutex mutex;
  std::vector<Stream::Parts> streams;
};
std::array<Idle, max_devices> idle;

/// The streams that all threads start with, by device.
struct OwnStream {
  std::once_flag made;
  std::optional<Stream> stream;
};
std::array<OwnStream, max_devices> own_streams;

void destroy_streams() {
  for (OwnStream& own : own_streams) own.stream.reset();
  for (Idle& of_device : idle) {
    for (const Stream::Parts& parts : of_device.streams) cudaStreamDestroy(parts.stream), cudaFree(parts.counters);
    of_device.streams.clear();
  }
}

Stream::Parts make_stream() {
  static std::once_flag noted;
  std::call_once(noted, [] { at_shut_down(destroy_streams); });
  Stream::Parts made;
  KNOCK_CUDA(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking));
  KNOCK_CUDA(cudaMalloc(reinterpret_cast<void**>(&made.counters), Stream::counters * sizeof(unsigned)));
  KNOCK_CUDA(cudaMemsetAsync(made.counters, 0, Stream::counters * sizeof(unsigned), made.stream));
  return made;
}

/// Of the current device: one that came back, or a new one.
Stream::Parts take_stream(Idle& from) {
  const std::lock_guard lock(from.mutex);
  if (from.streams.empty()) return make_stream();
  const Stream::Parts parts = from.streams.back();
  from.streams.pop_back();
  return parts;
}

const Stream& own_stream(int device) {
  OwnStream& own = own_streams[static_cast<std::size_t>(device)];
  std::call_once(own.made, [&] { own.stream.emplace(); });
  return *own.stream;
}

thread_local std::array<const Stream*, max_devices> chosen{};  // null: the device's own

const Stream& this_stream() {
  const int device = current_device();
  const Stream* const stream = chosen[static_cast<std::size_t>(device)];
  return stream ? *stream : own_stream(device);
}

void order(cudaStream_t first, cudaStream_t second) {
  Event event;
  event.record(first);
  event.block(second);
}

}  // namespace

Event::Event() { KNOCK_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
Event::~Event() {
  if (event_) cudaEventDestroy(event_);
}
void Event::record(cudaStream_t stream) { KNOCK_CUDA(cudaEventRecord(event_, stream)); }
void Event::block(cudaStream_t stream) const { KNOCK_CUDA(cudaStreamWaitEvent(stream, event_, 0)); }
void Event::synchronize() const { KNOCK_CUDA(cudaEventSynchronize(event_)); }
bool Event::done() const {
  const cudaError_t status = cudaEventQuery(event_);
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // no error to report after the next launch
    return false;
  }
  KNOCK_CUDA(status);
  return true;
}

Stream::Stream() : device_(current_device()), parts_(take_stream(idle[static_cast<std::size_t>(device_)])) {}
Stream::~Stream() {
  Idle& to = idle[static_cast<std::size_t>(device_)];
  const std::lock_guard lock(to.mutex);
  to.streams.push_back(parts_);
}

cudaStream_t current_stream() { return this_stream().get(); }
unsigned* current_counters() { return this_stream().counters_on_device(); }

void synchronize_stream() {
  refuse_in_graph("a wait for the device");
  fetch_findings();
  KNOCK_CUDA(cudaStreamSynchronize(current_stream()));
  forget_launches(current_device());
  report_findings();
}

void synchronize_device() {
  refuse_in_graph("a wait for the device");
  KNOCK_CUDA(cudaDeviceSynchronize());  // the slots of all streams are written
  synchronize_stream();
}

StreamGuard::StreamGuard(const Stream& stream) : device_(current_device()), before_(&this_stream()), inside_(&stream) {
  order(before_->get(), inside_->get());
  chosen[static_cast<std::size_t>(device_)] = inside_;
}

StreamGuard::~StreamGuard() {
  chosen[static_cast<std::size_t>(device_)] = before_;
  try {
    order(inside_->get(), before_->get());
  } catch (const Error&) {  // the device has failed: the next call says so
  }
}

}  // namespace knock::cuda
