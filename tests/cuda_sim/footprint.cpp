// Pages of sectors.

#include "footprint.hpp"

#include <bit>

namespace cuda_sim {

void Footprint::add_sector(uint64_t sector, bool read, bool written) {
  const uint64_t number = sector / sectors_of_page, place = sector % sectors_of_page;
  if (number != last_number_) {
    last_page_ = &pages_[number];  // pages keep their place in the map
    last_number_ = number;
  }
  const uint64_t bit = uint64_t{1} << place % 64;
  if (read) last_page_->read[place / 64] |= bit;
  if (written) last_page_->written[place / 64] |= bit;
}

uint64_t Footprint::bytes_of(Bits Page::*which) const {
  uint64_t sectors = 0;
  for (const auto& [number, page] : pages_)
    for (const uint64_t bits : page.*which) sectors += static_cast<uint64_t>(std::popcount(bits));
  return sectors * sector_bytes;
}

}  // namespace cuda_sim
