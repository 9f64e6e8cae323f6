#pragma once
// Streams are queues that run when somebody waits for them, so that a missing wait shows. Vector clocks say what is
// ordered before what, whether or not it happened to run in that order: clock[s] is the last position of stream s that
// is finished before.

#include "runtime.hpp"

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace cuda_sim {

struct Capture;

using Clock = std::vector<uint64_t>;

/// Takes the later of each.
void join(Clock& clock, const Clock& other);
uint64_t at(const Clock& clock, uint32_t stream);
void advance(Clock& clock, uint32_t stream, uint64_t position);

/// An operation in a queue.
struct Work {
  Operation operation;
  uint64_t position = 0;  ///< in its stream, from 1
  Clock before;           ///< what is finished when it begins
};

struct Stream {
  uint32_t number = 0;
  int device = 0;
  bool blocking = true;  ///< takes turns with the null stream
  bool destroyed = false;
  int priority = 0;
  std::deque<Work> queue;
  uint64_t submitted = 0, completed = 0;
  Clock clock;  ///< of what is submitted next: what is finished before it
  std::shared_ptr<Capture> capture;

  cudaStream_t handle() { return reinterpret_cast<cudaStream_t>(this); }
};

/// The operations that a stream, and those that wait for its events, submit while it is captured.
struct Capture {
  struct Member {
    Stream* stream = nullptr;
    Clock clock;        ///< by index of member: the operations that are before its next one
    uint64_t made = 0;  ///< its own operations
  };
  std::vector<Member> members;  ///< the first is where the capture began
  std::vector<Operation> operations;
  bool relaxed = false;  ///< cudaStreamCaptureModeRelaxed: calls such as cudaMalloc may be made meanwhile
  bool invalid = false;
};

struct Event {
  int device = 0;
  bool timed = true;
  bool destroyed = false;
  bool recorded = false;
  uint32_t stream = 0;
  uint64_t position = 0;
  Clock clock;  ///< what is finished when it is, itself included
  std::shared_ptr<double> milliseconds;
  std::shared_ptr<Capture> capture;  ///< recorded in one: then `clock` is a member's
};

constexpr int lowest_priority = 0, highest_priority = -5;

Stream& null_stream(int device);
Stream& stream_number(uint32_t number);
/// Puts the operation behind what the stream has, whether or not the stream is captured.
void enqueue(Stream& stream, const Operation& operation);
/// Runs the next operation of the stream, after all that must be finished before it.
void run_next(Stream& stream);
void wait_for(const Clock& clock);
/// The host has seen that everything in `clock` is finished.
void host_learns(const Clock& clock);

}  // namespace cuda_sim
