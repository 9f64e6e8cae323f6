#pragma once
// Graphs: the work of a device, recorded once and launched again as a whole. What torch.cuda.CUDAGraph is in PyTorch.
//
// A training step of a small model launches thousands of kernels, and the host may need longer to ask for them than the
// device to run them. A graph is asked for in one call.
//
//   Tensor x = zeros({64, 32}, {.device = "cuda:0"}), y;            // what a replay reads, at a fixed place
//   y = model.forward(x);                                           // once before: what is made at first use
//   Graph graph = Graph::capture("cuda:0", [&] { y = model.forward(x); });   // recorded, not run
//   for (const Tensor& batch : batches) {
//     x.copy_(batch);
//     graph.replay();                                               // writes y anew, at the same place
//   }
//
// What a replay does again is the work of the device, with the addresses and the numbers of the capture:
//
// * Tensors made in the capture keep their memory until the graph is destroyed, whether or not a handle is left: each
//   replay writes there again. What is released within the capture is used again within it alone.
// * Memory from outside must outlive the graph and keep its place. A tensor from outside whose last handle goes within
//   the capture is kept.
// * A replay counts as an in-place write of what the captured ops wrote in place, and it reads no stale bf16 copy of a
//   weight (core/rounded.hpp): one is made anew before it.
// * Numbers of the host (a learning rate, a loop's length, what item() gave before) stay what they were.
//
// An error within the capture, which then leaves nothing behind: reading a tensor on the host or waiting for the device
// (item, to_vector, nonzero, synchronize), copying from the host's memory or from another device, and random numbers,
// which would be the same in each replay. What kernels find wrong in a replay, such as an index out of range, is thrown
// at the next wait.

#include <knock/core/device.hpp>
#include <knock/core/rounded.hpp>

#include <memory>
#include <utility>

namespace knock {

class Graph {
 public:
  Graph() = default;

  /// Records what `body` asks of the device on this thread, without running it. An error where the device has no graphs
  /// (the CPU), in a capture, and for what cannot be recorded; what `body` throws ends the capture.
  template <class Body>
  static Graph capture(Device device, Body&& body) {
    Graph graph(device);
    {
      const detail::ReplayNotes::Scope scope(graph.notes_);
      std::forward<Body>(body)();
    }
    graph.end_capture();
    return graph;
  }

  /// Launches the work, behind what the device was asked for before. Does not wait for it.
  void replay();
  /// Gives up the graph and its memory.
  void reset() { *this = Graph(); }
  bool defined() const { return state_ != nullptr; }

 private:
  struct Destroy {
    const DeviceKindTable* table;
    void operator()(void* graph) const { table->destroy(graph); }
  };

  explicit Graph(Device device);
  void end_capture();

  std::unique_ptr<void, Destroy> state_;
  detail::ReplayNotes notes_;
};

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_GRAPH)
namespace knock {

KNOCK_FUNC Graph::Graph(Device device) {
  const DeviceKindTable* table = device.kind == DeviceKind::cpu ? nullptr : &detail::device_kind(device);
  check(table && table->begin_capture, "graph", device, " has no graphs; they are for devices such as cuda:0");
  state_ = {table->begin_capture(device.index), Destroy{table}};
}

KNOCK_FUNC void Graph::end_capture() { state_.get_deleter().table->end_capture(state_.get()); }

KNOCK_FUNC void Graph::replay() {
  check(defined(), "graph", "nothing was captured: use Graph::capture");
  notes_.before_replay();
  state_.get_deleter().table->replay(state_.get());
  notes_.after_replay();
}

}  // namespace knock
#endif
