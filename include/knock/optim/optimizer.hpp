#pragma once
// What all optimizers share: parameter groups with options of their own, state by parameter, saving and loading.

#include <knock/core/state_dict.hpp>
#include <knock/core/tensor.hpp>

#include <string>
#include <vector>

namespace knock::optim {

/// Parameters that share options.
template <class Options>
struct ParamGroup {
  NamedTensors params;
  Options options;
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  /// Updates every parameter that has a gradient; the others, and their state, stay as they are. Gradients count times
  /// `grad_scale` (see clip_factor).
  void step(double grad_scale = 1);
  /// Drops the gradients: grad() is undefined until the next backward.
  void zero_grad();

  /// Sets the learning rate of every group.
  virtual void set_lr(double lr) = 0;
  /// Sets the learning rate of every group to `factor` times the one it was made with.
  virtual void scale_lr(double factor) = 0;
  virtual double lr(std::size_t group = 0) const = 0;

  /// All parameters, in the order they were given.
  Tensors parameters() const;

  /// For each parameter `NAME.step` (i64, the number of its updates) and, once it was updated, its moments, such as
  /// `NAME.exp_avg`. The tensors share storage with the optimizer. Options such as the learning rate are not part of
  /// it.
  StateDict state_dict() const;
  /// Copies state in, by name. One error lists all missing, unexpected and mismatched names; then nothing is changed.
  void load_state_dict(const StateDict& state);

 protected:
  struct Slot {
    std::string name;
    Tensor param;
    std::size_t group;
    int64_t steps = 0;
    Tensors state;  ///< undefined before the first update
  };

  /// Names of the state tensors of each parameter of a group.
  using StateNames = std::vector<const char*>;

  Optimizer() = default;
  /// Appends a group of `op`, the optimizer.
  void add_slots(const char* op, const NamedTensors& params, StateNames names);
  /// One update of the slots, whose parameters have gradients; their steps already count it.
  virtual void update(const std::vector<Slot*>& slots, double grad_scale) = 0;

 private:
  std::vector<Slot> slots_;
  std::vector<StateNames> state_names_;  ///< by group
};

/// An optimizer whose groups have `Options`, with a learning rate `lr` among them. Beside Options stand
/// `check_options(options)`, which throws for impossible ones, and `state_names(options)`.
template <class Options>
class GroupedOptimizer : public Optimizer {
 public:
  using Group = ParamGroup<Options>;

  /// One group; state is named by position: 0, 1, ...
  explicit GroupedOptimizer(const Tensors& params, const Options& options = {}) {
    NamedTensors named;
    for (const Tensor& param : params) named.emplace_back(text(named.size()), param);
    add_group({std::move(named), options});
  }
  /// One group; state is named after the parameters.
  explicit GroupedOptimizer(const NamedTensors& params, const Options& options = {}) { add_group({params, options}); }
  explicit GroupedOptimizer(const std::vector<Group>& groups) {
    for (const Group& group : groups) add_group(group);
  }

  /// Adds parameters with options of their own. Error for impossible options, for a parameter or name that is already
  /// there, and for a tensor that is no leaf.
  void add_group(const Group& group) {
    check_options(group.options);
    add_slots(Options::optimizer, group.params, state_names(group.options));
    options_.push_back(group.options);
    peak_lr_.push_back(group.options.lr);
  }

  void set_lr(double lr) override {
    for (Options& options : options_) options.lr = lr;
  }
  void scale_lr(double factor) override {
    for (std::size_t i = 0; i < options_.size(); ++i) options_[i].lr = peak_lr_[i] * factor;
  }
  double lr(std::size_t group = 0) const override { return options_.at(group).lr; }

 protected:
  std::vector<Options> options_;

 private:
  std::vector<double> peak_lr_;
};

/// Whether weight decay is usual for a parameter: for matrices, but not for norms, biases and knocks.
bool usually_decays(std::string_view name, const Tensor& param);

/// Two groups: parameters that `decays(name, param)` accepts, with `options`, and the others with the same options but
/// no weight decay. A group without parameters is left out.
template <class Options, class Decays>
std::vector<ParamGroup<Options>> split_decay(const NamedTensors& params, const Options& options, Decays&& decays) {
  std::vector<ParamGroup<Options>> groups{{{}, options}, {{}, options}};
  groups[1].options.weight_decay = 0;
  for (const auto& [name, param] : params) groups[decays(name, param) ? 0 : 1].params.emplace_back(name, param);
  std::erase_if(groups, [](const auto& group) { return group.params.empty(); });
  return groups;
}
template <class Options>
std::vector<ParamGroup<Options>> split_decay(const NamedTensors& params, const Options& options) {
  return split_decay(params, options, usually_decays);
}

}  // namespace knock::optim

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPTIM_OPTIMIZER)
#include <knock/autograd/grad_mode.hpp>

