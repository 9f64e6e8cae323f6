// Work that is watched as it ends, what it touches, and work that is counted without being executed.

#include "counters.hpp"
#include "device_vector.cuh"
#include "runtime.hpp"
#include "runtime_kernels.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

TEST_CASE("cuda_sim counters: watched work tells the bytes it touches, each once") {
  setenv("KNOCK_CUDA_SIM_EAGER", "1", 1);
  std::vector<std::pair<std::string, cuda_sim::Counters>> seen;
  float* x = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&x), 1024);
  cuda_sim::watch_work([&](const std::string& name, const cuda_sim::Counters& did) { seen.emplace_back(name, did); });
  cudaMemsetAsync(x, 0, 1024, nullptr);
  launch_add(x, 130, 1, nullptr);  // 520 bytes: 17 sectors, the last of which is half used
  launch_double(x, nullptr);
  cuda_sim::watch_work({});
  launch_double(x, nullptr);
  cudaFree(x);
  unsetenv("KNOCK_CUDA_SIM_EAGER");

  REQUIRE(seen.size() == 3);
  CHECK(seen[0].first == "fill");
  CHECK(seen[0].second.touched_bytes_written == 1024);
  CHECK(seen[1].first == "(anonymous namespace)::add");
  CHECK(seen[1].second.launches == 1);
  CHECK(seen[1].second.touched_bytes_read == 17 * 32);
  CHECK(seen[1].second.touched_bytes_written == 17 * 32);
  CHECK(seen[2].second.touched_bytes_read == 32);
}

TEST_CASE("cuda_sim: work that is not executed is counted, and needs no memory") {
  constexpr std::size_t huge = std::size_t{1} << 36;
  char host[4] = {1, 2, 3, 4};
  float *x = nullptr, *filled = nullptr;
  cuda_sim::reset_kernel_counters();
  cuda_sim::set_executing(false);
  CHECK(cudaMalloc(reinterpret_cast<void**>(&x), huge) == cudaSuccess);
  CHECK(cudaMalloc(reinterpret_cast<void**>(&filled), 64) == cudaSuccess);
  launch_add(x, huge / 4, 1, nullptr);
  cudaMemset(filled, 0x11, 64);
  CHECK(cudaMemcpy(host, x, 2, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(cudaMemcpy(host + 2, reinterpret_cast<char*>(filled) + 62, 2, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(cudaFree(x) == cudaSuccess);
  CHECK(cudaFree(filled) == cudaSuccess);
  cuda_sim::set_executing(true);

  CHECK(host[0] == 0);
  CHECK(host[1] == 0);
  CHECK(host[2] == 0x11);
  CHECK(host[3] == 0x11);
  const auto& counters = cuda_sim::kernel_counters();
  CHECK(counters.at("(anonymous namespace)::add").launches == 1);
  CHECK(counters.at("(anonymous namespace)::add").warp_instructions == 0);
  CHECK(counters.at("copy to host").global_bytes_read == 4);
  CHECK(cuda_sim::take_reports().empty());
}
