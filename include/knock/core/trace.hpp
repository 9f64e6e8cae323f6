#pragma once
// A record of what ran: every call of a kernel, how long it took, how much it moved and computed.
//
//   trace::start();
//   loss.backward();
//   trace::write_chrome(trace::stop(), "trace.json");   // io/trace.hpp; opens
//   in chrome://tracing and Perfetto
//
// Ops reach kernels through `kernel(&Backend::name, "op", x)` (core/tensor.hpp) alone, which gives a `Call`. While
// nothing is recorded that is one load and one branch more than the call itself.
//
// Bytes are what the kernel must read and write: each element of an array once, however often a broadcast axis repeats
// it, and twice where it is updated in place. FLOPs are those of products (2 m n k), of the scores that attention's
// mask leaves, and of the experts' chosen slots; pointwise work counts none.

#include <knock/core/backend.hpp>

#include <atomic>
#include <string>
#include <string_view>
#include <vector>

namespace knock::trace {

/// One call of a kernel, or a span of the program that was given a name.
struct Event {
  std::string op = {};           ///< as error messages name it; a span's name
  std::string_view kernel = {};  ///< its entry in `Backend`; empty for a span
  std::string shapes = {};       ///< of the arrays in the order of the arguments
  bool backward = false;         ///< called by the backward pass
  int thread = 0;                ///< the calling thread, numbered from 0
  double start = 0;              ///< seconds since `start()`
  double seconds = 0;
  double bytes = 0, flop = 0;
};

namespace detail {
inline std::atomic<bool> active{false};
inline thread_local bool in_backward = false;
}  // namespace detail

/// Whether calls are being recorded.
inline bool is_active() { return detail::active.load(std::memory_order_relaxed); }

/// Begins to record the calls of all threads. Error when a trace is being recorded already.
void start();
/// Ends the recording: its events, in the order in which they ended. Error when nothing is being recorded.
std::vector<Event> stop();

/// Kernels that this thread calls in this scope belong to backward.
class BackwardScope {
 public:
  BackwardScope() : before_(detail::in_backward) { detail::in_backward = true; }
  ~BackwardScope() { detail::in_backward = before_; }
  BackwardScope(const BackwardScope&) = delete;
  BackwardScope& operator=(const BackwardScope&) = delete;

 private:
  bool before_;
};

/// A scope that a trace shows under a name: a step, an evaluation.
class Span {
 public:
  explicit Span(std::string_view name);
  ~Span();
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  Event event_;
  bool recorded_;
};

namespace detail {

/// What one call moves and computes.
struct Work {
  double bytes = 0, flop = 0;
  std::string shapes;

  void add(const Array& array);
  void add(std::span<const Array> arrays);
  void add(const MoeInputs& in);
  void add(const MoeGradients& out);
  void add(const MlpKnock& knock);
  void add(const MlpKnockGradients& out);
  void add(const GradientSum& sum);
  void add(std::span<const NormRopeHeads> heads);
  void add(std::span<const NormRopeGradients> gradients);
  void add(std::span<const AdamWUpdate> updates);
  void add(std::span<const SgdUpdate> updates);
  void add(std::span<const BiasUpdate> updates);
  template <class Other>
  void add(const Other&) {}
};

double bytes_of(const Array& array);
double attention_pairs(const AttentionScores& scores, const Array& q, const Array& k);

// What the sum over the arguments does not say, by the kernel's arguments.
template <class... Args>
void refine(Work&, const Args&...) {}
void refine(Work& work, double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out);
void refine(Work& work, const Array& a, const std::span<const Array>& b, const std::span<const Array>& out);
void refine(Work& work, const Array& a, const Array& b, bool add, const Array& out);
void refine(Work& work, const Array& a, const Array& b, const Array& bias, const Unary& activation, const Array& before,
            const Array& out);
void refine(Work& work, const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
            const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp);
void refine(Work& work, const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
            const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp, const Array& dout,
            const Array& dq, const Array& dk, const Array& dv);
void refine(Work& work, const MoeInputs& in, const Array& hidden, const Array& out);
void refine(Work& work, const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& gradients);
void refine(Work& work, double factor, const std::span<const Array>& x);
void refine(Work& work, const NormRope& options, const Array& x, const Array& knock, const Array& weight,
            const Array& positions, const Array& product, const Array& y, const Array& stats);
void refine(Work& work, const NormRope& options, const Array& x, const Array& knock, const Array& weight,
            const Array& positions, const Array& product, const Array& stats, const Array& dy, const Array& dproduct,
            const Array& dx, const GradientSum& dweight);
void refine(Work& work, const Array& x, const MlpKnock& knock, const Array& y);
void refine(Work& work, const Array& x, const MlpKnock& knock, const Array& dy, const MlpKnockGradients& out);

template <class... Args>
Work work_of(const Args&... args) {
  Work work;
  (work.add(args), ...);
  refine(work, args...);
  return work;
}

/// The name of the entry at this offset in `Backend`.
std::string_view kernel_name(std::size_t offset);

/// Times a call from its construction to its end.
class Timer {
 public:
  Timer(std::string_view op, std::size_t entry, Work work);
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  Event event_;
};

}  // namespace detail

/// A kernel as ops call it: the entry of a table and the op that it works for.
template <class Entry>
class Call;
template <class Result, class... Args>
class Call<Result (*)(Args...)> {
 public:
  Call(const Backend& table, Result (*const& entry)(Args...), std::string_view op)
      : table_(table), entry_(entry), op_(op) {}

