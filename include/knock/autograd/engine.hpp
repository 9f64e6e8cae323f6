#pragma once
// The backward pass: visits recorded nodes from the newest to the oldest, so that a node runs once all gradients of its
// outputs have arrived. A heap replaces recursion: graphs may be as deep as memory allows. What a node saved is freed
// as soon as it has run, unless retain_graph is set.

#include <knock/autograd/node.hpp>
#include <knock/autograd/view.hpp>

namespace knock::autograd {

struct GradOptions {
  bool retain_graph = false;  ///< keep what the graph saved
  bool create_graph = false;  ///< record the backward pass (implies retain_graph)
  bool allow_unused =
      false;              ///< give an undefined Tensor for an input the outputs do not depend on, instead of an error
  Tensors upstream = {};  ///< weights of the outputs; ones where absent, which needs a scalar output
};

/// Gradients of the outputs' (weighted) sum with respect to `inputs`, which may be leaves or intermediate tensors.
/// Nothing is added to any `grad()`.
Tensors grad(const Tensors& outputs, const Tensors& inputs, const GradOptions& options = {});

/// Adds the gradients of the outputs' (weighted) sum to the leaves' `grad()`.
void backward(const Tensors& outputs, const Tensors& upstream = {}, BackwardOptions options = {});

}  // namespace knock::autograd

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_ENGINE)
#include <unordered_map>
#include <unordered_set>

namespace knock {
namespace autograd {
namespace detail {

class BackwardPass {
 public:
  BackwardPass(bool retain_graph, bool create_graph)
      : retain_graph_(retain_graph || create_graph), recording_(create_graph) {}

  /// Gradients that reach this edge are kept instead of going to a leaf's grad().
  void capture(const Edge& edge) {
    captures_.push_back({edge.node, edge.index, {}});
    captured_nodes_.insert(edge.node.get());
  }
  const Tensor& captured(std::size_t i) const { return captures_[i].gradient; }

  void start(const Edge& root, const Tensor& gradient) {
    roots_.push_back(root.node.get());
    receive(root, gradient, "backward");
  }

  /// What has arrived at an edge so far; see Upstream::take_grad.
  Tensor take_arrived(const Edge& edge, const char* op) {
    const auto found = arrived_.find(edge.node.get());
    return found == arrived_.end() ? Tensor() : take_unseen(found->second[static_cast<std::size_t>(edge.index)], op);
  }

  void run() {
    const RecordingGuard guard(recording_);
    const trace::BackwardScope backward;
    if (!captures_.empty()) find_needed();
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end(), older);
      const std::shared_ptr<Node> node = std::move(heap_.back());
      heap_.pop_back();
      const auto found = arrived_.find(node.get());
      Tensors gradients = std::move(found->second);
      arrived_.erase(found);
      run_hooks(*node, gradients);
      take_captures(*node, gradients);
      visit(*node, gradients);
    }
  }

 private:
  struct Capture {
    std::shared_ptr<Node> node;  // owned: nothing else may hold the accumulator of a leaf that the graph does not reach
    int64_t index;
    Tensor gradient;
  };

  static bool older(const std::shared_ptr<Node>& a, const std::shared_ptr<Node>& b) {
    return a->sequence() < b->sequence();
  }

  void visit(Node& node, Tensors& gradients) {
    if (node.is_accumulator()) {
      if (captures_.empty()) node.apply(Upstream(node, gradients));
      return;
    }
    if (!captures_.empty() && !needed_.contains(&node)) return;
    Tensors out = apply(node, gradients);
    gradients.clear();
    if (!retain_graph_) node.release();
    check(out.size() == node.inputs.size(), node.name(), "backward gave ", out.size(), " gradients for ",
          node.inputs.size(), " inputs");
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (out[i].defined() && node.inputs[i].node) receive(node.inputs[i], std::move(out[i]), node.name());
      out[i] = Tensor();
    }
  }

  Tensors apply(Node& node, const Tensors& gradients) {
    const Upstream upstream(node, gradients, captures_.empty() ? this : nullptr);
    try {
      return node.apply(upstream);
    } catch (...) {
      upstream.give_back();
      throw;
    }
  }

  void receive(const Edge& edge, Tensor gradient, const char* from) {
    const Node::Output& expected = edge.node->outputs[static_cast<std::size_t>(edge.index)];
    check(gradient.shape() == expected.shape && gradient.dtype() == expected.dtype, from, "backward gave a gradient ",
          gradient, " for a tensor ", expected.shape, " ", expected.dtype, " made by ", edge.node->name());
    if (captures_.empty() && edge.node->takes_parts()) {
      const Tensors part{std::move(gradient)};
      edge.node->apply(Upstream(*edge.node, part));
      return;
    }
    auto [entry, first] = arrived_.try_emplace(edge.node.get());
    if (first) {
      entry->second.resize(edge.node->outputs.size());
      heap_.push_back(edge.node);
      std::push_heap(heap_.begin(), heap_.end(), older);
    }
    add_to(entry->second[static_cast<std::size_t>(edge.index)], std::move(gradient));
  }

