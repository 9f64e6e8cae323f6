#pragma once
// What the logs of all runs say, as a table.

#include <knock/train.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "paper.hpp"

namespace compare {

using namespace knock;

using Evaluation = train::RunHistory::Evaluation;

/// All that is known of a variant.
struct Result {
  std::string name;
  train::Config config;                 ///< with the size that the vocabulary has
  std::vector<train::RunHistory> runs;  ///< by seed

  models::ModelCost cost() const { return models::cost(config.model, config.train.seq_len); }
  double step_flops() const {
    const train::TrainOptions& t = config.train;
    return cost().training_flops_per_token * static_cast<double>(t.batch_size * t.seq_len * t.grad_accum);
  }
  /// Of a step, the median over all runs: a machine that does other things meanwhile hardly moves it.
  double step_seconds() const {
    std::vector<double> all;
    for (const train::RunHistory& run : runs) all.insert(all.end(), run.step_s.begin(), run.step_s.end());
    std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2), all.end());
    return all[all.size() / 2];
  }
  /// What `value` says of each run.
  template <class F>
  std::vector<double> each(F&& value) const {
    std::vector<double> out;
    for (const train::RunHistory& run : runs) out.push_back(value(run));
    return out;
  }
  /// What each run's last evaluation says.
  std::vector<double> last(double Evaluation::*value) const {
    return each([value](const train::RunHistory& run) { return run.evaluations.back().*value; });
  }
  std::vector<train::Spike> spikes() const {
    std::vector<train::Spike> out;
    for (const train::RunHistory& run : runs)
      for (const train::Spike& spike : train::find_spikes(run.loss)) out.push_back(spike);
    return out;
  }
};

inline double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, pattern, values...);
  return buffer;
}

/// Mean and standard deviation.
inline std::string summary(const std::vector<double>& values, const char* pattern) {
  if (values.size() < 2) return format(pattern, mean(values));
  const double center = mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - center) * (value - center);
  std::string spread = format(pattern, std::sqrt(squares / static_cast<double>(values.size() - 1)));
  if (spread.starts_with('+')) spread.erase(0, 1);
  return format(pattern, center) + " ± " + spread;
}

inline double total_seconds(const train::RunHistory& run) {
  return std::accumulate(run.step_s.begin(), run.step_s.end(), 0.0);
}

/// Mean loss of each run over a tenth of the steps: the last of those that `budget` suffices for when each takes
/// `price`.
inline std::vector<double> loss_within(double budget, const Result& result, double price) {
  return result.each([&](const train::RunHistory& run) {
    const auto steps = static_cast<double>(run.loss.size());
    const auto end = static_cast<std::ptrdiff_t>(std::clamp(std::floor(budget / price + 1e-6), 1.0, steps));
    const auto count = std::clamp<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(run.loss.size()) / 10, 1, end);
    return std::accumulate(run.loss.begin() + end - count, run.loss.begin() + end, 0.0) / static_cast<double>(count);
  });
}

/// The same kind without knocks; null when it is not compared, or when this is it.
inline const Result* plain_of(const Result& result, const std::vector<Result>& all) {
  const auto knocks = [](const nn::KnockOptions& k) { return std::vector{k.q, k.k, k.v}; };
  if (knocks(result.config.model.knock) == knocks({})) return nullptr;
  for (const Result& other : all)
    if (other.config.model.attention == result.config.model.attention && knocks(other.config.model.knock) == knocks({}))
      return &other;
  return nullptr;
}

/// The change of losses_of(result) by the knocks, seed by seed.
template <class F>
std::string knock_change(const Result& result, const std::vector<Result>& all, F&& losses_of) {
  const Result* plain = plain_of(result, all);
  if (!plain) return "";
  std::vector<double> change = losses_of(result);
  const std::vector<double> before = losses_of(*plain);
  for (std::size_t i = 0; i < change.size(); ++i) change[i] -= before[i];
  return summary(change, "%+.4f");
}

inline std::string paper_change(const Result& result) {
  const PaperFigure* paper = paper_figure(result.config.model.attention, result.config.model.knock);
  return paper ? format("%+.3f", paper->knocked - paper->plain) : "";
}

