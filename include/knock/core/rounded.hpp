#pragma once
// A bf16 copy that an f32 tensor keeps of itself.
//
// Weights are kept in f32 and multiplied in bf16. On the CPU a product rounds them while it packs them; on an
// accelerator that would be a pass over memory before each product. There a storage keeps its elements rounded, each at
// its place, so that every view finds its own. The copy is made when a product first asks, optimizers write it in the
// pass that writes the parameter, and after any other in-place write, which the storage's version shows, it is made
// again when it is next asked for. It stays in the same memory as long as the storage lives.

#include <knock/core/tensor.hpp>

#include <memory>
#include <vector>

namespace knock::detail {

/// `weight` as a product with x reads it: the copy where x is bf16 and the weight f32 and on an accelerator; else the
/// weight itself.
Array array_beside(const Tensor& x, const Tensor& weight);

/// The copy of x, if there is one that is up to date; else undefined.
Array rounded_array(const Tensor& x);

/// Notes an in-place write of x by `op`, a literal.
void note_write(const char* op, const Tensor& x);
/// The same where its copy, if that was up to date, was written too.
void note_write_with_rounded(const char* op, const Tensor& x);

/// What the host does at a replay of a graph (core/graph.hpp): a replay reads and writes memory without it.
class ReplayNotes {
 public:
  /// Makes the copies anew that the graph reads and that a write since has made stale.
  void before_replay() const;
  /// Counts the graph's writes.
  void after_replay() const;

  /// Notes what this thread reads and writes in the scope.
  class Scope {
   public:
    explicit Scope(ReplayNotes& notes);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

 private:
  friend Array array_beside(const Tensor& x, const Tensor& weight);
  friend void note_write(const char* op, const Tensor& x);
  friend void note_write_with_rounded(const char* op, const Tensor& x);

  struct Write {
    std::weak_ptr<Storage> storage;
    const char* op;
    bool with_rounded;
  };
  void add_write(const char* op, const Tensor& x, bool with_rounded) {
    written_.push_back({x.impl().storage, op, with_rounded});
  }

  Tensors read_;
  std::vector<Write> written_;
};

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

KNOCK_FUNC void round_storage(const Tensor& weight) {
  Storage& storage = *weight.impl().storage;
  const int64_t n = storage.bytes / size_of(DType::f32);
  kernel(&Backend::copy, "round_weight", weight)({storage.rounded->data, DType::bf16, {n}, {1}},
                                                 {storage.data, DType::f32, {n}, {1}});
}

KNOCK_FUNC void set_rounded_current(Storage& storage) {
  storage.rounded_version = storage.version.load(std::memory_order_relaxed);
}

/// Of the capture that this thread is in.
KNOCK_FUNC ReplayNotes*& replay_notes() {
  static thread_local ReplayNotes* notes = nullptr;
  return notes;
}

KNOCK_FUNC Array array_beside(const Tensor& x, const Tensor& weight) {
  const bool wanted = x.dtype() == DType::bf16 && weight.dtype() == DType::f32;
  if (!wanted || weight.device().kind == DeviceKind::cpu) return weight.array();
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Storage& storage = *weight.impl().storage;
  ReplayNotes* const notes = replay_notes();
  if (!storage.rounded) {
    check(!notes, "graph", "weight ", weight, " is rounded to bf16 for the first time; run once before the capture");
    storage.rounded = std::make_unique<Storage>(storage.bytes / 2, storage.device);
    storage.rounded_version = storage.version.load(std::memory_order_relaxed) - 1;
  }
  if (notes) notes->read_.push_back(weight.detach());
  if (!rounded_is_current(storage)) {
    round_storage(weight);
    if (!notes) set_rounded_current(storage);  // in a capture nothing runs
  }
  return place_in_rounded(weight);
}

KNOCK_FUNC Array rounded_array(const Tensor& x) {
  return x.dtype() == DType::f32 && rounded_is_current(*x.impl().storage) ? place_in_rounded(x) : Array{};
}

KNOCK_FUNC void bump_with_rounded(const char* op, Storage& storage) {
  const bool current = rounded_is_current(storage);
  storage.bump(op);
  if (current) set_rounded_current(storage);
}

KNOCK_FUNC void note_write(const char* op, const Tensor& x) {
  x.impl().storage->bump(op);
  if (ReplayNotes* const notes = replay_notes()) notes->add_write(op, x, false);
}

KNOCK_FUNC void note_write_with_rounded(const char* op, const Tensor& x) {
  if (ReplayNotes* const notes = replay_notes()) notes->add_write(op, x, rounded_is_current(*x.impl().storage));
  bump_with_rounded(op, *x.impl().storage);
}

KNOCK_FUNC ReplayNotes::Scope::Scope(ReplayNotes& notes) { replay_notes() = &notes; }
KNOCK_FUNC ReplayNotes::Scope::~Scope() { replay_notes() = nullptr; }

KNOCK_FUNC void ReplayNotes::before_replay() const {
  for (const Tensor& weight : read_) {
    Storage& storage = *weight.impl().storage;
    if (rounded_is_current(storage)) continue;
    round_storage(weight);
    set_rounded_current(storage);
  }
}

KNOCK_FUNC void ReplayNotes::after_replay() const {
  for (const Write& write : written_) {
    const std::shared_ptr<Storage> storage = write.storage.lock();
    if (storage && write.with_rounded) bump_with_rounded(write.op, *storage);
    if (storage && !write.with_rounded) storage->bump(write.op);
  }
}

}  // namespace knock::detail
#endif
