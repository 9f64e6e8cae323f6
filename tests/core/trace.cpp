#include <knock/io/file.hpp>
#include <knock/knock.hpp>

#include <support/temporary_folder.hpp>

#include <thread>

#include <doctest/doctest.h>

using namespace knock;

namespace {

/// What `body` calls, in order.
template <class Body>
std::vector<trace::Event> record(Body&& body) {
  trace::start();
  body();
  return trace::stop();
}

/// The only event of this kernel.
trace::Event find(const std::vector<trace::Event>& events, std::string_view kernel) {
  const trace::Event* found = nullptr;
  for (const trace::Event& event : events) {
    if (event.kernel != kernel) continue;
    REQUIRE(found == nullptr);
    found = &event;
  }
  REQUIRE(found != nullptr);
  return *found;
}

}  // namespace

TEST_CASE("trace: nothing is recorded before start and after stop") {
  const Tensor x = ones({4});
  CHECK(!trace::is_active());
  CHECK(exp(x).numel() == 4);
  trace::start();
  CHECK(trace::is_active());
  CHECK(exp(x).numel() == 4);
  CHECK(trace::stop().size() == 1);
  CHECK(!trace::is_active());
  CHECK(exp(x).numel() == 4);
  CHECK(record([] {}).empty());
}

TEST_CASE("trace: start and stop come in pairs") {
  CHECK_THROWS_WITH_AS(trace::stop(), doctest::Contains("no trace is being recorded"), Error);
  trace::start();
  CHECK_THROWS_WITH_AS(trace::start(), doctest::Contains("recorded already"), Error);
  CHECK(trace::stop().empty());
}

TEST_CASE("trace: op, kernel, phase and times of each call") {
  const Tensor x = ones({3}).requires_grad_();
  const auto events = record([&] { sum(x * 2).backward(); });
  std::vector<std::string> forward;
  bool backward = false;
  double end = 0;
  for (const trace::Event& event : events) {
    if (event.backward) backward = true;
    if (!event.backward) {
      CHECK(!(backward && event.op != "full"));  // the ones that backward starts from are made before it
      forward.push_back(text(event.op, "/", event.kernel));
    }
    CHECK(event.thread == events[0].thread);
    CHECK(event.seconds >= 0);
    CHECK(event.start >= end);  // one after the other
    end = event.start + event.seconds;
  }
  CHECK(backward);
  REQUIRE(forward.size() == 3);
  CHECK(forward[0] == "mul/binary_scalar");
  CHECK(forward[1] == "sum/reduce");
  CHECK(forward[2] == "full/fill");
}

TEST_CASE("trace: an error inside a kernel still ends its event") {
  const Tensor one = ones({2}, {.dtype = DType::i64}), none = zeros({2}, {.dtype = DType::i64});
  const auto events = record([&] { CHECK_THROWS_AS(floor_divide(one, none), Error); });
  CHECK(find(events, "binary").op == "floor_divide");
}

TEST_CASE("trace: bytes are each element of each array once, in place twice") {
  const Tensor x = randn({8, 4}), row = randn({4});
  CHECK(find(record([&] { add(x, x); }), "binary").bytes == 3 * 32 * 4);
  CHECK(find(record([&] { add(x, row); }), "binary").bytes == (2 * 32 + 4) * 4);
  CHECK(find(record([&] { add(x, row.slice(0, 0, 1)); }), "binary").bytes == (2 * 32 + 1) * 4);
  CHECK(find(record([&] { x.to(DType::f64); }), "copy").bytes == 32 * (4 + 8));
  CHECK(find(record([&] { add(x.slice(1, 0, 2), 1); }), "binary_scalar").bytes == 2 * 16 * 4);
  CHECK(find(record([&] { add(zeros({0, 3}), 1); }), "binary_scalar").bytes == 0);
  Tensor y = randn({8, 4});
  CHECK(find(record([&] { y.mul_(x); }), "binary").bytes == 3 * 32 * 4);

  Tensor w = randn({6}).requires_grad_();
  w.set_grad(ones({6}));
  optim::AdamW adamw({w}, {});
  CHECK(find(record([&] { adamw.step(); }), "adamw").bytes == (1 + 2 * 3) * 6 * 4);
  optim::SGD plain({w}, {}), momentum({w}, {.momentum = 0.9});
  CHECK(find(record([&] { plain.step(); }), "sgd").bytes == (1 + 2) * 6 * 4);
  CHECK(find(record([&] { momentum.step(); }), "sgd").bytes == (1 + 2 * 2) * 6 * 4);
}

TEST_CASE("trace: FLOPs of products are 2 m n k, for every matrix of a batch") {
  const Tensor a = randn({5, 2, 3}), b = randn({3, 4});
  double flop = 0;
  for (const trace::Event& event : record([&] { matmul(a, b); })) flop += event.flop;
  CHECK(flop == 2 * 5 * 2 * 3 * 4);
  const trace::Event event = find(record([&] { matmul(randn({2, 3}), b); }), "gemm");
  CHECK(event.bytes == (2 * 3 + 3 * 4 + 2 * 4) * 4);
  CHECK(event.shapes.starts_with("(2, 3) f32 (3, 4) f32"));
  CHECK(find(record([&] { exp(a); }), "unary").flop == 0);
}

