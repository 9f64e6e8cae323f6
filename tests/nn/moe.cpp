// The mixture of experts: against PyTorch, its fused op against the composite, balancing rules by hand, the same bits.
#include <nn/golden.hpp>

#include <algorithm>
#include <array>
#include <cmath>

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
          .shared_experts = o["shared_experts"],
          .capacity_factor = o["capacity_factor"]};
}

/// Operands of moe_experts with random routing; expert 2 gets no token. With `drops` token 1 has lost all its slots and
/// every third slot is lost.
struct Operands {
  Tensor x, indices, weights, gate, up, down;
  Operands(int64_t n, int64_t k, int64_t experts, int64_t c, int64_t f, DType dtype, bool drops = false) {
    const TensorOptions o{.dtype = dtype};
    std::vector<int64_t> index;
    const auto random = randint(0, experts - 1, {n}).to_vector<int64_t>();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t e = (random[static_cast<std::size_t>(i)] + j) % (experts - 1);
        index.push_back(drops && (i == 1 || (i * k + j) % 3 == 2) ? -1 : e >= 2 ? e + 1 : e);
      }
    indices = from_data(index, {n, k});
    x = randn({n, c}, o), weights = rand({n, k}, o), gate = randn({experts, f, c}, o), up = randn({experts, f, c}, o),
    down = randn({experts, c, f}, o);
    for (const Tensor& t : {x, weights, gate, up, down}) Tensor(t).requires_grad_();
  }
  Tensors floats() const { return {x, weights, gate, up, down}; }
};

std::vector<int64_t> integers(const Tensor& t) { return t.to_vector<int64_t>(); }

/// A layer of 4 experts in each mode.
std::vector<MoEOptions> modes() {
  const MoEOptions plain{.hidden = 6, .expert_ffn = 5, .experts = 4, .top_k = 2};
  MoEOptions softmax = plain, grouped = plain, capacity = plain, forced = plain;
  softmax.router = Router::softmax;
  grouped.n_group = 2, grouped.topk_group = 1, grouped.shared_experts = 1;
  capacity.capacity_factor = 0.75;
  forced.forced_balance = true;
  return {plain, softmax, grouped, capacity, forced};
}

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
    CHECK(integers(moe.load()) == integers(golden().at(name + "/load")));
    CHECK(moe.dropped().item<int64_t>() == golden().at(name + "/dropped").item<int64_t>());
    CHECK((moe.dropped().item<int64_t>() > 0) == (options["capacity_factor"] > 0));
    (sum(y * golden().at(name + "/dy")) + 0.3 * moe.balance_loss() + 0.2 * moe.z_loss()).backward();
    CHECK(distance(x.grad(), golden().at(name + "/dx")) <= 1e-12);
    check_gradients(moe, golden_group(name, "grad"), 1e-12);
    ++count;
  }
  CHECK(count == 10);
}

