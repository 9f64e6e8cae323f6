#pragma once
// The recorded graph: nodes, edges, what they save, and how an op records itself.
//
// An op computes its value, then says beside it how gradients flow:
//
//   Tensor exp(const Tensor& x) {
//     Tensor y = ...;
//     return autograd::record("exp", y, {x}, [y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
//       return {up.dy() * y.get(up)};          // one gradient per input
//     });
//   }
//
// Nodes point to the nodes that made their inputs, so every edge leads to a smaller sequence number.

#include <knock/autograd/grad_mode.hpp>
#include <knock/core/tensor.hpp>

#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace knock {
namespace autograd {

using Hook = std::function<Tensor(const Tensor&)>;

/// Where a gradient goes: output `index` of `node`. Without a node the gradient is not wanted.
struct Edge {
  std::shared_ptr<Node> node;
  int64_t index = 0;
};

class Upstream;
namespace detail {
class BackwardPass;  // engine.hpp
}

/// One recorded op. Its outputs' gradients come in, its inputs' gradients go out.
class Node : public std::enable_shared_from_this<Node> {
 public:
  struct Output {
    Shape shape;
    DType dtype;
    Device device;
    std::vector<Hook> hooks;
  };

  explicit Node(const char* op);
  virtual ~Node() = default;
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  /// Gradients of the inputs, in order; undefined ones count as zero.
  virtual Tensors apply(const Upstream& upstream) = 0;
  /// Frees what was saved for `apply`, which then cannot run again.
  virtual void release() {}
  /// Whether `apply` stores into a leaf's gradient instead of passing gradients on.
  virtual bool is_accumulator() const { return false; }
  /// Whether `apply` may be called with each part of a gradient as it arrives, instead of once with their sum.
  virtual bool takes_parts() const { return false; }
  /// Hands over the sum that parts are added to, if no one else can see it.
  virtual Tensor hand_over_sum(const char* /*op*/) { return {}; }

  const char* name() const { return name_; }
  uint64_t sequence() const { return sequence_; }

  std::vector<Edge> inputs;
  std::vector<Output> outputs;

 protected:
  const char* name_;
  uint64_t sequence_;  ///< creation order; 0 for accumulators
};

/// A shared node whose destruction does not recurse along the graph.
template <class T, class... Args>
std::shared_ptr<Node> make_node(Args&&... args);

/// What a tensor carries for autograd.
struct Meta {
  Tensor grad;
  std::shared_ptr<Node> grad_fn;
  int64_t output_index = 0;
  std::weak_ptr<Node> accumulator;   ///< of a leaf
  std::vector<Hook> hooks;           ///< of a leaf
  std::shared_ptr<TensorImpl> base;  ///< of a view: the tensor it looks into
  uint32_t version = 0;              ///< of a view: the storage's version that grad_fn belongs to
  bool tracked = false;              ///< of a view: made while recording, so that it follows its base's history
};

/// The tensor's autograd data, made when absent.
Meta& meta_of(const Tensor& tensor);

/// Where the gradient of this tensor goes.
Edge gradient_edge(const Tensor& tensor);

/// What backward of one node gets: the gradients of its outputs.
class Upstream {
 public:
  /// `pass`: the backward pass, where the op may take what it adds to.
  Upstream(Node& node, const Tensors& gradients, detail::BackwardPass* pass = nullptr)
      : node_(node), gradients_(gradients), pass_(pass) {}

  /// Gradient of output i, zeros when none came.
  Tensor dy(int64_t i = 0) const;
  /// Whether any gradient came for output i.
  bool has(int64_t i) const { return gradients_[static_cast<std::size_t>(i)].defined(); }
  /// Whether the gradient of input i is wanted.
  bool needs(int64_t i) const { return node_.inputs[static_cast<std::size_t>(i)].node != nullptr; }
  /// What there is of input i's gradient already, taken from where it lies: a leaf's grad(), or what newer ops have
  /// sent to a tensor in this pass. An op that adds its own gradient to these elements and returns them spares the pass
  /// that would add the two. Undefined where that cannot be: there is nothing, it is not dense or known to others, or
  /// the gradients go elsewhere (`grad`, create_graph). Of a leaf with hooks, which see the gradient of one pass, it is
  /// what has come in this pass. As Megatron-LM's fused accumulation of weight gradients, for any op and any input.
  Tensor take_grad(int64_t i) const;
  /// Gives the leaves back what was taken, with what the op may have added: it has failed.
  void give_back() const;
  /// An error under create_graph: for formulas that cannot themselves be differentiated.
  void no_double_backward(std::string_view instead) const;

