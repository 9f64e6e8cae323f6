// What goes wrong on a device and when the program hears of it.

#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>
#include <support/own_process.hpp>

namespace {

using namespace knock;

const Device device("cuda:0");

using test::error_of;
using test::tell;
using test::told_by;

TEST_CASE("errors: an index out of range is reported by the next wait, in the op's name") {
  const Tensor x = arange(0, 5, 1, {.dtype = DType::f32, .device = device});
  const Tensor index = from_data<int64_t>({0, 4, 5, -1}, {4}).to(device);
  Tensor taken;
  CHECK(error_of([&] { taken = index_select(x, 0, index); }) == "");
  CHECK(error_of([&] { taken.to_vector<float>(); }) ==
        "[index_select] an index is out of range for extent 5, first at position 2 of the flattened index");
  CHECK(taken.to_vector<float>() == std::vector<float>{0, 4, 0, 0});  // told once; nothing was read outside

  const Tensor again = index_select(x, 0, from_data<int64_t>({3}, {1}).to(device));
  CHECK(error_of([&] { synchronize(device); }) == "");
  CHECK(again.item() == 3);
}

TEST_CASE("errors: scatter with an index out of range writes nothing there") {
  const Tensor index = from_data<int64_t>({1, 7, 2}, {3}).to(device);
  const Tensor y = scatter_add(zeros({3}, {.device = device}), 0, index, ones({3}, {.device = device}));
  CHECK(error_of([&] { synchronize(device); }).starts_with("[scatter_add] an index is out of range for extent 3"));
  CHECK(y.to_vector<float>() == std::vector<float>{0, 1, 1});
}

TEST_CASE("errors: integer division by zero") {
  const Tensor a = from_data<int64_t>({6, 7}, {2}).to(device), b = from_data<int64_t>({2, 0}, {2}).to(device);
  const Tensor y = floor_divide(a, b);
  CHECK(error_of([&] { y.to_vector<int64_t>(); }) == "[divide] integer division by zero");
}

TEST_CASE("errors: a target that is no class") {
  const Tensor logits = zeros({2, 3}, {.device = device});
  const Tensor loss = cross_entropy(logits, from_data<int64_t>({0, 3}, {2}).to(device));
  CHECK(error_of([&] { loss.item(); }).starts_with("[cross_entropy] a target is neither ignore_index nor in a range"));
}

TEST_CASE("errors: many checks between two waits") {
  const Tensor x = arange(0, 5, 1, {.dtype = DType::f32, .device = device});
  const Tensor good = from_data<int64_t>({1, 2}, {2}).to(device), bad = from_data<int64_t>({1, 9}, {2}).to(device);
  for (int i = 0; i < 600; ++i) index_select(x, 0, good);  // more than there are slots
  index_select(x, 0, bad);
  CHECK(error_of([&] { synchronize(device); }).starts_with("[index_select] an index is out of range for extent 5"));
  CHECK(error_of([&] { synchronize(device); }) == "");
}

TEST_CASE("errors: tensors on two devices do not meet") {
  const Tensor here = ones({2}), there = ones({2}, {.device = device});
  CHECK(error_of([&] { here + there; }).find("tensors are on cpu and cuda:0; move one with") != std::string::npos);
}

// A kernel that fails ends all that the process can do on its devices.

TEST_CASE("errors of a process of its own: a kernel writes where no memory is" * doctest::skip()) {
  Tensor x = zeros({4}, {.device = device});
  synchronize(device);
  const Array nowhere{reinterpret_cast<void*>(4096), DType::f32, {4}, {1}};
  tell(error_of([&] { x = x + 1; }));
  tell(error_of([&] { backend(device).fill(nowhere, 1); }));
  tell(error_of([&] { synchronize(device); }));
  tell(error_of([&] { zeros({4}, {.device = device}); }));
  tell(error_of([&] { x.to_vector<float>(); }));
  tell(error_of([&] { synchronize(device); }));
}

TEST_CASE("errors: a kernel that fails is named by the next wait, and by every call after it") {
  const std::string test = "errors of a process of its own: a kernel writes where no memory is";
  const std::string what = "an illegal memory access was encountered (cudaErrorIllegalAddress) in ";
  const std::string later =
      "[cuda] the devices cannot be used any more in this process, because a kernel failed before: ";

  const auto told = told_by(test, "KNOCK_CUDA_SYNC=0");
  REQUIRE(told.size() == 6);
  CHECK(told[0] == "");
  CHECK(told[1] == "");  // the kernel runs later
  CHECK(told[2].starts_with("[cuda] " + what));
  CHECK(told[2].ends_with(
      "; launched since the last wait, the latest first: fill, add (KNOCK_CUDA_SYNC=1 finds the one that failed)"));
  for (std::size_t i = 3; i < told.size(); ++i) CHECK(told[i].starts_with(later + what));

  const auto waiting = told_by(test, "KNOCK_CUDA_SYNC=1");
  REQUIRE(waiting.size() == 6);
  CHECK(waiting[0] == "");
  CHECK(waiting[1] == "[cuda] " + what + "fill; launched since the last wait, the latest first: fill");
  for (std::size_t i = 2; i < waiting.size(); ++i) CHECK(waiting[i].starts_with(later + what + "fill"));
}

}  // namespace
