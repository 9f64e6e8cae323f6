#pragma once
// Layers one after the other.

#include <knock/nn/module.hpp>

#include <memory>

namespace knock::nn {

/// Owns its layers and names them 0, 1, ...:  nn::Sequential net(std::make_shared<nn::Linear>(2, 8), ...);
class Sequential : public Layer {
 public:
  template <class... Layers>
  explicit Sequential(std::shared_ptr<Layers>... layers) {
    (push_back(std::move(layers)), ...);
  }

  void push_back(std::shared_ptr<Layer> layer) {
    register_module(std::to_string(layers_.size()), *layer);
    layers_.push_back(std::move(layer));
  }
  std::size_t size() const { return layers_.size(); }
  Layer& operator[](std::size_t i) const { return *layers_.at(i); }

  Tensor forward(const Tensor& x) override {
    Tensor y = x;
    for (const auto& layer : layers_) y = layer->forward(y);
    return y;
  }

 private:
  std::vector<std::shared_ptr<Layer>> layers_;
};

}  // namespace knock::nn
