#pragma once
// A trace as a file that chrome://tracing and https://ui.perfetto.dev open: Chrome's trace event format, one complete
// event ("ph": "X") for each call of a kernel and each span, times in microseconds to the nanosecond; before them the
// names of the process and its threads ("ph": "M"). Numbers of processes and threads begin at 1, since Perfetto takes 0
// for an idle processor.

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

#include <algorithm>
#include <cmath>

namespace knock::trace {

namespace detail {

/// The event that names a process or a thread.
KNOCK_FUNC std::string name_event(std::string_view what, int thread, std::string_view name) {
  return text("{\"name\":\"", what, "\",\"cat\":\"__metadata\",\"ph\":\"M\",\"pid\":1,\"tid\":", thread,
              ",\"args\":{\"name\":\"", name, "\"}}");
}

KNOCK_FUNC double microseconds(double seconds) { return std::round(seconds * 1e9) / 1e3; }

}  // namespace detail

KNOCK_FUNC std::string to_chrome(const std::vector<Event>& events) {
  using io::detail::json_string;
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n" + detail::name_event("process_name", 0, "knock");
  int threads = 0;
  for (const Event& e : events) threads = std::max(threads, e.thread + 1);
  for (int i = 1; i <= threads; ++i) out += ",\n" + detail::name_event("thread_name", i, text("thread ", i));
  for (const Event& e : events) {
    const char* category = e.kernel.empty() ? "span" : e.backward ? "backward" : "forward";
    out += text(",\n{\"name\":", json_string(e.op), ",\"cat\":\"", category,
                "\",\"ph\":\"X\",\"pid\":1,\"tid\":", e.thread + 1, ",\"ts\":", detail::microseconds(e.start),
                ",\"dur\":", detail::microseconds(e.seconds));
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
