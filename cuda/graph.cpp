// Capture of a stream, with memory and slots for findings that belong to the graph.
//
// The capture is a relaxed one: cudaMalloc is allowed, which the graph's pool of memory needs. What must not be asked
// for meanwhile, transfer.cpp, stream.cpp and the kernels that take random numbers refuse, in words of their own.

#include "graph.hpp"

#include "allocator.hpp"
#include "device.hpp"
#include "error.hpp"
#include "findings.hpp"
#include "stream.hpp"

#include <memory>
#include <optional>
#include <utility>

namespace knock::cuda {
namespace {

class Recording;
thread_local const Recording* under_way = nullptr;

/// A graph, or what is becoming one.
class Recording {
 public:
  explicit Recording(int device)
      : device_(device), pool_(device), findings_(make_graph_findings()), on_stream_(std::in_place, stream_) {
    KNOCK_CUDA(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeRelaxed));
    pool_.open();
    ask_for_graph(findings_.get());
    under_way = this;
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  /// On its device.
  ~Recording() {
    if (under_way == this) destroy_template(end());
    if (executable_) cudaGraphExecDestroy(executable_);
    cudaGetLastError();  // of a capture that was given up
  }

  int device() const { return device_; }

  void finish() {
    const DeviceGuard guard(device_);
    cudaGraph_t graph = end();
    cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) status = cudaGraphInstantiate(&executable_, graph, 0);
    destroy_template(graph);
    check_call(status, "the capture of a graph");
  }

  void replay() {
    check(executable_, "graph", "the capture has not ended");
    refuse_in_graph("the replay of another graph");
    const DeviceGuard guard(device_);
    KNOCK_CUDA(cudaGraphLaunch(executable_, current_stream()));
    await_findings(findings_);
    after_launch("a graph");
  }

 private:
  /// Ends the capture; null, and an error that cudaGetLastError gives, when it has failed.
  cudaGraph_t end() {
    under_way = nullptr;
    ask_for_graph(nullptr);
    pool_.close();
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream_.get(), &graph);
    on_stream_.reset();
    return graph;
  }

  static void destroy_template(cudaGraph_t graph) {
    if (graph) cudaGraphDestroy(graph);
  }

  const int device_;
  Stream stream_;
  PrivatePool pool_;
  std::shared_ptr<GraphFindings> findings_;
  std::optional<StreamGuard> on_stream_;
  cudaGraphExec_t executable_ = nullptr;
};

Recording& recording(void* graph) { return *static_cast<Recording*>(graph); }

}  // namespace

void refuse_in_graph(const char* what) { check(!under_way, "graph", what, " cannot be part of a graph"); }

void* begin_capture(int device) {
  refuse_in_graph("a capture within another one");
  const DeviceGuard guard(device);
  return new Recording(device);
}

void end_capture(void* graph) { recording(graph).finish(); }
void replay(void* graph) { recording(graph).replay(); }
void destroy(void* graph) noexcept {
  try {
    const DeviceGuard guard(recording(graph).device());
    delete &recording(graph);
  } catch (...) {  // the device has failed
  }
}

}  // namespace knock::cuda
