// A program with the CUDA back-end where there is no device. CTest runs this with no simulated device.

#include <knock/knock.hpp>

#include <doctest/doctest.h>

namespace {

using namespace knock;

bool no_device() { return device_count(DeviceKind::cuda) == 0; }

TEST_CASE("no device: asking for one is an error that says so, the CPU works") {
  if (!no_device()) return;
  CHECK_FALSE(is_available("cuda:0"));
  std::string message;
  try {
    zeros({2}, {.device = "cuda:0"});
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message == "[device] cuda:0 asked for, but no NVIDIA driver is installed (libcuda.so is missing)");
  CHECK(sum(ones({3})).item() == 3);
}

}  // namespace
