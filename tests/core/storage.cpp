// The caching allocator: what it counts, that it hands memory out again, cut and joined, and never twice at a time.
#include <knock/core/storage.hpp>

#include <doctest/doctest.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace knock;

namespace {

constexpr int64_t MiB = 1 << 20;

int64_t from_system() { return memory::stats().system_allocations; }

/// A buffer with a byte of its own at both ends and in the middle.
class Marked {
 public:
  Marked(int64_t bytes, unsigned char mark) : storage_(bytes, {}), mark_(mark) {
    for (const int64_t at : places()) bytes_of()[at] = mark_;
  }
  bool intact() const {
    bool all = true;
    for (const int64_t at : places()) all = all && bytes_of()[at] == mark_;
    return all;
  }
  bool aligned() const { return reinterpret_cast<std::uintptr_t>(storage_.data) % 64 == 0; }

 private:
  unsigned char* bytes_of() const { return static_cast<unsigned char*>(storage_.data); }
  std::vector<int64_t> places() const { return {0, storage_.bytes / 2, storage_.bytes - 1}; }
  Storage storage_;
  unsigned char mark_;
};

}  // namespace

TEST_CASE("storage: the room of a large block serves several smaller ones, and the other way round") {
  memory::release_cached();
  { const Storage warm(96 * MiB, {}); }
  const int64_t before = from_system(), cached = memory::stats().bytes_cached;
  for (int round = 0; round < 3; ++round) {
    {
      const Storage a(30 * MiB, {}), b(2 * MiB + 5, {}), c(40 * MiB, {}), d(20 * MiB, {});
      CHECK(memory::stats().bytes_cached < cached - 92 * MiB);
    }
    CHECK(memory::stats().bytes_cached == cached);
    const Storage whole(96 * MiB, {});
  }
  CHECK(from_system() == before);
}

TEST_CASE("storage: bytes in use, their peak, and what is kept") {
  memory::release_cached();
  const memory::Stats before = memory::stats();
  CHECK(before.bytes_cached == 0);
  memory::reset_peak();
  {
    const Storage small(1000, {}), large(3 * MiB + 1, {});
    const memory::Stats now = memory::stats();
    CHECK(now.allocations == before.allocations + 2);
    CHECK(now.system_allocations == before.system_allocations + 2);
    CHECK(now.bytes_in_use - before.bytes_in_use >= 3 * MiB + 1001);
    CHECK(now.bytes_in_use - before.bytes_in_use < 3 * MiB + MiB / 8);
  }
  memory::Stats after = memory::stats();
  CHECK(after.bytes_in_use == before.bytes_in_use);
  CHECK(after.bytes_cached == after.peak_bytes - before.bytes_in_use);
  memory::release_cached();
  CHECK(memory::stats().bytes_cached == 0);
  const int64_t calls = from_system();
  { const Storage again(3 * MiB, {}); }  // what was given back comes from the system
  CHECK(from_system() == calls + 1);
  { const Storage again(3 * MiB, {}); }
  CHECK(from_system() == calls + 1);
}

TEST_CASE("storage: blocks never overlap, are aligned, and all comes back") {
  const int64_t in_use = memory::stats().bytes_in_use;
  std::mt19937 random(7);
  std::vector<std::unique_ptr<Marked>> blocks;
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  bool good = true;
  for (int step = 0; step < 20000; ++step) {
    if (step % 5000 == 4999) memory::release_cached();
    if (blocks.size() < 60 && below(2) == 0) {
      const int64_t bytes = below(3) == 0 ? 1 + below(4 * MiB) : 1 + below(2 * MiB);
      blocks.push_back(std::make_unique<Marked>(bytes, static_cast<unsigned char>(below(256))));
      good = good && blocks.back()->aligned();
    } else if (!blocks.empty()) {
      std::swap(blocks[static_cast<std::size_t>(below(blocks.size()))], blocks.back());
      good = good && blocks.back()->intact();
      blocks.pop_back();
    }
  }
  CHECK(good);
  blocks.clear();
  CHECK(memory::stats().bytes_in_use == in_use);
}

TEST_CASE("storage: a request that no machine can serve is an error that says so, and harms nothing") {
  const memory::Stats before = memory::stats();
  CHECK_THROWS_WITH_AS(Storage(int64_t{1} << 50, {}), doctest::Contains("out of memory: asked for 1125899906842624"),
                       Error);
  CHECK(memory::stats().bytes_in_use == before.bytes_in_use);
  const Storage after(2 * MiB, {});
  std::memset(after.data, 1, static_cast<std::size_t>(after.bytes));
}