TEST_CASE("moe: fused experts equal the composite, value and gradients") {
  for (const auto& precision : {std::pair{DType::f64, 1e-12}, {DType::f32, 1e-5}, {DType::bf16, 6e-2}}) {
    const DType dtype = precision.first;
    const double tolerance = precision.second;
    for (const auto& extents : {std::array<int64_t, 6>{13, 2, 5, 7, 6, 0},
                                {1, 1, 4, 3, 1, 0},
                                {300, 3, 6, 33, 17, 0},
                                {0, 2, 4, 5, 3, 0},
                                {14, 2, 5, 7, 6, 1},
                                {300, 3, 6, 33, 17, 1}}) {
      INFO(to_text(dtype), " n ", extents[0], " drops ", extents[5]);
      const Operands o(extents[0], extents[1], extents[2], extents[3], extents[4], dtype, extents[5] == 1);
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

TEST_CASE("moe: f32 experts beside bf16 tokens are rounded as they are read, their gradients stay f32") {
  const Operands o(300, 3, 6, 33, 17, DType::bf16, false);
  Tensors wide;
  for (const Tensor& matrix : {o.gate, o.up, o.down})
    wide.push_back(matrix.detach().to(DType::f32).requires_grad_());  // the same numbers
  const Tensor narrow_y = moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down);
  const Tensor y = moe_experts(o.x, o.indices, o.weights, wide[0], wide[1], wide[2]);
  CHECK(test::same_bits(y, narrow_y));
  const Tensor dy = randn_like(y);
  const Tensors got = autograd::grad({y}, {o.x, o.weights, wide[0], wide[1], wide[2]}, {.upstream = {dy}});
  const Tensors want = autograd::grad({narrow_y}, o.floats(), {.upstream = {dy}});
  for (std::size_t i = 0; i < got.size(); ++i) {
    CHECK(got[i].dtype() == (i < 2 ? DType::bf16 : DType::f32));
    CHECK(test::same_bits(got[i].to(DType::bf16), want[i]));
  }
  CHECK_THROWS_WITH_AS(moe_experts(o.x, o.indices, o.weights, wide[0], o.up, wide[2]),
                       doctest::Contains("dtypes differ"), Error);
}

TEST_CASE("moe: gradcheck, and an expert without tokens has gradient zero") {
  for (const bool drops : {false, true}) {
    const Operands operands(6, 2, 4, 3, 5, DType::f64, drops);
    const auto result = autograd::gradcheck(
        [&](const Tensors& in) -> Tensors {
          return {moe_experts(in[0], operands.indices, in[1], in[2], in[3], in[4])};
        },
        operands.floats());
    CHECK_MESSAGE(result.ok, result.report);
  }
  const Operands o(6, 2, 4, 3, 5, DType::f64);
  sum(moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down)).backward();
  CHECK(o.gate.grad()[2].to_vector<double>() == std::vector<double>(15, 0.0));
  CHECK(o.down.grad()[2].to_vector<double>() == std::vector<double>(15, 0.0));
  CHECK(o.gate.grad()[0].to_vector<double>() != std::vector<double>(15, 0.0));
}

TEST_CASE("moe: the same bits for any number of threads, in every mode") {
  for (MoEOptions options : modes()) {
    options.hidden = 48, options.expert_ffn = 40;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      INFO("router ", static_cast<int>(options.router), " groups ", options.n_group, " capacity ",
           options.capacity_factor, " forced ", options.forced_balance, " ", to_text(dtype));
      MoE moe(options);
      const Tensor x = randn({500, 48}, {.dtype = dtype}).requires_grad_();
      Tensors inputs = moe.parameters();
      inputs.push_back(x);
      std::vector<Tensors> runs;
      for (const int threads : {1, 2, 3}) {
        set_num_threads(threads);
        const Tensor y = moe(x);
        runs.push_back(autograd::grad({sum(square(y).to(DType::f32)) + moe.balance_loss() + moe.z_loss()}, inputs));
        for (const Tensor& value : {y, moe.load(), moe.dropped()}) runs.back().push_back(value.detach());
      }
      set_num_threads(2);
      for (std::size_t i = 0; i < runs[0].size(); ++i) {
        CHECK(same_bits(runs[0][i], runs[1][i]));
        CHECK(same_bits(runs[0][i], runs[2][i]));
      }
    }
  }
}

TEST_CASE("moe: a capacity keeps the first choices of each expert, in the order of the tokens") {
  const Tensor indices = from_data<int64_t>({0, 1, 0, 2, 0, 1, 1, 0}, {4, 2});
  CHECK(integers(within_capacity(indices, 3, 2)) == std::vector<int64_t>{0, 1, 0, 2, -1, 1, -1, -1});
  CHECK(integers(within_capacity(indices, 3, 1)) == std::vector<int64_t>{0, 1, -1, 2, -1, -1, -1, -1});
  CHECK(integers(within_capacity(indices, 3, 4)) == integers(indices));
  CHECK(within_capacity(zeros({0, 2}, {.dtype = DType::i64}), 3, 1).shape() == Shape{0, 2});

  MoEOptions options{.hidden = 4, .expert_ffn = 4, .experts = 6, .top_k = 2, .capacity_factor = 1};
  CHECK(nn::expert_capacity(options, 13) == 5);
  CHECK(nn::expert_capacity(options, 12) == 4);
  options.capacity_factor = 1e300;
  CHECK(nn::expert_capacity(options, 13) == 13);
  options.capacity_factor = 0.01;
  CHECK(nn::expert_capacity(options, 13) == 1);
}

