#pragma once
// Modules: named parameters, buffers and children, and what one does with them as a whole.
//
//   struct Mlp2 : nn::Module {
//     nn::Linear in{64, 256}, out{256, 10};
//     Mlp2() {
//       register_module("in", in);
//       register_module("out", out);
//     }
//     Tensor forward(const Tensor& x) { return out(gelu(in(x))); }
//   };

#include <knock/core/state_dict.hpp>
#include <knock/core/tensor.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace knock::nn {

class Module {
 public:
  Module() = default;
  virtual ~Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  /// Own parameters and those of all children, in order of registration, with dotted names. What optimizers update.
  NamedTensors named_parameters() const;
  Tensors parameters() const;
  /// Tensors that belong to the state but take no gradient.
  NamedTensors named_buffers() const;
  /// Number of elements of all parameters.
  int64_t parameter_count() const;

  /// Names and tensors as files show them; they share storage with the module.
  StateDict state_dict() const;
  /// Copies values in, by name. When `strict`, one error lists all missing, unexpected and mismatched names, and
  /// nothing is changed; otherwise only those present and matching are taken.
  void load_state_dict(const StateDict& state, bool strict = true);

  /// Training or evaluation behaviour (dropout), for all children too.
  void train(bool on = true);
  void eval() { train(false); }
  bool is_training() const { return training_; }

  /// Converts all parameters in place: their handles stay valid, so optimizers keep them. Buffers keep their dtype.
  void to(DType dtype);
  /// Moves parameters and buffers.
  void to(Device device);
  /// Drops all gradients.
  void zero_grad();

 protected:
  Tensor register_parameter(std::string name, const Tensor& tensor);
  Tensor register_buffer(std::string name, const Tensor& tensor);
  void register_module(std::string name, Module& child);
  /// Drops own parameters and children of this name.
  void unregister(std::string_view name);
  /// Replaces what a parameter's handle holds.
  static void assign(const Tensor& parameter, const Tensor& value);

  /// Adds this module's part of `state_dict`; modules that store parameters in another form than they show override it.
  KNOCK_FUNC virtual void append_state(const std::string& prefix, StateDict& out) const;
  void append_children_state(const std::string& prefix, StateDict& out) const;

 private:
  template <class Visit>
  void visit(const std::string& prefix, Visit&& each) const;

  NamedTensors parameters_, buffers_;
  std::vector<std::pair<std::string, Module*>> children_;
  bool training_ = true;
};

/// A module from one tensor to one tensor.
class Layer : public Module {
 public:
  virtual Tensor forward(const Tensor& x) = 0;
  Tensor operator()(const Tensor& x) { return forward(x); }
};

/// A parameter as ops take it beside x: in x's dtype, or f32 beside bf16, which they round as they read. Undefined
/// stays undefined.
Tensor beside(const Tensor& x, const Tensor& parameter);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MODULE)
#include <knock/autograd/grad_mode.hpp>

