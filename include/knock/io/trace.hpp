#pragma once
// A trace as a file that chrome://tracing and https://ui.perfetto.dev open:
// Chrome's trace event format, one complete event ("ph": "X") for each call of a kernel and each span, times in
// microseconds.

#include <knock/core/trace.hpp>

#include <string>
#include <vector>

namespace knock::trace {

/// Writes the events to `path`, atomically.
void write_chrome(const std::vector<Event>& events, const std::string& path);
/// The same as text.
std::string to_chrome(const std::vector<Event>& events);

}  // namespace knock::trace

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_TRACE)
#include <knock/io/file.hpp>
#include <knock/io/json.hpp>

namespace knock::trace {

KNOCK_FUNC std::string to_chrome(const std::vector<Event>& events) {
  using io::detail::json_string;
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  for (const Event& e : events) {
    const char* category = e.kernel.empty() ? "span" : e.backward ? "backward" : "forward";
    out +=
        text(&e == &events.front() ? "" : ",", "\n{\"name\":", json_string(e.op), ",\"cat\":\"", category,
             "\",\"ph\":\"X\",\"pid\":0,\"tid\":", e.thread, ",\"ts\":", e.start * 1e6, ",\"dur\":", e.seconds * 1e6);
    if (!e.kernel.empty())
      out += text(",\"args\":{\"kernel\":", json_string(e.kernel), ",\"shapes\":", json_string(e.shapes),
                  ",\"bytes\":", e.bytes, ",\"flop\":", e.flop, "}");
    out += '}';
  }
  return out + "\n]}\n";
}

KNOCK_FUNC void write_chrome(const std::vector<Event>& events, const std::string& path) {
  io::write_file(path, to_chrome(events));
}

}  // namespace knock::trace
#endif
