#pragma once
// What a program asks of a GPU, without one: the launches of every kernel, the bytes that it moves and what it
// computes.
//
// Launches are those of the back-end's own host code, whatever the size of the model: cuda_sim counts them and executes
// nothing. Bytes and operations of a kernel are measured where the simulator executes a small program of the same
// proportions, and scaled by what the calls of the kernel's table entry read, write and compute, which their arrays say
// (core/trace.hpp). A kernel's bytes are  factor * asked bytes + a rest for each call,  both from its calls in the
// small program; where those are of one size, and for operations, there is no rest. Products of cublasLt and copies
// need no measurement.
//
// Bytes are sectors of 32 bytes that a launch touches, each once: what must come from memory or go there when the
// caches serve every repetition within a launch and nothing between two.

#include <knock/core/backend.hpp>
#include <knock/core/device.hpp>
#include <knock/core/trace.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <counters.hpp>
#include <memory.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace bench::ledger {

/// What a kernel did over its launches, and what the calls that it is part of asked for.
struct Row {
  std::string phase, entry, kernel;
  int64_t launches = 0;
  double bytes = 0;
  double tensor_flop = 0, f32_flop = 0;    ///< on the tensor cores; by multiply-adds
  double asked_bytes = 0, asked_flop = 0;  ///< of the calls, each once; the products as the kernel pads them
  bool exact = false;                      ///< known without execution
  struct CallBytes {
    double asked = 0, moved = 0;
  };
  std::vector<CallBytes> calls;  ///< asked for, and moved by this kernel
  int64_t last_call = -1;
};
using Rows = std::vector<Row>;

/// A call of an entry of the table of kernels.
struct Call {
  std::string_view entry;
  int64_t number = -1;
  double bytes = 0, flop = 0;
  /// What padding to tiles makes of `flop`: by rows of 64 and columns of 64 in attention, by 128 rows to an expert, by
  /// 32 where an expert's rows are summed over, and as cuda/gemm_wide.cu chooses its tiles.
  double attention_padding = 1, expert_padding = 1, expert_sum_padding = 1, wide_padding = 1;

  double flop_of(std::string_view kernel) const {
    if (kernel.find("experts_from_rows") != kernel.npos) return flop * expert_sum_padding;
    return flop * attention_padding * expert_padding * wide_padding;
  }
};

namespace detail {

using knock::Array;

/// Pairs of a query and a key in tiles of 64 by 64 that hold one that is seen, over pairs that are seen.
inline double attention_padding(const knock::AttentionScores& scores, const Array& q, const Array& k) {
  constexpr int64_t tile = 64;
  const int64_t queries = q.shape[2], keys = k.shape[2];
  int64_t pairs = 0;
  for (int64_t first = 0; first < queries; first += tile) {
    const int64_t last = std::min(first + tile, queries) - 1;
    const int64_t begin = scores.window > 0 ? std::max<int64_t>(first + scores.shift - scores.window + 1, 0) : 0;
    const int64_t end = scores.causal ? std::clamp<int64_t>(last + scores.shift + 1, 0, keys) : keys;
    if (begin < end) pairs += tile * ((end + tile - 1) / tile - begin / tile) * tile;
  }
  const double seen = knock::trace::detail::attention_pairs(scores, q, k);
  return seen == 0 ? 1 : static_cast<double>(pairs * q.shape[0] * q.shape[1]) / seen;
}

/// Rows of experts, each expert's rounded up to `tile`, over all rows. Where nothing is executed the experts' shares
/// are not known: half a tile is added to each.
inline double expert_padding(const knock::MoeInputs& in, int64_t tile) {
  const int64_t rows = in.order.numel(), experts = in.gate.shape[0];
  if (!cuda_sim::is_executing())
    return 1 + static_cast<double>(experts * tile) / 2 / static_cast<double>(std::max<int64_t>(rows, 1));
  std::vector<int64_t> offsets(static_cast<std::size_t>(experts + 1));
  std::memcpy(offsets.data(), cuda_sim::bytes_at(in.offsets.data), offsets.size() * sizeof(int64_t));
  int64_t padded = 0;
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e) padded += (offsets[e + 1] - offsets[e] + tile - 1) / tile * tile;
  return static_cast<double>(padded) / static_cast<double>(std::max<int64_t>(rows, 1));
}

