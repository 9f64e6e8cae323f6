#pragma once
// The CPU's kernel table: an entry of KNOCK_CPU_KERNELS is the function of its name in knock::cpu.

#include <knock/core/backend.hpp>

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_BACKEND)
#include <knock/cpu/attention.hpp>
#include <knock/cpu/copy.hpp>
#include <knock/cpu/dropout.hpp>
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/gemm_activation.hpp>
#include <knock/cpu/gemm_many.hpp>
#include <knock/cpu/gemm_wide.hpp>
#include <knock/cpu/index.hpp>
#include <knock/cpu/knock_norm_rope.hpp>
#include <knock/cpu/loss.hpp>
#include <knock/cpu/mlp.hpp>
#include <knock/cpu/moe.hpp>
#include <knock/cpu/multinomial.hpp>
#include <knock/cpu/norm.hpp>
#include <knock/cpu/optim.hpp>
#include <knock/cpu/paged_attention.hpp>
#include <knock/cpu/pointwise.hpp>
#include <knock/cpu/reduce.hpp>
#include <knock/cpu/rms_norm.hpp>
#include <knock/cpu/rope.hpp>
#include <knock/cpu/router.hpp>
#include <knock/cpu/scan.hpp>
#include <knock/cpu/softmax.hpp>
#include <knock/cpu/sort.hpp>

namespace knock {

namespace cpu {

KNOCK_FUNC const Backend& table() {
  static const Backend kernels = [] {
    Backend b;
#define KNOCK_ENTRY(name) b.name = name;
    KNOCK_CPU_KERNELS(KNOCK_ENTRY)
#undef KNOCK_ENTRY
    return b;
  }();
  return kernels;
}

}  // namespace cpu

KNOCK_FUNC const Backend& backend(Device device) {
  if (device.kind == DeviceKind::cpu) [[likely]]
    return cpu::table();
  const DeviceKindTable& kind = detail::device_kind(device);
  kind.use(device.index);
  return *kind.kernels;
}

}  // namespace knock
#endif
