// Groups, state dicts, skipped parameters, errors and memory of the optimizers.
#include <doctest/doctest.h>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/optim.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>
#include <knock/optim/sgd.hpp>
#include <support/compare.hpp>

using namespace knock;
using optim::AdamW;
using optim::AdamWOptions;
using optim::SGD;
using optim::SGDOptions;
using test::contains;
using test::error_of;

namespace {

Tensor leaf(const Shape& shape, DType dtype = DType::f32) { return randn(shape, {.dtype = dtype}).requires_grad_(); }

void give_gradient(const Tensor& x) { Tensor(x).set_grad(randn_like(x)); }

std::vector<std::string> names_of(const StateDict& state) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : state) names.push_back(name);
  return names;
}

}  // namespace

TEST_CASE("optimizers: a parameter without gradient keeps its value and its state") {
  const Tensor used = leaf({3}), unused = leaf({2}), before = unused.detach().clone();
  AdamW opt({used, unused}, {.lr = 0.1, .weight_decay = 0.5});
  give_gradient(used);
  opt.step();
  CHECK(test::same_bits(unused.detach(), before));
  CHECK(names_of(opt.state_dict()) == std::vector<std::string>{"0.step", "0.exp_avg", "0.exp_avg_sq", "1.step"});
  CHECK(opt.state_dict().at("1.step").item<int64_t>() == 0);
  opt.zero_grad();
  CHECK_FALSE(used.grad().defined());
}

TEST_CASE("optimizers: groups have options of their own") {
  const Tensor decayed = leaf({4, 2}), bias = leaf({2}), other = leaf({2});
  const Tensor before_decayed = decayed.detach().clone(), before_bias = bias.detach().clone(),
               before_other = other.detach().clone();
  const NamedTensors params{{"weight", decayed}, {"bias", bias}};
  AdamW opt(optim::split_decay(params, AdamWOptions{.lr = 0.1, .weight_decay = 0.5}));
  opt.add_group({{{"other", other}}, {.lr = 0.01, .weight_decay = 0.1}});
  for (const Tensor& p : {decayed, bias, other}) Tensor(p).set_grad(zeros_like(p));
  opt.step();
  CHECK(test::distance(decayed, before_decayed * 0.95) < 1e-7);
  CHECK(test::same_bits(bias.detach(), before_bias));
  CHECK(test::distance(other, before_other * 0.999) < 1e-7);

  CHECK(opt.lr(0) == 0.1);
  CHECK(opt.lr(2) == 0.01);
  opt.scale_lr(0.5);
  CHECK(opt.lr(0) == 0.05);
  CHECK(opt.lr(2) == 0.005);
  opt.set_lr(0.2);
  CHECK(opt.lr(1) == 0.2);
  CHECK(opt.lr(2) == 0.2);
  opt.scale_lr(1);
  CHECK(opt.lr(2) == 0.01);
}

TEST_CASE("split_decay: matrices decay; norms, biases and knocks do not; a predicate chooses otherwise") {
  const NamedTensors params{{"layers.0.q_proj.weight", leaf({4, 4})},
                            {"layers.0.q_norm.weight", leaf({4})},
                            {"layers.0.knock_v.up.weight", leaf({4, 4})},
                            {"embed_tokens.weight", leaf({8, 4})}};
  const AdamWOptions options{.weight_decay = 0.1};
  const auto groups = optim::split_decay(params, options);
  REQUIRE(groups.size() == 2);
  CHECK(groups[0].options.weight_decay == 0.1);
  CHECK(groups[0].params.size() == 2);
  CHECK(groups[1].options.weight_decay == 0);
  CHECK(groups[1].params[1].first == "layers.0.knock_v.up.weight");
  const auto chosen = optim::split_decay(
      params, options, [](std::string_view name, const Tensor&) { return !name.starts_with("embed"); });
  CHECK(chosen[1].params.size() == 1);
  CHECK(optim::split_decay(params, options, [](std::string_view, const Tensor&) { return true; }).size() == 1);
}

