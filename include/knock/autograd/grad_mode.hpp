#pragma once
// Whether ops record the graph: on by default, per thread.

namespace knock {

namespace autograd {
namespace detail {
inline thread_local bool recording = true;
}

/// Whether ops on this thread record what backward needs.
inline bool is_recording() { return detail::recording; }

/// Sets recording for a scope and restores it at the end.
class RecordingGuard {
 public:
  explicit RecordingGuard(bool recording) : before_(detail::recording) { detail::recording = recording; }
  ~RecordingGuard() { detail::recording = before_; }
  RecordingGuard(const RecordingGuard&) = delete;
  RecordingGuard& operator=(const RecordingGuard&) = delete;

 private:
  bool before_;
};

}  // namespace autograd

/// Recording off in this scope, on this thread.
class NoGradGuard {
  autograd::RecordingGuard guard_{false};
};

}  // namespace knock