/// The price of a step of the variant where it is least.
template <class Price>
double least(const std::vector<Result>& all, Price&& price) {
  double out = price(all[0]);
  for (const Result& result : all) out = std::min(out, price(result));
  return out;
}

/// A line of the table: what it is called, and what it says of a variant.
struct Row {
  const char* name;
  std::function<std::string(const Result&)> cell;
};

inline std::vector<Row> table_rows(const std::vector<Result>& all) {
  const auto steps = static_cast<double>(all[0].runs[0].loss.size());
  const double flops = steps * least(all, [](const Result& r) { return r.step_flops(); });
  const double seconds = steps * least(all, [](const Result& r) { return r.step_seconds(); });
  const auto held_out = [](const Result& r) { return r.last(&Evaluation::loss); };
  const auto training = [steps](const Result& r) { return loss_within(steps, r, 1); };
  const auto largest_spike = [](const char* pattern, auto train::Spike::*member) {
    return [=](const Result& r) {
      const std::vector<train::Spike> spikes = r.spikes();
      const auto less = [=](const train::Spike& a, const train::Spike& b) { return a.*member < b.*member; };
      const auto largest = std::max_element(spikes.begin(), spikes.end(), less);
      return largest == spikes.end() ? "" : format(pattern, static_cast<double>((*largest).*member));
    };
  };
  return {
      {"", [](const Result& r) { return r.name; }},
      {"bits per byte, held-out text",
       [](const Result& r) { return summary(r.last(&Evaluation::bits_per_byte), "%.4f"); }},
      {"loss there, nats a token", [=](const Result& r) { return summary(held_out(r), "%.4f"); }},
      {"  change by the knock", [=, &all](const Result& r) { return knock_change(r, all, held_out); }},
      {"training loss, last tenth", [=](const Result& r) { return summary(training(r), "%.4f"); }},
      {"  change by the knock", [=, &all](const Result& r) { return knock_change(r, all, training); }},
      {"  the paper's", paper_change},
      {"loss spikes, all seeds", [](const Result& r) { return text(r.spikes().size()); }},
      {"  highest, nats", largest_spike("%.3f", &train::Spike::height)},
      {"  longest, steps", largest_spike("%.0f", &train::Spike::length)},
      {"parameters", [](const Result& r) { return text(r.cost().parameters); }},
      {"training MFLOP a token",
       [](const Result& r) { return format("%.3f", r.cost().training_flops_per_token / 1e6); }},
      {"cache bytes a token (bf16)", [](const Result& r) { return text(2 * r.cost().cache_numbers_per_token); }},
      {"seconds of training", [](const Result& r) { return summary(r.each(total_seconds), "%.1f"); }},
      {"seconds a step, median", [](const Result& r) { return format("%.3f", r.step_seconds()); }},
      {"training loss, equal FLOPs",
       [flops](const Result& r) { return summary(loss_within(flops, r, r.step_flops()), "%.4f"); }},
      {"training loss, equal seconds",
       [seconds](const Result& r) { return summary(loss_within(seconds, r, r.step_seconds()), "%.4f"); }},
  };
}

/// Lines of cells: a name, then one cell a variant.
using Table = std::vector<std::vector<std::string>>;

inline Table make_table(const std::vector<Result>& all) {
  Table table;
  for (const Row& row : table_rows(all)) {
    std::vector<std::string> line = {row.name};
    for (const Result& result : all) line.push_back(row.cell(result));
    table.push_back(std::move(line));
  }
  return table;
}

/// Columns that a terminal needs for a text.
inline std::size_t width(const std::string& words) {
  return static_cast<std::size_t>(
      std::count_if(words.begin(), words.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

/// The table for a terminal, four variants side by side.
inline std::string to_text(const Table& table) {
  std::string out;
  for (std::size_t begin = 1; begin < table[0].size(); begin += 4) {
    const std::size_t end = std::min(begin + 4, table[0].size());
    for (const std::vector<std::string>& cells : table) {
      std::string line = cells[0];
      for (std::size_t i = begin, at = 30; i < end; ++i, at += 20) {
        line.append(at > width(line) ? at - width(line) : 1, ' ');
        line += cells[i];
      }
      line.erase(line.find_last_not_of(' ') + 1);
      out += line + "\n";
    }
    out += "\n";
  }
  return out;
}

}  // namespace compare
