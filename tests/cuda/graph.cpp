// Graphs of a device's work: what a replay does, whose memory it uses, and what cannot be captured.

#include <knock/knock.hpp>

#include "cuda/device.hpp"
#include "cuda/stream.hpp"

#include <doctest/doctest.h>
#include <support/compare.hpp>

namespace {

using namespace knock;

const Device device("cuda:0");

using test::error_of;

Tensor on_device(std::initializer_list<float> values) {
  return from_data(values, {static_cast<int64_t>(values.size())}).to(device);
}

TEST_CASE("graph: nothing runs in the capture, all of it in each replay") {
  Tensor x = on_device({1, 2, 3}), count = zeros({}, {.device = device}), y;
  Graph graph = Graph::capture(device, [&] {
    y = x * 2 + 1;
    count.add_(1);
  });
  CHECK(graph.defined());
  CHECK(count.item() == 0);
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>{3, 5, 7});
  x.copy_(from_data<float>({10, 20, 30}, {3}));
  graph.replay();
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>{21, 41, 61});
  CHECK(count.item() == 3);
  graph.reset();
  CHECK(!graph.defined());
  CHECK(y.to_vector<float>() == std::vector<float>{21, 41, 61});  // a tensor lives longer than the graph
}

TEST_CASE("graph: forward and backward, with the same bits") {
  manual_seed(3);
  const Tensor x = randn({16, 8}, {.device = device});
  Tensor a = randn({8, 32}, {.device = device}).requires_grad_(),
         b = randn({32, 4}, {.device = device}).requires_grad_();
  const auto step = [&] {
    const Tensor loss = mean(square(matmul(silu(matmul(x, a)), b)));
    loss.backward();
    return loss.detach();
  };
  const auto bits = [&](const Tensor& loss) {
    return std::vector{loss.to_vector<float>(), a.grad().to_vector<float>(), b.grad().to_vector<float>()};
  };
  const auto expected = bits(step());
  a.set_grad({});
  b.set_grad({});
  Tensor loss;
  Graph graph = Graph::capture(device, [&] { loss = step(); });
  const void* place = a.grad().raw_data();
  for (int i = 0; i < 3; ++i) {
    graph.replay();
    CHECK(bits(loss) == expected);  // written, not added to what the replay before left
  }
  CHECK(a.grad().raw_data() == place);
}

TEST_CASE("graph: what is allocated in the capture stays the graph's, until that is destroyed") {
  memory::release_cached(device);
  const memory::Stats before = memory::stats(device);
  const Tensor x = full({1 << 16}, 2, {.device = device});
  Tensor y;
  {
    Graph graph = Graph::capture(device, [&] {
      y = x;
      for (int i = 0; i < 8; ++i) y = y + 1;  // of these only two are there at a time
    });
    const memory::Stats captured = memory::stats(device);
    CHECK(captured.bytes_in_use + captured.bytes_cached <= before.bytes_in_use + before.bytes_cached + (4 << 20));
    y = Tensor();
    std::vector<Tensor> others;
    for (int i = 0; i < 16; ++i) others.push_back(full({1 << 16}, -1, {.device = device}));
    memory::release_cached(device);
    graph.replay();  // into its own memory, although no handle is left
    for (const Tensor& other : others) CHECK(sum(other).item() == -(1 << 16));
  }
  memory::release_cached(device);
  const memory::Stats after = memory::stats(device);
  CHECK(after.bytes_in_use == before.bytes_in_use + (1 << 18));  // x
}

TEST_CASE("graph: a tensor from outside that is released in the capture is kept") {
  Tensor x = full({1000}, 4, {.device = device}), y;
  Graph graph = Graph::capture(device, [&] {
    y = sqrt(x);
    x = Tensor();
  });
  const Tensor other = full({1000}, 100, {.device = device});
  graph.replay();
  CHECK(sum(y).item() == 2000);
}