  Result operator()(Args... args) const {
    if (is_active()) [[unlikely]]
      return recorded(args...);
    return entry_(args...);
  }

 private:
#ifdef __GNUC__
  [[gnu::noinline, gnu::cold]]
#endif
  Result
  recorded(Args... args) const {
    const auto offset = reinterpret_cast<const char*>(&entry_) - reinterpret_cast<const char*>(&table_);
    const detail::Timer timer(op_, static_cast<std::size_t>(offset), detail::work_of(args...));
    return entry_(args...);
  }

  const Backend& table_;
  Result (*const& entry_)(Args...);
  std::string_view op_;
};

}  // namespace knock::trace

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_TRACE)
#include <chrono>
#include <cstddef>
#include <mutex>
#include <utility>

namespace knock::trace {
namespace detail {

struct Recorder {
  std::mutex mutex;
  std::vector<Event> events;
  double begin = 0;  // when the trace began
  int threads = 0;   // numbered so far

  static Recorder& instance() {
    static Recorder recorder;
    return recorder;
  }

  void add(Event event, double end) {
    const std::lock_guard lock(mutex);
    static thread_local const int thread = threads++;
    event.thread = thread;
    event.seconds = end - event.start;
    event.start -= begin;
    if (is_active()) events.push_back(std::move(event));
  }
};

KNOCK_FUNC double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

KNOCK_FUNC double bytes_of(const Array& array) {
  if (!array.defined()) return 0;
  int64_t n = size_of(array.dtype);
  for (int64_t i = 0; i < array.rank(); ++i)
    n *= array.strides[i] == 0 ? std::min<int64_t>(array.shape[i], 1) : array.shape[i];
  return static_cast<double>(n);
}

KNOCK_FUNC void Work::add(const Array& array) {
  if (!array.defined()) return;
  bytes += bytes_of(array);
  shapes += text(shapes.empty() ? "" : " ", array.shape, " ", array.dtype);
}

KNOCK_FUNC void Work::add(std::span<const Array> arrays) {
  for (const Array& array : arrays) add(array);
}

KNOCK_FUNC void Work::add(const MoeInputs& in) {
  for (const Array* array : {&in.x, &in.order, &in.offsets, &in.places, &in.weights, &in.gate, &in.up, &in.down})
    add(*array);
}

KNOCK_FUNC void Work::add(const MoeGradients& out) {
  for (const Array* array : {&out.x, &out.weights, &out.gate, &out.up, &out.down}) add(*array);
  if (!out.add) return;
  for (const Array* sum : {&out.gate, &out.up, &out.down}) bytes += bytes_of(*sum);  // read as well
}

KNOCK_FUNC void Work::add(const MlpKnock& knock) {
  for (const Array* array : {&knock.gate, &knock.up, &knock.down}) add(*array);
}

KNOCK_FUNC void Work::add(const MlpKnockGradients& out) {
  for (const Array* array : {&out.x, &out.gate, &out.up, &out.down}) add(*array);
  if (!out.add) return;
  for (const Array* sum : {&out.gate, &out.up, &out.down}) bytes += bytes_of(*sum);  // read as well
}

KNOCK_FUNC void Work::add(const GradientSum& sum) {
  add(sum.array);
  if (sum.adds) bytes += bytes_of(sum.array);  // read as well
}

KNOCK_FUNC void Work::add(std::span<const NormRopeHeads> heads) {
  for (const NormRopeHeads& h : heads)
    for (const Array* array : {&h.x, &h.weight, &h.out_y, &h.out_stats}) add(*array);
}

KNOCK_FUNC void Work::add(std::span<const NormRopeGradients> gradients) {
  for (const NormRopeGradients& g : gradients) {
    for (const Array* array : {&g.x, &g.weight, &g.stats, &g.dy, &g.out_dx}) add(*array);
    add(g.out_dweight);
  }
}

KNOCK_FUNC void Work::add(std::span<const AdamWUpdate> updates) {
  for (const AdamWUpdate& u : updates) {
    for (const Array* array : {&u.param, &u.grad, &u.exp_avg, &u.exp_avg_sq, &u.rounded}) add(*array);
    for (const Array* array : {&u.param, &u.exp_avg, &u.exp_avg_sq}) bytes += bytes_of(*array);
  }
}

KNOCK_FUNC void Work::add(std::span<const SgdUpdate> updates) {
  for (const SgdUpdate& u : updates) {
    for (const Array* array : {&u.param, &u.grad, &u.momentum, &u.rounded}) add(*array);
    for (const Array* array : {&u.param, &u.momentum}) bytes += bytes_of(*array);
  }
}

KNOCK_FUNC void Work::add(std::span<const BiasUpdate> updates) {
  for (const BiasUpdate& u : updates)
    for (const Array* array : {&u.bias, &u.counts.load, &u.counts.logit_max, &u.dropped}) add(*array);
}

KNOCK_FUNC void refine(Work& work, double, const Array& a, const Array&, double beta, const Array& c,
                       const Array& out) {
  work.flop = 2 * static_cast<double>(out.numel()) * static_cast<double>(a.shape.back());
  if (beta == 0) work.bytes -= bytes_of(c);  // not read
}

KNOCK_FUNC void refine(Work& work, const Array& a, const std::span<const Array>&, const std::span<const Array>& out) {
  for (const Array& part : out)
    work.flop += 2 * static_cast<double>(part.numel()) * static_cast<double>(a.shape.back());
}

KNOCK_FUNC void refine(Work& work, const Array& a, const Array&, const Array&, const Unary&, const Array&,
                       const Array& out) {
  work.flop = 2 * static_cast<double>(out.numel()) * static_cast<double>(a.shape.back());
}

KNOCK_FUNC void refine(Work& work, const Array& a, const Array&, bool, const Array& out) {
  work.flop = 2 * static_cast<double>(out.numel()) * static_cast<double>(a.shape.back());
}

/// Pairs of a query and a key that it sees, over all batches and heads.
KNOCK_FUNC double attention_pairs(const AttentionScores& scores, const Array& q, const Array& k) {
  const int64_t queries = q.shape[2], keys = k.shape[2];
  int64_t pairs = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t place = i + scores.shift;
    const int64_t end = scores.causal ? std::clamp<int64_t>(place + 1, 0, keys) : keys;
    const int64_t begin = scores.window > 0 ? std::max<int64_t>(place + 1 - scores.window, 0) : 0;
    pairs += std::max<int64_t>(end - begin, 0);
  }
  return static_cast<double>(pairs * q.shape[0] * q.shape[1]);
}

KNOCK_FUNC void refine(Work& work, const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                       const Array&, const Array&, const Array&, const Array&) {
  work.flop = 2 * attention_pairs(scores, q, k) * static_cast<double>(q.shape.back() + v.shape.back());
}

// The scores again, dV, dP, dQ and dK.
KNOCK_FUNC void refine(Work& work, const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                       const Array&, const Array&, const Array&, const Array&, const Array&, const Array&, const Array&,
                       const Array&) {
  work.flop = 2 * attention_pairs(scores, q, k) * static_cast<double>(3 * q.shape.back() + 2 * v.shape.back());
}

/// The three products of a chosen expert, over all tokens and choices.
KNOCK_FUNC double expert_flop(const MoeInputs& in) {
  return 6 * static_cast<double>(in.order.numel()) * static_cast<double>(in.gate.shape[1] * in.gate.shape[2]);
}

KNOCK_FUNC void refine(Work& work, const MoeInputs& in, const Array&, const Array&) { work.flop = expert_flop(in); }
KNOCK_FUNC void refine(Work& work, const MoeInputs& in, const Array&, const Array&, const MoeGradients&) {
  work.flop = 2 * expert_flop(in);
}

KNOCK_FUNC void refine(Work& work, double, const std::span<const Array>&) { work.bytes *= 2; }

KNOCK_FUNC void refine(Work& work, const NormRope&, const Array& x, const Array&, const Array&, const Array&,
                       const Array&, const Array&, const Array&) {
  work.flop = 2 * static_cast<double>(x.numel()) * static_cast<double>(x.shape.back());
}

// The product again where there is a norm and it was not kept, and dx.
KNOCK_FUNC void refine(Work& work, const NormRope& options, const Array& x, const Array&, const Array&, const Array&,
                       const Array& product, const Array&, const Array&, const Array&, const Array& dx,
                       const GradientSum&) {
  const int products = (options.norm && !product.defined() ? 1 : 0) + (dx.defined() ? 1 : 0);
  work.flop = 2 * products * static_cast<double>(x.numel()) * static_cast<double>(x.shape.back());
}

KNOCK_FUNC void refine(Work& work, const Array& x, const MlpKnock&, const Array&) {
  work.flop = 6 * static_cast<double>(x.numel()) * static_cast<double>(x.shape.back());
}

// The gate's and the up product again and the gradient of what is between the products, for dx and for the matrices;
// two products for dx, one for each matrix.
KNOCK_FUNC void refine(Work& work, const Array& x, const MlpKnock&, const Array&, const MlpKnockGradients& out) {
  const int products = (out.x.defined() ? 5 : 0) + (out.gate.defined() ? 6 : 0);
  work.flop = 2 * products * static_cast<double>(x.numel()) * static_cast<double>(x.shape.back());
}

KNOCK_FUNC std::string_view kernel_name(std::size_t offset) {
#define KNOCK_NAME(name) \
  if (offset == offsetof(Backend, name)) return #name;
  KNOCK_KERNELS(KNOCK_NAME)
#undef KNOCK_NAME
  return "unknown";
}

KNOCK_FUNC Timer::Timer(std::string_view op, std::size_t entry, Work work) {
  event_.op = op;
  event_.kernel = kernel_name(entry);
  event_.shapes = std::move(work.shapes);
  event_.backward = in_backward;
  event_.bytes = work.bytes;
  event_.flop = work.flop;
  event_.start = now();
}

KNOCK_FUNC Timer::~Timer() { Recorder::instance().add(std::move(event_), now()); }

}  // namespace detail

KNOCK_FUNC void start() {
  auto& recorder = detail::Recorder::instance();
  const std::lock_guard lock(recorder.mutex);
  check(!is_active(), "trace", "a trace is being recorded already; stop() ends it");
  recorder.events.clear();
  recorder.begin = detail::now();
  detail::active.store(true, std::memory_order_relaxed);
}

KNOCK_FUNC std::vector<Event> stop() {
  auto& recorder = detail::Recorder::instance();
  const std::lock_guard lock(recorder.mutex);
  check(is_active(), "trace", "no trace is being recorded; start() begins one");
  detail::active.store(false, std::memory_order_relaxed);
  return std::exchange(recorder.events, {});
}

KNOCK_FUNC Span::Span(std::string_view name) : recorded_(is_active()) {
  if (!recorded_) return;
  event_.op = name;
  event_.start = detail::now();
}

KNOCK_FUNC Span::~Span() {
  if (recorded_) detail::Recorder::instance().add(std::move(event_), detail::now());
}

}  // namespace knock::trace
#endif