TEST_CASE("moe: a dropped slot adds nothing, its weight has gradient zero, and the router's choice counts as load") {
  const Operands o(6, 2, 4, 3, 5, DType::f64, true);  // token 1 is slots 2 and 3
  const Tensor y = moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.down);
  CHECK(y[1].to_vector<double>() == std::vector<double>(3, 0.0));
  sum(y).backward();
  CHECK(o.x.grad()[1].to_vector<double>() == std::vector<double>(3, 0.0));
  const auto indices = integers(o.indices);
  const auto gradient = o.weights.grad().to_vector<double>();
  for (std::size_t slot = 0; slot < indices.size(); ++slot) CHECK((gradient[slot] == 0) == (indices[slot] < 0));

  MoE moe({.hidden = 6, .expert_ffn = 5, .experts = 4, .top_k = 1, .capacity_factor = 0.5});
  moe.gate.e_score_correction_bias.narrow(0, 2, 1).add_(9);  // all choose expert 2, which takes ceil(0.5 * 10 / 4)
  const Tensor out = moe(randn({10, 6}));
  CHECK(integers(moe.load()) == std::vector<int64_t>{0, 0, 10, 0});
  CHECK(moe.dropped().item<int64_t>() == 8);
  const Tensor size = sum(abs(out), {1});
  CHECK(size.narrow(0, 2, 8).to_vector<float>() == std::vector<float>(8, 0.F));
  CHECK(amin(size.narrow(0, 0, 2)).item() > 0);
}

TEST_CASE("moe: with a capacity no output depends on later tokens, and in evaluation nothing is dropped") {
  const NoGradGuard no_grad;
  MoE moe({.hidden = 6, .expert_ffn = 5, .experts = 4, .top_k = 2, .capacity_factor = 0.5});
  const Tensor x = randn({1, 40, 6});
  const Tensor y = moe(x);
  CHECK(moe.dropped().item<int64_t>() > 10);
  for (const int64_t t : {1, 7, 20, 39}) {
    const Tensor changed = cat({x.narrow(1, 0, t), randn({1, 40 - t, 6})}, 1);
    CHECK(same_bits(moe(changed).narrow(1, 0, t), y.narrow(1, 0, t)));
  }
  moe.eval();
  const Tensor all = moe(x);
  CHECK(moe.dropped().item<int64_t>() == 0);
  Tensors one_by_one;
  for (int64_t t = 0; t < 40; ++t) one_by_one.push_back(moe(x.narrow(1, t, 1)));
  CHECK(distance(cat(one_by_one, 1), all) <= 1e-6);
}

TEST_CASE("moe: forced balance gives experts tokens in turn, with the weights of their scores") {
  for (const int64_t tokens : {16, 17}) {
    MoE moe({.hidden = 6, .expert_ffn = 5, .experts = 5, .top_k = 3, .forced_balance = true});
    moe.gate.e_score_correction_bias.narrow(0, 1, 1).add_(9);
    const Tensor x = randn({tokens, 6});
    const nn::Routing routing = moe.gate.forward(x);
    const auto indices = integers(routing.indices);
    for (std::size_t slot = 0; slot < indices.size(); ++slot) CHECK(indices[slot] == static_cast<int64_t>(slot % 5));
    const Tensor scores = gather(sigmoid(routing.logits), 1, routing.indices);
    CHECK(distance(routing.weights, scores / sum(scores, {1}, true)) <= 1e-6);
    moe(x);
    const auto load = integers(moe.load());
    CHECK(*std::max_element(load.begin(), load.end()) - *std::min_element(load.begin(), load.end()) <= 1);
  }
}

