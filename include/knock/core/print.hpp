#pragma once
// Tensors as text, in PyTorch's layout: aligned columns, four digits, scientific when the range asks for it, the first
// and last three elements of long axes when there are more than 1000 elements.
//
//   std::cout << x << "\n";
//   tensor([[ 0.5000, -1.2500],
//           [    nan,     inf]], shape=(2, 2), dtype=f32)

#include <knock/core/tensor.hpp>

#include <iosfwd>
#include <string>

namespace knock {

/// The elements, then shape and dtype, and the device when it is not the CPU.
std::string to_string(const Tensor& x);
std::ostream& operator<<(std::ostream& out, const Tensor& x);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_PRINT)
#include <cmath>
#include <ostream>

namespace knock {
namespace detail {

/// Writes the elements that are shown, all numbers alike.
class TensorPrinter {
 public:
  explicit TensorPrinter(const Tensor& x) : floating_(is_float(x.dtype())), shape_(x.shape()), shown_(x.shape()) {
    if (x.numel() > threshold) {
      for (int64_t& extent : shown_)
        if (extent > 2 * edge_items) extent = 2 * edge_items;
    }
    const Tensor part = empty(shown_, {floating_ ? DType::f64 : DType::i64, x.device()});
    copy_shown(x, part.array(), x.array(), 0);
    if (floating_) {
      reals_ = part.to_vector<double>();
      choose_format();
    } else {
      integers_ = part.to_vector<int64_t>();
    }
    const std::size_t count = floating_ ? reals_.size() : integers_.size();
    for (std::size_t i = 0; i < count; ++i) {
      const bool counts = !floating_ || (std::isfinite(reals_[i]) && reals_[i] != 0);
      if (counts) width_ = std::max(width_, element(i).size());
    }
  }

  std::string print() {
    next_ = 0;
    return axis_text(0, prefix.size());
  }

  static constexpr std::string_view prefix = "tensor(";
  static constexpr std::size_t line_width = 80;

 private:
  static constexpr int64_t threshold = 1000, edge_items = 3;

  /// Copies the shown elements: along summarised axes the first and the last ones.
  static void copy_shown(const Tensor& x, const Array& to, const Array& from, int64_t axis) {
    if (axis == from.rank()) return kernel(&Backend::copy, "print", x)(to, from);
    if (to.shape[axis] == from.shape[axis]) return copy_shown(x, to, from, axis + 1);
    for (const bool last : {false, true}) {
      Array part_to = to, part_from = from;
      const int64_t skip_to = last ? edge_items : 0, skip_from = last ? from.shape[axis] - edge_items : 0;
      part_to.shape[axis] = part_from.shape[axis] = edge_items;
      part_to.data = to.as<char>() + skip_to * to.strides[axis] * size_of(to.dtype);
      part_from.data = from.as<char>() + skip_from * from.strides[axis] * size_of(from.dtype);
      copy_shown(x, part_to, part_from, axis + 1);
    }
  }

  /// Whole numbers are shown as such; wide ranges, large and small numbers in scientific notation.
  void choose_format() {
    double smallest = 0, largest = 0;
    for (const double value : reals_) {
      if (!std::isfinite(value) || value == 0) continue;
      const double magnitude = std::abs(value);
      smallest = smallest == 0 ? magnitude : std::min(smallest, magnitude);
      largest = std::max(largest, magnitude);
      whole_ = whole_ && value == std::ceil(value);
    }
    scientific_ = largest > 0 && (largest / smallest > 1000 || largest > 1e8 || smallest < 1e-4);
  }

  std::string element(std::size_t i) const {
    if (!floating_) return text(integers_[i]);
    const double value = reals_[i];
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    char digits[64];
    const auto format = scientific_ ? std::chars_format::scientific : std::chars_format::fixed;
    const int precision = whole_ && !scientific_ ? 0 : 4;
    std::string out(digits, std::to_chars(digits, digits + sizeof digits, value, format, precision).ptr);
    if (precision == 0) out += '.';
    return out;
  }

  std::string next_element() {
    std::string out = element(next_++);
    if (out.size() < width_) out.insert(0, width_ - out.size(), ' ');
    return out;
  }

  std::string axis_text(int64_t axis, std::size_t indent) {
    if (axis == shown_.rank()) return next_element();
    const bool innermost = axis + 1 == shown_.rank(), summarised = shown_[axis] != shape_[axis];
    const std::size_t per_line = std::max<std::size_t>((line_width - indent) / (width_ + 2), 1);
    std::string new_line(1, '\n'), separator(1, ',');
    new_line.append(indent + 1, ' ');
    if (!innermost) separator.append(static_cast<std::size_t>(shown_.rank() - axis - 2), '\n').append(new_line);
    std::string out = "[";
    std::size_t written = 0;
    const auto append = [&](std::string_view item) {
      if (written > 0) out.append(separator);
      if (written > 0 && innermost) out.append(written % per_line == 0 ? std::string_view(new_line) : " ");
      out.append(item);
      ++written;
    };
    for (int64_t i = 0; i < shown_[axis]; ++i) {
      if (summarised && i == edge_items) append(innermost ? " ..." : "...");
      append(axis_text(axis + 1, indent + 1));
    }
    out.append("]");
    return out;
  }

  bool floating_, whole_ = true, scientific_ = false;
  Shape shape_, shown_;
  std::vector<double> reals_;
  std::vector<int64_t> integers_;
  std::size_t width_ = 1, next_ = 0;
};

}  // namespace detail

KNOCK_FUNC std::string to_string(const Tensor& x) {
  using Printer = detail::TensorPrinter;
  if (!x.defined()) return "tensor(undefined)";
  std::string out(Printer::prefix);
  out += x.numel() == 0 ? "[]" : Printer(x).print();
  std::string suffix = text("shape=", x.shape(), ", dtype=", x.dtype());
  if (x.device() != Device()) suffix += text(", device=", x.device());
  const std::size_t last_line = out.size() - (out.rfind('\n') + 1);
  const bool fits = last_line + 2 + suffix.size() + 1 <= Printer::line_width;
  out.append(fits ? ", " : ",\n");
  if (!fits) out.append(Printer::prefix.size(), ' ');
  return out.append(suffix).append(")");
}

KNOCK_FUNC std::ostream& operator<<(std::ostream& out, const Tensor& x) { return out << to_string(x); }

}  // namespace knock
#endif
