// The mixture of experts: against PyTorch, its fused op against the composite, balancing rules by hand, the same bits.
#include <nn/golden.hpp>

using namespace test;
using nn::BiasRule;
using nn::MoE;
using nn::MoEOptions;
using nn::Router;

namespace {

MoEOptions options_of(const nlohmann::json& o) {
  return {.hidden = o["hidden"],
          .expert_ffn = o["expert_ffn"],
          .experts = o["experts"],
          .top_k = o["top_k"],
          .router = o["router"] == "sigmoid" ? Router::sigmoid : Router::softmax,
          .router_bias = o["router_bias"],
          .norm_topk_prob = o["norm_topk_prob"],
          .routed_scaling_factor = o["routed_scaling_factor"],
          .n_group = o["n_group"],
          .topk_group = o["topk_group"],
          .shared_experts = o["shared_experts"]};
}

/// Operands of moe_experts with random routing; expert 2 gets no token.
struct Operands {
  Tensor x, indices, weights, gate, up, down;
  Operands(int64_t n, int64_t k, int64_t experts, int64_t c, int64_t f, DType dtype) {
    const TensorOptions o{.dtype = dtype};
    std::vector<int64_t> index;
    const auto random = randint(0, experts - 1, {n}).to_vector<int64_t>();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t e = (random[static_cast<std::size_t>(i)] + j) % (experts - 1);
        index.push_back(e >= 2 ? e + 1 : e);
      }
    indices = from_data(index, {n, k});
    x = randn({n, c}, o), weights = rand({n, k}, o), gate = randn({experts, f, c}, o), up = randn({experts, f, c}, o),
    down = randn({experts, c, f}, o);
    for (const Tensor& t : {x, weights, gate, up, down}) Tensor(t).requires_grad_();
  }
  Tensors floats() const { return {x, weights, gate, up, down}; }
};

}  // namespace

TEST_CASE("moe: equals PyTorch, output, losses, load and every gradient") {
  int count = 0;
  for (const auto& golden_case : golden_cases("moe/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    MoE moe(options_of(options));
    moe.to(DType::f64);
    moe.load_state_dict(golden_group(name, "param"));
    const Tensor x = golden().at(name + "/x").clone().requires_grad_();
    const Tensor y = moe(x);
    CHECK(distance(y, golden().at(name + "/y")) <= 1e-12);
    CHECK(distance(moe.balance_loss(), golden().at(name + "/balance")) <= 1e-12);
    CHECK(distance(moe.z_loss(), golden().at(name + "/z")) <= 1e-12);
    CHECK(moe.load().to_vector<int64_t>() == golden().at(name + "/load").to_vector<int64_t>());
    (sum(y * golden().at(name + "/dy")) + 0.3 * moe.balance_loss() + 0.2 * moe.z_loss()).backward();
    CHECK(distance(x.grad(), golden().at(name + "/dx")) <= 1e-12);
    check_gradients(moe, golden_group(name, "grad"), 1e-12);
    ++count;
  }
  CHECK(count == 7);
}

TEST_CASE("moe: fused experts equal the composite, value and gradients") {
  for (const auto& precision : {std::pair{DType::f64, 1e-12}, {DType::f32, 1e-5}, {DType::bf16, 6e-2}}) {
    const DType dtype = precision.first;
    const double tolerance = precision.second;
    for (const auto& extents :
         {std::array<int64_t, 5>{13, 2, 5, 7, 6}, {1, 1, 4, 3, 1}, {300, 3, 6, 33, 17}, {0, 2, 4, 5, 3}}) {
      INFO(to_text(dtype), " n ", extents[0]);
      const Operands o(extents[0], extents[1], extents[2], extents[3], extents[4], dtype);
      const Tensor fused = moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down);
      const Tensor composite = composite::moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down);
      CHECK(distance(fused, composite) <= tolerance);
      const Tensor dy = randn_like(fused);
      const Tensors a = autograd::grad({fused}, o.floats(), {.upstream = {dy}});
      const Tensors b = autograd::grad({composite}, o.floats(), {.allow_unused = true, .upstream = {dy}});
      for (std::size_t i = 0; i < a.size(); ++i)
        CHECK(distance(a[i], b[i].defined() ? b[i] : zeros_like(a[i])) <= tolerance);
    }
  }
}

TEST_CASE("moe: gradcheck, and an expert without tokens has gradient zero") {
  const Operands o(6, 2, 4, 3, 5, DType::f64);
  const auto result = autograd::gradcheck(
      [&](const Tensors& in) -> Tensors { return {moe_experts(in[0], o.indices, in[1], in[2], in[3], in[4])}; },
      o.floats());
  CHECK_MESSAGE(result.ok, result.report);
  sum(moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down)).backward();
  CHECK(o.gate.grad()[2].to_vector<double>() == std::vector<double>(15, 0.0));
  CHECK(o.down.grad()[2].to_vector<double>() == std::vector<double>(15, 0.0));
  CHECK(o.gate.grad()[0].to_vector<double>() != std::vector<double>(15, 0.0));
}

TEST_CASE("moe: the same bits for any number of threads") {
  const Operands o(500, 3, 7, 48, 40, DType::f32);
  std::vector<std::vector<float>> runs;
  for (const int threads : {1, 2, 3}) {
    set_num_threads(threads);
    const Tensor y = moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down);
    runs.push_back(y.to_vector<float>());
    for (const Tensor& g : autograd::grad({sum(square(y))}, o.floats())) {
      const auto values = g.to_vector<float>();
      runs.back().insert(runs.back().end(), values.begin(), values.end());
    }
  }
  set_num_threads(2);
  CHECK(runs[0] == runs[1]);
  CHECK(runs[0] == runs[2]);
}