namespace knock::nn {

template <class Visit>
void Module::visit(const std::string& prefix, Visit&& each) const {
  each(prefix, *this);
  for (const auto& [name, child] : children_) child->visit(prefix + name + ".", each);
}

KNOCK_FUNC NamedTensors Module::named_parameters() const {
  NamedTensors out;
  visit("", [&](const std::string& prefix, const Module& module) {
    for (const auto& [name, tensor] : module.parameters_) out.emplace_back(prefix + name, tensor);
  });
  return out;
}

KNOCK_FUNC NamedTensors Module::named_buffers() const {
  NamedTensors out;
  visit("", [&](const std::string& prefix, const Module& module) {
    for (const auto& [name, tensor] : module.buffers_) out.emplace_back(prefix + name, tensor);
  });
  return out;
}

KNOCK_FUNC Tensors Module::parameters() const {
  Tensors out;
  for (const auto& [name, tensor] : named_parameters()) out.push_back(tensor);
  return out;
}

KNOCK_FUNC int64_t Module::parameter_count() const {
  int64_t count = 0;
  for (const Tensor& parameter : parameters()) count += parameter.numel();
  return count;
}

KNOCK_FUNC StateDict Module::state_dict() const {
  const NoGradGuard no_grad;
  StateDict out;
  append_state("", out);
  return out;
}

KNOCK_FUNC void Module::append_state(const std::string& prefix, StateDict& out) const {
  for (const auto& [name, tensor] : parameters_) out.insert(prefix + name, tensor.detach());
  for (const auto& [name, tensor] : buffers_) out.insert(prefix + name, tensor.detach());
  append_children_state(prefix, out);
}

KNOCK_FUNC void Module::append_children_state(const std::string& prefix, StateDict& out) const {
  for (const auto& [name, child] : children_) child->append_state(prefix + name + ".", out);
}

KNOCK_FUNC void Module::load_state_dict(const StateDict& state, bool strict) {
  const NoGradGuard no_grad;
  const StateDict own = state_dict();
  std::string missing, unexpected, mismatched;
  const auto append = [](std::string& list, const auto&... pieces) {
    list += text(list.empty() ? "" : ", ", pieces...);
  };
  for (const auto& [name, tensor] : own) {
    const Tensor* given = state.find(name);
    if (!given) {
      append(missing, name);
    } else if (given->shape() != tensor.shape()) {
      append(mismatched, name, " (has ", tensor.shape(), ", given ", given->shape(), ")");
    }
  }
  for (const auto& [name, tensor] : state)
    if (!own.contains(name)) append(unexpected, name);
  if (strict) {
    std::string report;
    if (!missing.empty()) append(report, "missing: ", missing);
    if (!unexpected.empty()) report += text(report.empty() ? "" : "; ", "unexpected: ", unexpected);
    if (!mismatched.empty()) report += text(report.empty() ? "" : "; ", "mismatched: ", mismatched);
    check(report.empty(), "load_state_dict", report);
  }
  for (const auto& [name, tensor] : own) {
    const Tensor* given = state.find(name);
    if (given && given->shape() == tensor.shape()) Tensor(tensor).copy_(*given);
  }
}

KNOCK_FUNC void Module::train(bool on) {
  training_ = on;
  for (const auto& [name, child] : children_) child->train(on);
}

KNOCK_FUNC void Module::assign(const Tensor& parameter, const Tensor& value) {
  const TensorImpl& from = value.impl();
  TensorImpl& to = parameter.impl();
  to.storage = from.storage;
  to.shape = from.shape;
  to.strides = from.strides;
  to.offset = from.offset;
  to.dtype = from.dtype;
  to.meta = nullptr;
}

KNOCK_FUNC void Module::to(DType dtype) {
  const NoGradGuard no_grad;
  for (const auto& [name, tensor] : named_parameters())
    if (tensor.dtype() != dtype) assign(tensor, tensor.to(dtype));
}

KNOCK_FUNC void Module::to(Device device) {
  const NoGradGuard no_grad;
  for (const NamedTensors& list : {named_parameters(), named_buffers()})
    for (const auto& [name, tensor] : list)
      if (tensor.device() != device) assign(tensor, tensor.to(device));
}

KNOCK_FUNC void Module::zero_grad() {
  for (Tensor parameter : parameters()) parameter.set_grad({});
}

KNOCK_FUNC Tensor Module::register_parameter(std::string name, const Tensor& tensor) {
  Tensor parameter = tensor;
  parameter.requires_grad_();
  parameters_.emplace_back(std::move(name), parameter);
  return parameter;
}

KNOCK_FUNC Tensor Module::register_buffer(std::string name, const Tensor& tensor) {
  buffers_.emplace_back(std::move(name), tensor);
  return tensor;
}

KNOCK_FUNC void Module::register_module(std::string name, Module& child) {
  children_.emplace_back(std::move(name), &child);
}

KNOCK_FUNC void Module::unregister(std::string_view name) {
  std::erase_if(parameters_, [&](const auto& entry) { return entry.first == name; });
  std::erase_if(children_, [&](const auto& entry) { return entry.first == name; });
}

KNOCK_FUNC Tensor beside(const Tensor& x, const Tensor& parameter) {
  const bool fits = x.dtype() == DType::bf16 && parameter.defined() && parameter.dtype() == DType::f32;
  return fits || !parameter.defined() ? parameter : parameter.to(x.dtype());
}

}  // namespace knock::nn
#endif
