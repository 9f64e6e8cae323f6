#pragma once
// Forward declarations of the names that cross floors.

#include <knock/config.hpp>

#include <cstdint>
#include <memory>
#include <vector>

namespace knock {

class Shape;
class Tensor;
struct TensorImpl;
struct Storage;
using Tensors = std::vector<Tensor>;

namespace autograd {
class Node;
struct Meta;
}  // namespace autograd

}  // namespace knock
