// The bf16 copies that f32 weights keep on the device: what products read is never stale, and optimizers write it.

#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>
#include <support/tiny_lm.hpp>

using namespace knock;
using test::same_bits;

namespace {

const Device gpu = "cuda:0";
constexpr TensorOptions on_gpu{.device = Device(DeviceKind::cuda)}, bf16_on_gpu{DType::bf16, Device(DeviceKind::cuda)};

/// What a product reads of a weight (out, in): x w^T with the identity, which adds nothing but zeros.
Tensor as_read(const Tensor& weight) {
  const NoGradGuard no_grad;
  return linear(eye(weight.size(1), bf16_on_gpu), weight).t();
}

void check_read(const Tensor& weight) { CHECK(same_bits(as_read(weight), weight.detach().to(DType::bf16))); }

const void* copy_of(const Tensor& x) {
  const auto& copy = x.impl().storage->rounded;
  return copy ? copy->data : nullptr;
}

template <class Run>
int64_t roundings(Run&& run) {
  trace::start();
  run();
  int64_t count = 0;
  for (const trace::Event& event : trace::stop()) count += event.op == "round_weight";
  return count;
}

/// Whether a product is given an f32 operand beside a bf16 one, which it would round itself; gemm_wide does not.
bool rounds_operand(const trace::Event& event) {
  const auto narrow = event.shapes.find(" bf16"), wide = event.shapes.find(" f32");
  if (narrow == std::string::npos || wide == std::string::npos) return false;
  if (event.kernel.starts_with("moe_")) return event.kernel == "moe_forward";  // backward's gradients are f32
  const auto second = event.shapes.find(" (");                                 // the operands come first
  const auto third = event.shapes.find(" (", second + 1);
  const bool reads_weight = (event.kernel.starts_with("gemm") && event.kernel != "gemm_wide") ||
                            event.kernel.starts_with("knock_norm_rope") || event.kernel.starts_with("mlp_knock");
  return reads_weight && std::min(narrow, wide) < second && std::max(narrow, wide) < third;
}

Tensor weight(const Shape& shape) { return randn(shape, on_gpu).requires_grad_(); }

}  // namespace

TEST_CASE("rounded: made when a product first asks, read as often as wanted, by all views") {
  const Tensor w = weight({4, 6, 5}), x = randn({3, 5}, bf16_on_gpu);
  CHECK(copy_of(w) == nullptr);
  Tensor first;
  CHECK(roundings([&] { first = linear(x, w[1]); }) == 1);
  CHECK(roundings([&] {
          CHECK(same_bits(linear(x, w[1]), first));
          for (int64_t i = 0; i < 4; ++i) check_read(w[i]);
          check_read(w.view({8, 15}).narrow(0, 2, 3));
          check_read(w[2].t());
          check_read(w.detach()[3].slice(0, 1, 6, 2));
        }) == 0);
  CHECK(roundings([&] { linear(randn({3, 5}, on_gpu), w[1]); }) == 0);  // f32 reads the weight itself
}

TEST_CASE("rounded: the CPU keeps none, and neither do bf16 weights") {
  const Tensor w = randn({6, 5}).requires_grad_(), v = randn({6, 5}, bf16_on_gpu);
  linear(randn({3, 5}).to(DType::bf16), w);
  linear(randn({3, 5}, bf16_on_gpu), v);
  CHECK(copy_of(w) == nullptr);
  CHECK(copy_of(v) == nullptr);
}

TEST_CASE("rounded: every in-place write is seen, through the tensor and through views of it") {
  const auto after = [](auto&& write) {
    const NoGradGuard no_grad;
    const Tensor w = weight({6, 5});
    check_read(w);
    const void* const place = copy_of(w);
    const Tensor before = as_read(w).clone();
    write(Tensor(w));
    CHECK_FALSE(same_bits(as_read(w), before));
    check_read(w);
    CHECK(copy_of(w) == place);
  };
  after([](Tensor w) { w.copy_(randn({6, 5})); });
  after([](Tensor w) { w.mul_(1.5); });
  after([](Tensor w) { w.add_(randn({6, 5}, on_gpu)); });
  after([](Tensor w) { w.fill_(2); });
  after([](Tensor w) { w.normal_(); });
  after([](Tensor w) { w.exp_(); });
  after([](Tensor w) { w.lerp_(ones({6, 5}, on_gpu), 0.5); });
  after([](Tensor w) { w.masked_fill_(w > 0, 7); });
  after([](Tensor w) { w[3].zero_(); });
  after([](Tensor w) { w.t().narrow(0, 1, 2).mul_(3); });
  after([](Tensor w) { w.detach().view({30}).slice(0, 0, 30, 7).uniform_(5, 6); });
  after([](Tensor w) { scale_({w.narrow(0, 1, 1)}, 0.5); });
  after([](Tensor w) { nn::fold_into_rows(w.view({2, 3, 5}), 2 * eye(3, on_gpu)); });
}

