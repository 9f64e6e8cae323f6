// What was launched, by name.

#include "counters.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

namespace cuda_sim {
namespace {

std::map<std::string, Counters>& table() {
  static auto* all = new std::map<std::string, Counters>;
  return *all;
}

std::function<void(const std::string&, const Counters&)>& watcher() {
  static auto* see = new std::function<void(const std::string&, const Counters&)>;
  return *see;
}

bool executing = true;

double ratio(uint64_t made, uint64_t ideal) {
  return ideal == 0 ? 0 : static_cast<double>(made) / static_cast<double>(ideal);
}

void print_row(const std::string& name, const Counters& of) {
  constexpr double mebibyte = 1 << 20;
  std::fprintf(
      stderr, "%8lu %9.1f %6.1f %10.3f %10.3f %8.2f %8.2f %9lu %9lu %10lu  %s\n", of.launches,
      static_cast<double>(of.warp_instructions) / 1e3, 100 * ratio(of.lane_instructions, 32 * of.warp_instructions),
      static_cast<double>(of.global_bytes_read) / mebibyte, static_cast<double>(of.global_bytes_written) / mebibyte,
      ratio(of.global_sectors, of.global_ideal_sectors), ratio(of.shared_wavefronts, of.shared_ideal_wavefronts),
      of.divergent_branches, of.barriers, of.mma, name.c_str());
}

}  // namespace

const std::map<std::string, Counters>& kernel_counters() { return table(); }
void reset_kernel_counters() { table().clear(); }

uint64_t launches(const std::string& part) {
  uint64_t sum = 0;
  for (const auto& [name, counters] : table())
    if (name.find(part) != std::string::npos) sum += counters.launches;
  return sum;
}

Counters& Counters::operator+=(const Counters& other) {
  for (const auto member :
       {&Counters::launches, &Counters::warp_instructions, &Counters::lane_instructions, &Counters::global_requests,
        &Counters::global_sectors, &Counters::global_ideal_sectors, &Counters::global_bytes_read,
        &Counters::global_bytes_written, &Counters::shared_requests, &Counters::shared_wavefronts,
        &Counters::shared_ideal_wavefronts, &Counters::divergent_branches, &Counters::barriers, &Counters::fma_lanes,
        &Counters::mma, &Counters::touched_bytes_read, &Counters::touched_bytes_written}) {
    this->*member += other.*member;
  }
  return *this;
}

void note_work(const std::string& name, const Counters& did) {
  table()[name] += did;
  if (watcher()) watcher()(name, did);
}

void watch_work(std::function<void(const std::string&, const Counters&)> see) { watcher() = std::move(see); }
bool is_work_watched() { return static_cast<bool>(watcher()); }

void set_executing(bool wanted) { executing = wanted; }
bool is_executing() { return executing; }

void print_profile() {
  const char* wanted = std::getenv("KNOCK_CUDA_SIM_PROFILE");
  if (wanted == nullptr || std::string(wanted) == "0") return;
  std::fprintf(stderr, "%8s %9s %6s %10s %10s %8s %8s %9s %9s %10s  %s\n", "launches", "k instr", "lanes%", "MiB read",
               "MiB writ.", "sectors", "shared", "diverg.", "barriers", "mma", "name");
  std::vector<const std::pair<const std::string, Counters>*> rows;
  for (const auto& row : table()) rows.push_back(&row);
  std::sort(rows.begin(), rows.end(),
            [](const auto* a, const auto* b) { return a->second.warp_instructions > b->second.warp_instructions; });
  for (const auto* row : rows) print_row(row->first, row->second);
}

}  // namespace cuda_sim
