// The list of what is to be given back.

#include "lifetime.hpp"

#include <mutex>
#include <vector>

namespace knock::cuda {
namespace {

struct Lifetime {
  std::mutex mutex;
  std::vector<void (*)()> releases;
};

Lifetime& lifetime() {
  static auto* all = new Lifetime;
  return *all;
}

}  // namespace

void at_shut_down(void (*release)()) {
  const std::lock_guard lock(lifetime().mutex);
  lifetime().releases.push_back(release);
}

void shut_down() {
  auto& releases = lifetime().releases;
  for (; !releases.empty(); releases.pop_back()) releases.back()();
}

}  // namespace knock::cuda
