#pragma once
// Where a tensor lives: "cpu", or "cuda:N" when a CUDA back-end is linked in.

#include <knock/core/error.hpp>

namespace knock {

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

}  // namespace knock