TEST_CASE("rounded: loading a state, and moving a model to another device and back") {
  nn::Linear layer(5, 6), other(5, 6);
  layer.to(gpu);
  check_read(layer.weight);
  layer.load_state_dict(other.state_dict());
  CHECK(same_bits(as_read(layer.weight).to("cpu"), other.weight.detach().to(DType::bf16)));
  layer.to("cpu");
  {
    const NoGradGuard no_grad;
    layer.weight.mul_(2);
  }
  layer.to(gpu);
  check_read(layer.weight);
}

TEST_CASE("rounded: optimizers write the copy in the pass that writes the parameter") {
  const auto check_optimizer = [](auto&& make) {
    Tensors params{weight({6, 5}), weight({129, 65}), weight({1, 1})};
    const Tensor flat = randn({1 + 7 * 3}, on_gpu);  // a parameter at an odd place of its memory
    params.push_back(flat.narrow(0, 1, 21).view({7, 3}).detach().requires_grad_());
    const auto optimizer = make(params);
    for (const Tensor& p : params) check_read(p);
    std::vector<const void*> places;
    for (const Tensor& p : params) places.push_back(copy_of(p));
    for (int step = 0; step < 3; ++step) {
      for (const Tensor& p : params) Tensor(p).set_grad(randn(p.shape(), on_gpu));
      const Tensor before = as_read(params[1]).clone();
      CHECK(roundings([&] {
              optimizer->step();
              for (const Tensor& p : params) check_read(p);
            }) == 0);
      CHECK_FALSE(same_bits(as_read(params[1]), before));
    }
    for (std::size_t i = 0; i < params.size(); ++i) CHECK(copy_of(params[i]) == places[i]);
  };
  check_optimizer([](const Tensors& p) { return std::make_unique<optim::AdamW>(p, optim::AdamWOptions{.lr = 0.1}); });
  check_optimizer([](const Tensors& p) { return std::make_unique<optim::SGD>(p, optim::SGDOptions{.lr = 0.1}); });
  check_optimizer(
      [](const Tensors& p) { return std::make_unique<optim::SGD>(p, optim::SGDOptions{.lr = 0.1, .momentum = 0.9}); });
}

TEST_CASE("rounded: an optimizer leaves a stale copy stale, and parameters that share memory are all seen") {
  const Tensor w = weight({6, 5});
  check_read(w);
  {
    const NoGradGuard no_grad;
    Tensor(w).mul_(2);  // makes the copy stale
  }
  Tensor(w).set_grad(zeros({6, 5}, on_gpu));
  optim::AdamW({w}, {.lr = 0.1, .weight_decay = 0}).step();
  check_read(w);

  // One storage: two dense parameters, one that is not, and rows that no parameter owns.
  const Tensor whole = randn({8, 6}, on_gpu);
  const Tensor a = whole.narrow(0, 0, 2).detach().requires_grad_(), b = whole.narrow(0, 2, 2).detach().requires_grad_(),
               c = whole.narrow(0, 4, 3).slice(1, 0, 6, 2).detach().requires_grad_();
  for (const Tensors& params : {Tensors{a, b}, Tensors{a, c, b}, Tensors{c}, Tensors{a}}) {
    optim::SGD sgd(params, {.lr = 1});
    check_read(whole);
    for (const Tensor& p : params) Tensor(p).set_grad(randn(p.shape(), on_gpu));
    sgd.step();
    check_read(whole);
    for (const Tensor& p : params) check_read(p);
  }
}

TEST_CASE("rounded: the CPU's gradients, from the same copy forward and backward") {
  const Tensor w = randn({7, 5}), bias = randn({7}), x = randn({4, 5}).to(DType::bf16),
               up = randn({4, 7}).to(DType::bf16);
  const auto gradients = [&](Device device) {
    Tensors leaves{x.to(device).detach().requires_grad_(), w.to(device).detach().requires_grad_(),
                   bias.to(device).detach().requires_grad_()};
    linear(leaves[0], leaves[1], leaves[2]).backward(up.to(device));
    Tensors out;
    for (const Tensor& leaf : leaves) out.push_back(leaf.grad().to("cpu"));
    return out;
  };
  Tensors found;
  CHECK(roundings([&] { found = gradients(gpu); }) == 2);  // weight and bias
  const Tensors expected = gradients("cpu");
  for (std::size_t i = 0; i < found.size(); ++i) {
    CHECK(found[i].dtype() == expected[i].dtype());
    CHECK(test::distance(found[i], expected[i]) < 8e-3);
  }
  Tensor leaf = weight({7, 5});
  const Tensor y = linear(randn({4, 5}, bf16_on_gpu).requires_grad_(), leaf);
  leaf.set_grad(ones({7, 5}, on_gpu));
  optim::SGD({leaf}, {}).step();  // the copy has moved on, and backward must say so
  CHECK(test::contains(test::error_of([&] { y.backward(ones({4, 7}, bf16_on_gpu)); }), "that SGD changed in place"));
}

