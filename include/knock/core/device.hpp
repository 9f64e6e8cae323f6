#pragma once
// Where a tensor lives: "cpu", or "cuda:N" when a CUDA back-end is linked in.
//
// A back-end for a further kind of device is registered once, as a table of functions: its kernels, its memory, and
// what waits for it. The CPU is built in.

#include <knock/core/error.hpp>

namespace knock {

struct Backend;  // core/backend.hpp
namespace memory {
struct Stats;  // core/storage.hpp
}

enum class DeviceKind : uint8_t { cpu, cuda };
inline constexpr int device_kind_count = 2;

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int16_t index = 0;

  constexpr Device() = default;
  constexpr Device(DeviceKind k, int i = 0) : kind(k), index(static_cast<int16_t>(i)) {}
  Device(const char* name) : Device(std::string_view(name)) {}
  Device(const std::string& name) : Device(std::string_view(name)) {}
  Device(std::string_view name) {
    if (name == "cpu") return;
    check(name.starts_with("cuda"), "device", "unknown device \"", name, "\"; known: cpu, cuda, cuda:N");
    kind = DeviceKind::cuda;
    if (name == "cuda") return;
    const std::string_view digits = name.size() > 5 && name[4] == ':' ? name.substr(5) : std::string_view();
    int value = -1;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    check(error == std::errc() && end == digits.data() + digits.size() && value >= 0 && value < 1024, "device",
          "unknown device \"", name, "\"; known: cpu, cuda, cuda:N");
    index = static_cast<int16_t>(value);
  }

  friend constexpr bool operator==(Device, Device) = default;
};

inline std::string to_text(Device device) {
  return device.kind == DeviceKind::cpu ? std::string("cpu") : text("cuda:", static_cast<int>(device.index));
}

/// What a back-end brings for its kind of device. Functions that take an index throw `Error` when that device cannot be
/// used, but for `problem` and `release`.
struct DeviceKindTable {
  const Backend* kernels;
  int (*count)();                     ///< devices of this kind that the system shows, usable or not
  std::string (*problem)(int index);  ///< why the device cannot be used; empty when it can
  void (*use)(int index);             ///< called before kernels of the device are
  void (*synchronize)(int index);
  void* (*allocate)(int64_t bytes, int index);
  void (*release)(void* block, int64_t bytes, int index) noexcept;
  memory::Stats (*stats)(int index);
  void (*reset_peak)(int index);
  void (*release_cached)(int index);

  // Graphs (core/graph.hpp); absent where the kind has none.
  void* (*begin_capture)(int index) = nullptr;      ///< what this thread asks of the device is recorded from now on
  void (*end_capture)(void* graph) = nullptr;       ///< makes what was recorded ready
  void (*replay)(void* graph) = nullptr;            ///< launches it
  void (*destroy)(void* graph) noexcept = nullptr;  ///< also one whose capture has not ended
};

namespace detail {
inline const DeviceKindTable* device_kinds[device_kind_count] = {};

/// The table of an accelerator; an error when its back-end is not part of this program.
inline const DeviceKindTable& device_kind(Device device) {
  const DeviceKindTable* table = device_kinds[static_cast<int>(device.kind)];
  check(table != nullptr, "device", device,
        " asked for, but no CUDA back-end is linked into this program; configure knock with KNOCK_CUDA=ON, which needs "
        "nvcc, and link knock::cuda");
  return *table;
}
}  // namespace detail

/// Makes a kind of device known; `table` stays in use until the program ends.
inline bool register_device_kind(DeviceKind kind, const DeviceKindTable& table) {
  detail::device_kinds[static_cast<int>(kind)] = &table;
  return true;
}

/// Number of devices of a kind: 0 when none is present or its back-end is not part of this program.
inline int device_count(DeviceKind kind) {
  if (kind == DeviceKind::cpu) return 1;
  const DeviceKindTable* table = detail::device_kinds[static_cast<int>(kind)];
  return table ? table->count() : 0;
}

/// Whether tensors can be made on the device.
inline bool is_available(Device device) {
  if (device.kind == DeviceKind::cpu) return true;
  const DeviceKindTable* table = detail::device_kinds[static_cast<int>(device.kind)];
  return table && table->problem(device.index).empty();
}

/// Waits until everything that was asked of the device is done, and reports what failed in it. Reading a tensor's
/// elements waits by itself.
inline void synchronize(Device device) {
  if (device.kind != DeviceKind::cpu) detail::device_kind(device).synchronize(device.index);
}

}  // namespace knock
