#pragma once
// The bytes of global memory that a launch touches, each once: what it must move when caches serve every repetition.

#include <array>
#include <cstdint>
#include <unordered_map>

namespace cuda_sim {

/// Sectors of 32 bytes, those that are read and those that are written.
class Footprint {
 public:
  static constexpr uint64_t sector_bytes = 32;

  void add(uint64_t address, uint64_t bytes, bool read, bool written) {
    const uint64_t last = (address + bytes - 1) / sector_bytes;
    for (uint64_t sector = address / sector_bytes; sector <= last; ++sector) add_sector(sector, read, written);
  }

  uint64_t bytes_read() const { return bytes_of(&Page::read); }
  uint64_t bytes_written() const { return bytes_of(&Page::written); }

 private:
  static constexpr uint64_t sectors_of_page = 128;
  using Bits = std::array<uint64_t, sectors_of_page / 64>;
  struct Page {
    Bits read{}, written{};
  };

  void add_sector(uint64_t sector, bool read, bool written);
  uint64_t bytes_of(Bits Page::*which) const;

  std::unordered_map<uint64_t, Page> pages_;
  Page* last_page_ = nullptr;
  uint64_t last_number_ = ~uint64_t{0};
};

}  // namespace cuda_sim
