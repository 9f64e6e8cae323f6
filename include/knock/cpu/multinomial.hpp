#pragma once
// Drawing from discrete distributions on the CPU, with replacement: the inverse of the running sum, in f64.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void multinomial(RngState state, const Array& weights, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MULTINOMIAL)
#include <knock/core/parallel.hpp>
#include <knock/cpu/row.hpp>

#include <algorithm>
#include <vector>

namespace knock::cpu {

KNOCK_FUNC void multinomial(RngState state, const Array& weights, const Array& out) {
  dispatch_float(weights.dtype, "multinomial", [&]<class T>(Type<T>) {
    const Rows<T> rows(weights);
    const Rows<int64_t> drawn(out);
    const int64_t n = rows.length(), samples = drawn.length();
    parallel_for(rows.count(), std::max<int64_t>(16384 / (n + 16 * samples), 1), [&](int64_t begin, int64_t end) {
      std::vector<double> upper(static_cast<std::size_t>(n));  // running sums; class i owns [upper[i - 1], upper[i])
      for (int64_t row = begin; row < end; ++row) {
        double total = 0;
        std::size_t last = 0;
        for (std::size_t i = 0; i < upper.size(); ++i) {
          const double weight = static_cast<compute_t<T>>(rows.stored(row)[static_cast<int64_t>(i) * rows.step()]);
          if (weight > 0) last = i;
          upper[i] = total += weight;
        }
        for (int64_t sample = 0; sample < samples; ++sample) {
          const auto counter = static_cast<uint64_t>(row * samples + sample);
          const auto bits = philox4x32(state.seed, counter, state.offset);
          const auto found = std::upper_bound(upper.begin(), upper.end(), total * uniform_double(bits[0], bits[1]));
          const auto at = std::min(static_cast<std::size_t>(found - upper.begin()), last);
          drawn.stored(row)[sample * drawn.step()] = static_cast<int64_t>(at);
        }
      }
    });
  });
}

}  // namespace knock::cpu
#endif
