// Queues of work, what orders them, and the API of streams.

#include "streams.hpp"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <utility>

namespace cuda_sim {
namespace {

struct Streams {
  std::vector<std::unique_ptr<Stream>> all;  // by number; never freed, so that a use after destruction is recognised
  std::set<const void*> handles;
  std::vector<Stream*> null_streams;  // by device
  Clock host;                         // what the host knows to be finished
  bool in_host_function = false;
  uint64_t host_waits = 0;
};

Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

bool runs_at_once() {
  const char* value = std::getenv("KNOCK_CUDA_SIM_EAGER");
  return value != nullptr && std::string(value) != "0";
}

Stream& add_stream(int device, bool blocking, int priority) {
  auto& all = streams();
  auto stream = std::make_unique<Stream>();
  stream->number = static_cast<uint32_t>(all.all.size());
  stream->device = device;
  stream->blocking = blocking;
  stream->priority = priority;
  all.handles.insert(stream.get());
  all.all.push_back(std::move(stream));
  return *all.all.back();
}

bool is_null_stream(const Stream& stream) {
  const auto& nulls = streams().null_streams;
  return std::find(nulls.begin(), nulls.end(), &stream) != nulls.end();
}

void run_until(const Clock& clock) {
  for (uint32_t number = 0; number < clock.size(); ++number) {
    auto& stream = *streams().all[number];
    while (stream.completed < clock[number]) run_next(stream);
  }
}

// The null stream and the blocking streams of a device take turns.
void join_turns(Stream& stream) {
  if (!stream.blocking) return;
  if (!is_null_stream(stream)) return join(stream.clock, null_stream(stream.device).clock);
  for (const auto& other : streams().all) {
    if (other->blocking && other->device == stream.device) join(stream.clock, other->clock);
  }
}

bool capture_forbids(Stream& stream) {
  if (!is_null_stream(stream)) return false;
  return std::any_of(streams().all.begin(), streams().all.end(), [&](const auto& other) {
    return other->blocking && other->device == stream.device && other->capture != nullptr;
  });
}

// Whether no other stream can have work: another one that exists, or a null stream that was used.
bool is_alone(const Stream& stream) {
  return std::none_of(streams().all.begin(), streams().all.end(), [&](const auto& other) {
    return other.get() != &stream && (other->submitted > 0 || !is_null_stream(*other));
  });
}

// What the host had waited for when the oldest of the queued works was submitted: it is before all that still runs.
Clock known_to_all(const Work& next) {
  auto known = streams().host;
  const auto limit = [&](const Clock& clock) {
    for (uint32_t i = 0; i < known.size(); ++i) known[i] = std::min(known[i], at(clock, i));
  };
  limit(next.before);
  for (const auto& stream : streams().all) {
    if (!stream->queue.empty()) limit(stream->queue.front().before);
  }
  return known;
}

void add_to_capture(Stream& stream, Operation operation) {
  auto& capture = *stream.capture;
  for (std::size_t i = 0; i < capture.members.size(); ++i) {
    auto& member = capture.members[i];
    if (member.stream == &stream) advance(member.clock, static_cast<uint32_t>(i), ++member.made);
  }
  capture.operations.push_back(std::move(operation));
}

}  // namespace

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

uint64_t at(const Clock& clock, uint32_t stream) { return stream < clock.size() ? clock[stream] : 0; }

void advance(Clock& clock, uint32_t stream, uint64_t position) {
  if (clock.size() <= stream) clock.resize(stream + 1);
  clock[stream] = std::max(clock[stream], position);
}

Stream& null_stream(int device) {
  auto& nulls = streams().null_streams;
  while (static_cast<int>(nulls.size()) <= device) {
    nulls.push_back(&add_stream(static_cast<int>(nulls.size()), true, 0));
  }
  return *nulls[static_cast<std::size_t>(device)];
}

Stream& stream_number(uint32_t number) { return *streams().all[number]; }

Stream* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return &null_stream(current_device());
  if (handle == cudaStreamPerThread) fatal("per-thread default streams are not modelled");
  if (!streams().handles.contains(handle)) {
    report("a stream handle that cudaStreamCreate never gave");
    return nullptr;
  }
  auto* stream = reinterpret_cast<Stream*>(handle);
  if (!stream->destroyed) return stream;
  report("use of stream " + std::to_string(stream->number) + " after cudaStreamDestroy");
  return nullptr;
}

void enqueue(Stream& stream, const Operation& operation) {
  join(stream.clock, streams().host);
  join_turns(stream);
  Work work{operation, ++stream.submitted, stream.clock};
  advance(stream.clock, stream.number, work.position);
  if (operation.host.bytes > 0) protect(operation.host, stream.number, work.position, operation.name);
  stream.queue.push_back(std::move(work));
  if (runs_at_once()) run_until(stream.clock);
}

cudaError_t submit(cudaStream_t handle, Operation operation) {
  auto* stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->capture != nullptr) {
    add_to_capture(*stream, std::move(operation));
    return cudaSuccess;
  }
  if (capture_forbids(*stream)) return refuse_in_capture(operation.name.c_str());
  enqueue(*stream, operation);
  return cudaSuccess;
}