  void add_to(Tensor& sum, Tensor gradient) const {
    if (!sum.defined()) {
      sum = std::move(gradient);
    } else if (!recording_ && sum.handle().use_count() == 1 && sum.impl().storage.use_count() == 1) {
      sum.add_(gradient);
    } else {
      sum = sum + gradient;
    }
  }

  static void run_hooks(Node& node, Tensors& gradients) {
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      for (const Hook& hook : node.outputs[i].hooks) {
        if (!gradients[i].defined()) continue;
        const Tensor replaced = hook(gradients[i]);
        if (replaced.defined()) gradients[i] = replaced;
      }
    }
  }

  void take_captures(Node& node, const Tensors& gradients) {
    if (!captured_nodes_.contains(&node)) return;
    for (Capture& capture : captures_)
      if (capture.node.get() == &node) capture.gradient = gradients[static_cast<std::size_t>(capture.index)];
  }

  // The nodes from which a captured edge can be reached, found depth first with an explicit stack.
  void find_needed() {
    std::unordered_set<Node*> seen;
    std::vector<std::pair<Node*, std::size_t>> stack;
    for (Node* root : roots_) {
      if (seen.insert(root).second) stack.emplace_back(root, 0);
      while (!stack.empty()) {
        auto& [node, next] = stack.back();
        if (next == node->inputs.size()) {
          bool needed = false;
          for (const Edge& edge : node->inputs)
            needed = needed || captured_nodes_.contains(edge.node.get()) || needed_.contains(edge.node.get());
          if (needed) needed_.insert(node);
          stack.pop_back();
          continue;
        }
        Node* child = node->inputs[next++].node.get();
        if (child && seen.insert(child).second) stack.emplace_back(child, 0);
      }
    }
  }

  bool retain_graph_;
  bool recording_;
  std::vector<Node*> roots_;
  std::vector<Capture> captures_;
  std::unordered_set<Node*> captured_nodes_;
  std::unordered_set<Node*> needed_;
  std::unordered_map<Node*, Tensors> arrived_;
  std::vector<std::shared_ptr<Node>> heap_;
};

KNOCK_FUNC void start_all(BackwardPass& pass, const char* op, const Tensors& outputs, const Tensors& upstream) {
  check(upstream.empty() || upstream.size() == outputs.size(), op, upstream.size(), " upstream gradients for ",
        outputs.size(), " outputs");
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Tensor& output = outputs[i];
    check(output.requires_grad(), op, "output ", output,
          " does not require a gradient: no input of it does, or it was ", "computed under NoGradGuard");
    const Tensor weight = i < upstream.size() ? upstream[i] : Tensor();
    check(weight.defined() || output.numel() == 1, op,
          "needs an upstream gradient for an output of more than one element, ", output);
    check(!weight.defined() || (weight.shape() == output.shape() && weight.dtype() == output.dtype()), op,
          "upstream gradient ", weight, " does not match the output ", output);
    pass.start(gradient_edge(output), weight.defined() ? weight : ones_like(output));
  }
}

}  // namespace detail

KNOCK_FUNC Tensor Upstream::take_grad(int64_t i) const {
  if (!pass_ || !needs(i) || is_recording()) return {};
  const Edge& edge = node_.inputs[static_cast<std::size_t>(i)];
  if (!edge.node->takes_parts()) return pass_->take_arrived(edge, node_.name());
  Tensor sum = edge.node->hand_over_sum(node_.name());
  if (sum.defined()) taken_.emplace_back(i, sum);
  return sum;
}

KNOCK_FUNC void backward(const Tensors& outputs, const Tensors& upstream, BackwardOptions options) {
  detail::BackwardPass pass(options.retain_graph, options.create_graph);
  detail::start_all(pass, "backward", outputs, upstream);
  pass.run();
}

KNOCK_FUNC Tensors grad(const Tensors& outputs, const Tensors& inputs, const GradOptions& options) {
  detail::BackwardPass pass(options.retain_graph, options.create_graph);
  for (const Tensor& input : inputs) {
    check(input.requires_grad(), "grad", "input ", input, " does not require a gradient");
    pass.capture(gradient_edge(input));
  }
  detail::start_all(pass, "grad", outputs, options.upstream);
  pass.run();
  Tensors gradients;
  gradients.reserve(inputs.size());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    gradients.push_back(pass.captured(i));
    check(gradients.back().defined() || options.allow_unused, "grad", "the outputs do not depend on input ", i, ", ",
          inputs[i], "; pass {.allow_unused = true} to get an undefined Tensor for it");
  }
  return gradients;
}

}  // namespace autograd

KNOCK_FUNC void Tensor::backward(BackwardOptions options) const { autograd::backward({*this}, {}, options); }
KNOCK_FUNC void Tensor::backward(const Tensor& upstream, BackwardOptions options) const {
  autograd::backward({*this}, {upstream}, options);
}

}  // namespace knock
#endif
