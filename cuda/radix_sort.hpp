#pragma once
// Sorting of many keys on the device: by digits of 8 bits, the least significant first, stable.

#include "allocator.hpp"

#include <cstdint>

namespace knock::cuda {

/// n keys, each with the number of what it is the key of.
class RadixSort {
 public:
  explicit RadixSort(int64_t n);

  /// To be filled, and sorted afterwards.
  uint64_t* keys() const { return keys_[now_].as<uint64_t>(); }
  uint32_t* ids() const { return ids_[now_].as<uint32_t>(); }

  /// Sorts by `bits` bits of the keys, from bit `first` on.
  void sort(int first, int bits);

 private:
  int64_t n_;
  Scratch keys_[2], ids_[2], counts_;
  int now_ = 0;
};

/// out[i] = counts[0] + ... + counts[i - 1], for i up to and with n; out has n + 1 places and may be `counts`.
void exclusive_sums(const uint32_t* counts, int64_t n, uint32_t* out);

/// Bits of the numbers below n.
inline int bits_below(int64_t n) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}

}  // namespace knock::cuda
