// What the simulator counts of the hot kernels, against limits: memory moved beyond what was asked for, bank conflicts,
// idle lanes, instructions for each product on the tensor cores. A change that makes a kernel worse fails here.

#include <knock/autograd/engine.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/inplace.hpp>
#include <knock/ops/knock_norm_rope.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/mlp_knock.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/norm_rope.hpp>
#include <knock/ops/optim.hpp>
#include <knock/ops/paged_attention.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>
#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>
#include <knock/optim/sgd.hpp>

#include <doctest/doctest.h>
#include <counters.hpp>

#include <support/tiny_lm.hpp>

using namespace knock;
using cuda_sim::launches;

namespace {

struct Limits {
  const char* kernel;       ///< part of its name
  double sectors = 1.1;     ///< of 32 bytes that were moved, over those that hold what lanes asked for
  double shared = 1.0;      ///< wavefronts of shared memory over what they would be without bank conflicts
  double lanes = 0.9;       ///< active ones, at least
  double bytes = 0;         ///< that a lane asks for at once, at least: 16 in packs of four f32
  double instructions = 0;  ///< of a warp for each mma, at most; 0: no mma
  double mma = 0;           ///< over the ideal number, at most
  double ideal_mma = 0;
};

double ratio(uint64_t a, uint64_t b) { return b == 0 ? 0 : static_cast<double>(a) / static_cast<double>(b); }

void check_kernel(const std::string& name, const cuda_sim::Counters& c, const Limits& limit) {
  CAPTURE(name);
  CHECK(ratio(c.global_sectors, c.global_ideal_sectors) <= limit.sectors);
  CHECK(ratio(c.shared_wavefronts, c.shared_ideal_wavefronts) <= limit.shared);
  CHECK(ratio(c.lane_instructions, 32 * c.warp_instructions) >= limit.lanes);
  CHECK(ratio(c.global_bytes_read + c.global_bytes_written, 32 * c.global_requests) >= limit.bytes);
  if (limit.instructions == 0) return;
  CHECK(c.mma > 0);
  CHECK(ratio(c.warp_instructions, c.mma) <= limit.instructions);
  CHECK(static_cast<double>(c.mma) <= limit.mma * limit.ideal_mma);
}

/// The first of `all` that is about the kernel, otherwise those of a pass over memory.
Limits limit_of(const std::string& kernel, const std::vector<Limits>& all) {
  for (const Limits& limit : all)
    if (kernel.find(limit.kernel) != std::string::npos) return limit;
  return {.kernel = ""};
}

/// What `run` does, by kernel.
template <class Run>
std::map<std::string, cuda_sim::Counters> counted(Run&& run) {
  synchronize("cuda:0");
  cuda_sim::reset_kernel_counters();
  run();
  synchronize("cuda:0");
  return cuda_sim::kernel_counters();
}

/// Runs and compares what was counted of the kernels with their limits.
template <class Run>
void check_limits(const std::vector<Limits>& all, Run&& run) {
  const auto kernels = counted(run);
  for (const Limits& limit : all) {
    CAPTURE(std::string(limit.kernel));
    int found = 0;
    for (const auto& [name, counters] : kernels) {
      if (name.find(limit.kernel) == std::string::npos) continue;
      ++found;
      check_kernel(name, counters, limit);
    }
    CHECK(found > 0);
  }
}

Tensor on_device(const Shape& shape, DType dtype = DType::f32) { return randn(shape).to(dtype).to("cuda:0"); }

}  // namespace

TEST_CASE("limits: attention on the tensor cores") {
  constexpr int64_t heads = 2, tokens = 512, depth = 64;
  const auto leaf = [&] { return on_device({1, heads, tokens, depth}, DType::bf16).requires_grad_(); };
  const Tensor q = leaf(), k = leaf(), v = leaf(), up = on_device({1, heads, tokens, depth}, DType::bf16);
  const double product = heads * tokens * tokens * depth / (16.0 * 8 * 16);  // mma of one of (T, T, D)
  check_limits({{.kernel = "attention_forward_mma", .instructions = 14, .mma = 1, .ideal_mma = 2 * product},
                {.kernel = "attention_dq_mma", .instructions = 10.5, .mma = 1, .ideal_mma = 3 * product},
                {.kernel = "attention_dkv_mma", .instructions = 10.5, .mma = 1, .ideal_mma = 4 * product}},
               [&] { scaled_dot_product_attention(q, k, v).backward(up); });
}

