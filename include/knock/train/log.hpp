#pragma once
// What a run writes while it goes: log.jsonl, one JSON object a line, and lines or a progress line on the terminal.
//
//   {"step":1,"loss":7.6,"lr":0.0001,"grad_norm":1.2,"tokens_per_s":9000.1,"step_s":0.23,"load_entropy":[0.99,0.98],
//    "max_violation":[0.12,0.15],"router_logit_max":[2.1,3.4],"dropped":[0.0,0.0]}
//   {"step":250,"val_loss":4.1,"val_bpb":1.9}
//   {"step":500,"sample":"It was ..."}
//
// The arrays of a step have one number for each layer with experts, over all of the step's micro-batches:
//   load_entropy      entropy of how often the router chose each expert, over its largest value: 1 when even
//   max_violation     how often it chose the busiest expert, over the mean, less 1: 0 when even
//   router_logit_max  largest absolute logit of the router: growth without end foretells trouble
//   dropped           share of the choices that were beyond an expert's capacity; 0 without model.capacity_factor

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace knock::train {

/// How a layer's experts fared in a step, see above.
struct ExpertsRecord {
  double load_entropy = 1, max_violation = 0, router_logit_max = 0, dropped = 0;
};

struct StepRecord {
  int64_t step = 0;
  double loss = 0, lr = 0, grad_norm = 0, tokens_per_s = 0, step_s = 0;
  std::vector<ExpertsRecord> experts;  ///< of each MoE layer
};

/// The lines of a log.jsonl that belong to a run which has done `step` steps: later ones, which a crash may have left,
/// and a damaged last one are dropped, also the evaluation and sample at `step` unless it was `reported`. Nothing when
/// there is no such file.
std::string lines_up_to(const std::string& path, int64_t step, bool reported);

/// The losses that a log.jsonl tells of.
struct RunHistory {
  struct Evaluation {
    int64_t step;
    double loss, bits_per_byte;
  };
  std::vector<double> loss, step_s;  ///< of steps 1, 2, ...
  std::vector<Evaluation> evaluations;
};
RunHistory read_history(const std::string& path);

/// Text as a terminal may show it: control characters but newlines and tabs are replaced.
std::string printable(std::string_view text);

class RunLog {
 public:
  /// Prints to standard output: one line that renews itself on a terminal, plain lines otherwise. `out_dir` exists.
  RunLog(std::string out_dir, int64_t total_steps);
  ~RunLog();
  RunLog(const RunLog&) = delete;
  RunLog& operator=(const RunLog&) = delete;

  /// Starts log.jsonl with `history`, the lines of the steps that were done before (see lines_up_to).
  void begin(int64_t step, const std::string& history);
  void step(const StepRecord& record);
  void evaluation(int64_t step, double loss, double bits_per_byte);
  void sample(int64_t step, const std::string& text);

  std::string path() const { return out_dir_ + "/log.jsonl"; }

 private:
  void append(const std::string& json);
  void print_line(const std::string& line);
  void show_progress(const std::string& line);
  void clear_progress();

  std::string out_dir_;
  int64_t total_steps_, last_step_ = 0;
  std::FILE* file_ = nullptr;
  bool terminal_, progress_shown_ = false;
  double seconds_per_step_ = 0;  ///< smoothed, for the time left
  std::chrono::steady_clock::time_point shown_{};
};

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_LOG)
#include <knock/core/error.hpp>
#include <knock/io/file.hpp>
#include <knock/train/json_lines.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <filesystem>

#include <sys/ioctl.h>
#include <unistd.h>

namespace knock::train {
namespace detail {

inline std::string format(const char* pattern, auto... values) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, pattern, values...);
  return buffer;
}

inline std::string duration(double seconds) {
  const auto s = static_cast<long>(seconds + 0.5);
  if (s >= 3600) return format("%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  return format("%ld:%02ld", s / 60, s % 60);
}

/// Columns of the terminal that standard output is.
inline std::size_t terminal_width() {
  winsize size{};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/// The step of a line, -1 without.
inline int64_t step_of(const nlohmann::json& line) {
  const auto found = line.find("step");
  return found != line.end() && found->is_number_integer() ? found->get<int64_t>() : -1;
}

}  // namespace detail

KNOCK_FUNC std::string lines_up_to(const std::string& path, int64_t step, bool reported) {
  if (!std::filesystem::exists(path)) return "";
  std::string kept;
  detail::for_each_object(io::read_file(path), [&](std::string_view line, const auto& json) {
    const int64_t at = detail::step_of(json);
    if (at < 0) return;
    if (at < step || (at == step && (reported || json.contains("loss")))) kept += text(line, "\n");
  });
  return kept;
}

KNOCK_FUNC RunHistory read_history(const std::string& path) {
  RunHistory out;
  detail::for_each_object(io::read_file(path), [&](std::string_view, const auto& json) {
    const auto number = [&](const char* key) {
      const auto found = json.find(key);
      return found != json.end() && found->is_number() ? found->template get<double>() : NAN;
    };
    if (json.contains("val_loss"))
      out.evaluations.push_back({detail::step_of(json), number("val_loss"), number("val_bpb")});
    if (!json.contains("loss")) return;
    out.loss.push_back(number("loss"));
    out.step_s.push_back(number("step_s"));
  });
  return out;
}

KNOCK_FUNC std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if ((code < 0x20 && c != '\n' && c != '\t') || code == 0x7F)
      out += "\xef\xbf\xbd";  // U+FFFD
    else
      out += c;
  }
  return out;
}

