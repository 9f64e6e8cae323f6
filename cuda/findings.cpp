// The questions of a device and their slots, which are used again after each wait.

#include "findings.hpp"

#include "allocator.hpp"
#include "device.hpp"
#include "error.hpp"
#include "lifetime.hpp"
#include "stream.hpp"

#include <array>
#include <memory>
#include <mutex>
#include <utility>

namespace knock::cuda {
namespace {

/// The questions of a device since the last wait, and their slots.
class Findings {
 public:
  static constexpr int slots = 512;

  Finding* ask(const Question& question) {
    const std::lock_guard lock(mutex_);
    if (!on_device_) make();
    questions_[static_cast<std::size_t>(asked_)] = question;
    return static_cast<Finding*>(on_device_) + asked_++;
  }

  bool full() {
    const std::lock_guard lock(mutex_);
    return asked_ == slots;
  }

  void fetch() {
    const std::lock_guard lock(mutex_);
    if (asked_ == 0) return;
    const auto bytes = static_cast<std::size_t>(asked_) * sizeof(Finding);
    KNOCK_CUDA(cudaMemcpyAsync(on_host_->data(), on_device_, bytes, cudaMemcpyDeviceToHost, current_stream()));
    fetched_ = asked_;
  }

  void report() {
    const std::lock_guard lock(mutex_);
    const Finding* answers = static_cast<const Finding*>(on_host_ ? on_host_->data() : nullptr);
    for (int i = 0; i < fetched_; ++i) {
      if (answers[i] == none) continue;
      forget(true);
      throw_finding(questions_[static_cast<std::size_t>(i)], answers[i]);
    }
    forget(false);
  }

  void release() {
    cudaFree(on_device_);
    on_device_ = nullptr;
    on_host_.reset();
  }

 private:
  static constexpr Finding none = ~Finding{0};

  void make() {
    KNOCK_CUDA(cudaMalloc(&on_device_, slots * sizeof(Finding)));  // not a block that the statistics would count
    on_host_ = std::make_unique<PinnedBuffer>(slots * sizeof(Finding));
    clear();
  }

  void clear() { KNOCK_CUDA(cudaMemsetAsync(on_device_, 0xff, slots * sizeof(Finding), current_stream())); }

  /// Questions asked after the fetch keep their slots.
  void forget(bool found) {
    if (fetched_ == 0) return;
    if (found) clear();
    if (fetched_ == asked_ || found) asked_ = 0;
    fetched_ = 0;
  }

  [[noreturn]] static void throw_finding(const Question& question, Finding position) {
    if (question.extent == 0) fail(question.op, question.what);
    fail(question.op, question.what, " ", question.extent, ", first at position ", static_cast<int64_t>(position),
         " of the flattened index");
  }

  std::mutex mutex_;
  std::array<Question, slots> questions_;
  int asked_ = 0, fetched_ = 0;
  void* on_device_ = nullptr;
  std::unique_ptr<PinnedBuffer> on_host_;
};

std::array<Findings, max_devices>& all_findings() {
  static auto* all = new std::array<Findings, max_devices>;
  static std::once_flag noted;
  std::call_once(noted, [] {
    at_shut_down([] {
      for (Findings& findings : all_findings()) findings.release();
    });
  });
  return *all;
}

Findings& findings() { return all_findings()[static_cast<std::size_t>(current_device())]; }

}  // namespace

Finding* ask(const Question& question) {
  if (findings().full()) synchronize_stream();
  return findings().ask(question);
}

void fetch_findings() { findings().fetch(); }
void report_findings() { findings().report(); }

}  // namespace knock::cuda
