#pragma once
// Frames: the registers of functions that warps are in, and how lanes enter and leave functions.

#include <memory>
#include <vector>

#include "warp.hpp"

namespace cuda_sim {

/// Of a thread's local memory, for the functions that its kernel calls.
constexpr std::size_t call_stack_bytes = 16 * 1024;

class CallStack {
 public:
  CallStack() = default;
  ~CallStack();  ///< its frames are kept for later launches
  CallStack(const CallStack&) = delete;
  CallStack& operator=(const CallStack&) = delete;

  /// The frame of the kernel itself; one for each warp, for all blocks.
  Frame* entry_frame(const Warp& warp);
  /// Writes the special registers that depend on the block.
  void fill_block_specials(const Warp& warp, const Frame& frame) const;

  /// The lanes of the mask enter the function that the instruction names; the rest of the group goes on behind it.
  /// False: the group's place changed. True: there is nothing to enter (printf), and all go on.
  bool call(Warp& warp, std::size_t group);
  /// Lanes return from the warp's frame: their results go to the caller.
  void leave(Warp& warp, uint32_t lanes);
  /// Lanes exit the kernel in this frame.
  void abandon(Frame& frame, uint32_t lanes);

 private:
  Frame* new_frame(const Warp& warp, const Function& function);
  void enter(Warp& warp, const Function& callee, const Call& call, uint32_t lanes, const Group& from);
  void recycle(Frame& frame);

  std::vector<std::unique_ptr<Frame>> frames_;
  std::vector<Frame*> entries_;  ///< by warp
  std::vector<Frame*> free_;
};

/// The frames that are kept for the module's functions go.
void forget_frames(const Module& module);

/// Whether the lanes that the member mask of the warp's instruction names are all here. If not, the group waits.
bool meet_lanes(Warp& warp, std::size_t group);

}  // namespace cuda_sim
