#pragma once
// A bf16 copy that an f32 tensor keeps of itself.
//
// Weights are kept in f32 and multiplied in bf16. On the CPU a product rounds them while it packs them; on an
// accelerator that would be a pass over memory before each product. There a storage keeps its elements rounded, each at
// its place, so that every view finds its own. The copy is made when a product first asks, optimizers write it in the
// pass that writes the parameter, and after any other in-place write, which the storage's version shows, it is made
// again when it is next asked for. It stays in the same memory as long as the storage lives.

#include <knock/core/tensor.hpp>

namespace knock::detail {

/// `weight` as a product with x reads it: the copy where x is bf16 and the weight f32 and on an accelerator; else the
/// weight itself.
Array array_beside(const Tensor& x, const Tensor& weight);

/// The copy of x, if there is one that is up to date; else undefined.
Array rounded_array(const Tensor& x);

/// Notes a write by `op` of x and, where it is up to date, of its copy.
void bump_with_rounded(const char* op, const Tensor& x);

}  // namespace knock::detail

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_ROUNDED)
#include <mutex>

namespace knock::detail {

KNOCK_FUNC bool rounded_is_current(const Storage& storage) {
  return storage.rounded && storage.rounded_version == storage.version.load(std::memory_order_relaxed);
}

KNOCK_FUNC Array place_in_rounded(const Tensor& x) {
  const TensorImpl& impl = x.impl();
  return {static_cast<char*>(impl.storage->rounded->data) + impl.offset * size_of(DType::bf16), DType::bf16, impl.shape,
          impl.strides};
}

KNOCK_FUNC Array array_beside(const Tensor& x, const Tensor& weight) {
  const bool wanted = x.dtype() == DType::bf16 && weight.dtype() == DType::f32;
  if (!wanted || weight.device().kind == DeviceKind::cpu) return weight.array();
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Storage& storage = *weight.impl().storage;
  if (!rounded_is_current(storage)) {
    const int64_t n = storage.bytes / size_of(DType::f32);
    if (!storage.rounded) storage.rounded = std::make_unique<Storage>(n * size_of(DType::bf16), storage.device);
    kernel(&Backend::copy, "round_weight", weight)({storage.rounded->data, DType::bf16, {n}, {1}},
                                                   {storage.data, DType::f32, {n}, {1}});
    storage.rounded_version = storage.version.load(std::memory_order_relaxed);
  }
  return place_in_rounded(weight);
}

KNOCK_FUNC Array rounded_array(const Tensor& x) {
  return x.dtype() == DType::f32 && rounded_is_current(*x.impl().storage) ? place_in_rounded(x) : Array{};
}

KNOCK_FUNC void bump_with_rounded(const char* op, const Tensor& x) {
  Storage& storage = *x.impl().storage;
  const bool current = rounded_is_current(storage);
  storage.bump(op);
  if (current) storage.rounded_version = storage.version.load(std::memory_order_relaxed);
}

}  // namespace knock::detail
#endif
