#include "block_order.hpp"

#include <algorithm>
#include <iterator>

namespace cuda_sim {
namespace {

void merge_into(std::vector<uint32_t>& into, const std::vector<uint32_t>& more) {
  if (more.empty()) return;
  std::vector<uint32_t> all;
  std::ranges::set_union(into, more, std::back_inserter(all));
  into = std::move(all);
}

}  // namespace

void BlockOrder::begin_kernel() { *this = {}; }

void BlockOrder::begin_block(Moment now) {
  block_start_ = barrier_ = now;
  threads_.clear();
  known_.clear();
}

void BlockOrder::pass_barrier(Moment now) {
  barrier_ = now;
  for (const auto& [number, thread] : threads_) merge_into(known_, thread.known);
}

void BlockOrder::pass_fence(uint32_t thread, Moment synced, Moment now) {
  Thread& own = threads_[thread];
  merge_into(own.known, own.met);
  own.met.clear();
  own.has_fenced = true;
  own.next = {block_start_, barrier_, now, synced, thread, own.known};
  merge_into(own.next.known, known_);
}

void BlockOrder::pass_atomic(uint32_t thread, uint64_t address, bool changes) {
  const auto own = threads_.find(thread);
  const bool releases = changes && own != threads_.end() && own->second.has_fenced;
  if (const auto at = at_address_.find(address); at != at_address_.end()) merge_into(threads_[thread].met, at->second);
  if (!releases) return;
  Releases& here = at_address_[address];
  merge_into(here, own->second.next.known);
  here.push_back(static_cast<uint32_t>(releases_.size()));
  releases_.push_back(own->second.next);
}

bool BlockOrder::covers(const Releases& known, const Record& write) const {
  auto behind = std::ranges::partition_point(
      known, [&](uint32_t number) { return releases_[number].block_start <= write.moment; });
  if (behind == known.begin()) return false;
  const Moment block_start = releases_[*std::prev(behind)].block_start;
  for (; behind != known.begin(); --behind) {
    const Release& release = releases_[*std::prev(behind)];
    if (release.block_start != block_start) return false;
    const uint32_t who = release.thread << thread_shift;
    if (write.moment < release.barrier || (same_thread(write.who, who) && write.moment < release.fence) ||
        (same_warp(write.who, who) && write.moment < release.synced))
      return true;
  }
  return false;
}

bool BlockOrder::is_ordered(const Record& write, uint32_t thread) const {
  if (releases_.empty() || (write.who & pending_bit) != 0) return false;
  const auto own = threads_.find(thread);
  return covers(known_, write) || (own != threads_.end() && covers(own->second.known, write));
}

}  // namespace cuda_sim