TEST_CASE("limits: decoding reads keys and values once") {
  constexpr int64_t kv_heads = 2, group = 4, keys = 1024, depth = 64;
  const auto run = [&](DType dtype, int64_t q_heads, const Limits& part) {
    const Tensor q = on_device({1, q_heads, 1, depth}, dtype);
    const auto cached = [&] { return on_device({1, kv_heads, keys + 64, depth}, dtype).narrow(2, 0, keys); };
    const Tensor k = cached(), v = cached();
    check_limits({part, {.kernel = "attention_decode_join", .lanes = 0.45}},
                 [&] { scaled_dot_product_attention(q, k, v, {.causal = Causal::bottom_right}); });
    check_limits({part, {.kernel = "attention_decode_join", .lanes = 0.45}}, [&] {
      const Tensor pages = arange(keys / 16).reshape({1, -1}).to("cuda:0"),
                   count = full({1}, keys, {DType::i64, "cuda:0"});
      const auto paged = [&](const Tensor& x) {  // (P, Hkv, page, D)
        return x.reshape({kv_heads, -1, 16, depth}).transpose(0, 1);
      };
      paged_attention(q, paged(k), paged(v), pages, count);
    });
  };
  const double product = kv_heads * keys * depth / (8.0 * 16);  // mma of 16 rows with all keys
  run(DType::bf16, kv_heads * group,
      {.kernel = "attention_decode_mma_part", .shared = 1.01, .instructions = 60, .mma = 1, .ideal_mma = 2 * product});
  run(DType::f32, kv_heads * group, {.kernel = "attention_decode_part"});
  run(DType::f32, kv_heads, {.kernel = "attention_decode_part"});
}

TEST_CASE("limits: a knock with norm and rotation") {
  constexpr int64_t tokens = 512, heads = 4;
  const auto pass = [&](DType dtype, int64_t depth, const std::vector<Limits>& limits) {
    const Tensor x = on_device({1, tokens, heads, depth}, dtype).requires_grad_(),
                 knock = (on_device({depth, depth}) * 0.1).to(dtype).detach().requires_grad_(),
                 weight = on_device({depth}, dtype).requires_grad_(), at = arange(tokens).to("cuda:0"),
                 up = on_device({1, heads, tokens, depth}, dtype);
    check_limits(limits, [&] { knock_norm_rope(x, knock, at, weight).backward(up); });
  };
  const auto on_tensor_cores = [&](int64_t depth, double forward, double backward) {
    const double product = static_cast<double>(tokens * heads * depth * depth) / (16.0 * 8 * 16);
    pass(DType::bf16, depth,
         {{.kernel = "knock_norm_rope_mma", .instructions = forward, .mma = 1, .ideal_mma = product},
          {.kernel = "knock_norm_rope_backward_mma", .instructions = backward, .mma = 1, .ideal_mma = 2 * product}});
  };
  on_tensor_cores(64, 34.5, 30);
  on_tensor_cores(80, 28.5, 25.3);  // rows of shared memory that are no multiple of its banks
  on_tensor_cores(128, 19.5, 16.5);
  on_tensor_cores(256, 14.8, 17.4);  // the knock streams
  pass(DType::f32, 128, {{.kernel = "knock_norm_rope_general"}, {.kernel = "knock_norm_rope_backward_general"}});
}

TEST_CASE("limits: an mlp knock") {
  const auto pass = [](int64_t depth, double forward, double dx, double matrices) {
    constexpr int64_t rows = 8192;
    const auto matrix = [&] { return (on_device({depth, depth}) * 0.1).to(DType::bf16).detach().requires_grad_(); };
    const Tensor x = on_device({rows, depth}, DType::bf16).requires_grad_(), gate = matrix(), up = matrix(),
                 down = matrix(), dy = on_device({rows, depth}, DType::bf16);
    const double product = static_cast<double>(rows * depth * depth) / (16.0 * 8 * 16);
    check_limits({{.kernel = "mlp_knock_mma", .instructions = forward, .mma = 1, .ideal_mma = 3 * product},
                  {.kernel = "mlp_knock_dx_mma", .instructions = dx, .mma = 1, .ideal_mma = 5 * product},
                  {.kernel = "mlp_knock_matrices_mma", .instructions = matrices, .mma = 1, .ideal_mma = 6 * product},
                  {.kernel = "add_mlp_knock_parts"}},
                 [&] { mlp_knock(x, gate, up, down).backward(dy); });
  };
  pass(64, 13.2, 11.6, 12.5);
  pass(80, 12.2, 9.8, 12.4);  // rows of shared memory that are no multiple of its banks
  pass(128, 8.8, 7.7, 10);
}

