// A program with the CUDA back-end on machines without a device that it could use: the simulated one is told what it
// lacks.

#include <knock/knock.hpp>

#include <cuda_runtime_api.h>
#include <doctest/doctest.h>
#include <support/compare.hpp>
#include <support/own_process.hpp>

namespace {

using namespace knock;

TEST_CASE("no device of a process of its own: asks for one" * doctest::skip()) {
  test::tell(text(device_count(DeviceKind::cuda), is_available("cuda:0") ? " available" : ""));
  test::tell(test::error_of([] { zeros({2}, {.device = "cuda:0"}); }));
  test::tell(text(sum(ones({3})).item()));
}

void check_refusal(const std::string& environment, int devices, const std::string& why) {
  CAPTURE(environment);
  const std::vector<std::string> expected{text(devices), "[device] cuda:0 asked for, but " + why, "3"};
  CHECK(test::told_by("no device of a process of its own: asks for one", environment) == expected);
}

TEST_CASE("no device: asking for one is an error that says why, the CPU works") {
  check_refusal("KNOCK_CUDA_SIM_DRIVER=0", 0, "no NVIDIA driver is installed (libcuda.so is missing)");
  check_refusal("KNOCK_CUDA_SIM_DRIVER=11080", 0,
                text("the NVIDIA driver supports CUDA 11.8, this program needs ", CUDART_VERSION / 1000, ".",
                     CUDART_VERSION % 1000 / 10));
  check_refusal("KNOCK_CUDA_SIM_DEVICES=0", 0, "the NVIDIA driver shows no device");
  check_refusal("KNOCK_CUDA_SIM_CAPABILITY=7.5", 1, "its compute capability is 7.5, 8.0 is needed");
}

}  // namespace
