#pragma once
// What lasts as long as the process: the devices' streams, buffers of copies, handles of libraries. Nothing destroys it
// at exit, when the driver may be gone. For tools that look for leaks, shut_down does so before.

namespace knock::cuda {

/// Has `release` called by shut_down, the latest first.
void at_shut_down(void (*release)());

/// Gives all of it back, and cached memory. Nothing of this back-end may be used afterwards.
void shut_down();

}  // namespace knock::cuda
