// Events: marks in streams, that streams and the host wait for.

#include "streams.hpp"

#include <algorithm>
#include <chrono>
#include <set>

namespace cuda_sim {
namespace {

struct Events {
  std::set<const void*> handles;  // never freed, so that a use after destruction is recognised
  std::size_t live = 0;
};

Events& events() {
  static auto* all = new Events;
  return *all;
}

Event* event_of(cudaEvent_t handle) {
  if (!events().handles.contains(handle)) {
    report("an event handle that cudaEventCreate never gave");
    return nullptr;
  }
  auto* event = reinterpret_cast<Event*>(handle);
  if (!event->destroyed) return event;
  report("use of an event after cudaEventDestroy");
  return nullptr;
}

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Capture::Member* member_of(Capture& capture, const Stream& stream) {
  const auto found = std::find_if(capture.members.begin(), capture.members.end(),
                                  [&](const auto& member) { return member.stream == &stream; });
  return found == capture.members.end() ? nullptr : &*found;
}

void record_in_capture(Event& event, const Stream& stream) {
  event.capture = stream.capture;
  event.clock = member_of(*stream.capture, stream)->clock;
  event.recorded = true;
}

void record(Event& event, Stream& stream) {
  event.milliseconds = std::make_shared<double>(0);
  enqueue(stream, {"cudaEventRecord", [time = event.milliseconds] { *time = now(); }});
  event.capture = nullptr;
  event.stream = stream.number;
  event.position = stream.submitted;
  event.clock = stream.clock;
  event.recorded = true;
}

cudaError_t wait_in_capture(Stream& stream, const Event& event) {
  if (stream.capture == nullptr) {
    stream.capture = event.capture;
    event.capture->members.push_back({&stream, {}, 0});
  }
  if (stream.capture != event.capture) return refuse_in_capture("cudaStreamWaitEvent between two captures");
  join(member_of(*stream.capture, stream)->clock, event.clock);
  return cudaSuccess;
}

bool is_finished(const Event& event) {
  return !event.recorded || stream_number(event.stream).completed >= event.position;
}

}  // namespace

std::size_t live_events() { return events().live; }

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    constexpr unsigned known = cudaEventBlockingSync | cudaEventDisableTiming;
    if (handle == nullptr || (flags & ~known) != 0) return cudaErrorInvalidValue;
    auto* event = new Event;
    event->device = current_device();
    event->timed = (flags & cudaEventDisableTiming) == 0;
    events().handles.insert(event);
    ++events().live;
    *handle = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t handle) {
  return api([&] {
    auto* event = event_of(handle);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    event->destroyed = true;
    --events().live;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return api([&] {
    auto* event = event_of(handle);
    auto* stream = stream_of(stream_handle);
    if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->device != stream->device) {
      return refuse(cudaErrorInvalidResourceHandle, "cudaEventRecord: the event is of another device than the stream");
    }
    if (is_capturing(*stream)) {
      record_in_capture(*event, *stream);
    } else {
      record(*event, *stream);
    }
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  return api([&] {
    auto* event = event_of(handle);
    auto* stream = stream_of(stream_handle);
    if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (flags != 0) return cudaErrorInvalidValue;
    if (!event->recorded) return cudaSuccess;
    if (event->capture != nullptr) return wait_in_capture(*stream, *event);
    if (is_capturing(*stream)) return refuse_in_capture("cudaStreamWaitEvent for an event from outside the capture");
    join(stream->clock, event->clock);
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t handle) {
  return api([&] {
    auto* event = event_of(handle);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) return refuse_in_capture("cudaEventSynchronize");
    if (event->recorded) wait_for(event->clock);
    return sticky_error();
  });
}

cudaError_t CUDARTAPI cudaEventQuery(cudaEvent_t handle) {
  return api([&] {
    auto* event = event_of(handle);
    if (event == nullptr) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) return refuse_in_capture("cudaEventQuery");
    if (is_finished(*event)) {
      host_learns(event->clock);
      return sticky_error();
    }
    run_next(stream_number(event->stream));
    return cudaErrorNotReady;
  });
}

cudaError_t CUDARTAPI cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
  return api([&] {
    auto* begin = event_of(first);
    auto* end = event_of(last);
    if (begin == nullptr || end == nullptr) return cudaErrorInvalidResourceHandle;
    if (!begin->timed || !end->timed || !begin->recorded || !end->recorded) return cudaErrorInvalidResourceHandle;
    if (!is_finished(*begin) || !is_finished(*end)) return cudaErrorNotReady;
    *milliseconds = static_cast<float>(*end->milliseconds - *begin->milliseconds);
    return cudaSuccess;
  });
}

}  // extern "C"