TEST_CASE("moe: permuted experts give the same output and permuted loads") {
  // The sigmoid router gives the same bits, a softmax the same within the rounding of its sum.
  for (const auto& mode : modes()) {
    if (mode.n_group > 1 || mode.forced_balance) continue;  // there an expert's place has a meaning
    MoE moe(mode), permuted(mode);
    moe.gate.e_score_correction_bias.copy_(0.3 * randn({4}));
    const std::vector<int64_t> order = {2, 0, 3, 1};
    StateDict state = moe.state_dict();
    const Tensor index = from_data(order, {4});
    for (const char* name : {"gate.weight", "gate.e_score_correction_bias"})
      state[name] = index_select(state.at(name), 0, index);
    for (std::size_t e = 0; e < order.size(); ++e)
      for (const char* name : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"})
        state[text("experts.", e, ".", name)] = moe.state_dict().at(text("experts.", order[e], ".", name));
    permuted.load_state_dict(state);
    const Tensor x = randn({50, 6});
    const Tensor a = moe(x), b = permuted(x);
    CHECK(integers(permuted.load()) == integers(index_select(moe.load(), 0, index)));
    CHECK(permuted.dropped().item<int64_t>() == moe.dropped().item<int64_t>());
    CHECK(distance(a, b) <= (mode.router == Router::softmax ? 1e-6 : 0));
    CHECK(distance(moe.balance_loss(), permuted.balance_loss()) <= 1e-6);
  }
}

TEST_CASE("moe: an expert without tokens has gradient zero, not none") {
  MoE moe({.hidden = 6, .expert_ffn = 5, .experts = 4, .top_k = 2});
  moe.gate.e_score_correction_bias.narrow(0, 1, 1).add_(-9);
  const Tensor y = moe(randn({20, 6}));
  (sum(square(y)) + moe.balance_loss()).backward();
  CHECK(integers(moe.load())[1] == 0);
  for (const Tensor& weight : {moe.gate_proj, moe.up_proj, moe.down_proj}) {
    REQUIRE(weight.grad().defined());
    CHECK(amax(abs(weight.grad()[1])).item() == 0);
    CHECK(amax(abs(weight.grad()[0])).item() > 0);
  }
}

TEST_CASE("moe: the router computes in f32 whatever the precision") {
  const NoGradGuard no_grad;
  MoE moe({.hidden = 32, .expert_ffn = 4, .experts = 16, .top_k = 4});
  const Tensor x = randn({400, 32}, {.dtype = DType::bf16});
  const nn::Routing routing = moe.gate.forward(x);
  const Tensor logits = linear(x.to(DType::f32), moe.gate.weight);
  CHECK(same_bits(routing.logits, logits));
  CHECK(routing.weights.dtype() == DType::bf16);
  CHECK(same_bits(routing.indices, topk(sigmoid(logits), 4, -1).indices));
  const Tensor rounded = topk(sigmoid(linear(x, moe.gate.weight.to(DType::bf16)).to(DType::f32)), 4, -1).indices;
  CHECK(!same_bits(routing.indices, rounded));  // otherwise this test would see nothing
  moe(x);
  CHECK(integers(moe.load()) == integers(expert_load(routing.indices, 16)));
}

TEST_CASE("moe: the router in one kernel equals the composite, with gradients of bf16 and f32 features") {
  for (const MoEOptions& mode : modes())
    for (const bool normalised : {false, true})
      for (const DType dtype : {DType::f32, DType::bf16}) {
        if (mode.forced_balance) continue;
        MoEOptions options = mode;
        options.norm_topk_prob = normalised, options.routed_scaling_factor = 1.5;
        MoE moe(options);
        const Tensor& bias = moe.gate.e_score_correction_bias;
        Tensor(bias).copy_(0.3 * randn({4}));
        const Tensor x = randn({50, 6}).to(dtype), dy = randn({50, options.top_k}).to(dtype);
        const Routes composed = composite::route(linear(x.to(DType::f32), moe.gate.weight), bias,
                                                 {.top_k = options.top_k,
                                                  .scores = options.router,
                                                  .norm_topk_prob = normalised,
                                                  .routed_scaling_factor = 1.5,
                                                  .n_group = options.n_group,
                                                  .topk_group = options.topk_group});
        const nn::Routing fused = moe.gate.forward(x);
        CHECK(same_bits(fused.indices, composed.indices));
        CHECK(distance(fused.weights.to(DType::f32), composed.weights) <= (dtype == DType::bf16 ? 4e-3 : 1e-6));
        const auto gradient = [&](const Tensor& weights) {
          return autograd::grad({sum((weights.to(dtype) * dy).to(DType::f32))}, {moe.gate.weight})[0];
        };
        const Tensor expected = gradient(composed.weights);
        CHECK(amax(abs(expected)).item() > 0.1);
        CHECK(distance(gradient(fused.weights), expected) <= 1e-5);
      }
}

TEST_CASE("route: the bias chooses and takes no gradient, errors name the option") {
  const Tensor logits = from_data(std::vector<double>{0, 1, 2, 3}, {1, 4}).requires_grad_();
  const Tensor bias = from_data(std::vector<double>{9, 0, 0, 0}, {4}).requires_grad_();
  const Routes routes = route(logits, bias, {.top_k = 2, .norm_topk_prob = false});
  CHECK(integers(routes.indices) == std::vector<int64_t>{0, 3});
  CHECK(distance(routes.weights, from_data(std::vector<double>{0.5, 1 / (1 + std::exp(-3.0))}, {1, 2})) <= 1e-15);
  sum(routes.weights).backward();
  CHECK(!bias.grad().defined());
  CHECK(logits.grad().to_vector<double>()[0] == 0.25);
  CHECK(logits.grad().to_vector<double>()[1] == 0);

  const auto fails = [&](const Tensor& x, const Tensor& b, const RouteOptions& options, const char* message) {
    CHECK_MESSAGE(contains(error_of([&] { route(x, b, options); }), message), message);
    CHECK_MESSAGE(contains(error_of([&] { composite::route(x, b, options); }), message), message);
  };
  const Tensor x = randn({3, 6}), none;
  fails(x.to(DType::bf16), none, {}, "[route] logits must be f32 or f64 (N, E), got (3, 6) bf16 cpu");
  fails(randn({3}), none, {}, "[route] logits must be f32 or f64 (N, E)");
  fails(x, randn({5}), {}, "[route] bias (5,) f32 cpu must be (E) of the dtype of logits");
  fails(x, zeros({6}, {.dtype = DType::f64}), {}, "[route] bias (6,) f64 cpu must be (E) of the dtype of logits");
  fails(x, none, {.top_k = 0}, "[route] top_k 0 is outside 1 to 6");
  fails(x, none, {.top_k = 7}, "[route] top_k 7 is outside 1 to 6");
  fails(x, none, {.n_group = 4}, "[route] experts 6 is not divisible by n_group 4");
  fails(x, none, {.n_group = 6}, "[route] a group needs at least 2 experts, n_group 6 leaves 1");
  fails(x, none, {.n_group = 3, .topk_group = 4}, "[route] topk_group 4 is outside 1 to n_group 3");
  fails(x, none, {.top_k = 3, .n_group = 3}, "[route] top_k 3 exceeds the 2 experts of topk_group 1 groups");
}

TEST_CASE("moe: losses of the parts of a batch average to those of the batch") {
  for (const auto& mode : modes()) {
    MoE moe(mode);
    const Tensor x = 3 * randn({32, 6});
    moe(x);
    const Tensor load = moe.load(), balance = moe.balance_loss(), z = moe.z_loss();
    const Tensor gradient = autograd::grad({balance + z}, {moe.gate.weight})[0];
    Tensor balance_of_parts = zeros({}), z_of_parts = zeros({}), parts_alone = zeros({});
    for (int64_t part = 0; part < 4; ++part) {
      moe(x.narrow(0, 8 * part, 8));
      balance_of_parts = balance_of_parts + moe.balance_loss(load) / 4;
      parts_alone = parts_alone + moe.balance_loss() / 4;
      z_of_parts = z_of_parts + moe.z_loss() / 4;
    }
    CHECK(distance(balance_of_parts, balance) <= 1e-6);
    CHECK(distance(z_of_parts, z) <= 1e-6);
    CHECK(distance(autograd::grad({balance_of_parts + z_of_parts}, {moe.gate.weight})[0], gradient) <= 1e-6);
    if (!mode.forced_balance) CHECK(distance(parts_alone, balance) > 1e-4);  // why the batch's load is needed
  }
}

TEST_CASE("moe: gradients can be differentiated again") {
  const Operands o(5, 2, 4, 3, 2, DType::f64, true);
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
  CHECK_THROWS_WITH_AS(moe_experts(o.x, full({4, 1}, -2, {.dtype = DType::i64}), o.weights, o.gate, o.up, o.down),
                       doctest::Contains("index -2 of slot 0"), Error);
  CHECK_THROWS_WITH_AS(moe_experts(o.x, o.indices.to(DType::i32), o.weights, o.gate, o.up, o.down),
                       doctest::Contains("indices must be i64"), Error);
  CHECK_THROWS_AS(moe_experts(o.x.narrow(1, 0, 2), o.indices, o.weights, o.gate, o.up, o.down), Error);
  CHECK_THROWS_AS(moe_experts(o.x.to(DType::f64), o.indices, o.weights, o.gate, o.up, o.down), Error);
  CHECK_THROWS_AS(moe_experts(o.x, o.indices, o.weights, o.gate, o.up, o.gate), Error);
  for (const MoEOptions& bad :
       {MoEOptions{},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 5},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 0},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 1, .capacity_factor = -1},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 1, .capacity_factor = std::nan("")},
        {.hidden = 4, .expert_ffn = 4, .experts = 6, .top_k = 1, .n_group = 4},
        {.hidden = 4, .expert_ffn = 4, .experts = 4, .top_k = 1, .n_group = 4, .topk_group = 1},
        {.hidden = 4, .expert_ffn = 4, .experts = 6, .top_k = 3, .n_group = 3, .topk_group = 1}})
    CHECK_THROWS_AS(MoE{bad}, Error);
}

