// Texts of failed calls, with the kernels that were launched since the last wait.

#include "error.hpp"

#include "device.hpp"
#include "stream.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace knock::cuda {
namespace {

/// The last kernels that were launched on a device and not waited for.
class LaunchLog {
 public:
  void add(const char* kernel) {
    const uint64_t place = added_.fetch_add(1, std::memory_order_relaxed);
    names_[place % names_.size()].store(kernel, std::memory_order_relaxed);
  }

  void forget() { waited_for_.store(added_.load(std::memory_order_relaxed), std::memory_order_relaxed); }

  /// The latest first, each name once.
  std::string names() const {
    std::string out;
    const uint64_t added = added_.load(std::memory_order_relaxed);
    const uint64_t pending = added - waited_for_.load(std::memory_order_relaxed);
    const char* before = "";
    for (uint64_t i = 1; i <= pending && i <= names_.size(); ++i) {
      const char* name = names_[(added - i) % names_.size()].load(std::memory_order_relaxed);
      if (std::strcmp(name, before) != 0) out += text(out.empty() ? "" : ", ", name);
      before = name;
    }
    return pending > names_.size() ? out + " and others" : out;
  }

 private:
  std::atomic<uint64_t> added_{0}, waited_for_{0};
  std::array<std::atomic<const char*>, 16> names_{};
};

LaunchLog& log_of(int device) {
  static std::array<LaunchLog, max_devices> logs;
  return logs[static_cast<std::size_t>(device)];
}

bool waits_for_every_launch() {
  static const bool waits = [] {
    const char* value = std::getenv("KNOCK_CUDA_SYNC");
    return value && std::strcmp(value, "1") == 0;
  }();
  return waits;
}

/// Whether CUDA refuses all that the process asks of it from now on.
bool is_final(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

/// Throws a final error: the first time as it was found, then as the reason why nothing goes on.
[[noreturn]] void fail_for_good(const std::string& what) {
  static std::mutex mutex;
  static auto* first = new std::string;  // never destroyed: tensors of static duration are released late
  const std::lock_guard lock(mutex);
  if (!first->empty())
    fail("cuda", "the devices cannot be used any more in this process, because a kernel failed before: ", *first);
  *first = what;
  fail("cuda", what);
}

/// Whether the current stream records a graph, in which nothing can be waited for.
bool is_recorded() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(current_stream(), &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

}  // namespace

void fail_call(cudaError_t status, const char* call) {
  cudaGetLastError();  // it is reported here, not after the next launch
  const std::string launched = log_of(current_device()).names();
  const std::string kernels =
      launched.empty() ? ""
                       : text("; launched since the last wait, the latest first: ", launched,
                              waits_for_every_launch() ? "" : " (KNOCK_CUDA_SYNC=1 finds the one that failed)");
  const std::string what = text(cudaGetErrorString(status), " (", cudaGetErrorName(status), ") in ", call, kernels);
  if (is_final(status)) fail_for_good(what);
  fail("cuda", what);
}

void after_launch(const char* kernel) {
  LaunchLog& log = log_of(current_device());
  log.add(kernel);
  cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess && waits_for_every_launch() && !is_recorded()) {
    status = cudaStreamSynchronize(current_stream());
    if (status == cudaSuccess) log.forget();
  }
  if (status != cudaSuccess) [[unlikely]]
    fail_call(status, kernel);
}

void forget_launches(int device) { log_of(device).forget(); }

}  // namespace knock::cuda
