#pragma once
// The library's one exception, and checks whose text is built only when they fail.
//
//   check(a.size(1) == b.size(0), "matmul", "inner dimensions differ: lhs ", a, ", rhs ", b);
//   -> knock::Error  "[matmul] inner dimensions differ: lhs (2, 3) f32 cpu, rhs (4, 5) f32 cpu"

#include <knock/config.hpp>

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace knock {

/// Thrown by every public function that refuses its input. `what()` is one line.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

inline void append_text(std::string& out, std::string_view text) { out.append(text); }

template <class T>
requires std::is_arithmetic_v<T>
void append_text(std::string& out, T value) {
  if constexpr (std::is_same_v<T, bool>) {
    out.append(value ? "true" : "false");
  } else if constexpr (std::is_same_v<T, char>) {
    out.push_back(value);
  } else {
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    out.append(digits, end);
  }
}

/// Anything with a `to_text` found by argument-dependent look-up (Shape, DType, Device, Tensor) can be printed.
template <class T>
requires requires(const T& value) { std::string_view(to_text(value)); }
void append_text(std::string& out, const T& value) { out.append(to_text(value)); }

}  // namespace detail

/// The pieces, one after the other, as one string.
template <class... Pieces>
std::string text(const Pieces&... pieces) {
  std::string out;
  (detail::append_text(out, pieces), ...);
  return out;
}

/// Throws `Error` with the text `[where] pieces...`.
template <class... Pieces>
[[noreturn]] void fail(std::string_view where, const Pieces&... pieces) {
  throw Error(text("[", where, "] ", pieces...));
}

/// Throws `Error` with the text `[where] pieces...` unless the condition holds.
template <class... Pieces>
void check(bool condition, std::string_view where, const Pieces&... pieces) {
  if (!condition) [[unlikely]]
    fail(where, pieces...);
}

}  // namespace knock
