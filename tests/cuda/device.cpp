// Devices of the CUDA back-end: what is there, what asking for another one says, copies between memories.

#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

namespace {

using namespace knock;

using test::contains;
using test::error_of;

TEST_CASE("device: one is there, the next is an error that says so") {
  REQUIRE(device_count(DeviceKind::cuda) >= 1);
  CHECK(is_available("cuda:0"));
  const int beyond = device_count(DeviceKind::cuda);
  const Device absent(DeviceKind::cuda, beyond);
  CHECK_FALSE(is_available(absent));
  CHECK(contains(error_of([&] { zeros({2}, {.device = absent}); }),
                 text("[device] cuda:", beyond, " asked for, but there")));
  CHECK(contains(error_of([&] { synchronize(absent); }), text("cuda:", beyond, " asked for")));
  CHECK(contains(error_of([&] { memory::stats(absent); }), text("cuda:", beyond, " asked for")));
}

TEST_CASE("device: factories make the same elements as on the CPU") {
  const auto same = [](const Tensor& here, const Tensor& there) {
    CHECK(there.device() == Device("cuda:0"));
    CHECK(here.to_vector<double>() == there.to_vector<double>());
  };
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    const TensorOptions host{dtype, "cpu"}, device{dtype, "cuda:0"};
    same(zeros({3, 5}, host), zeros({3, 5}, device));
    same(full({7}, 3, host), full({7}, 3, device));
    same(arange(2, 40, 3, host), arange(2, 40, 3, device));
    same(eye(3, 5, host), eye(3, 5, device));
    if (is_float(dtype)) same(linspace(-1, 2, 13, host), linspace(-1, 2, 13, device));
    const auto drawn = [&](const TensorOptions& options) {
      manual_seed(7);
      return randint(0, 200, {37}, options);
    };
    same(drawn(host), drawn(device));
  }
}

TEST_CASE("device: uniform numbers have the CPU's bits, normal ones its values") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const auto draw = [&](bool normal, Device device) {
      manual_seed(11);
      return (normal ? randn({1001}, {dtype, device}) : rand({1001}, {dtype, device})).to_vector<double>();
    };
    CHECK(draw(false, "cpu") == draw(false, "cuda:0"));
    const auto here = draw(true, "cpu"), there = draw(true, "cuda:0");
    double worst = 0;
    for (std::size_t i = 0; i < here.size(); ++i) worst = std::max(worst, std::abs(here[i] - there[i]));
    CHECK(worst <= (dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 0.016));
  }
}

TEST_CASE("device: copies there and back, converted and strided") {
  const Tensor x = randn({5, 7, 3});
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    const Tensor small = (x * 3).to(DType::i64).to(dtype == DType::u8 ? DType::i64 : dtype);
    const Tensor there = small.to("cuda:0");
    CHECK(there.to("cpu").to_vector<double>() == small.to_vector<double>());
    CHECK(there.permute({2, 0, 1}).to_vector<double>() == small.permute({2, 0, 1}).to_vector<double>());
    CHECK(there.slice(1, 6, 0, 2).to("cpu").to_vector<double>() == small.slice(1, 6, 0, 2).to_vector<double>());
    CHECK(there.select(2, 1).to(DType::f64).to_vector<double>() == small.select(2, 1).to_vector<double>());
  }
  Tensor there = zeros({5, 7, 3}, {.device = "cuda:0"});
  there.transpose(0, 2).copy_(x.transpose(0, 2));
  CHECK(there.to_vector<float>() == x.to_vector<float>());
}

TEST_CASE("device: large copies pass the staging buffers in parts") {
  const int64_t n = 3 * (int64_t{1} << 20) + 17;  // f32: more than two buffers
  const Tensor x = arange(0, n, 1, {.dtype = DType::f32});
  CHECK(x.to("cuda:0").to("cpu").to_vector<float>() == x.to_vector<float>());
}

}  // namespace
