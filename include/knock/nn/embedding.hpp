#pragma once
// Rows of a table by index.

#include <knock/nn/init.hpp>
#include <knock/nn/module.hpp>

namespace knock::nn {

/// ids (...) i64 -> (..., dim). The table starts normal with deviation `deviation` (1 as in PyTorch).
class Embedding : public Layer {
 public:
  Embedding(int64_t entries, int64_t dim, double deviation = 1);
  KNOCK_FUNC Tensor forward(const Tensor& ids) override;

  Tensor weight;  // (entries, dim)
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_EMBEDDING)
#include <knock/ops/index.hpp>

namespace knock::nn {

KNOCK_FUNC Embedding::Embedding(int64_t entries, int64_t dim, double deviation) {
  check(entries > 0 && dim > 0, "Embedding", "entries and dim must be positive, got ", entries, " and ", dim);
  weight = register_parameter("weight", init::normal({entries, dim}, deviation));
}

KNOCK_FUNC Tensor Embedding::forward(const Tensor& ids) { return embedding(ids, weight); }

}  // namespace knock::nn
#endif
