// The caching allocator of the CUDA devices: what it counts, reuses, gives back and refuses.

#include "cuda/allocator.hpp"

#include "cuda/device.hpp"
#include "cuda/stream.hpp"

#include <knock/knock.hpp>

#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <array>

namespace {

using namespace knock;

const Device device("cuda:0");

Tensor bytes(int64_t n) { return empty({n}, {DType::u8, device}); }

/// Nothing cached, nothing counted before.
memory::Stats fresh_start() {
  memory::release_cached(device);
  memory::reset_peak(device);
  return memory::stats(device);
}

TEST_CASE("allocator: counts what is in use, cached and asked of the system") {
  const memory::Stats before = fresh_start();
  {
    const Tensor x = bytes(1000);
    const memory::Stats now = memory::stats(device);
    CHECK(now.bytes_in_use == before.bytes_in_use + 1024);
    CHECK(now.allocations == before.allocations + 1);
    CHECK(now.system_allocations == before.system_allocations + 1);
    CHECK(now.bytes_in_use + now.bytes_cached == before.bytes_in_use + before.bytes_cached + (int64_t{2} << 20));
  }
  const memory::Stats after = memory::stats(device);
  CHECK(after.bytes_in_use == before.bytes_in_use);
  CHECK(after.peak_bytes == before.peak_bytes + 1024);
  memory::release_cached(device);
  CHECK(memory::stats(device).bytes_cached == before.bytes_cached);
}

TEST_CASE("allocator: a steady loop asks the system once") {
  fresh_start();
  const auto step = [] {
    const Tensor small = bytes(3000), large = bytes(int64_t{5} << 20), middle = bytes(700000);
    return small.numel() + large.numel() + middle.numel();
  };
  step();
  const int64_t first = memory::stats(device).system_allocations;
  for (int i = 0; i < 10; ++i) step();
  CHECK(memory::stats(device).system_allocations == first);
}

TEST_CASE("allocator: small blocks share a segment, and join again when they are free") {
  const memory::Stats before = fresh_start();
  {
    std::array<Tensor, 4> parts;
    for (Tensor& part : parts) part = bytes(int64_t{1} << 19);  // 4 of them fill a segment of 2 MiB
    CHECK(memory::stats(device).system_allocations == before.system_allocations + 1);
    parts[1] = parts[2] = Tensor();
    const Tensor joined = bytes(int64_t{1} << 20);  // fits where two lay side by side
    CHECK(memory::stats(device).system_allocations == before.system_allocations + 1);
    CHECK(static_cast<char*>(joined.raw_data()) == static_cast<char*>(parts[0].raw_data()) + (1 << 19));
  }
  memory::release_cached(device);
  CHECK(memory::stats(device).bytes_cached == before.bytes_cached);
}

TEST_CASE("allocator: out of memory names the figures, after the caches were freed") {
  fresh_start();
  { const Tensor cached = bytes(int64_t{64} << 20); }
  CHECK(memory::stats(device).bytes_cached >= int64_t{64} << 20);
  std::string message;
  try {
    bytes(int64_t{1} << 46);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.starts_with("[memory] out of memory on cuda:0: asked for 70368744177664 bytes with "));
  CHECK(message.find("cached in pieces; the device has ") != std::string::npos);
  CHECK(memory::stats(device).bytes_cached < int64_t{64} << 20);
  CHECK(full({3}, 2, {.device = device}).to_vector<float>() == std::vector<float>{2, 2, 2});
}

TEST_CASE("allocator: what is cached makes room where the device has no more") {
  fresh_start();
  std::size_t room = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&room, &total) == cudaSuccess);
  const auto share = [&](int64_t tenths) { return static_cast<int64_t>(room) / 10 * tenths; };
  { const Tensor cached = bytes(share(6)); }
  CHECK(memory::stats(device).bytes_cached >= share(6));
  const Tensor larger = bytes(share(7));  // not beside it
  CHECK(memory::stats(device).bytes_in_use >= share(7));
  CHECK(memory::stats(device).bytes_cached < share(6));
}

TEST_CASE("allocator: a block that another stream used comes back when that stream is done with it") {
  fresh_start();
  cuda::use_device(0);
  const cuda::Stream side;
  const Tensor x = full({1 << 16}, 3, {.device = device});
  for (int round = 0; round < 4; ++round) {
    Tensor made = zeros({1 << 16}, {.device = device});
    {
      const cuda::StreamGuard guard(side);
      made.add_(x);
      made = Tensor();  // released while the side stream may still write
    }
    const Tensor next = full({1 << 16}, round, {.device = device});
    CHECK(sum(next).item<double>() == (1 << 16) * static_cast<double>(round));
  }
}

TEST_CASE("allocator: addresses tell their device") {
  const Tensor x = bytes(100);
  const int on_host = 0;
  CHECK(cuda::device_of(x.raw_data()) == 0);
  CHECK(cuda::device_of(static_cast<char*>(x.raw_data()) + 99) == 0);
  CHECK(cuda::device_of(&on_host) == -1);
}

TEST_CASE("pinned buffer: copies that nobody waits for, both ways, in the order of the stream; too much is an error") {
  cuda::use_device(0);
  constexpr int64_t n = 3000, size = n * static_cast<int64_t>(sizeof(float));
  const cuda::PinnedBuffer from(size), to(size);
  auto *const given = static_cast<float*>(from.data()), *const got = static_cast<float*>(to.data());
  for (int64_t i = 0; i < n; ++i) given[i] = static_cast<float>(i);
  const Tensor x = empty({n}, {.device = device});
  cudaMemcpyAsync(x.raw_data(), given, size, cudaMemcpyHostToDevice, cuda::current_stream());
  const Tensor twice = x * 2;
  cudaMemcpyAsync(got, twice.raw_data(), size, cudaMemcpyDeviceToHost, cuda::current_stream());
  cuda::synchronize_stream();
  for (int64_t i = 0; i < n; ++i) CHECK(got[i] == static_cast<float>(2 * i));
  CHECK_THROWS_AS(cuda::PinnedBuffer(std::size_t{1} << 50), Error);
  CHECK(sum(x).item() == n * (n - 1) / 2);  // what comes after it is not blamed
}

}  // namespace