TEST_CASE("limits: experts on the tensor cores") {
  constexpr int64_t tokens = 512, features = 256, ffn = 128, experts = 4, top_k = 2;
  const Tensor x = on_device({tokens, features}, DType::bf16).requires_grad_();
  const auto weights = [&](const Shape& shape) {
    return (on_device(shape) * 0.1).to(DType::bf16).detach().requires_grad_();
  };
  const Tensors w = {weights({experts, ffn, features}), weights({experts, ffn, features}),
                     weights({experts, features, ffn})};
  const Tensor slots = arange(tokens * top_k).reshape({tokens, top_k}).to("cuda:0");
  const Tensor chosen = remainder(slots, experts), share = full({tokens, top_k}, 0.5, {DType::bf16, "cuda:0"});
  const auto pass = [&](const Tensors& m) { sum(moe_experts(x, chosen, share, m[0], m[1], m[2])).backward(); };
  const double rows = tokens * top_k, one = rows * features * ffn / (16.0 * 8 * 16);
  check_limits({{.kernel = "rows_times_experts_mma_tile<false>", .instructions = 13, .mma = 1, .ideal_mma = one},
                {.kernel = "rows_times_experts_mma_tile<true>", .instructions = 10.5, .mma = 1, .ideal_mma = 2 * one},
                {.kernel = "gate_experts_mma_tile", .instructions = 14, .mma = 1, .ideal_mma = 2 * one},
                {.kernel = "gate_experts_backward_mma_tile", .instructions = 24.5, .mma = 1, .ideal_mma = one},
                {.kernel = "experts_from_rows_mma_tile", .instructions = 10.2, .mma = 1, .ideal_mma = 3 * one}},
               [&] { pass(w); });
  Tensors wide;
  for (const Tensor& matrix : w) wide.push_back(matrix.detach().to(DType::f32).requires_grad_());
  pass(wide);
  for (const Tensors& held : {w, wide})  // gradients that are added to
    check_limits({{.kernel = "experts_from_rows_mma_tile", .instructions = 12.1, .mma = 1, .ideal_mma = 3 * one}},
                 [&] { pass(held); });
}

TEST_CASE("limits: a router's products move their operands once") {
  constexpr int64_t features = 256, experts = 64;
  for (const int64_t tokens : {512, 4096}) {  // with many groups of threads, and with two
    const Tensor x = on_device({tokens, features}, DType::bf16).requires_grad_(),
                 w = on_device({experts, features}).requires_grad_(), dy = on_device({tokens, experts});
    check_limits({{.kernel = "wide_tile", .shared = 1.26}}, [&] { linear_wide(x, w).backward(dy); });
  }
}

TEST_CASE("limits: one pass over memory") {
  constexpr int64_t rows = 256, n = 512;
  const Tensor a = on_device({rows, n}), b = on_device({rows, n}), w = on_device({n}), row = on_device({1, n});
  check_limits({{.kernel = "pointwise_kernel", .bytes = 16}}, [&] { a + b; });
  check_limits({{.kernel = "pointwise_kernel", .bytes = 16}}, [&] { a + row; });
  check_limits({{.kernel = "pointwise_kernel", .bytes = 16}}, [&] { swiglu(a, b); });
  check_limits({{.kernel = "pointwise_kernel", .bytes = 16}}, [&] { sigmoid_gate(a, b, 2); });
  check_limits({{.kernel = "softmax_rows", .bytes = 16}}, [&] { softmax(a, -1); });
  // One lane of a row writes its statistics.
  check_limits({{.kernel = "rms_norm_rows", .lanes = 0.88, .bytes = 15}}, [&] { add_rms_norm(a, b, w); });
  check_limits({{.kernel = "layer_norm_rows", .lanes = 0.88, .bytes = 13}}, [&] { layer_norm(a, w, w); });
  const Tensor x = a.detach().requires_grad_();
  check_limits({{.kernel = "GatedGradient<float>", .bytes = 16}}, [&] { swiglu(x, b).backward(b); });
  check_limits({{.kernel = "rms_norm_backward_rows", .lanes = 0.89}}, [&] { rms_norm(x, w).backward(b); });
  check_limits({{.kernel = "layer_norm_backward_rows", .lanes = 0.89}}, [&] { layer_norm(x, w, w).backward(b); });
  check_limits({{.kernel = "softmax_backward_rows", .bytes = 16}}, [&] { softmax(x, -1).backward(b); });
  const Tensor classes = arange(rows).to("cuda:0");
  check_limits({{.kernel = "cross_entropy_rows", .lanes = 0.85}, {.kernel = "cross_entropy_backward_rows"}},
               [&] { cross_entropy(x, classes).backward(); });
}

