#pragma once
// Comparing tensors in tests.

#include <knock/core/tensor.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace test {

/// Largest |a - b| of two tensors of one shape, relative to the largest finite |b| where that is not 0. Infinite where
/// only one of the two is NaN, or where they are different infinities.
inline double distance(const knock::Tensor& a, const knock::Tensor& b) {
  if (a.shape() != b.shape()) return std::numeric_limits<double>::infinity();
  const auto x = a.to_vector<double>(), y = b.to_vector<double>();
  double worst = 0, largest = 0;
  for (const double value : y)
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
    const double difference = std::abs(x[i] - y[i]);
    worst = std::isfinite(difference) ? std::max(worst, difference) : std::numeric_limits<double>::infinity();
  }
  return largest == 0 ? worst : worst / largest;
}

/// Whether two tensors have the same shape, dtype and bits.
inline bool same_bits(const knock::Tensor& a, const knock::Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  return knock::dispatch_all(a.dtype(), [&]<class T>(knock::Type<T>) {
    const auto x = a.to_vector<T>(), y = b.to_vector<T>();
    return x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
  });
}

/// The text of the knock::Error that `body` throws; empty when it throws none.
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const knock::Error& error) {
    return error.what();
  }
  return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace test
