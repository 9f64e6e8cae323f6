// Two devices: copies between them, and what each counts. CTest runs this with two simulated devices.

#include <knock/knock.hpp>

#include <doctest/doctest.h>

#include <cstdlib>

namespace {

using namespace knock;

const doctest::skip without_two_devices(!std::getenv("KNOCK_CUDA_SIM_DEVICES"));

TEST_CASE("devices: tensors pass from one to the other" * without_two_devices) {
  const Tensor x = randn({4, 6, 3});
  const Tensor first = x.to("cuda:0"), second = first.to("cuda:1");
  CHECK(second.device() == Device("cuda:1"));
  CHECK(second.to_vector<float>() == x.to_vector<float>());
  CHECK(first.permute({2, 1, 0}).to("cuda:1").to_vector<float>() == x.permute({2, 1, 0}).to_vector<float>());
  Tensor into = zeros({3, 6, 4}, {DType::f64, "cuda:1"});
  into.permute({2, 1, 0}).copy_(first);
  CHECK(into.permute({2, 1, 0}).to_vector<double>() == x.to_vector<double>());
  CHECK((exp(second) * 2).to("cuda:0").to_vector<float>() == (exp(first) * 2).to_vector<float>());
}

TEST_CASE("devices: gradients go back the way the values came" * without_two_devices) {
  const Tensor x = randn({5}, {DType::f32, "cuda:0"}).requires_grad_();
  sum(square(x.to("cuda:1"))).backward();
  CHECK(x.grad().device() == Device("cuda:0"));
  CHECK(x.grad().to_vector<float>() == (x.detach() * 2).to_vector<float>());
}

TEST_CASE("devices: each has its own memory" * without_two_devices) {
  const int64_t first = memory::stats("cuda:0").bytes_in_use, second = memory::stats("cuda:1").bytes_in_use;
  const Tensor x = zeros({1 << 10}, {DType::f32, "cuda:1"});
  CHECK(memory::stats("cuda:0").bytes_in_use == first);
  CHECK(memory::stats("cuda:1").bytes_in_use == second + (1 << 12));
}

TEST_CASE("devices: a graph of the second one, without copies from the first" * without_two_devices) {
  const Tensor here = ones({4}, {DType::f32, "cuda:0"}), x = full({4}, 3, {DType::f32, "cuda:1"});
  Tensor y;
  std::string message;
  try {
    Graph::capture("cuda:1", [&] { y = here.to("cuda:1"); });
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message == "[graph] a copy between devices cannot be part of a graph");
  Graph graph = Graph::capture("cuda:1", [&] { y = x * x; });
  sum(here).item();  // another device is the thread's
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>(4, 9));
}

}  // namespace