TEST_CASE("trace: FLOPs of attention are those of the scores that the mask leaves") {
  const auto flops = [](int64_t queries, int64_t keys, const AttentionParams& options) {
    const Tensor q = randn({2, 4, queries, 8}).requires_grad_(), k = randn({2, 2, keys, 8}), v = randn({2, 2, keys, 6});
    const auto events = record([&] { sum(scaled_dot_product_attention(q, k, v, options)).backward(); });
    const trace::Event forward = find(events, "attention"), backward = find(events, "attention_backward");
    CHECK(!forward.backward);
    CHECK(backward.backward);
    CHECK(forward.flop * (3 * 8 + 2 * 6) == backward.flop * (8 + 6));
    return forward.flop / (2.0 * (8 + 6) * 2 * 4);  // pairs of a head
  };
  CHECK(flops(5, 5, {}) == 25);
  CHECK(flops(5, 5, {.causal = Causal::top_left}) == 15);
  CHECK(flops(5, 5, {.causal = Causal::top_left, .window = 2}) == 1 + 2 * 4);
  CHECK(flops(2, 5, {.causal = Causal::bottom_right}) == 4 + 5);
}

TEST_CASE("trace: FLOPs of the experts are those of the chosen slots; sums that are added to are read") {
  nn::MoE moe({.hidden = 8, .expert_ffn = 5, .experts = 4, .top_k = 2});
  const auto events = record([&] { sum(moe(randn({7, 8}))).backward(); });
  CHECK(find(events, "moe_forward").flop == 2 * 7 * 2 * 3 * 5 * 8);
  CHECK(find(events, "moe_backward").flop == 2 * find(events, "moe_forward").flop);

  // A second pass reads the gradients as well as it writes them.
  const auto again = record([&] { sum(moe(randn({7, 8}))).backward(); });
  const double gradients = 3 * 4 * 5 * 8 * 4;
  CHECK(find(again, "moe_backward").bytes == find(events, "moe_backward").bytes + gradients);
}

TEST_CASE("trace: threads are told apart") {
  const auto events = record([] {
    exp(ones({2}));
    std::thread([] { exp(ones({2})); }).join();
  });
  REQUIRE(events.size() == 4);
  CHECK(events[0].thread == events[1].thread);
  CHECK(events[2].thread == events[3].thread);
  CHECK(events[0].thread != events[2].thread);
}

TEST_CASE("trace: spans hold the calls made in them") {
  const auto events = record([] {
    const trace::Span span("a \"step\"");
    exp(ones({2}));
  });
  REQUIRE(events.size() == 3);
  const trace::Event& span = events.back();
  CHECK(span.op == "a \"step\"");
  CHECK(span.kernel.empty());
  CHECK(span.start <= events[0].start);
  CHECK(span.start + span.seconds >= events[1].start + events[1].seconds);
  { const trace::Span nothing("while nothing is recorded"); }
  CHECK(record([] {}).empty());
}

TEST_CASE("trace: the file is Chrome's trace event format") {
  const std::vector<trace::Event> events = {
      {.op = "mat\"mul",
       .kernel = "gemm",
       .shapes = "(2,)",
       .start = 0.125000,
       .seconds = 0.25,
       .bytes = 8,
       .flop = 16},
      {.op = "exp", .kernel = "unary", .backward = true, .thread = 1, .start = 1.25e-7},
      {.op = "step", .seconds = 12.3456789012}};
  const char* expected =
      "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n"
      "{\"name\":\"process_name\",\"cat\":\"__metadata\",\"ph\":\"M\",\"pid\":1,\"tid\":0,"
      "\"args\":{\"name\":\"knock\"}},\n"
      "{\"name\":\"thread_name\",\"cat\":\"__metadata\",\"ph\":\"M\",\"pid\":1,\"tid\":1,"
      "\"args\":{\"name\":\"thread 1\"}},\n"
      "{\"name\":\"thread_name\",\"cat\":\"__metadata\",\"ph\":\"M\",\"pid\":1,\"tid\":2,"
      "\"args\":{\"name\":\"thread 2\"}},\n"
      "{\"name\":\"mat\\\"mul\",\"cat\":\"forward\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":125000,\"dur\":250000,"
      "\"args\":{\"kernel\":\"gemm\",\"shapes\":\"(2,)\",\"bytes\":8,\"flop\":16}},\n"
      "{\"name\":\"exp\",\"cat\":\"backward\",\"ph\":\"X\",\"pid\":1,\"tid\":2,\"ts\":0.125,\"dur\":0,"
      "\"args\":{\"kernel\":\"unary\",\"shapes\":\"\",\"bytes\":0,\"flop\":0}},\n"
      "{\"name\":\"step\",\"cat\":\"span\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":0,\"dur\":12345678.901}\n]}\n";
  CHECK(trace::to_chrome(events) == expected);
  CHECK(trace::to_chrome({}) ==
        "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n"
        "{\"name\":\"process_name\",\"cat\":\"__metadata\",\"ph\":\"M\",\"pid\":1,\"tid\":0,"
        "\"args\":{\"name\":\"knock\"}}\n]}\n");
  const test::TemporaryFolder folder;
  trace::write_chrome(events, folder / "trace.json");
  CHECK(io::read_file(folder / "trace.json") == expected);
}
