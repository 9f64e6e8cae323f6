#include <knock/data/loader.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include <doctest/doctest.h>

using namespace knock;
using data::Batch;
using data::LoaderPosition;
using data::SequentialWindows;
using data::ShuffledWindows;

namespace {

/// A stream whose token says where it stands.
std::vector<int32_t> counting(int32_t length) {
  std::vector<int32_t> tokens(static_cast<std::size_t>(length));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

/// The next `windows` rows, one by one.
std::vector<std::vector<int64_t>> rows(ShuffledWindows& loader, int windows) {
  std::vector<std::vector<int64_t>> out;
  Batch batch;
  for (int i = 0; i < windows; ++i) {
    loader.next(1, batch);
    out.push_back(batch.inputs);
    out.back().insert(out.back().end(), batch.targets.begin(), batch.targets.end());
  }
  return out;
}

}  // namespace

TEST_CASE("loader: an epoch holds each window once, targets follow inputs") {
  const std::vector<int32_t> tokens = counting(1003);
  ShuffledWindows loader(tokens, {.seq_len = 10, .seed = 3});
  REQUIRE(loader.windows_per_epoch() == 100);
  Batch batch;
  for (int epoch = 0; epoch < 3; ++epoch) {
    std::set<int64_t> seen;
    for (int i = 0; i < 25; ++i) {
      loader.next(4, batch);
      REQUIRE(batch.inputs.size() == 40);
      CHECK(batch.target_tokens == 40);
      for (std::size_t j = 0; j < 40; ++j) {
        CHECK(batch.targets[j] == batch.inputs[j] + 1);
        CHECK(seen.insert(batch.targets[j]).second);
        if (j % 10 != 0) CHECK((batch.inputs[j] == batch.inputs[j - 1] + 1 || batch.inputs[j] == 0));
      }
    }
    CHECK(seen.size() == 1000);  // of 1002: the two left out differ from epoch to epoch
  }
}

TEST_CASE("loader: order depends on seed and epoch, and is well mixed") {
  const std::vector<int32_t> tokens = counting(10'001);
  ShuffledWindows a(tokens, {.seq_len = 10, .seed = 1}), same(tokens, {.seq_len = 10, .seed = 1}),
      other(tokens, {.seq_len = 10, .seed = 2});
  const auto first = rows(a, 1000), second = rows(a, 1000);
  CHECK(first == rows(same, 1000));
  CHECK(first != second);
  CHECK(first != rows(other, 1000));
  // The mean start of each tenth of an epoch is that of the whole, 5000, within five standard errors (2900 / 10).
  for (std::size_t tenth = 0; tenth < 10; ++tenth) {
    double sum = 0;
    for (std::size_t i = 0; i < 100; ++i) sum += static_cast<double>(first[tenth * 100 + i][0]);
    CHECK(sum / 100 == doctest::Approx(5000).epsilon(0.29));
  }
  // Neighbours in the stream are not neighbours in the order.
  int neighbours = 0;
  for (std::size_t i = 1; i < first.size(); ++i) neighbours += first[i][0] == first[i - 1][0] + 10 ? 1 : 0;
  CHECK(neighbours < 10);
}

TEST_CASE("loader: a saved position resumes the exact sequence, whatever the batch size") {
  const std::vector<int32_t> tokens = counting(127);
  const int total = 60;  // five epochs of 12
  ShuffledWindows whole(tokens, {.seq_len = 10, .seed = 9});
  const auto expected = rows(whole, total);
  for (int stop = 0; stop <= total; ++stop) {
    ShuffledWindows before(tokens, {.seq_len = 10, .seed = 9}), after(tokens, {.seq_len = 10, .seed = 9});
    rows(before, stop);
    (void)rows(after, 5);  // wherever it stood
    after.seek(before.position());
    CHECK(after.position() == before.position());
    const auto rest = rows(after, total - stop);
    CHECK(std::equal(rest.begin(), rest.end(), expected.begin() + stop, expected.end()));
  }
  ShuffledWindows wide(tokens, {.seq_len = 10, .seed = 9});
  Batch batch;
  for (std::size_t done = 0; done < total; done += 5) {
    wide.next(5, batch);
    for (std::size_t row = 0; row < 5; ++row)
      CHECK(
          std::equal(expected[done + row].begin(), expected[done + row].begin() + 10, batch.inputs.begin() + row * 10));
  }
  CHECK(wide.position() == whole.position());
}

TEST_CASE("loader: the batch's buffers are reused") {
  const std::vector<int32_t> tokens = counting(127);
  ShuffledWindows loader(tokens, {.seq_len = 10, .seed = 9});
  Batch batch;
  loader.next(4, batch);
  const int64_t *inputs = batch.inputs.data(), *targets = batch.targets.data();
  for (int i = 0; i < 20; ++i) loader.next(4, batch);
  CHECK(batch.inputs.data() == inputs);
  CHECK(batch.targets.data() == targets);
}

TEST_CASE("loader: a text of exactly one sequence will do, a shorter one will not") {
  const std::vector<int32_t> tokens = counting(11);
  ShuffledWindows loader(tokens, {.seq_len = 10, .seed = 0});
  CHECK(loader.windows_per_epoch() == 1);
  for (auto row : rows(loader, 5)) {
    std::sort(row.begin(), row.begin() + 10);
    CHECK(std::equal(row.begin(), row.begin() + 10, tokens.begin()));
  }
  CHECK_THROWS_WITH_AS(ShuffledWindows(tokens, {.seq_len = 11}),
                       "[loader] the training text is shorter than one sequence: 11 tokens, but seq_len 11 needs 12",
                       Error);
  CHECK_THROWS_AS(ShuffledWindows({}, {.seq_len = 1}), Error);
  CHECK_THROWS_AS(ShuffledWindows(tokens, {.seq_len = 0}), Error);
  Batch batch;
  CHECK_THROWS_AS(loader.next(0, batch), Error);
  for (const LoaderPosition wrong : {LoaderPosition{-1, 0}, LoaderPosition{0, -1}, LoaderPosition{0, 2}})
    CHECK_THROWS_WITH_AS(loader.seek(wrong), doctest::Contains("is not one of this text's 1 windows"), Error);
}

TEST_CASE("loader: evaluation predicts every token once and counts its bytes") {
  const std::vector<int32_t> lengths = [] {
    std::vector<int32_t> out(50);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int32_t>(i % 7);
    return out;
  }();
  for (const int32_t length : {2, 3, 8, 9, 10, 17, 18, 40, 50})
    for (const int64_t context : {0, 1, 4, 7}) {
      const std::vector<int32_t> tokens = counting(length);
      SequentialWindows windows(tokens, {.seq_len = 8, .context = context, .token_lengths = lengths});
      for (const int64_t max_rows : {1, 3, 100}) {
        CAPTURE(length);
        CAPTURE(context);
        std::vector<int64_t> targets;
        int64_t bytes = 0, count = 0, rows_seen = 0;
        Batch batch;
        windows.rewind();
        while (windows.next(max_rows, batch)) {
          CHECK(batch.rows <= max_rows);
          rows_seen += batch.rows;
          bytes += batch.target_bytes;
          count += batch.target_tokens;
          for (std::size_t i = 0; i < batch.targets.size(); ++i)
            if (batch.targets[i] != data::ignored_target) {
              targets.push_back(batch.targets[i]);
              CHECK(batch.inputs[i] + 1 == batch.targets[i]);
              // Only the first window may start without context.
              if (rows_seen > batch.rows || i >= 8) CHECK(static_cast<int64_t>(i % 8) >= context);
            }
        }
        CHECK(rows_seen == windows.size());
        CHECK(targets == std::vector<int64_t>(tokens.begin() + 1, tokens.end()));
        CHECK(count == length - 1);
        CHECK(bytes == std::accumulate(lengths.begin() + 1, lengths.begin() + length, int64_t{0}));
      }
    }
}

TEST_CASE("loader: a sparse evaluation takes every so many windows, from the first to the end of the text") {
  const std::vector<int32_t> tokens = counting(50);
  for (const int64_t every : {1, 2, 3, 5, 100}) {
    SequentialWindows all(tokens, {.seq_len = 8, .context = 3}),
        some(tokens, {.seq_len = 8, .context = 3, .every = every});
    Batch window, expected;
    int64_t count = 0;
    for (int64_t i = 0; all.next(1, expected); ++i) {
      if (i % every != 0) continue;
      REQUIRE(some.next(1, window));
      CHECK(window.inputs == expected.inputs);
      CHECK(window.targets == expected.targets);
      ++count;
    }
    CHECK_FALSE(some.next(1, window));
    CHECK(count == some.size());
  }
}

TEST_CASE("loader: evaluation refuses what it cannot do") {
  const std::vector<int32_t> tokens = counting(20);
  Batch batch;
  CHECK_THROWS_AS(SequentialWindows(tokens, {.seq_len = 0}), Error);
  CHECK_THROWS_AS(SequentialWindows(tokens, {.seq_len = 8, .every = 0}), Error);
  CHECK_THROWS_WITH_AS(SequentialWindows(tokens, {.seq_len = 8, .context = 8}), doctest::Contains("context 8"), Error);
  CHECK_THROWS_WITH_AS(SequentialWindows(std::span(tokens).first(1), {.seq_len = 8}),
                       doctest::Contains("no token to predict"), Error);
  CHECK_THROWS_AS(SequentialWindows(tokens, {.seq_len = 8}).next(0, batch), Error);
}

TEST_CASE("loader: bits per byte") {
  CHECK(data::bits_per_byte(std::log(2.0) * 30, 15) == doctest::Approx(2.0));
  CHECK_THROWS_AS(data::bits_per_byte(1.0, 0), Error);
}
