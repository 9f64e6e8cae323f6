#pragma once
// The CPU's kernel table: one line per kernel.

#include <knock/core/backend.hpp>

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_BACKEND)
#include <knock/cpu/copy.hpp>
#include <knock/cpu/gemm.hpp>

namespace knock {

namespace cpu {

KNOCK_FUNC const Backend& table() {
  static const Backend kernels = [] {
    Backend b;
    b.fill = fill;
    b.copy = copy;
    b.arange = arange;
    b.random = random;
    b.gemm = gemm;
    return b;
  }();
  return kernels;
}

}  // namespace cpu

KNOCK_FUNC const Backend& backend(Device device) {
  check(device.kind == DeviceKind::cpu, "backend", device,
        " asked for, but no CUDA back-end is linked into this program");
  return cpu::table();
}

}  // namespace knock
#endif
