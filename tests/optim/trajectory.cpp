// Whole optimization runs against PyTorch's (tests/golden/optim.py), step for step in f64, and f32 and bf16 beside
// them.
#include <doctest/doctest.h>
#include <knock/io/safetensors.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>
#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>
#include <knock/optim/schedule.hpp>
#include <knock/optim/sgd.hpp>
#include <support/compare.hpp>

#include <functional>
#include <memory>

using namespace knock;
using optim::AdamW;
using optim::SGD;
using test::distance;

namespace {

constexpr int steps = 100, sample_every = 10;

const StateDict& golden() {
  static const StateDict data = io::load_safetensors(KNOCK_TEST_DATA "/optim.safetensors");
  return data;
}

using Make = std::function<std::unique_ptr<optim::Optimizer>(const NamedTensors&)>;

template <class Optimizer, class Options>
Make make(const Options& options) {
  return [options](const NamedTensors& params) { return std::make_unique<Optimizer>(params, options); };
}

struct Case {
  const char* name;
  Make make;
  double max_norm = 0;
  double scheduled_peak = 0;
};

const std::vector<Case>& cases() {  // tests/golden/optim.py has the same list
  using optim::AdamWOptions;
  using optim::SGDOptions;
  static const std::vector<Case> all = {
      {"adamw", make<AdamW>(AdamWOptions{})},
      {"adamw_options", make<AdamW>(AdamWOptions{.lr = 3e-2, .betas = {0.8, 0.95}, .eps = 1e-4, .weight_decay = 0.3})},
      {"adamw_clipped", make<AdamW>(AdamWOptions{.lr = 1e-2, .weight_decay = 0}), 0.5},
      {"adamw_schedule", make<AdamW>(AdamWOptions{.lr = 5e-2}), 0, 5e-2},
      {"sgd", make<SGD>(SGDOptions{.lr = 2e-2})},
      {"sgd_momentum", make<SGD>(SGDOptions{.lr = 1e-2, .momentum = 0.9})},
      {"sgd_dampening", make<SGD>(SGDOptions{.lr = 3e-2, .momentum = 0.8, .dampening = 0.5, .weight_decay = 0.1})},
      {"sgd_nesterov", make<SGD>(SGDOptions{.lr = 1e-2, .momentum = 0.9, .nesterov = true, .weight_decay = 0.05}), 2.0},
  };
  return all;
}

/// The minimisation of tests/golden/optim.py in one dtype.
class Run {
 public:
  Run(const Case& c, DType dtype) : case_(c), dtype_(dtype) {
    for (const char* name : {"first", "second"})
      params_.emplace_back(name, golden().at(text("p0/", name)).to(dtype).clone().requires_grad_());
    opt_ = c.make(params_);
  }

  optim::Optimizer& optimizer() { return *opt_; }
  const NamedTensors& params() const { return params_; }
  const std::vector<double>& norms() const { return norms_; }

  /// The steps from `first` up to `last`. With `fused_clip` the factor is handed to the step.
  void advance(int first, int last, bool fused_clip = false) {
    for (int step = first; step < last; ++step) {
      opt_->zero_grad();
      backward(step);
      if (case_.scheduled_peak > 0) {
        const optim::Schedule schedule({.kind = optim::ScheduleKind::cosine, .total = steps, .min_lr_ratio = 0.1});
        opt_->set_lr(case_.scheduled_peak * schedule.factor(step));
      }
      double factor = 1;
      if (case_.max_norm > 0) {
        const Tensors tensors = opt_->parameters();
        norms_.push_back(fused_clip ? optim::grad_norm(tensors) : optim::clip_grad_norm_(tensors, case_.max_norm));
        if (fused_clip) factor = optim::clip_factor(norms_.back(), case_.max_norm);
      }
      opt_->step(factor);
    }
  }

  /// Both parameters, flattened, in f64.
  Tensor flat() const {
    const NoGradGuard no_grad;
    Tensors parts;
    for (const auto& [name, p] : params_) parts.push_back(p.detach().to(DType::f64).flatten());
    return cat(parts, 0);
  }

 private:
  void backward(int step) {
    for (const auto& [name, p] : params_) {
      if (name == "second" && step % 2 == 1) continue;
      const Tensor a = golden().at("a/" + name).to(dtype_), b = golden().at("b/" + name).to(dtype_);
      (sum(a * square(p - b)) / 2 + sum(square(square(p))) / 40).backward();
    }
  }

  const Case& case_;
  DType dtype_;
  NamedTensors params_;
  std::unique_ptr<optim::Optimizer> opt_;
  std::vector<double> norms_;
};

}  // namespace

TEST_CASE("optimizers: 100 steps in f64 are PyTorch's") {
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    const Tensor samples = golden().at(text("case/", c.name));
    Run run(c, DType::f64);
    for (int sample = 0; sample < steps / sample_every; ++sample) {
      CAPTURE(sample);
      run.advance(sample * sample_every, (sample + 1) * sample_every);
      CHECK(distance(run.flat(), samples[sample]) < 1e-13);
    }
    if (c.max_norm > 0) CHECK(distance(from_data(run.norms(), {steps}), golden().at(text("norms/", c.name))) < 1e-13);
  }
}

TEST_CASE("optimizers: a clip factor handed to the step does what clipping in place does") {
  for (const Case& c : cases()) {
    if (c.max_norm == 0) continue;
    Run run(c, DType::f64);
    run.advance(0, steps, true);
    CHECK(distance(run.flat(), golden().at(text("case/", c.name))[9]) < 1e-13);
  }
}

TEST_CASE("optimizers: f32 parameters stay near the f64 trajectory") {
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    Run run(c, DType::f32);
    run.advance(0, steps);
    CHECK(distance(run.flat(), golden().at(text("case/", c.name))[9]) < 2e-6);
  }
}

TEST_CASE("optimizers: a step on bf16 parameters is the f64 step rounded once") {
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    const Tensor start = randn({500}).to(DType::bf16), gradient = randn({500}).to(DType::bf16);
    Tensor narrow = start.clone().requires_grad_(), wide = start.to(DType::f64).requires_grad_();
    narrow.set_grad(gradient);
    wide.set_grad(gradient.to(DType::f64));
    c.make({{"x", narrow}})->step();
    c.make({{"x", wide}})->step();
    CHECK(distance(narrow, wide.detach().to(DType::bf16)) < 4e-3);  // a unit in the last place of the largest
    CHECK(mean((narrow.detach() != wide.detach().to(DType::bf16)).to(DType::f64)).item() < 0.01);
  }
}

TEST_CASE("optimizers: saving, loading and going on gives the bits of going on") {
  for (const Case& c : cases()) {
    CAPTURE(c.name);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Run run(c, dtype), other(c, dtype);
      run.advance(0, 37);
      other.advance(0, 5);  // state of its own, to be replaced
      other.optimizer().load_state_dict(run.optimizer().state_dict());
      for (std::size_t i = 0; i < run.params().size(); ++i) {
        const NoGradGuard no_grad;
        Tensor(other.params()[i].second).copy_(run.params()[i].second);
      }
      run.advance(37, 60);
      other.advance(37, 60);
      CHECK(test::same_bits(run.flat(), other.flat()));
    }
  }
}
