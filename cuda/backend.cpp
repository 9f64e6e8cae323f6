// Makes the device kind known: its table of kernels and its memory. Linked as an object file, this file registers
// itself.

#include "allocator.hpp"
#include "device.hpp"
#include "graph.hpp"
#include "kernels.hpp"
#include "stream.hpp"

namespace knock::cuda {
namespace {

const Backend& kernels() {
  static const Backend table = [] {
    Backend b;
#define KNOCK_ENTRY(name) b.name = name;
    KNOCK_KERNELS(KNOCK_ENTRY)
#undef KNOCK_ENTRY
    return b;
  }();
  return table;
}

void synchronize(int device) {
  const DeviceGuard guard(device);
  synchronize_device();
}

const DeviceKindTable& device_kind() {
  static const DeviceKindTable table{.kernels = &kernels(),
                                     .count = device_count,
                                     .problem = problem,
                                     .use = use_device,
                                     .synchronize = synchronize,
                                     .allocate = allocate,
                                     .release = release,
                                     .stats = stats,
                                     .reset_peak = reset_peak,
                                     .release_cached = release_cached,
                                     .begin_capture = begin_capture,
                                     .end_capture = end_capture,
                                     .replay = replay,
                                     .destroy = destroy};
  return table;
}

[[maybe_unused]] const bool registered = register_device_kind(DeviceKind::cuda, device_kind());

}  // namespace
}  // namespace knock::cuda
