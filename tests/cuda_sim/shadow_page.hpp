#pragma once
// Cells that remember the last accesses, in pages whose granularity (4, 2 or 1 bytes) follows the accesses.

#include "shadow.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <vector>

namespace cuda_sim {

struct Record {
  Moment moment = 0;
  uint32_t who = 0;  // thread of the block: 10 bits, atomic, pending, line: the lowest 20 bits
};

inline constexpr uint32_t line_bits = 20, line_mask = (1u << line_bits) - 1, pending_bit = 1u << 20,
                          atomic_bit = 1u << 21;
inline constexpr uint32_t thread_shift = 22, warp_shift = thread_shift + 5;

inline uint32_t thread_of(uint32_t who) { return who >> thread_shift; }
inline bool same_warp(uint32_t a, uint32_t b) { return a >> warp_shift == b >> warp_shift; }
inline bool same_thread(uint32_t a, uint32_t b) { return a >> thread_shift == b >> thread_shift; }

struct Cell {
  Record write;
  Record read, earlier_read;  // of two threads of the block that read last
  Record foreign_read;        // of an earlier block or kernel
};

inline constexpr std::size_t page_shift = 12, page_bytes = std::size_t{1} << page_shift;
inline constexpr int coarsest = 2;  // a cell for 4 bytes

// The cells of 4096 bytes, as arrays of each of their fields, so that a warp's accesses are looked at together.
class Page {
 public:
  enum Field : int { write, read, earlier_read, foreign_read, fields };
  Moment last_use = 0;

  int shift() const { return shift_; }  // a cell stands for 1 << shift bytes
  std::size_t size() const { return page_bytes >> shift_; }
  Moment* moments(Field field) { return data_.get() + field * room_; }
  uint32_t* whos(Field field) { return data_.get() + (fields + field) * room_; }

  // Afterwards the cells hold anything that was in the page.
  void reset(int shift) {
    shift_ = shift;
    if (room_ < size()) [[unlikely]]
      make_room();
  }

  Record at(Field field, std::size_t i) { return {moments(field)[i], whos(field)[i]}; }
  Cell load(std::size_t i) { return {at(write, i), at(read, i), at(earlier_read, i), at(foreign_read, i)}; }

  void store(std::size_t i, const Cell& cell) {
    const auto set = [&](Field field, const Record& record) {
      moments(field)[i] = record.moment;
      whos(field)[i] = record.who;
    };
    set(write, cell.write);
    set(read, cell.read);
    set(earlier_read, cell.earlier_read);
    set(foreign_read, cell.foreign_read);
  }

  // Cells become smaller, each as the larger one was.
  [[gnu::noinline]] void refine(int shift) {
    std::vector<Cell> old(size());
    for (std::size_t i = 0; i < old.size(); ++i) old[i] = load(i);
    const auto parts = std::size_t{1} << (shift_ - shift);
    reset(shift);
    for (std::size_t i = 0; i < size(); ++i) store(i, old[i / parts]);
  }

 private:
  [[gnu::noinline]] void make_room() {
    room_ = size();
    data_ = std::make_unique<uint32_t[]>(2 * fields * room_);
  }

  std::unique_ptr<uint32_t[]> data_;
  std::size_t room_ = 0;  // cells that there are
  int shift_ = coarsest;
};

inline int finest_shift(std::size_t offset, std::size_t bytes) {
  return std::min(coarsest, std::countr_zero(static_cast<uint64_t>(offset | bytes)));
}

// Makes the page fine enough for an access. One in which nothing matters any more may become coarse again.
inline void prepare(Page& page, std::size_t offset, std::size_t bytes, Moment settled, Moment now) {
  const int shift = finest_shift(offset, bytes);
  if (page.last_use < settled) [[unlikely]] {
    page.reset(shift);
  } else if (shift < page.shift()) [[unlikely]] {
    page.refine(shift);
  }
  page.last_use = now;
}

}  // namespace cuda_sim