TEST_CASE("limits: optimizers, in at most two launches for any number of tensors") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Tensors params;
    for (int i = 0; i < 300; ++i) {  // many small ones, and a few large ones
      params.push_back(on_device(i % 100 == 0 ? Shape{257, 512} : Shape{128}, dtype).requires_grad_());
      params.back().set_grad(on_device(params.back().shape(), dtype));
    }
    optim::AdamW adamw(params, {});
    optim::SGD sgd(params, {.momentum = 0.9});
    const auto step = [&] {
      optim::grad_norm(params);
      adamw.step();
      sgd.step();
      scale_({params[0].grad(), params[1].grad()}, 0.5);
    };
    step();  // makes the moments
    check_limits(
        {{.kernel = "AdamW<float>"}, {.kernel = "Sgd<float>"}, {.kernel = "square_chunks"}, {.kernel = "scale_chunks"}},
        step);
    CHECK(launches("AdamW<float>") == 1);
    CHECK(launches("Sgd<float>") == 1);
    CHECK(launches() == 1 + 1 + 2 + 1 + 1);  // the norm's two; the host reads it
  }
}

TEST_CASE("limits: every kernel of a training step") {
  models::MoeLm model({.vocab_size = 512,
                       .hidden = 256,
                       .layers = 1,
                       .q_heads = 4,
                       .kv_heads = 2,
                       .head_dim = 64,
                       .experts = 8,
                       .top_k = 2,
                       .expert_ffn = 128});
  model.to("cuda:0");
  model.set_compute_dtype(DType::bf16);
  const Tensor tokens = randint(0, 512, {1, 513}).to("cuda:0"), inputs = tokens.narrow(1, 0, 512).contiguous(),
               targets = tokens.narrow(1, 1, 512).contiguous();
  optim::AdamW optimizer(model.parameters(), {.lr = 1e-3});
  const auto step = [&] {
    model.loss(inputs, targets).backward();
    optimizer.step(optim::clip_factor(optim::grad_norm(model.parameters()), 1));
    model.zero_grad();
  };
  step();  // makes the moments
  const std::vector<Limits> others{
      {.kernel = "wide_tile", .shared = 1.26},   // tiles are transposed on their way to shared memory
      {.kernel = "route_tokens", .lanes = 0.6},  // 8 experts leave most of a warp idle
      {.kernel = "count_slots", .lanes = 0.78},  // as above, of few numbers
      {.kernel = "place_slots", .sectors = 1.45, .lanes = 0.78},
      {.kernel = "sort_block", .sectors = 1.6, .shared = 1.1},
      {.kernel = "add_partial", .lanes = 0.8},
      {.kernel = "add_losses", .lanes = 0.89},
      {.kernel = "Range<long>", .sectors = 2},  // four numbers of 8 bytes are two stores
  };
  for (const auto& [name, counters] : counted(step))
    if (counters.warp_instructions > 0) check_kernel(name, counters, limit_of(name, others));
}

TEST_CASE("limits: launches of a training step") {
  models::MoeLm model(test::tiny_lm());
  model.to("cuda:0");
  model.set_compute_dtype(DType::bf16);
  const Tensor tokens = randint(0, 64, {2, 17}).to("cuda:0"), inputs = tokens.narrow(1, 0, 16).contiguous(),
               targets = tokens.narrow(1, 1, 16).contiguous();
  optim::AdamW optimizer(model.parameters(), {.lr = 1e-3});
  const auto step = [&] {
    model.zero_grad();
    model.loss(inputs, targets).backward();
    optimizer.step(optim::clip_factor(optim::grad_norm(model.parameters()), 1));
    synchronize("cuda:0");
  };
  step();
  cuda_sim::reset_kernel_counters();
  step();
  CHECK(launches() <= 151);
  CHECK(launches("update_parameters") == 1);
  CHECK(launches("square_chunks") + launches("add_partial") == 2);
}