template <class... Args>
void refine(Call&, const Args&...) {}
template <class... Rest>
void refine(Call& call, const knock::AttentionScores& scores, const Array& q, const Array& k, const Rest&...) {
  call.attention_padding = attention_padding(scores, q, k);
}
template <class... Rest>
void refine(Call& call, const knock::MoeInputs& in, const Rest&...) {
  call.expert_padding = expert_padding(in, 128);
  call.expert_sum_padding = expert_padding(in, 32);
}
inline void refine(Call& call, const Array& a, const Array&, bool, const Array& out) {
  const auto padded = [](int64_t n, int64_t tile) { return (n + tile - 1) / tile * tile; };
  const int64_t m = out.shape[0], n = out.shape[1], k = a.shape[1];
  const int64_t tiles = padded(m, 64) * padded(n, 64) / (64 * 64);
  const int64_t cols = tiles >= 64 ? 64 : 16, depth = tiles >= 512 ? 16 : tiles >= 64 ? 32 : 128;
  if (m * n * k > 0)
    call.wide_padding =
        static_cast<double>(padded(m, 64) * padded(n, cols) * padded(k, depth)) / static_cast<double>(m * n * k);
}

}  // namespace detail

/// Notes what the CUDA back-end is asked for and launches, from its construction to its end. There is one at a time;
/// KNOCK_CUDA_SIM_EAGER=1 must be set, so that a launch is seen in the call that makes it.
class Recorder {
 public:
  Recorder() {
    const auto kind = static_cast<int>(knock::DeviceKind::cuda);
    before_ = knock::detail::device_kinds[kind];
    knock::check(before_ != nullptr, "ledger", "no CUDA back-end is linked into this program");
    instance() = this;
    watching_ = *before_;
    watching_.kernels = &table_;
#define BENCH_WATCH(entry) table_.entry = Watched<&knock::Backend::entry>::named(#entry);
    KNOCK_KERNELS(BENCH_WATCH)
#undef BENCH_WATCH
    knock::register_device_kind(knock::DeviceKind::cuda, watching_);
    cuda_sim::watch_work([this](const std::string& name, const cuda_sim::Counters& did) { note(name, did); });
  }
  ~Recorder() {
    cuda_sim::watch_work({});
    knock::register_device_kind(knock::DeviceKind::cuda, *before_);
    instance() = nullptr;
  }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  /// What follows belongs to a phase; that of an empty name is not kept.
  void begin(const std::string& phase) { phase_ = phase; }

  /// What was noted since the last call.
  Rows take() {
    Rows out;
    for (auto& [key, row] : rows_) out.push_back(std::move(row));
    rows_.clear();
    return out;
  }

 private:
  static Recorder*& instance() {
    static Recorder* one = nullptr;
    return one;
  }

  /// The entry of the table that notes the call and makes it.
  template <auto entry>
  struct Watched;
  template <class Result, class... Args, Result (*knock::Backend::*entry)(Args...)>
  struct Watched<entry> {
    static inline const char* name = nullptr;
    using Function = Result (*)(Args...);
    static Function named(const char* text) {
      name = text;
      return &call;
    }
    static Result call(Args... args) {
      const CallScope scope(name, args...);
      return (instance()->before_->kernels->*entry)(args...);
    }
  };

  class CallScope {
   public:
    template <class... Args>
    CallScope(const char* entry, const Args&... args) : outer_(instance()->call_) {
      const knock::trace::detail::Work work = knock::trace::detail::work_of(args...);
      Call call{.entry = entry, .number = ++instance()->calls_, .bytes = work.bytes, .flop = work.flop};
      detail::refine(call, args...);
      instance()->call_ = call;
    }
    ~CallScope() { instance()->call_ = outer_; }
    CallScope(const CallScope&) = delete;
    CallScope& operator=(const CallScope&) = delete;

   private:
    Call outer_;
  };

