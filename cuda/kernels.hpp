#pragma once
// The kernels of the CUDA back-end, each declared as its entry in the table wants it.

#include <knock/core/backend.hpp>

#include <type_traits>

namespace knock::cuda {

#define KNOCK_DECLARE(name)                                               \
  using name##_function = std::remove_pointer_t<decltype(Backend::name)>; \
  name##_function name;
KNOCK_KERNELS(KNOCK_DECLARE)
#undef KNOCK_DECLARE

}  // namespace knock::cuda