TEST_CASE("moe: gradients can be differentiated again") {
  const Operands o(5, 2, 4, 3, 2, DType::f64);
  const auto result = autograd::gradcheck(
      [&](const Tensors& in) -> Tensors {
        const Tensor y = sum(square(moe_experts(in[0], o.indices, in[1], in[2], in[3], in[4])));
        return autograd::grad({y}, in, {.create_graph = true});
      },
      o.floats(), {.tolerance = 1e-5});
  CHECK_MESSAGE(result.ok, result.report);
}

TEST_CASE("moe: wrong operands are errors that name them") {
  const Operands o(4, 1, 4, 3, 2, DType::f32);
  CHECK_THROWS_WITH_AS(moe_experts(o.x, full({4, 1}, 4, {.dtype = DType::i64}), o.weights, o.gate, o.up, o.down),
                       doctest::Contains("index 4 of slot 0"), Error);
  CHECK_THROWS_WITH_AS(moe_experts(o.x, o.indices.to(DType::i32), o.weights, o.gate, o.up, o.down),
                       doctest::Contains("indices must be i64"), Error);
  CHECK_THROWS_AS(moe_experts(o.x.narrow(1, 0, 2), o.indices, o.weights, o.gate, o.up, o.down), Error);
  CHECK_THROWS_AS(moe_experts(o.x.to(DType::f64), o.indices, o.weights, o.gate, o.up, o.down), Error);
  CHECK_THROWS_AS(moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.gate), Error);
  for (const MoEOptions& bad :
       {MoEOptions{},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 5},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 0},
        {.hidden = 4, .expert_ffn = 4, .experts = 6, .top_k = 1, .n_group = 4},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 1, .n_group = 4, .topk_group = 1},
        {.hidden = 4, .expert_ffn = 4, .experts = 6, .top_k = 3, .n_group = 3, .topk_group = 1}})
    CHECK_THROWS_AS(MoE{bad}, Error);
}

TEST_CASE("balance: the three rules by hand") {
  const Tensor bias = from_data<float>({0.F, 0.F, 0.F, 0.F}, {4}), load = from_data<int64_t>({10, 2, 4, 4}, {4});
  const auto moved = [&](BiasRule rule) {
    return nn::updated_bias(bias, load, {.speed = 0.1, .rule = rule}).to_vector<float>();
  };
  // mean load 5: e = -5, 3, 1, 1; signs -1, 1, 1, 1 with mean 0.5; rms(e) = 3
  const std::vector<float> sign = {-0.1F, 0.1F, 0.1F, 0.1F}, centred = {-0.15F, 0.05F, 0.05F, 0.05F};
  const std::vector<float> rms = {-0.5F / 3, 0.1F, 0.1F / 3, 0.1F / 3};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(moved(BiasRule::sign)[i] == doctest::Approx(sign[i]));
    CHECK(moved(BiasRule::centred_sign)[i] == doctest::Approx(centred[i]));
    CHECK(moved(BiasRule::rms)[i] == doctest::Approx(rms[i]));
  }
  const Tensor even = full({4}, 5, {.dtype = DType::i64}), start = from_data<float>({1.F, 2.F, 3.F, 4.F}, {4});
  for (const BiasRule rule : {BiasRule::centred_sign, BiasRule::sign, BiasRule::rms})
    CHECK(nn::updated_bias(start, even, {.rule = rule}).to_vector<float>() == start.to_vector<float>());
  CHECK_THROWS_AS(nn::updated_bias(start, zeros({3})), Error);
  CHECK(nn::load_entropy(even) == doctest::Approx(1));
  CHECK(nn::load_entropy(from_data<int64_t>({0, 7, 0}, {3})) == doctest::Approx(0));
}

TEST_CASE("balance: the bias evens out a router that prefers one expert") {
  manual_seed(3);
  const NoGradGuard no_grad;
  MoE moe({.hidden = 6, .expert_ffn = 4, .experts = 4, .top_k = 1});
  moe.gate.weight.narrow(0, 0, 1).add_(0.5);  // with positive inputs expert 0 scores highest
  const Tensor x = rand({256, 6}) + 0.5;
  moe(x);
  CHECK(nn::load_entropy(moe.load()) < 0.5);
  Tensor total = zeros_like(moe.load());
  for (int i = 0; i < 600; ++i) {
    moe(x);
    moe.update_bias({.speed = 2e-3});
    if (i >= 500) total.add_(moe.load());  // it keeps swinging around the even load
  }
  CHECK(nn::load_entropy(total) > 0.98);
}

TEST_CASE("moe: load is counted once: not in evaluation, not again in recomputation") {
  MoE moe({.hidden = 6, .expert_ffn = 4, .experts = 4, .top_k = 2});
  const Tensor x = randn({10, 6}).requires_grad_();
  const auto total = [&] { return sum(moe.accumulated_load()).item<int64_t>(); };
  autograd::checkpoint([&](const Tensors& in) { return moe(in[0]); }, {x}).backward(ones({10, 6}));
  CHECK(total() == 20);
  CHECK(moe.gate_proj.grad().defined());
  moe.eval();
  moe(x);
  CHECK(total() == 20);
  moe.train();
  moe(x);
  CHECK(total() == 40);
  moe.update_bias();
  CHECK(total() == 0);
}