  Node& node() const { return node_; }

 private:
  Node& node_;
  const Tensors& gradients_;
  detail::BackwardPass* pass_;
  mutable std::vector<std::pair<int64_t, Tensor>> taken_;  ///< of which inputs
};

/// An input or constant kept for backward. Using it after an in-place write to its storage is an error.
class Saved {
 public:
  Saved() = default;
  explicit Saved(const Tensor& tensor);
  Tensor get(const Upstream& up) const;
  bool defined() const { return tensor_.defined(); }

 protected:
  Tensor tensor_;
  uint32_t version_ = 0;
};

/// An output of the op itself kept for its backward; made before `record`.
class SavedOutput : public Saved {
 public:
  SavedOutput() = default;
  explicit SavedOutput(const Tensor& output, int64_t index = 0);
  Tensor get(const Upstream& up) const;

 private:
  int64_t index_ = 0;
};

namespace detail {

template <class Backward>
class OpNode final : public Node {
 public:
  OpNode(const char* op, Backward backward) : Node(op), backward_(std::move(backward)) {}
  Tensors apply(const Upstream& upstream) override {
    check(backward_.has_value(), name_,
          "backward runs a second time, but what it saved was freed by the first; "
          "pass {.retain_graph = true} to the first backward");
    return (*backward_)(upstream);
  }
  void release() override { backward_.reset(); }

 private:
  std::optional<Backward> backward_;
};

void retire(Node* node);
bool wants_recording(std::span<const Tensor> inputs);
void connect(std::shared_ptr<Node> node, std::span<const Tensor> outputs, std::span<const Tensor> inputs);
/// A new handle to the same elements, without history.
Tensor alias(const Tensor& tensor);
/// Takes a gradient that no one else can see, for `op` to add to: dense, with its only handle here, and no history.
Tensor take_unseen(Tensor& sum, const char* op);

/// The node that adds to the grad() of a leaf; one for all graphs that reach it.
std::shared_ptr<Node> accumulator_of(const Tensor& leaf);

}  // namespace detail

template <class T, class... Args>
std::shared_ptr<Node> make_node(Args&&... args) {
  Node* const node = new T(std::forward<Args>(args)...);  // shared as a Node: one shared_ptr to compile for all ops
  return {node, detail::retire};
}

/// Records that `op` made the outputs from the inputs. `backward(const Upstream&) -> Tensors` gives one gradient per
/// input. Nothing is kept when recording is off or no input requires a gradient. Integer outputs take no gradient.
template <class Backward>
void record(const char* op, std::span<const Tensor> outputs, std::span<const Tensor> inputs, Backward&& backward) {
  if (!detail::wants_recording(inputs)) return;
  detail::connect(make_node<detail::OpNode<std::decay_t<Backward>>>(op, std::forward<Backward>(backward)), outputs,
                  inputs);
}
template <class Backward>
Tensor record(const char* op, const Tensor& output, std::initializer_list<Tensor> inputs, Backward&& backward) {
  record(op, std::span(&output, 1), std::span(inputs.begin(), inputs.size()), std::forward<Backward>(backward));
  return output;
}
template <class Backward>
Tensor record(const char* op, const Tensor& output, const Tensors& inputs, Backward&& backward) {
  record(op, std::span(&output, 1), std::span<const Tensor>(inputs), std::forward<Backward>(backward));
  return output;
}
template <class Backward>
void record(const char* op, std::initializer_list<Tensor> outputs, std::initializer_list<Tensor> inputs,
            Backward&& backward) {
  record(op, std::span(outputs.begin(), outputs.size()), std::span(inputs.begin(), inputs.size()),
         std::forward<Backward>(backward));
}

/// Makes a view of x with the given geometry (offset in elements from x's own first element) and notes its base, so
/// that in-place writes to either are followed.
Tensor make_view(const Tensor& x, const Shape& shape, const Strides& strides, int64_t offset);

/// make_view, recorded: `backward` gives x's gradient.
template <class Backward>
Tensor record_view(const char* op, const Tensor& x, const Shape& shape, const Strides& strides, int64_t offset,
                   Backward&& backward) {
  return record(op, make_view(x, shape, strides, offset), {x}, std::forward<Backward>(backward));
}

/// For in-place ops. `result` was computed with recording on from `self.clone()`, and its elements were written into
/// self: self (and the tensor it is a view of) now has the history of result. Error for a leaf that requires a
/// gradient.
void rebase_history(const char* op, const Tensor& self, const Tensor& result);
/// Error when `self` must not be written in place: a leaf that requires a gradient while recording, or overlapping
/// strides.
void check_writable(const char* op, const Tensor& self);
/// Whether writing `self` in place from `sources` changes the recorded graph.
bool write_changes_graph(const Tensor& self, std::initializer_list<Tensor> sources);

}  // namespace autograd