KNOCK_FUNC RunLog::RunLog(std::string out_dir, int64_t total_steps)
    : out_dir_(std::move(out_dir)), total_steps_(total_steps), terminal_(::isatty(STDOUT_FILENO) == 1) {}

KNOCK_FUNC RunLog::~RunLog() {
  clear_progress();
  if (file_) std::fclose(file_);
}

KNOCK_FUNC void RunLog::begin(int64_t step, const std::string& history) {
  io::write_file(path(), history);
  file_ = std::fopen(path().c_str(), "a");
  check(file_ != nullptr, "train", "cannot write ", path(), ": ", io::system_message(errno));
  last_step_ = step;
}

KNOCK_FUNC void RunLog::append(const std::string& json) {
  const bool written = std::fputs((json + "\n").c_str(), file_) >= 0 && std::fflush(file_) == 0;
  check(written, "train", "cannot write ", path(), ": ", io::system_message(errno));
}

KNOCK_FUNC void RunLog::step(const StepRecord& r) {
  const auto of_layers = [&](double ExpertsRecord::*value) {
    std::vector<double> out;
    for (const ExpertsRecord& layer : r.experts) out.push_back(layer.*value);
    return out;
  };
  append(nlohmann::ordered_json{{"step", r.step},
                                {"loss", r.loss},
                                {"lr", r.lr},
                                {"grad_norm", r.grad_norm},
                                {"tokens_per_s", r.tokens_per_s},
                                {"step_s", r.step_s},
                                {"load_entropy", of_layers(&ExpertsRecord::load_entropy)},
                                {"max_violation", of_layers(&ExpertsRecord::max_violation)},
                                {"router_logit_max", of_layers(&ExpertsRecord::router_logit_max)},
                                {"dropped", of_layers(&ExpertsRecord::dropped)}}
             .dump());
  const bool first = r.step <= last_step_ + 2;  // the first step also fills the allocator; the second starts anew
  seconds_per_step_ = first ? r.step_s : 0.95 * seconds_per_step_ + 0.05 * r.step_s;
  const double left = seconds_per_step_ * static_cast<double>(total_steps_ - r.step);
  const std::string line = detail::format("step %lld/%lld  loss %.4f  %.0f tokens/s  lr %.2e  grad norm %.2f  ETA %s",
                                          static_cast<long long>(r.step), static_cast<long long>(total_steps_), r.loss,
                                          r.tokens_per_s, r.lr, r.grad_norm, detail::duration(left).c_str());
  const int64_t every = std::max<int64_t>(total_steps_ / 100, 1);
  if (terminal_) {
    show_progress(line);
  } else if (r.step == last_step_ + 1 || r.step % every == 0 || r.step == total_steps_) {
    print_line(line);
  }
}

KNOCK_FUNC void RunLog::evaluation(int64_t step, double loss, double bits_per_byte) {
  append(nlohmann::ordered_json{{"step", step}, {"val_loss", loss}, {"val_bpb", bits_per_byte}}.dump());
  print_line(detail::format("step %lld  validation loss %.4f, %.4f bits per byte", static_cast<long long>(step), loss,
                            bits_per_byte));
}

KNOCK_FUNC void RunLog::sample(int64_t step, const std::string& text) {
  using nlohmann::ordered_json;
  append(ordered_json{{"step", step}, {"sample", text}}.dump(-1, ' ', false, ordered_json::error_handler_t::replace));
  print_line("sample: " + (terminal_ ? printable(text) : text));
}

/// Writes over the line that is there, at most ten times a second; one column stays free so that nothing wraps.
KNOCK_FUNC void RunLog::show_progress(const std::string& line) {
  const auto now = std::chrono::steady_clock::now();
  if (progress_shown_ && now - shown_ < std::chrono::milliseconds(100)) return;
  shown_ = now;
  std::printf("\r%.*s\033[K", static_cast<int>(detail::terminal_width() - 1), line.c_str());
  std::fflush(stdout);
  progress_shown_ = true;
}

KNOCK_FUNC void RunLog::print_line(const std::string& line) {
  clear_progress();
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

KNOCK_FUNC void RunLog::clear_progress() {
  if (!progress_shown_) return;
  std::printf("\r\033[K");
  std::fflush(stdout);
  progress_shown_ = false;
}

}  // namespace knock::train
#endif