  void note(const std::string& name, const cuda_sim::Counters& did) {
    if (phase_.empty()) return;
    Row& row = rows_[{phase_, std::string(call_.entry), name}];
    row.phase = phase_, row.entry = call_.entry, row.kernel = name;
    row.launches += static_cast<int64_t>(did.launches);
    row.exact = name.starts_with("cublasLt") || name.starts_with("copy ") || name == "fill" || name == "graph launch";
    const double multiply_adds = 2 * static_cast<double>(did.fma_lanes);
    if (name.starts_with("cublasLt bf16")) {
      row.tensor_flop += multiply_adds;
    } else {
      constexpr double flop_of_mma = 2 * 16 * 8 * 16;
      row.f32_flop += multiply_adds;
      row.tensor_flop += flop_of_mma * static_cast<double>(did.mma);
    }
    if (row.last_call != call_.number) {
      row.last_call = call_.number;
      row.calls.push_back({call_.bytes, 0});
      row.asked_bytes += call_.bytes;
      row.asked_flop += call_.flop_of(name);
    }
    const auto bytes = static_cast<double>(did.touched_bytes_read + did.touched_bytes_written);
    row.bytes += bytes;
    row.calls.back().moved += bytes;
  }

  const knock::DeviceKindTable* before_ = nullptr;
  knock::DeviceKindTable watching_{};
  knock::Backend table_;
  Call call_;
  int64_t calls_ = 0;
  std::string phase_;
  std::map<std::tuple<std::string, std::string, std::string>, Row> rows_;
};

/// The last name of a function, without namespaces, template arguments and parameters.
inline std::string short_name(const std::string& name) {
  if (name.starts_with("cublasLt")) return name;
  std::string out;
  int depth = 0;
  for (const char c : name) {
    if (c == '<' || c == '(') ++depth;
    if (depth == 0) out += c;
    if (c == '>' || c == ')') --depth;
  }
  return out.substr(out.rfind(':') + 1);
}

/// What kernels do for each byte and operation that their entries are asked for, as a program's execution showed.
class Factors {
 public:
  explicit Factors(const Rows& executed) {
    for (const Row& row : executed) {
      for (const std::string& kernel : {row.kernel, short_name(row.kernel)}) {
        Row& sum = sums_[{row.entry, kernel}];
        sum.bytes += row.bytes, sum.tensor_flop += row.tensor_flop, sum.f32_flop += row.f32_flop;
        sum.asked_bytes += row.asked_bytes, sum.asked_flop += row.asked_flop;
        sum.calls.insert(sum.calls.end(), row.calls.begin(), row.calls.end());
      }
    }
  }

  /// Fills in what rows of a program that was not executed move and compute. An instance of a template that was not
  /// measured is taken to be like those that were. Returns kernels that were not measured at all: they are charged what
  /// their calls ask for.
  std::vector<std::string> apply(Rows& rows) const {
    std::vector<std::string> unknown;
    for (Row& row : rows) {
      if (row.exact) continue;
      auto found = sums_.find({row.entry, row.kernel});
      if (found == sums_.end()) found = sums_.find({row.entry, short_name(row.kernel)});
      if (found == sums_.end()) {
        row.bytes = row.asked_bytes, row.tensor_flop = row.asked_flop;
        unknown.push_back(row.entry + ": " + row.kernel);
        continue;
      }
      const Row& sum = found->second;
      const double bytes = bytes_of(row, sum), by_bytes = ratio(bytes, sum.bytes);
      const double by_flop = ratio(row.asked_flop, sum.asked_flop);
      row.bytes = bytes;
      row.tensor_flop = sum.tensor_flop * by_flop;
      row.f32_flop = sum.f32_flop * (sum.asked_flop > 0 ? by_flop : by_bytes);
    }
    return unknown;
  }

 private:
  static double ratio(double a, double b) { return b == 0 ? 0 : a / b; }

  /// What `row` moves, by the line of least squares through the executed calls where their sizes tell one.
  static double bytes_of(const Row& row, const Row& executed) {
    double least = executed.calls.front().asked, most = least, xx = 0, xy = 0;
    const auto n = static_cast<double>(executed.calls.size());
    const double x = executed.asked_bytes / n, y = executed.bytes / n;
    for (const auto& [asked, moved] : executed.calls) {
      least = std::min(least, asked), most = std::max(most, asked);
      xx += (asked - x) * (asked - x), xy += (asked - x) * (moved - y);
    }
    const double factor = ratio(xy, xx), rest = y - factor * x;
    if (most < 2 * least || factor <= 0 || rest < 0)
      return executed.bytes * ratio(row.asked_bytes, executed.asked_bytes);
    return factor * row.asked_bytes + rest * static_cast<double>(row.calls.size());
  }

  std::map<std::pair<std::string, std::string>, Row> sums_;
};

}  // namespace bench::ledger