template <class Hook>
void Tensor::register_hook(Hook hook) const {
  check(requires_grad(), "register_hook", "tensor ", *this, " does not require a gradient");
  autograd::Hook call = [hook](const Tensor& gradient) -> Tensor {
    if constexpr (std::is_void_v<decltype(hook(gradient))>) {
      hook(gradient);
      return {};
    } else {
      return hook(gradient);
    }
  };
  const autograd::Edge edge = autograd::gradient_edge(*this);
  if (edge.node->is_accumulator()) {
    autograd::meta_of(*this).hooks.push_back(std::move(call));
  } else {
    edge.node->outputs[static_cast<std::size_t>(edge.index)].hooks.push_back(std::move(call));
  }
}

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_NODE)
#include <atomic>
#include <mutex>

namespace knock {
namespace autograd {

namespace detail {

KNOCK_FUNC uint64_t next_sequence() {
  static std::atomic<uint64_t> counter{0};
  return ++counter;
}

// Deleting a node drops its edges, which may be the last owners of other nodes: those queue up here instead of
// recursing.
KNOCK_FUNC void retire(Node* node) {
  static thread_local std::vector<Node*>* pending = nullptr;
  if (pending) {
    pending->push_back(node);
    return;
  }
  std::vector<Node*> queue;
  pending = &queue;
  delete node;
  while (!queue.empty()) {
    Node* next = queue.back();
    queue.pop_back();
    delete next;
  }
  pending = nullptr;
}

KNOCK_FUNC bool wants_recording(std::span<const Tensor> inputs) {
  if (!is_recording()) return false;
  bool wants =
      false;  // every input is asked: a stale view gets its new history before the node that takes it is numbered
  for (const Tensor& input : inputs) wants |= input.defined() && input.requires_grad();
  return wants;
}

KNOCK_FUNC void connect(std::shared_ptr<Node> node, std::span<const Tensor> outputs, std::span<const Tensor> inputs) {
  node->inputs.reserve(inputs.size());
  for (const Tensor& input : inputs)
    node->inputs.push_back(input.defined() && input.requires_grad() ? gradient_edge(input) : Edge{});
  node->outputs.reserve(outputs.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Tensor& output = outputs[i];
    node->outputs.push_back({output.shape(), output.dtype(), output.device(), {}});
    if (!is_float(output.dtype())) continue;
    output.impl().requires_grad = true;
    Meta& meta = meta_of(output);
    meta.grad_fn = node;
    meta.output_index = static_cast<int64_t>(i);
  }
}

KNOCK_FUNC Tensor alias(const Tensor& tensor) {
  auto impl = std::make_shared<TensorImpl>();
  const TensorImpl& from = tensor.impl();
  impl->storage = from.storage;
  impl->shape = from.shape;
  impl->strides = from.strides;
  impl->offset = from.offset;
  impl->dtype = from.dtype;
  return Tensor(std::move(impl));
}

KNOCK_FUNC Tensor take_unseen(Tensor& sum, const char* op) {
  if (!sum.defined() || sum.handle().use_count() != 1 || !sum.is_contiguous()) return {};
  const TensorImpl& impl = sum.impl();
  if (impl.storage.use_count() != 1 || impl.requires_grad) return {};
  impl.storage->bump(op);
  return std::exchange(sum, Tensor());
}

/// Adds what reaches a leaf to its `grad()`.
class Accumulator final : public Node {
 public:
  explicit Accumulator(const Tensor& leaf) : Node("accumulate"), leaf_(leaf.handle()) {
    sequence_ = 0;
    outputs.push_back({leaf.shape(), leaf.dtype(), leaf.device(), {}});
  }
  bool is_accumulator() const override { return true; }
  bool takes_parts() const override { return meta_of(Tensor(leaf_)).hooks.empty(); }

  Tensors apply(const Upstream& upstream) override {
    const std::lock_guard lock(mutex_);
    const Tensor leaf(leaf_);
    Tensor gradient = upstream.dy();
    Meta& meta = meta_of(leaf);
    for (const Hook& hook : meta.hooks) {
      Tensor replaced = hook(gradient);
      if (replaced.defined()) gradient = replaced;
    }
    if (is_recording()) {
      meta.grad = meta.grad.defined() ? meta.grad + gradient : gradient;
    } else if (meta.grad.defined()) {
      meta.grad.add_(gradient);
    } else {
      const bool sole_owner = gradient.handle().use_count() <= 2 && gradient.impl().storage.use_count() == 1;
      meta.grad = sole_owner && gradient.is_contiguous() ? alias(gradient) : gradient.detach().clone();
    }
    return {};
  }

