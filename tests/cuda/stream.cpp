// Streams and events: order within and between streams.

#include "cuda/stream.hpp"

#include "cuda/device.hpp"

#include <knock/knock.hpp>

#include <doctest/doctest.h>

#include <thread>

namespace {

using namespace knock;

const Device device("cuda:0");

TEST_CASE("stream: work on another stream follows what came before it, and what comes after follows it") {
  cuda::use_device(0);
  const cuda::Stream side;
  Tensor x = ones({1000}, {.device = device});
  for (int round = 0; round < 5; ++round) {
    x.mul_(2);
    const cuda::StreamGuard guard(side);
    x.add_(1);
  }
  CHECK(x.to_vector<float>() == std::vector<float>(1000, 63));  // x -> 2 x + 1, five times from 1
}

TEST_CASE("stream: threads share the device's stream") {
  cuda::use_device(0);
  const cudaStream_t here = cuda::current_stream();
  cudaStream_t there = nullptr;
  Tensor made;
  std::thread([&] {
    cuda::use_device(0);
    there = cuda::current_stream();
    made = full({100}, 5, {.device = device});
  }).join();
  CHECK(here == there);
  CHECK(sum(made).item() == 500);
}

TEST_CASE("stream: a guard is this thread's alone, and guards nest") {
  cuda::use_device(0);
  const cudaStream_t own = cuda::current_stream();
  const cuda::Stream outer, inner;
  {
    const cuda::StreamGuard first(outer);
    CHECK(cuda::current_stream() == outer.get());
    {
      const cuda::StreamGuard second(inner);
      CHECK(cuda::current_stream() == inner.get());
    }
    CHECK(cuda::current_stream() == outer.get());
    cudaStream_t elsewhere = nullptr;
    std::thread([&] {
      cuda::use_device(0);
      elsewhere = cuda::current_stream();
    }).join();
    CHECK(elsewhere == own);
  }
  CHECK(cuda::current_stream() == own);
}

TEST_CASE("stream: it is lent again, and tensors outlive it") {
  cuda::use_device(0);
  Tensor made;
  cudaStream_t lent = nullptr;
  {
    const cuda::Stream side, other;
    CHECK(side.get() != other.get());
    CHECK(side.counters_on_device() != other.counters_on_device());
    lent = side.get();
    const cuda::StreamGuard guard(side);
    made = full({3000}, 2, {.device = device});
  }
  made.mul_(2);
  CHECK(sum(made).item() == 12000);
  made = Tensor();  // given back to a stream that nobody has
  const cuda::Stream first, second;
  CHECK((first.get() == lent || second.get() == lent));
  CHECK(first.get() != second.get());
}

TEST_CASE("event: done after the work before it") {
  cuda::use_device(0);
  cuda::Event event;
  const Tensor x = exp(ones({1 << 14}, {.device = device}));
  event.record(cuda::current_stream());
  while (!event.done()) CHECK(ones({3}, {.device = device}).numel() == 3);  // which launches
  event.synchronize();
  CHECK(event.done());
  CHECK(x.numel() == 1 << 14);
}

}  // namespace