TEST_CASE("optimizers: state dict is strict and an error changes nothing") {
  const Tensor w = leaf({3, 2}), b = leaf({2});
  AdamW opt({{"w", w}, {"b", b}}, {});
  give_gradient(w);
  give_gradient(b);
  opt.step();
  StateDict state;
  for (const auto& [name, tensor] : opt.state_dict()) state.insert(name, tensor.clone());
  opt.step();

  StateDict damaged;
  for (const auto& [name, tensor] : state)
    if (name != "w.exp_avg" && name != "b.exp_avg_sq") damaged.insert(name, tensor);
  damaged.insert("b.exp_avg_sq", zeros({3}));
  damaged.insert("c.step", zeros({}, {DType::i64}));
  CHECK(error_of([&] { opt.load_state_dict(damaged); }) ==
        "[load_state_dict] missing: w.exp_avg; mismatched: b.exp_avg_sq (needs (2,) f32, given (3,) f32 cpu); "
        "unexpected: c.step");
  CHECK(contains(error_of([&] { opt.load_state_dict({}); }), "missing: w.step; missing: b.step"));
  CHECK(contains(error_of([&] {
                   opt.load_state_dict({{"w.step", zeros({2})}, {"b.step", state.at("b.step")}});
                 }),
                 "mismatched: w.step (needs one integer >= 0, given (2,) f32 cpu)"));
  CHECK(opt.state_dict().at("w.step").item<int64_t>() == 2);

  opt.load_state_dict(state);
  const StateDict restored = opt.state_dict();
  CHECK(names_of(restored) == names_of(state));
  for (const auto& [name, tensor] : restored) CHECK(test::same_bits(tensor, state.at(name)));
  // What was loaded is a copy.
  opt.step();
  CHECK(state.at("w.step").item<int64_t>() == 1);
  CHECK_FALSE(test::same_bits(opt.state_dict().at("w.exp_avg"), state.at("w.exp_avg")));
}

TEST_CASE("optimizers: no allocation reaches the system in a steady step, for any kind of clipping") {
  const Tensors params{leaf({300, 70}), leaf({70})};
  AdamW adamw(params, {});
  SGD sgd(params, {.momentum = 0.9});
  const auto step = [&] {
    for (const Tensor& p : params) sum(square(p)).backward();
    const double norm = optim::grad_norm(params);
    adamw.step(optim::clip_factor(norm, 1));
    optim::clip_grad_norm_(params, 0.5);
    sgd.step();
    sgd.zero_grad();
  };
  for (int i = 0; i < 3; ++i) step();
  const int64_t before = memory::stats().system_allocations, in_use = memory::stats().bytes_in_use;
  for (int i = 0; i < 5; ++i) step();
  CHECK(memory::stats().system_allocations == before);
  CHECK(memory::stats().bytes_in_use == in_use);
}

TEST_CASE("optimizers: the same bits for any number of threads, and a version for autograd") {
  const Tensor start = randn({100001}), gradient = randn({100001});
  const int threads = num_threads();
  Tensors results;
  std::vector<double> norms;
  for (const int n : {1, 3}) {
    set_num_threads(n);
    const Tensor p = start.clone().requires_grad_(), q = start.clone().requires_grad_();
    Tensor(p).set_grad(gradient.clone());
    Tensor(q).set_grad(gradient.clone());
    norms.push_back(optim::clip_grad_norm_({p, q}, 0.3));
    AdamW({p}, {}).step();
    SGD({q}, {}).step();
    results.push_back(p.detach());
    results.push_back(q.detach());
  }
  set_num_threads(threads);
  CHECK(test::same_bits(results[0], results[2]));
  CHECK(test::same_bits(results[1], results[3]));
  CHECK(norms[0] == norms[1]);

  const Tensor w = leaf({3});
  const Tensor loss = sum(square(w));
  give_gradient(w);
  SGD({w}, {}).step();
  CHECK(contains(error_of([&] { loss.backward(); }), "SGD"));
}