  Tensor hand_over_sum(const char* op) override {
    const std::lock_guard lock(mutex_);
    return take_unseen(meta_of(Tensor(leaf_)).grad, op);
  }

 private:
  std::shared_ptr<TensorImpl> leaf_;
  std::mutex mutex_;
};

KNOCK_FUNC std::shared_ptr<Node> accumulator_of(const Tensor& leaf) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Meta& meta = meta_of(leaf);
  std::shared_ptr<Node> accumulator = meta.accumulator.lock();
  if (!accumulator) {
    accumulator = make_node<Accumulator>(leaf);
    meta.accumulator = accumulator;
  }
  return accumulator;
}

}  // namespace detail

KNOCK_FUNC Node::Node(const char* op) : name_(op), sequence_(detail::next_sequence()) {}

KNOCK_FUNC Meta& meta_of(const Tensor& tensor) {
  auto& meta = tensor.impl().meta;
  if (!meta) meta = std::make_shared<Meta>();
  return *meta;
}

KNOCK_FUNC Tensor Upstream::dy(int64_t i) const {
  const Tensor& gradient = gradients_[static_cast<std::size_t>(i)];
  if (gradient.defined()) return gradient;
  const auto& output = node_.outputs[static_cast<std::size_t>(i)];
  return zeros(output.shape, {output.dtype, output.device});
}

KNOCK_FUNC void Upstream::give_back() const {
  for (auto& [i, sum] : taken_) {
    Node& leaf = *node_.inputs[static_cast<std::size_t>(i)].node;
    const Tensors part{std::move(sum)};
    leaf.apply(Upstream(leaf, part));
  }
}

KNOCK_FUNC void Upstream::no_double_backward(std::string_view instead) const {
  check(!is_recording(), node_.name(), "its fused backward cannot be differentiated again (create_graph); ", instead);
}

KNOCK_FUNC Saved::Saved(const Tensor& tensor) : tensor_(tensor) {
  if (tensor.defined()) version_ = tensor.impl().storage->version.load(std::memory_order_relaxed);
}

KNOCK_FUNC Tensor Saved::get(const Upstream& up) const {
  if (!tensor_.defined()) return {};
  const Storage& storage = *tensor_.impl().storage;
  check(storage.version.load(std::memory_order_relaxed) == version_, up.node().name(), "backward needs a tensor ",
        tensor_, " that ", storage.last_write.load(std::memory_order_relaxed), " changed in place after ",
        up.node().name(), " saved it; use a copy (clone()) or the out-of-place op");
  return tensor_;
}

KNOCK_FUNC SavedOutput::SavedOutput(const Tensor& output, int64_t index)
    : Saved(detail::alias(output)), index_(index) {}

KNOCK_FUNC Tensor SavedOutput::get(const Upstream& up) const {
  Tensor output = Saved::get(up);
  if (!is_recording() || !output.defined()) return output;
  output = detail::alias(output);
  output.impl().requires_grad = true;
  Meta& meta = meta_of(output);
  meta.grad_fn = up.node().shared_from_this();
  meta.output_index = index_;
  return output;
}

}  // namespace autograd

KNOCK_FUNC Tensor Tensor::detach() const { return autograd::detail::alias(*this); }

KNOCK_FUNC Tensor Tensor::grad() const {
  const auto& meta = impl().meta;
  return meta ? meta->grad : Tensor();
}

KNOCK_FUNC void Tensor::set_grad(const Tensor& grad) {
  check(!grad.defined() || (grad.shape() == shape() && grad.dtype() == dtype()), "set_grad", "gradient ", grad,
        " does not match the tensor ", *this);
  autograd::meta_of(*this).grad = grad;
}

KNOCK_FUNC bool Tensor::is_leaf() const { return !requires_grad() || !autograd::meta_of(*this).grad_fn; }

KNOCK_FUNC Tensor& Tensor::requires_grad_(bool requires_grad) {
  check(is_float(dtype()) || !requires_grad, "requires_grad_", "only floating tensors take gradients, got ", *this);
  check(is_leaf() || requires_grad, "requires_grad_", "not a leaf: its gradient is recorded; use detach()");
  impl().requires_grad = requires_grad;
  return *this;
}

}  // namespace knock
#endif