void run_next(Stream& stream) {
  auto work = std::move(stream.queue.front());
  stream.queue.pop_front();
  run_until(work.before);
  if (sticky_error() == cudaSuccess) {
    const auto known = known_to_all(work);
    begin_work({.stream = stream.number,
                .position = work.position,
                .before = work.before.data(),
                .streams = static_cast<uint32_t>(work.before.size()),
                .known = known.data(),
                .known_streams = static_cast<uint32_t>(known.size()),
                .alone = is_alone(stream),
                .name = work.operation.name});
    if (work.operation.on_host) unprotect(work.before);
    work.operation.run();
  }
  stream.completed = work.position;
}

void host_learns(const Clock& clock) {
  join(streams().host, clock);
  unprotect(streams().host);
}

void wait_for(const Clock& clock) {
  const auto& host = streams().host;
  for (uint32_t i = 0; i < clock.size(); ++i) {
    if (clock[i] <= at(host, i)) continue;
    ++streams().host_waits;
    break;
  }
  run_until(clock);
  host_learns(clock);
}

void wait_for(Stream& stream) {
  if (is_null_stream(stream)) join_turns(stream);
  wait_for(stream.clock);
}

void wait_for_device(int device) {
  for (std::size_t i = 0; i < streams().all.size(); ++i) {
    if (streams().all[i]->device == device) wait_for(streams().all[i]->clock);
  }
}

void run_everything() {
  for (std::size_t i = 0; i < streams().all.size(); ++i) run_until(streams().all[i]->clock);
}

bool is_capturing(const Stream& stream) { return stream.capture != nullptr; }

cudaError_t refuse_in_capture(const char* function) {
  bool captured = false;
  for (const auto& stream : streams().all) {
    if (stream->capture == nullptr) continue;
    stream->capture->invalid = captured = true;
  }
  if (!captured) return cudaSuccess;
  return refuse(cudaErrorStreamCaptureUnsupported, std::string(function) + ": not while a stream is captured");
}

cudaError_t refuse_unsafe_in_capture(const char* function) {
  const bool all_relaxed = std::none_of(streams().all.begin(), streams().all.end(), [](const auto& stream) {
    return stream->capture != nullptr && !stream->capture->relaxed;
  });
  return all_relaxed ? cudaSuccess : refuse_in_capture(function);
}

uint64_t host_waits() { return streams().host_waits; }

cudaError_t refuse_in_host_function() {
  if (!streams().in_host_function) return cudaSuccess;
  return refuse(cudaErrorNotPermitted, "a function that a stream calls must not call the CUDA API");
}

void reset_streams() {
  for (const auto& stream : streams().all) {
    stream->queue.clear();
    stream->completed = stream->submitted;
    stream->capture = nullptr;
    stream->destroyed = !is_null_stream(*stream);
    host_learns(stream->clock);
  }
}

std::size_t live_streams() {
  return static_cast<std::size_t>(std::count_if(streams().all.begin(), streams().all.end(), [](const auto& stream) {
    return !stream->destroyed && !is_null_stream(*stream);
  }));
}

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    if (stream == nullptr || (flags & ~unsigned{cudaStreamNonBlocking}) != 0) return cudaErrorInvalidValue;
    null_stream(current_device());
    const int used = std::clamp(priority, highest_priority, lowest_priority);
    *stream = add_stream(current_device(), (flags & cudaStreamNonBlocking) == 0, used).handle();
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t CUDARTAPI cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

// Work that is left still runs; nothing can wait for it by this stream any more.
cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t handle) {
  return api([&] {
    auto* stream = handle == nullptr ? nullptr : stream_of(handle);
    if (stream == nullptr || is_null_stream(*stream)) return cudaErrorInvalidResourceHandle;
    if (is_capturing(*stream)) return refuse_in_capture("cudaStreamDestroy");
    stream->destroyed = true;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t handle) {
  return api([&] {
    auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (is_capturing(*stream)) return refuse_in_capture("cudaStreamSynchronize");
    wait_for(*stream);
    return sticky_error();
  });
}

// Makes progress, so that a loop of queries ends.
cudaError_t CUDARTAPI cudaStreamQuery(cudaStream_t handle) {
  return api([&] {
    auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (is_capturing(*stream)) return refuse_in_capture("cudaStreamQuery");
    if (!stream->queue.empty()) {
      run_next(*stream);
      return cudaErrorNotReady;
    }
    wait_for(*stream);
    return sticky_error();
  });
}

cudaError_t CUDARTAPI cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  return api([&] {
    auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *flags = stream->blocking ? cudaStreamDefault : cudaStreamNonBlocking;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return api([&] {
    auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *priority = stream->priority;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  return api([&] {
    *lowest = lowest_priority;
    *highest = highest_priority;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return api([&] {
    if (function == nullptr) return cudaErrorInvalidValue;
    const auto call = [=] {
      streams().in_host_function = true;
      function(data);
      streams().in_host_function = false;
    };
    return submit(handle, {.name = "cudaLaunchHostFunc", .run = call, .host = {}, .on_host = true});
  });
}

cudaError_t CUDARTAPI cudaDeviceSynchronize() {
  return api([] {
    if (device_count() == 0) return cudaErrorNoDevice;
    if (const auto error = refuse_in_capture("cudaDeviceSynchronize"); error != cudaSuccess) return error;
    wait_for_device(current_device());
    return sticky_error();
  });
}

}  // extern "C"
