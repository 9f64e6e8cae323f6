#pragma once
// Graphs (core/graph.hpp): what a thread asks of a device, recorded by the driver from a stream of its own.

namespace knock::cuda {

/// Error where this thread records a graph: `what` cannot be part of one.
void refuse_in_graph(const char* what);

void* begin_capture(int device);
void end_capture(void* graph);
void replay(void* graph);
void destroy(void* graph) noexcept;

}  // namespace knock::cuda
