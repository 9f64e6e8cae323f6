#pragma once
// What the parts of the simulated CUDA runtime say to each other.
//
// The environment, each read when it matters:
//   KNOCK_CUDA_SIM_DRIVER=n     the driver is one of CUDA n / 1000 (as new as the program); 0 is a machine without one
//   KNOCK_CUDA_SIM_DEVICES=n    that many devices (1); 0 is a machine without one
//   KNOCK_CUDA_SIM_CAPABILITY=n.m  compute capability of the devices, as they tell it (8.0)
//   KNOCK_CUDA_SIM_PROCESSORS=n,m  multiprocessors of the devices (108)
//   KNOCK_CUDA_SIM_SHARED=n     KiB of shared memory that a block may ask for (163)
//   KNOCK_CUDA_SIM_MEMORY=n     MiB of memory of each device (4096)
//   KNOCK_CUDA_SIM_EAGER=1      streams run at once, not when somebody waits
//   KNOCK_CUDA_SIM_LEAKS=1      what was never freed or destroyed is reported at exit
//   KNOCK_CUDA_SIM_PROFILE=1    prints what each kernel did, at exit

#include "counters.hpp"
#include "machine.hpp"
#include "memory.hpp"
#include "report.hpp"
#include "shadow.hpp"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace cuda_sim {

/// Says what the simulator cannot do, and ends the process.
[[noreturn]] void fatal(const std::string& what);

// ---- errors: errors.cpp ----

/// One caller at a time.
std::recursive_mutex& runtime_mutex();
/// The error that a kernel's fault left, which every later call returns until cudaDeviceReset.
cudaError_t sticky_error();
void set_sticky_error(cudaError_t error);
/// What cudaGetLastError will return; keeps `error` when it is one. cudaErrorNotReady counts, as it does with drivers
/// for whose sake others clear it.
cudaError_t noted(cudaError_t error);

/// An error, after a report, where the caller is a function that a stream calls (cudaLaunchHostFunc).
cudaError_t refuse_in_host_function();

/// The body of an API function: one caller at a time, nothing done after a sticky error, errors noted.
template <class Body>
cudaError_t api(Body&& body) {
  const std::lock_guard lock(runtime_mutex());
  if (sticky_error() != cudaSuccess) return noted(sticky_error());
  if (const auto error = refuse_in_host_function(); error != cudaSuccess) return noted(error);
  return noted(body());
}

/// Reports how an API function was misused, and answers it.
cudaError_t refuse(cudaError_t error, const std::string& finding);

// ---- devices: devices.cpp ----

constexpr int max_devices = 8;
constexpr std::size_t default_shared_bytes = 48 << 10, shared_bytes_of_processor = 164 << 10;
/// What a block may ask for.
std::size_t most_shared_bytes();
int device_count();
int current_device();

// ---- host memory and faults: host_memory.cpp ----

/// Catches host code that touches device memory, freed pinned memory or pinned memory that a copy still uses. Called
/// again and again, because others (doctest) put their handlers in front of ours.
void watch_faults();
bool is_pinned(const void* address);
/// Whether [address, address + bytes) lies inside one pinned range.
bool is_pinned_range(const void* address, std::size_t bytes);
/// Where the simulator reads and writes pinned memory, whether or not host code may; other addresses are their own.
char* host_bytes(const void* address);
void* allocate_pinned(std::size_t bytes);
bool release_pinned(void* data);
std::size_t pinned_ranges();

/// Pinned memory that stream work uses until the host has waited for it.
struct HostUse {
  const void* address = nullptr;
  std::size_t bytes = 0;
  bool written = false;  ///< by the work; else only read
};
/// Host code must not touch the range (not write it, where the work only reads) until the host has waited for the work.
void protect(const HostUse& use, uint32_t stream, uint64_t position, const std::string& name);
/// The host has waited: finished[s] is the last position of stream s that it knows to be finished.
void unprotect(const std::vector<uint64_t>& finished);

// ---- streams and events: streams.cpp, events.cpp, graphs.cpp ----

/// What is queued: everything that a stream, or a graph that is launched again and again, must know of it.
struct Operation {
  std::string name;
  std::function<void()> run;
  HostUse host{};
  bool on_host = false;  ///< a function of the program: it may touch pinned memory that earlier work used
};

struct Stream;

/// The stream of a handle; null, after a report, where it is none.
Stream* stream_of(cudaStream_t handle);
/// Queues the operation, or adds it to the graph that the stream captures.
cudaError_t submit(cudaStream_t handle, Operation operation);
/// Runs everything in the stream, and what it depends on; the host knows it then.
void wait_for(Stream& stream);
void wait_for_device(int device);
/// Runs everything that is queued, without the host knowing it.
void run_everything();
/// An error, and the end of the captures, where a call must not be made while a stream is captured.
cudaError_t refuse_in_capture(const char* function);
/// The same for calls that a relaxed capture allows.
cudaError_t refuse_unsafe_in_capture(const char* function);
bool is_capturing(const Stream& stream);
/// How often the host has waited for work that it did not know to be finished, since the program began.
uint64_t host_waits();
/// Forgets all queues (cudaDeviceReset).
void reset_streams();

// ---- leaks, asked at the end of the program ----

std::vector<const Allocation*> live_allocations();
std::size_t live_streams();
std::size_t live_events();
std::size_t live_graphs();
std::size_t live_cublas_objects();
void report_leaks();

}  // namespace cuda_sim