TEST_CASE("optimizers: errors at construction") {
  const Tensor w = leaf({3});
  CHECK(contains(error_of([] { AdamW opt(Tensors{}, {}); }), "[AdamW] got no parameters"));
  CHECK(contains(error_of([&] { SGD opt({w, w}, {}); }), "[SGD] parameter \"1\" is already there as \"0\""));
  CHECK(contains(error_of([&] { SGD opt({{"a", w}, {"a", leaf({2})}}, {}); }), "two parameters named \"a\""));
  CHECK(contains(error_of([&] { SGD opt({w * 2}, {}); }), "must be a floating leaf tensor"));
  CHECK(contains(error_of([] { SGD opt({Tensor()}, {}); }), "must be a floating leaf tensor"));
  CHECK(contains(error_of([&] { AdamW opt({w}, {.lr = -1}); }), "lr must not be negative"));
  CHECK(contains(error_of([&] { AdamW opt({w}, {.betas = {0.9, 1.0}}); }), "betas must be in [0, 1)"));
  CHECK(contains(error_of([&] { AdamW opt({w}, {.eps = -1}); }), "eps"));
  CHECK(contains(error_of([&] { AdamW opt({w}, {.weight_decay = -1}); }), "weight_decay"));
  CHECK(contains(error_of([&] { SGD opt({w}, {.momentum = -1}); }), "momentum"));
  CHECK(contains(error_of([&] { SGD opt({w}, {.nesterov = true}); }), "nesterov needs momentum"));

  AdamW opt({w}, {});
  CHECK(contains(error_of([&] { opt.add_group({{{"0", leaf({2})}}, {}}); }), "two parameters named \"0\""));
  give_gradient(w);
  opt.step();  // the failed group left no trace
  CHECK(opt.parameters().size() == 1);
}

TEST_CASE("optimizer steps: tensors that do not fit are refused") {
  const Tensor p = randn({3}), g = randn({3}), m = zeros({3});
  CHECK(contains(error_of([&] { adamw_step_({{p, randn({2}), m, m, {}}}); }), "gradient (2,) f32 cpu does not match"));
  CHECK(contains(error_of([&] { adamw_step_({{p, g, m, zeros({3}, {DType::f64}), {}}}); }), "state (3,) f64 cpu"));
  CHECK(contains(error_of([&] { sgd_step_({{arange(3), arange(3), {}, {}}}); }), "needs floating parameters"));
}

TEST_CASE("optimizers: a parameter that is not dense, and a gradient, are updated where they lie") {
  const Tensor start = randn({6, 5}), gradient = randn({5, 6});
  const auto run = [&](const Tensor& param, const Tensor& grad) {
    Tensor(param).requires_grad_().set_grad(grad);
    AdamW adamw({param}, {.lr = 0.1});
    SGD sgd({param}, {.lr = 0.1, .momentum = 0.9});
    for (int i = 0; i < 2; ++i) adamw.step(), sgd.step();
    return param.detach().clone();
  };
  const Tensor expected = run(start.t().contiguous(), gradient);
  const Tensor whole = zeros({6, 10}), part = whole.slice(1, 0, 10, 2);
  Tensor(part).copy_(start);
  CHECK(test::same_bits(run(part.t(), gradient.t().contiguous().t()), expected));
  CHECK(test::same_bits(whole.slice(1, 1, 10, 2), zeros({6, 5})));
}

TEST_CASE("optimizers: one step on many tensors of all sizes and dtypes is that on each") {
  Tensors params, alone;
  int64_t size = 1;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::f32, DType::bf16}) {
    for (const int64_t n : {int64_t{0}, size, int64_t{16384}, int64_t{40001}}) {
      params.push_back(leaf({n}, dtype));
      give_gradient(params.back());
      alone.push_back(params.back().detach().clone().requires_grad_());
      alone.back().set_grad(params.back().grad());
    }
    size = size * 7 + 3;
  }
  AdamW adamw(params, {.lr = 0.1});
  SGD sgd(params, {.lr = 0.1, .momentum = 0.9});
  for (int i = 0; i < 2; ++i) adamw.step(), sgd.step();
  for (std::size_t k = 0; k < params.size(); ++k) {
    AdamW own_adamw({alone[k]}, {.lr = 0.1});
    SGD own_sgd({alone[k]}, {.lr = 0.1, .momentum = 0.9});
    for (int i = 0; i < 2; ++i) own_adamw.step(), own_sgd.step();
    CHECK(test::same_bits(params[k].detach(), alone[k].detach()));
  }
}
