#pragma once
// User-defined differentiable functions, in the manner of torch::autograd::Function.
//
//   struct Cube : autograd::Function<Cube> {
//     static Tensor forward(autograd::Context& ctx, const Tensor& x) {
//       ctx.save({x});
//       return x * x * x;
//     }
//     static Tensors backward(autograd::Context& ctx, const Tensors& dy) {
//       const Tensor x = ctx.saved(0);
//       return {3 * x * x * dy[0]};                       // one gradient per Tensor argument of forward, in order
//     }
//   };
//   Tensor y = Cube::apply(x);

#include <knock/autograd/node.hpp>

#include <any>
#include <map>
#include <type_traits>

namespace knock::autograd {

/// What forward leaves for backward.
class Context {
 public:
  /// Inputs and constants; writing to them in place before backward is an error.
  void save(const Tensors& tensors) {
    for (const Tensor& tensor : tensors) saved_.emplace_back(tensor);
  }
  /// The i-th saved tensor.
  Tensor saved(std::size_t i) const {
    check(i < saved_.size(), "Context::saved", "index ", i, " with ", saved_.size(), " tensors saved");
    return saved_[i].get(*upstream_);
  }
  /// Anything else backward needs.
  std::map<std::string, std::any> values;
  /// In backward: whether the gradient of the i-th Tensor argument is wanted.
  bool needs(int64_t i) const { return upstream_->needs(i); }

 private:
  template <class>
  friend class Function;
  std::vector<Saved> saved_;
  const Upstream* upstream_ = nullptr;
};

/// Base of a user-defined function: `Derived` has static `forward(Context&, args...)`, giving a Tensor or Tensors, and
/// static `backward(Context&, const Tensors& dy) -> Tensors`.
template <class Derived>
class Function {
 public:
  /// Runs forward without recording and records the whole as one op.
  template <class... Args>
  static auto apply(Args&&... args) {
    Tensors inputs;
    (collect(inputs, args), ...);
    auto context = std::make_shared<Context>();
    auto outputs = [&] {
      const NoGradGuard guard;
      return Derived::forward(*context, std::forward<Args>(args)...);
    }();
    Tensors list;
    if constexpr (std::is_same_v<decltype(outputs), Tensor>) {
      outputs = fresh(outputs, inputs);
      list = {outputs};
    } else {
      for (Tensor& output : outputs) output = fresh(output, inputs);
      list = outputs;
    }
    record("function", std::span<const Tensor>(list), std::span<const Tensor>(inputs),
           [context, count = list.size()](const Upstream& up) -> Tensors {
             Tensors dy;
             for (std::size_t i = 0; i < count; ++i) dy.push_back(up.dy(static_cast<int64_t>(i)));
             context->upstream_ = &up;
             return Derived::backward(*context, dy);
           });
    return outputs;
  }

 private:
  template <class T>
  static void collect(Tensors& inputs, const T& arg) {
    if constexpr (std::is_convertible_v<const T&, const Tensor&>) inputs.push_back(arg);
  }
  // An output that is an input, or already has a history, gets a handle of its own.
  static Tensor fresh(const Tensor& output, const Tensors& inputs) {
    bool is_input = output.requires_grad();
    for (const Tensor& input : inputs) is_input = is_input || output.is(input);
    return is_input ? detail::alias(output) : output;
  }
};

}  // namespace knock::autograd
