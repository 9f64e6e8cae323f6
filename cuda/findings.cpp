// The questions of a device and their slots, which are used again after each wait.

#include "findings.hpp"

#include "allocator.hpp"
#include "device.hpp"
#include "error.hpp"
#include "lifetime.hpp"
#include "stream.hpp"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace knock::cuda {
namespace {

constexpr Finding none = ~Finding{0};

struct Found {
  Question question;
  Finding position;
};

[[noreturn]] void throw_finding(const Found& found) {
  const auto& [op, what, extent] = found.question;
  if (extent == 0) fail(op, what);
  fail(op, what, " ", extent, ", first at position ", static_cast<int64_t>(found.position), " of the flattened index");
}

/// Questions, and their slots on the device.
class Slots {
 public:
  static constexpr int most = 512;

  /// Of the current device; ready for what comes on the stream.
  explicit Slots(cudaStream_t stream) {
    KNOCK_CUDA(cudaMalloc(&on_device_,
                          most * sizeof(Finding)));  // not a block that the statistics would count
    clear(stream);
  }
  ~Slots() { cudaFree(on_device_); }
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  bool full() const { return asked_ == most; }
  Finding* ask(const Question& question) {
    questions_[static_cast<std::size_t>(asked_)] = question;
    return static_cast<Finding*>(on_device_) + asked_++;
  }

  void fetch() {
    if (asked_ == 0) return;
    const auto bytes = static_cast<std::size_t>(asked_) * sizeof(Finding);
    KNOCK_CUDA(cudaMemcpyAsync(on_host_.data(), on_device_, bytes, cudaMemcpyDeviceToHost, current_stream()));
    fetched_ = asked_;
  }

  /// The first of what was fetched; then all slots are empty again.
  std::optional<Found> take() {
    const auto* answers = static_cast<const Finding*>(on_host_.data());
    for (int i = 0; i < fetched_; ++i) {
      if (answers[i] == none) continue;
      clear(current_stream());
      return Found{questions_[static_cast<std::size_t>(i)], answers[i]};
    }
    return {};
  }

  /// Gives the slots to new questions; those asked after the fetch keep theirs.
  void restart(bool found) {
    if (fetched_ > 0 && (fetched_ == asked_ || found)) asked_ = 0;
    fetched_ = 0;
  }

 private:
  void clear(cudaStream_t stream) { KNOCK_CUDA(cudaMemsetAsync(on_device_, 0xff, most * sizeof(Finding), stream)); }

  std::array<Question, most> questions_;
  int asked_ = 0, fetched_ = 0;
  void* on_device_ = nullptr;
  PinnedBuffer on_host_{most * sizeof(Finding)};
};

}  // namespace

class GraphFindings {
 public:
  explicit GraphFindings(cudaStream_t stream) : stream_(stream) { add(); }

  Finding* ask(const Question& question) {
    if (slots_.back()->full()) add();
    return slots_.back()->ask(question);
  }
  void fetch() {
    for (const auto& slots : slots_) slots->fetch();
  }
  std::optional<Found> take() {
    std::optional<Found> first;
    for (const auto& slots : slots_) {
      const auto found = slots->take();
      if (!first) first = found;
    }
    return first;
  }

 private:
  void add() { slots_.push_back(std::make_unique<Slots>(stream_)); }

  cudaStream_t stream_;  // not the one that is captured
  std::vector<std::unique_ptr<Slots>> slots_;
};

namespace {

thread_local GraphFindings* of_graph = nullptr;

/// The questions of a device since the last wait, and the graphs launched since then.
class Findings {
 public:
  Finding* ask(const Question& question) {
    const std::lock_guard lock(mutex_);
    if (!own_) own_.emplace(current_stream());
    return own_->ask(question);
  }

  bool full() {
    const std::lock_guard lock(mutex_);
    return own_ && own_->full();
  }

  void await(const std::shared_ptr<GraphFindings>& findings) {
    const std::lock_guard lock(mutex_);
    if (std::find(launched_.begin(), launched_.end(), findings) == launched_.end()) launched_.push_back(findings);
  }

  void fetch() {
    const std::lock_guard lock(mutex_);
    if (own_) own_->fetch();
    for (const auto& graph : launched_) graph->fetch();
    fetched_.insert(fetched_.end(), launched_.begin(), launched_.end());
    launched_.clear();
  }

  void report() {
    const std::lock_guard lock(mutex_);
    std::optional<Found> first;
    if (own_) {
      first = own_->take();
      own_->restart(first.has_value());
    }
    for (const auto& graph : std::exchange(fetched_, {})) {
      const auto found = graph->take();
      if (!first) first = found;
    }
    if (first) throw_finding(*first);
  }

  void release() {
    own_.reset();
    launched_.clear();
    fetched_.clear();
  }

 private:
  std::mutex mutex_;
  std::optional<Slots> own_;
  std::vector<std::shared_ptr<GraphFindings>> launched_, fetched_;
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
  if (of_graph) return of_graph->ask(question);
  if (findings().full()) synchronize_stream();
  return findings().ask(question);
}

void fetch_findings() { findings().fetch(); }
void report_findings() { findings().report(); }

std::shared_ptr<GraphFindings> make_graph_findings() { return std::make_shared<GraphFindings>(current_stream()); }
void ask_for_graph(GraphFindings* graph) { of_graph = graph; }
void await_findings(const std::shared_ptr<GraphFindings>& graph) { findings().await(graph); }

}  // namespace knock::cuda
