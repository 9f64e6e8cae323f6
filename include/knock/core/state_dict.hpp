#pragma once
// An ordered map from name to tensor: what modules and optimizers save and load.

#include <knock/core/tensor.hpp>

#include <string>
#include <utility>
#include <vector>

namespace knock {

/// Names and tensors, in order.
using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// Names and tensors in the order they were inserted. Names are unique.
class StateDict {
 public:
  using Entry = NamedTensors::value_type;

  StateDict() = default;
  StateDict(std::initializer_list<Entry> entries) {
    for (const Entry& entry : entries) insert(entry.first, entry.second);
  }

  /// Appends; an error when the name is taken.
  void insert(std::string name, Tensor tensor);
  /// The tensor's place, or nullptr.
  Tensor* find(std::string_view name);
  const Tensor* find(std::string_view name) const;
  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// The tensor of this name; an error when there is none.
  const Tensor& at(std::string_view name) const;
  /// The tensor of this name, appended undefined when there is none.
  Tensor& operator[](std::string_view name);

  std::size_t size() const { return entries_.size(); }
  bool empty() const { return entries_.empty(); }
  auto begin() const { return entries_.begin(); }
  auto end() const { return entries_.end(); }
  auto begin() { return entries_.begin(); }
  auto end() { return entries_.end(); }

 private:
  NamedTensors entries_;
  std::vector<std::size_t> by_name_;  ///< positions in entries_, sorted by name
  std::size_t lower_bound(std::string_view name) const;
};

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_STATE_DICT)
namespace knock {

KNOCK_FUNC std::size_t StateDict::lower_bound(std::string_view name) const {
  const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                   [&](std::size_t i, std::string_view wanted) { return entries_[i].first < wanted; });
  return static_cast<std::size_t>(at - by_name_.begin());
}

KNOCK_FUNC void StateDict::insert(std::string name, Tensor tensor) {
  check(!contains(name), "StateDict", "name \"", name, "\" is already there");
  (*this)[name] = std::move(tensor);
}

KNOCK_FUNC const Tensor* StateDict::find(std::string_view name) const {
  const std::size_t i = lower_bound(name);
  if (i == by_name_.size() || entries_[by_name_[i]].first != name) return nullptr;
  return &entries_[by_name_[i]].second;
}

KNOCK_FUNC Tensor* StateDict::find(std::string_view name) {
  return const_cast<Tensor*>(static_cast<const StateDict&>(*this).find(name));
}

KNOCK_FUNC const Tensor& StateDict::at(std::string_view name) const {
  const Tensor* found = find(name);
  check(found != nullptr, "StateDict", "no tensor named \"", name, "\" among ", entries_.size());
  return *found;
}

KNOCK_FUNC Tensor& StateDict::operator[](std::string_view name) {
  if (Tensor* found = find(name)) return *found;
  by_name_.insert(by_name_.begin() + static_cast<std::ptrdiff_t>(lower_bound(name)), entries_.size());
  return entries_.emplace_back(std::string(name), Tensor()).second;
}

}  // namespace knock
#endif
