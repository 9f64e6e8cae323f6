#pragma once
// Element types: f32, f64, bf16, i32, i64, and u8, which also serves as bool (0 and 1).

#include <knock/core/error.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace knock {

/// bfloat16: the upper half of an f32. Arithmetic is done in f32 and rounded to nearest, ties to even.
struct bf16 {
  uint16_t bits = 0;

  bf16() = default;
  KNOCK_HD bf16(float value) : bits(round(std::bit_cast<uint32_t>(value))) {}
  /// Without a temporary, which would keep loops from being vectorised.
  KNOCK_HD bf16& operator=(float value) {
    bits = round(std::bit_cast<uint32_t>(value));
    return *this;
  }
  KNOCK_HD operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

  KNOCK_HD static constexpr uint16_t round(uint32_t f) {
    const bool nan = (f & 0x7fffffffU) > 0x7f800000U;
    const uint32_t rounded = f + 0x7fffU + ((f >> 16) & 1U);
    return static_cast<uint16_t>(nan ? (f >> 16) | 0x40U : rounded >> 16);
  }
};

enum class DType : uint8_t { f32, f64, bf16, i32, i64, u8 };
inline constexpr int dtype_count = 6;

constexpr const char* to_text(DType dtype) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "i32", "i64", "u8"};
  return names[static_cast<int>(dtype)];
}

/// Bytes of one element.
constexpr int64_t size_of(DType dtype) {
  constexpr int64_t sizes[] = {4, 8, 2, 4, 8, 1};
  return sizes[static_cast<int>(dtype)];
}

constexpr bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16; }

template <class T>
struct Type {
  using type = T;
};

template <class T>
constexpr DType dtype_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, float>) return DType::f32;
  if constexpr (std::is_same_v<U, double>) return DType::f64;
  if constexpr (std::is_same_v<U, bf16>) return DType::bf16;
  if constexpr (std::is_same_v<U, int32_t>) return DType::i32;
  if constexpr (std::is_same_v<U, bool> || std::is_same_v<U, uint8_t>) return DType::u8;
  static_assert(sizeof(U) <= 8, "knock has no dtype for this type");
  return DType::i64;
}

/// The C++ types that are elements of a tensor.
template <class T>
concept Element = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bf16> ||
    std::is_same_v<T, int32_t> || std::is_same_v<T, int64_t> || std::is_same_v<T, uint8_t>;

/// The type arithmetic is done in: f32 for bf16, the type itself otherwise.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, bf16>, float, T>;

/// The dtype of compute_t.
constexpr DType compute_dtype(DType dtype) { return dtype == DType::bf16 ? DType::f32 : dtype; }

/// The type long sums are accumulated in: f64 for f32, f64 and bf16 alike, i64 for integers.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, bf16> || std::is_floating_point_v<T>, double, int64_t>;

/// Calls `body(Type<T>{})` with the C++ type of a floating dtype; an error for the others.
template <class Body>
decltype(auto) dispatch_float(DType dtype, std::string_view where, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(Type<float>{});
    case DType::f64:
      return body(Type<double>{});
    case DType::bf16:
      return body(Type<bf16>{});
    default:
      fail(where, "needs a floating dtype (f32, f64, bf16), got ", dtype, "; convert with .to(DType::f32)");
  }
}

/// Calls `body(Type<T>{})` with the C++ type of an integer dtype (i32, i64, u8); an error for the others.
template <class Body>
decltype(auto) dispatch_int(DType dtype, std::string_view where, Body&& body) {
  switch (dtype) {
    case DType::i32:
      return body(Type<int32_t>{});
    case DType::i64:
      return body(Type<int64_t>{});
    case DType::u8:
      return body(Type<uint8_t>{});
    default:
      fail(where, "needs an integer dtype (i32, i64, u8), got ", dtype);
  }
}

/// Calls `body(Type<T>{})` with an unsigned integer as large as an element of `dtype`: for what is moved, not computed.
template <class Body>
void dispatch_size(DType dtype, Body&& body) {
  switch (size_of(dtype)) {
    case 1:
      return body(Type<uint8_t>{});
    case 2:
      return body(Type<uint16_t>{});
    case 4:
      return body(Type<uint32_t>{});
    default:
      return body(Type<uint64_t>{});
  }
}

/// Calls `body(Type<T>{})` with the C++ type of any dtype.
template <class Body>
decltype(auto) dispatch_all(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(Type<float>{});
    case DType::f64:
      return body(Type<double>{});
    case DType::bf16:
      return body(Type<bf16>{});
    case DType::i32:
      return body(Type<int32_t>{});
    case DType::i64:
      return body(Type<int64_t>{});
    case DType::u8:
      break;
  }
  return body(Type<uint8_t>{});
}

/// The dtype of a result of two operands: the wider of two floats (bf16 with f32 gives f32), the wider of two integers.
/// A float with an integer is an error: convert one of them.
inline DType promote(DType a, DType b, std::string_view where) {
  if (a == b) return a;
  check(is_float(a) == is_float(b), where, "operands are ", a, " and ", b,
        "; convert one of them with .to(DType::...) so that both are floating or both integer");
  constexpr int rank[] = {1, 2, 0, 1, 2, 0};
  return rank[static_cast<int>(a)] > rank[static_cast<int>(b)] ? a : b;
}

/// A number as an argument: keeps integers exact.
struct Scalar {
  double real = 0;
  int64_t integer = 0;
  bool integral = true;

  Scalar() = default;
  template <class T>
  requires std::is_integral_v<T> Scalar(T value)
      : real(static_cast<double>(value)), integer(static_cast<int64_t>(value)) {}
  template <class T>
  requires std::is_floating_point_v<T> Scalar(T value) : real(static_cast<double>(value)), integral(false) {}

  template <class T>
  T to() const {
    if constexpr (std::is_integral_v<T>) return integral ? static_cast<T>(integer) : static_cast<T>(real);
    if constexpr (std::is_same_v<T, bf16>) return bf16(static_cast<float>(real));
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>(real);
  }
};

}  // namespace knock
