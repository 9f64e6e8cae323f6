// causal attention, forward and backward: milliseconds and GFLOP/s
//
//   ./run bench attention [--dtype f32|bf16] [--threads N] [--json]
//
// What is masked is not counted. In the last row sequences are packed of documents of equal length.
#include <knock/core/dtype.hpp>
#include <knock/cpu/attention.hpp>

#include "measure.hpp"

#include <cmath>

using namespace knock;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, length, depth, documents;
};

const Case cases[] = {{4, 8, 2, 1024, 64, 1},
                      {16, 8, 2, 256, 32, 1},
                      {4, 8, 8, 512, 64, 1},
                      {1, 8, 2, 8192, 64, 1},
                      {1, 8, 2, 8192, 64, 16}};

struct Seconds {
  bench::Spread forward, backward;
};

template <class T>
Seconds measure(const Case& c) {
  struct Buffer {
    std::vector<T> values;
    Array array;
    Buffer(int64_t b, int64_t h, int64_t t, int64_t d)
        : values(static_cast<std::size_t>(b * h * t * d)),
          array{values.data(), dtype_of<T>(), {b, h, t, d}, {h * t * d, d, h * d, 1}} {  // (B, T, H, D) in memory
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = T(static_cast<float>(i * 7919 % 1000) / 500.0F - 1.0F);
    }
  };
  const auto make = [&](int64_t heads) { return Buffer(c.batch, heads, c.length, c.depth); };
  const Buffer q = make(c.heads), k = make(c.kv_heads), v = make(c.kv_heads), out = make(c.heads), dout = make(c.heads),
               dq = make(c.heads), dk = make(c.kv_heads), dv = make(c.kv_heads);
  std::vector<compute_t<T>> lse(static_cast<std::size_t>(c.batch * c.heads * c.length));
  const Shape rows{c.batch, c.heads, c.length};
  const Array log_sum_exp{lse.data(), dtype_of<compute_t<T>>(), rows, contiguous_strides(rows)};
  std::vector<int64_t> ids(static_cast<std::size_t>(c.length));
  for (int64_t i = 0; i < c.length; ++i) ids[static_cast<std::size_t>(i)] = i * c.documents / c.length;
  const Array documents =
      c.documents > 1 ? Array{ids.data(), DType::i64, {c.batch, c.length}, {0, 1}} : Array{};  // the same in all
  const AttentionScores scores{1 / std::sqrt(static_cast<double>(c.depth)), true, 0, 0};
  return {
      bench::time([&] { cpu::attention(scores, q.array, k.array, v.array, {}, documents, out.array, log_sum_exp); }),
      bench::time([&] {
        cpu::attention_backward(scores, q.array, k.array, v.array, {}, documents, out.array, log_sum_exp, dout.array,
                                dq.array, dk.array, dv.array);
      })};
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options(argc, argv, {"dtype"});
  const std::string wanted = options.one_of("dtype", {"all", "f32", "bf16"});
  bench::Table table(options, "attention", "GFLOP/s with percent of the peak; what is masked is not counted");
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const Case& c : cases) {
      if (wanted != "all" && wanted != to_text(dtype)) continue;
      const Seconds seconds = dtype == DType::f32 ? measure<float>(c) : measure<bf16>(c);
      const double gflop = 2e-9 * static_cast<double>(c.batch * c.heads * c.length * (c.length / c.documents) *
                                                      c.depth);  // both products, half
      const double peak = bench::peak_gflops(dtype);
      table.row({{"batch", c.batch},
                 {"heads", c.heads},
                 {"kv_heads", c.kv_heads},
                 {"length", c.length},
                 {"depth", c.depth},
                 {"documents", c.documents},
                 {"dtype", std::string(to_text(dtype))},
                 {"forward_ms", bench::Measured{seconds.forward * 1e3}},
                 {"backward_ms", bench::Measured{seconds.backward * 1e3}},
                 {"forward_gflops", bench::Measured{seconds.forward.rate(gflop), peak}},
                 {"backward_gflops", bench::Measured{seconds.backward.rate(2.5 * gflop), peak}}});
    }
}