TEST_CASE("balance: the three rules by hand") {
  const Tensor bias = from_data<float>({0.F, 0.F, 0.F, 0.F}, {4}), load = from_data<int64_t>({10, 2, 4, 4}, {4});
  const auto moved = [&](BiasRule rule) {
    const Tensor found = bias.clone();
    update_router_biases({{found, {load.clone(), zeros({})}, zeros({}, {.dtype = DType::i64})}}, rule, 0.1);
    CHECK(distance(found, nn::updated_bias(bias, load, {.speed = 0.1, .rule = rule})) <= 1e-7);
    return found.to_vector<float>();
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
  const Tensor none = zeros({}, {.dtype = DType::i64});
  for (const BiasRule rule : {BiasRule::centred_sign, BiasRule::sign, BiasRule::rms}) {
    const Tensor found = start.clone();
    update_router_biases({{found, {even.clone(), zeros({})}, none}}, rule, 1e-3);
    CHECK(found.to_vector<float>() == start.to_vector<float>());
    CHECK(nn::updated_bias(start, even, {.rule = rule}).to_vector<float>() == start.to_vector<float>());
  }
  CHECK_THROWS_AS(nn::updated_bias(start, zeros({3})), Error);
  CHECK_THROWS_AS(
      update_router_biases({{start, {zeros({3}, {.dtype = DType::i64}), zeros({})}, none}}, BiasRule::sign, 1), Error);
  CHECK(nn::load_entropy(even) == doctest::Approx(1));
  const Tensor one = from_data<int64_t>({0, 7, 0}, {3});
  CHECK(nn::load_entropy(one) == doctest::Approx(0));
  CHECK(nn::max_violation(even) == 0);
  CHECK(nn::max_violation(one) == doctest::Approx(2));
  CHECK(nn::max_violation(from_data<int64_t>({2, 4, 6}, {3})) == doctest::Approx(0.5));
  CHECK(nn::max_violation(zeros_like(one)) == 0);
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

TEST_CASE("moe: loads, drops and logits count once: not in evaluation, not again in recomputation") {
  MoE moe({.hidden = 6, .expert_ffn = 4, .experts = 4, .top_k = 2, .capacity_factor = 0.5});
  const Tensor x = randn({10, 6}).requires_grad_();
  const auto total = [&] { return sum(moe.health().load).item<int64_t>(); };
  const Tensor y = autograd::checkpoint([&](const Tensors& in) { return moe(in[0]); }, {x});
  CHECK(total() == 20);
  const auto dropped = moe.dropped().item<int64_t>();
  CHECK(dropped >= 8);  // 12 slots
  CHECK(moe.health().dropped.item<int64_t>() == dropped);
  CHECK(moe.health().logit_max.item() == amax(abs(moe.gate.forward(x).logits)).item());
  moe.reset_health();
  y.backward(ones({10, 6}));  // recomputes
  CHECK(moe.gate_proj.grad().defined());
  CHECK(moe.dropped().item<int64_t>() == dropped);
  const auto nothing = [&] {
    return total() == 0 && moe.health().dropped.item<int64_t>() == 0 && moe.health().logit_max.item() == 0;
  };
  CHECK(nothing());
  moe.eval();
  moe(x);
  CHECK(nothing());
  moe.train();
  moe(-x);
  CHECK(moe.health().logit_max.item() == amax(abs(moe.gate.forward(x).logits)).item());
  moe.reset_health();
  moe(x);
  moe(x);
  CHECK(total() == 40);
  CHECK(moe.health().dropped.item<int64_t>() == 2 * dropped);
  moe.update_bias();
  CHECK(nothing());
}
