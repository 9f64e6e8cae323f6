#pragma once
// What kernels find wrong in their input: an index out of range, an integer divided by zero. A kernel cannot throw, and
// to wait for each one would take longer than the kernel. So it notes the first place that is wrong in a slot on the
// device, which the next wait reads; what was found is thrown there, in the name of the op.

#include <cstdint>
#include <memory>

namespace knock::cuda {

/// What a kernel looks for.
struct Question {
  const char* op;      ///< a literal
  const char* what;    ///< what is wrong where something is found; a literal
  int64_t extent = 0;  ///< of the axis that an index is for; 0 for other questions
};

/// The first place where something is wrong; all bits set while nothing is.
using Finding = unsigned long long;

/// A slot for the next kernel on the current stream, which takes the minimum of it and what it finds.
Finding* ask(const Question& question);

/// Lets the current stream bring the answers to the host; nothing when nothing was asked.
void fetch_findings();
/// After the stream has been waited for: throws the first finding.
void report_findings();

/// The slots of a graph's kernels: every replay asks the same questions again.
class GraphFindings;
/// For what is recorded on the current stream from now on.
std::shared_ptr<GraphFindings> make_graph_findings();
/// Lets this thread's kernels ask there until it is null.
void ask_for_graph(GraphFindings* findings);
/// The graph has been launched: the next wait reads its slots too.
void await_findings(const std::shared_ptr<GraphFindings>& findings);

}  // namespace knock::cuda
