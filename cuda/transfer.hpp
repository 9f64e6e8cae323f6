#pragma once
// Bytes between host and device, and between devices, on the current stream.

#include <cstdint>

namespace knock::cuda {

/// To the current device. The host's memory may change when this returns; the copy may still be under way.
void to_device(void* device, const void* host, int64_t bytes);
/// From the current device. Waits: the host's memory is written when this returns.
void to_host(void* host, const void* device, int64_t bytes);
/// To the current device from another one, after what its current stream was given before.
void from_device(void* here, const void* there, int64_t bytes, int other_device);

}  // namespace knock::cuda