TEST_CASE("graph: on a stream of the program") {
  cuda::use_device(0);
  const cuda::Stream side;
  const cuda::StreamGuard guard(side);
  const Tensor x = on_device({1, 4});
  Tensor y;
  Graph graph = Graph::capture(device, [&] { y = sqrt(x); });
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>{1, 2});
}

TEST_CASE("graph: what kernels find wrong is thrown at the wait after each replay") {
  const Tensor x = arange(0, 5, 1, {.dtype = DType::f32, .device = device});
  Tensor index = from_data<int64_t>({1, 4}, {2}).to(device), y;
  Graph graph = Graph::capture(device, [&] {
    for (int i = 0; i < 600; ++i) y = index_select(x, 0, index);  // more questions than a block of slots has
  });
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>{1, 4});
  const std::string found = "[index_select] an index is out of range for extent 5, first at position 1";
  for (int i = 0; i < 2; ++i) {
    index.copy_(from_data<int64_t>({1, 5}, {2}));
    graph.replay();
    CHECK(error_of([&] { synchronize(device); }).starts_with(found));
    CHECK(error_of([&] { synchronize(device); }) == "");
    index.copy_(from_data<int64_t>({2, 3}, {2}));
    graph.replay();
    CHECK(y.to_vector<float>() == std::vector<float>{2, 3});
  }
  index.copy_(from_data<int64_t>({7, 3}, {2}));
  graph.replay();
  graph.reset();  // what it found is told all the same
  CHECK(error_of([&] { synchronize(device); }).starts_with("[index_select] an index is out of range for extent 5"));
}

TEST_CASE("graph: what cannot be captured is an error that says so, and leaves the device usable") {
  const Tensor x = on_device({1, 0, 3}), here = ones({3});
  struct Refused {
    const char* what;
    std::function<void()> call;
  };
  const Refused all[] = {
      {"reading a tensor on the host (item, to_vector, to(\"cpu\"), nonzero, ...)", [&] { sum(x).item(); }},
      {"reading a tensor on the host (item, to_vector, to(\"cpu\"), nonzero, ...)", [&] { x.to("cpu"); }},
      {"reading a tensor on the host (item, to_vector, to(\"cpu\"), nonzero, ...)", [&] { nonzero(x); }},
      {"a wait for the device", [] { synchronize(device); }},
      {"a copy from the host's memory, which is another one in each replay,", [&] { here.to(device); }},
      {"random numbers, which would be the same in each replay,", [] { randn({3}, {.device = device}); }},
      {"random numbers, which would be the same in each replay,", [&] { dropout(x, 0.5, true); }},
      {"giving cached memory back", [] { memory::release_cached(device); }},
      {"a capture within another one", [] { Graph::capture(device, [] {}); }},
  };
  const memory::Stats before = memory::stats(device);
  for (const Refused& refused : all) {
    Tensor y;
    CHECK(error_of([&] {
            Graph::capture(device, [&] {
              y = x + 1;
              refused.call();
            });
          }) == "[graph] " + std::string(refused.what) + " cannot be part of a graph");
    y = x + 2;
    CHECK(y.to_vector<float>() == std::vector<float>{3, 2, 5});
  }
  CHECK(memory::stats(device).bytes_in_use == before.bytes_in_use);
  Graph graph = Graph::capture(device, [&] { x + 1; });
  CHECK(error_of([&] { Graph::capture(device, [&] { graph.replay(); }); }) ==
        "[graph] the replay of another graph cannot be part of a graph");
}

TEST_CASE("graph: an exception of the program ends the capture") {
  const Tensor x = on_device({1, 2});
  CHECK_THROWS_AS(Graph::capture(device,
                                 [&] {
                                   x + 1;
                                   throw std::runtime_error("stop");
                                 }),
                  std::runtime_error);
  Tensor y;
  Graph graph = Graph::capture(device, [&] { y = x * 3; });
  graph.replay();
  CHECK(y.to_vector<float>() == std::vector<float>{3, 6});
}

}  // namespace