namespace knock::optim {

KNOCK_FUNC bool usually_decays(std::string_view name, const Tensor& param) {
  return param.rank() >= 2 && name.find("knock") == std::string_view::npos;
}

KNOCK_FUNC void Optimizer::add_slots(const char* op, const NamedTensors& params, StateNames names) {
  check(!params.empty(), op, "got no parameters");
  std::vector<Slot> slots = slots_;  // an error leaves the optimizer as it was
  for (const auto& [name, param] : params) {
    check(param.defined() && is_float(param.dtype()) && param.is_leaf(), op, "parameter \"", name, "\", ", param,
          ", must be a floating leaf tensor");
    for (const Slot& slot : slots) {
      check(!slot.param.is(param), op, "parameter \"", name, "\" is already there as \"", slot.name, "\"");
      check(slot.name != name, op, "there are two parameters named \"", name, "\"");
    }
    slots.push_back({name, param, state_names_.size(), 0, Tensors(names.size())});
  }
  slots_ = std::move(slots);
  state_names_.push_back(std::move(names));
}

KNOCK_FUNC void Optimizer::step(double grad_scale) {
  std::vector<Slot*> due;
  for (Slot& slot : slots_) {
    const Tensor& param = slot.param;
    if (!param.grad().defined()) continue;
    for (Tensor& moment : slot.state)
      if (!moment.defined()) moment = zeros(param.shape(), {compute_dtype(param.dtype()), param.device()});
    ++slot.steps;
    due.push_back(&slot);
  }
  if (!due.empty()) update(due, grad_scale);
}

KNOCK_FUNC void Optimizer::zero_grad() {
  for (Slot& slot : slots_) slot.param.set_grad({});
}

KNOCK_FUNC Tensors Optimizer::parameters() const {
  Tensors params;
  for (const Slot& slot : slots_) params.push_back(slot.param);
  return params;
}

KNOCK_FUNC StateDict Optimizer::state_dict() const {
  StateDict state;
  for (const Slot& slot : slots_) {
    state.insert(slot.name + ".step", from_data({slot.steps}, {}));
    const auto& names = state_names_[slot.group];
    for (std::size_t i = 0; i < names.size(); ++i)
      if (slot.steps > 0) state.insert(text(slot.name, ".", names[i]), slot.state[i]);
  }
  return state;
}

KNOCK_FUNC void Optimizer::load_state_dict(const StateDict& state) {
  std::string report;
  const auto complain = [&](const char* what, const auto&... pieces) {
    report += text(report.empty() ? "" : "; ", what, " ", pieces...);
  };
  StateDict expected;
  std::vector<int64_t> steps;
  for (const Slot& slot : slots_) {
    const std::string counter = slot.name + ".step";
    const Tensor* given = state.find(counter);
    const bool valid = given && given->numel() == 1 && !is_float(given->dtype()) && given->item<int64_t>() >= 0;
    if (!given) complain("missing:", counter);
    if (given && !valid) complain("mismatched:", counter, " (needs one integer >= 0, given ", *given, ")");
    steps.push_back(valid ? given->item<int64_t>() : 0);
    expected[counter] = Tensor();
    if (steps.back() == 0) continue;
    for (const char* moment : state_names_[slot.group]) {
      const std::string name = text(slot.name, ".", moment);
      const Tensor* tensor = state.find(name);
      const DType dtype = compute_dtype(slot.param.dtype());
      if (!tensor) {
        complain("missing:", name);
      } else if (tensor->shape() != slot.param.shape() || tensor->dtype() != dtype) {
        complain("mismatched:", name, " (needs ", slot.param.shape(), " ", dtype, ", given ", *tensor, ")");
      }
      expected[name] = tensor ? *tensor : Tensor();
    }
  }
  for (const auto& [name, tensor] : state)
    if (!expected.contains(name)) complain("unexpected:", name);
  check(report.empty(), "load_state_dict", report);

  const NoGradGuard no_grad;
  for (std::size_t s = 0; s < slots_.size(); ++s) {
    Slot& slot = slots_[s];
    slot.steps = steps[s];
    const auto& names = state_names_[slot.group];
    for (std::size_t i = 0; i < names.size(); ++i) {
      slot.state[i] = Tensor();
      if (slot.steps > 0) slot.state[i] = expected.at(text(slot.name, ".", names[i])).to(slot.param.device()).clone();
    }
  }
}

}  // namespace knock::optim
#endif
