#pragma once
// Element i of arrays of any strides and dtypes, on the device.
//
// A Walk is a merged loop nest (core/loop_nest.hpp) that turns the number of an element into its offset in each array,
// by division through multiplication. Dense arrays are read and written in packs of four
// elements, 16 bytes of f32 at a time.

#include <knock/core/loop_nest.hpp>

namespace knock::cuda {

/// An element as another type; floats become integers by truncation.
template <class To, class From>
__device__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return static_cast<To>(static_cast<compute_t<To>>(static_cast<compute_t<From>>(value)));
  }
}

/// Division by a constant of numbers below 2^63: (n magic / 2^64 + n) / 2^shift (Granlund and Montgomery, "Division by
/// invariant integers using multiplication", PLDI 1994).
struct Divider {
  int64_t divisor = 1;
  uint64_t magic = 1;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d) {
    __extension__ using Wide = unsigned __int128;
    while ((int64_t{1} << shift) < d) ++shift;
    const auto excess = static_cast<Wide>((uint64_t{1} << shift) - static_cast<uint64_t>(d));
    magic = static_cast<uint64_t>((excess << 64) / static_cast<uint64_t>(d)) + 1;
  }
  __device__ int64_t quotient(int64_t n) const {
    const auto bits = static_cast<uint64_t>(n);
    return static_cast<int64_t>((__umul64hi(bits, magic) + bits) >> shift);
  }
};

/// Offsets of element i in K arrays. Axes are numbered from the innermost one on.
template <int K>
struct Walk {
  int64_t n = 0;  ///< elements
  int rank = 0;
  Divider extents[max_rank];
  int64_t strides[max_rank][K] = {};

  Walk() = default;
  /// In the memory order of the first array.
  explicit Walk(const std::array<const Array*, K>& arrays) : Walk(merge_axes<K>(arrays), 0) {}
  /// In row-major order.
  static Walk row_major(const std::array<const Array*, K>& arrays) {
    const Array order{nullptr, DType::u8, arrays[0]->shape, contiguous_strides(arrays[0]->shape)};
    std::array<const Array*, K + 1> all{&order};
    std::copy(arrays.begin(), arrays.end(), all.begin() + 1);
    return Walk(merge_axes<K + 1>(all), 1);
  }

  /// Of the arrays from the `first` one of the nest on.
  template <std::size_t Arrays>
  Walk(const LoopNest<Arrays>& nest, std::size_t first) {
    n = nest.shape.numel();
    rank = static_cast<int>(nest.shape.rank());
    for (int axis = 0; axis < rank; ++axis) {
      const int64_t from = rank - 1 - axis;
      if (n > 0) extents[axis] = Divider(nest.shape[from]);
      for (std::size_t k = 0; k < K; ++k) strides[axis][k] = nest.strides[first + k][from];
    }
  }

  __device__ void offsets(int64_t i, int64_t (&out)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] = 0;
#pragma unroll 1
    for (int axis = 0; axis < rank - 1; ++axis) {
      const int64_t rest = extents[axis].quotient(i);
      const int64_t index = i - rest * extents[axis].divisor;
#pragma unroll
      for (int k = 0; k < K; ++k) out[k] += index * strides[axis][k];
      i = rest;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) out[k] += i * strides[rank - 1][k];
  }
};

/// Four elements that move together.
template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Pack {
  T at[4];
};

/// Whether elements lie one after the other from an address on that packs can be read from.
inline bool is_packed(const Array& array) {
  return array.contiguous() && reinterpret_cast<std::uintptr_t>(array.data) % (4 * size_of(array.dtype)) == 0;
}

/// Element i of `data` as C, whatever its dtype.
template <class C>
__device__ C load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return convert<C>(static_cast<const float*>(data)[i]);
    case DType::f64:
      return convert<C>(static_cast<const double*>(data)[i]);
    case DType::bf16:
      return convert<C>(static_cast<const bf16*>(data)[i]);
    case DType::i32:
      return convert<C>(static_cast<const int32_t*>(data)[i]);
    case DType::i64:
      return convert<C>(static_cast<const int64_t*>(data)[i]);
    default:
      return convert<C>(static_cast<const uint8_t*>(data)[i]);
  }
}

template <class C>
__device__ void store(void* data, DType dtype, int64_t i, C value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = convert<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(data)[i] = convert<double>(value);
      break;
    case DType::bf16:
      static_cast<bf16*>(data)[i] = convert<bf16>(value);
      break;
    case DType::i32:
      static_cast<int32_t*>(data)[i] = convert<int32_t>(value);
      break;
    case DType::i64:
      static_cast<int64_t*>(data)[i] = convert<int64_t>(value);
      break;
    default:
      static_cast<uint8_t*>(data)[i] = convert<uint8_t>(value);
  }
}

/// The same where C is what elements of `dtype` are computed in.
template <class C>
__device__ C load_wide(const void* data, DType dtype, int64_t i) {
  if constexpr (std::is_same_v<C, double>) {
    return static_cast<const double*>(data)[i];
  } else {
    return dtype == DType::bf16 ? static_cast<float>(static_cast<const bf16*>(data)[i])
                                : static_cast<const float*>(data)[i];
  }
}

template <class C>
__device__ void store_wide(void* data, DType dtype, int64_t i, C value) {
  if constexpr (std::is_same_v<C, double>) {
    static_cast<double*>(data)[i] = value;
  } else if (dtype == DType::bf16) {
    static_cast<bf16*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

template <class T, class C>
__device__ void load_pack_of(const void* data, int64_t i, C (&out)[4]) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(data) + i);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = convert<C>(pack.at[j]);
}

template <class T, class C>
__device__ void store_pack_of(void* data, int64_t i, const C (&values)[4]) {
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < 4; ++j) pack.at[j] = convert<T>(values[j]);
  *reinterpret_cast<Pack<T>*>(static_cast<T*>(data) + i) = pack;
}

/// Whether packs of the dtype are read and written as C: the dtypes that are computed in C and those that C is made
/// into often, so that kernels stay small.
template <class C>
constexpr bool moves_packs(DType dtype) {
  if (std::is_same_v<C, float>) return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::u8;
  if (std::is_same_v<C, double>) return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::u8;
  return dtype == DType::i64 || dtype == DType::i32 || dtype == DType::u8;
}

/// Elements i to i + 3 of a packed array.
template <class C>
__device__ void load_pack(const void* data, DType dtype, int64_t i, C (&out)[4]) {
  using Other =
      std::conditional_t<std::is_same_v<C, float>, bf16, std::conditional_t<std::is_same_v<C, double>, float, int32_t>>;
  if (dtype == dtype_of<C>()) return load_pack_of<C>(data, i, out);
  if (dtype == dtype_of<Other>()) return load_pack_of<Other>(data, i, out);
  load_pack_of<uint8_t>(data, i, out);
}

template <class C>
__device__ void store_pack(void* data, DType dtype, int64_t i, const C (&values)[4]) {
  using Other =
      std::conditional_t<std::is_same_v<C, float>, bf16, std::conditional_t<std::is_same_v<C, double>, float, int32_t>>;
  if (dtype == dtype_of<C>()) return store_pack_of<C>(data, i, values);
  if (dtype == dtype_of<Other>()) return store_pack_of<Other>(data, i, values);
  store_pack_of<uint8_t>(data, i, values);
}

}  // namespace knock::cuda