TEST_CASE("rounded: replays of graphs read no stale copy, and leave none") {
  const NoGradGuard no_grad;
  const Tensor w = weight({6, 5}), x = eye(5, bf16_on_gpu), fresh = weight({6, 5});
  CHECK(test::contains(test::error_of([&] { Graph::capture(gpu, [&] { linear(x, w); }); }),
                       "run once before the capture"));
  linear(x, w);
  Tensor y;
  Graph read = Graph::capture(gpu, [&] { y = linear(x, w); });
  const auto check_replay = [&] {
    read.replay();
    CHECK(same_bits(y.t(), w.detach().to(DType::bf16)));
  };
  check_replay();
  CHECK(roundings([&] { read.replay(); }) == 0);
  Tensor(w).copy_(randn({6, 5}));  // outside of the graph
  check_replay();
  check_read(w);

  Tensor(w).set_grad(ones({6, 5}, on_gpu));
  optim::SGD sgd({w}, {.lr = 0.5});
  Graph step = Graph::capture(gpu, [&] { sgd.step(); });  // writes the weight and the copy
  check_read(w);
  CHECK(roundings([&] {
          for (int i = 0; i < 2; ++i) {
            step.replay();
            check_read(w);
            check_replay();
          }
        }) == 0);
  Tensor(w).mul_(2);  // the graph writes the copy still, but it was stale
  step.replay();
  check_read(w);

  Graph write = Graph::capture(gpu, [&] { Tensor(w).mul_(1.5); });
  for (int i = 0; i < 2; ++i) {
    check_read(w);
    const uint32_t version = w.impl().storage->version;
    write.replay();
    CHECK(w.impl().storage->version != version);
  }
  check_read(w);
  check_replay();

  linear(x, fresh);  // made stale within the capture: the graph makes it anew itself
  Graph both = Graph::capture(gpu, [&] {
    Tensor(fresh).mul_(1.5);
    y = linear(x, fresh);
  });
  for (int i = 0; i < 2; ++i) {
    both.replay();
    CHECK(same_bits(y.t(), fresh.detach().to(DType::bf16)));
    check_read(fresh);
  }
}

TEST_CASE("rounded: experts and the loss of logits read it too; a steady step of a model rounds no weight") {
  manual_seed(3);
  models::MoeLm model(test::tiny_lm());
  model.to(gpu);
  model.set_compute_dtype(DType::bf16);
  const Tensor tokens = randint(0, 64, {2, 17}).to(gpu), inputs = tokens.narrow(1, 0, 16).contiguous(),
               targets = tokens.narrow(1, 1, 16).contiguous();
  optim::AdamW optimizer(model.parameters(), {.lr = 1e-3});
  const auto step = [&] {
    model.zero_grad();
    model.loss(inputs, targets).backward();
    optimizer.step(optim::clip_factor(optim::grad_norm(model.parameters()), 1));
  };
  CHECK(roundings(step) > 0);
  step();
  trace::start();
  step();
  int64_t products = 0;
  for (const trace::Event& event : trace::stop()) {
    CAPTURE(event.shapes);
    CHECK(event.op != "round_weight");
    CHECK_FALSE(rounds_operand(event));
    products += event.kernel.starts_with("gemm") || event.kernel == "moe_forward";
  }
  CHECK(products > 20);
  CHECK(rounds_operand({.kernel = "gemm", .shapes = "(2, 3) bf16 (3, 4) f32 (2, 4) bf16"}));
  CHECK_FALSE(rounds_operand({.kernel = "gemm", .shapes = "(2, 3) bf16 (3, 4) bf16 (2, 4) f32"}));
  for (const auto& entry : model.named_parameters()) {
    const std::string& name = entry.first;
    const Tensor& p = entry.second;
    CAPTURE(name);
    if (name.find("experts") != std::string::npos || name.find("knock") != std::string::npos)
      CHECK(copy_of(p) != nullptr);
    if (copy_of(p) && p.rank() == 2) check_read(p);
  }
}
