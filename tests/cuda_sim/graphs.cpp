// Stream capture, and graphs that queue what was captured again, with the captured parameters. The operations of a
// graph run one after another, as they were captured: branches that run beside each other are not modelled.

#include "streams.hpp"

#include <memory>
#include <set>
#include <utility>

namespace cuda_sim {
namespace {

using Operations = std::vector<Operation>;

// A graph and what is instantiated from it hold the same operations.
struct Graph {
  std::shared_ptr<const Operations> operations;
  bool destroyed = false;
};

struct Graphs {
  std::set<const void*> handles;  // of both kinds; never freed, so that a use after destruction is recognised
  std::size_t live = 0;
};

Graphs& graphs() {
  static auto* all = new Graphs;
  return *all;
}

template <class Handle>
Handle add_graph(std::shared_ptr<const Operations> operations) {
  auto* graph = new Graph{std::move(operations)};
  graphs().handles.insert(graph);
  ++graphs().live;
  return reinterpret_cast<Handle>(graph);
}

Graph* graph_of(const void* handle) {
  if (!graphs().handles.contains(handle)) {
    report("a graph handle that was never given");
    return nullptr;
  }
  auto* graph = static_cast<Graph*>(const_cast<void*>(handle));
  if (!graph->destroyed) return graph;
  report("use of a graph after it was destroyed");
  return nullptr;
}

cudaError_t destroy(const void* handle) {
  auto* graph = graph_of(handle);
  if (graph == nullptr) return cudaErrorInvalidValue;
  graph->destroyed = true;
  --graphs().live;
  return cudaSuccess;
}

bool all_joined(const Capture& capture) {
  const auto& origin = capture.members.front();
  for (std::size_t i = 1; i < capture.members.size(); ++i) {
    if (at(origin.clock, static_cast<uint32_t>(i)) < capture.members[i].made) return false;
  }
  return true;
}

cudaError_t end_capture(Stream& stream, cudaGraph_t* graph) {
  const auto capture = stream.capture;
  if (capture == nullptr || capture->members.front().stream != &stream) {
    return refuse(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture: the capture did not begin in this stream");
  }
  for (const auto& member : capture->members) member.stream->capture = nullptr;
  if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
  if (!all_joined(*capture)) {
    return refuse(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture: a stream that forked has not been joined");
  }
  *graph = add_graph<cudaGraph_t>(std::make_shared<const Operations>(std::move(capture->operations)));
  return cudaSuccess;
}

}  // namespace

std::size_t live_graphs() { return graphs().live; }

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return api([&] {
    auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (handle == nullptr || handle == cudaStreamLegacy) {
      return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture of the null stream");
    }
    if (is_capturing(*stream)) return cudaErrorIllegalState;
    stream->capture = std::make_shared<Capture>();
    stream->capture->relaxed = mode == cudaStreamCaptureModeRelaxed;
    stream->capture->members.push_back({stream, {}, 0});
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return api([&] {
    *graph = nullptr;
    auto* stream = stream_of(handle);
    return stream == nullptr ? cudaErrorInvalidResourceHandle : end_capture(*stream, graph);
  });
}

cudaError_t CUDARTAPI cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return api([&] {
    const auto* stream = stream_of(handle);
    if (stream == nullptr) return cudaErrorInvalidResourceHandle;
    *status = !is_capturing(*stream)     ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t handle, unsigned long long) {
  return api([&] {
    const auto* graph = graph_of(handle);
    if (graph == nullptr) return cudaErrorInvalidValue;
    *executable = add_graph<cudaGraphExec_t>(graph->operations);
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle) {
  return api([&] {
    const auto* graph = graph_of(handle);
    auto* stream = stream_of(stream_handle);
    if (graph == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
    if (is_capturing(*stream)) fatal("a graph inside of a captured stream is not modelled");
    for (const auto& operation : *graph->operations) enqueue(*stream, operation);
    note_work("graph launch", {.launches = 1});
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count) {
  return api([&] {
    const auto* graph = graph_of(handle);
    if (graph == nullptr) return cudaErrorInvalidValue;
    if (nodes != nullptr) fatal("cudaGraphGetNodes: only their number is modelled");
    *count = graph->operations->size();
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph) {
  return api([&] { return destroy(graph); });
}

cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return api([&] { return destroy(executable); });
}

}  // extern "C"
