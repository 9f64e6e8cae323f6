#pragma once
// What the logs of all runs say, as a table.

#include <knock/train.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "paper.hpp"

namespace compare {

using namespace knock;

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

/// The change of the validation loss by the knocks, seed by seed, and the paper's.
inline std::vector<std::string> knock_changes(const Result& result, const std::vector<Result>& all) {
  const models::MoeLmConfig& model = result.config.model;
  const PaperFigure* paper = paper_figure(model.attention, model.knock);
  const Result* plain = plain_of(result, all);
  std::vector<double> change;
  for (std::size_t i = 0; plain && i < result.runs.size(); ++i)
    change.push_back(result.runs[i].evaluations.back().loss - plain->runs[i].evaluations.back().loss);
  return {plain ? summary(change, "%+.4f") : "", paper ? format("%+.3f", paper->knocked - paper->plain) : ""};
}

/// Count, height and length of the spikes of all seeds.
inline std::vector<std::string> spike_cells(const Result& result) {
  std::size_t count = 0;
  double height = 0;
  int64_t length = 0;
  for (const train::RunHistory& run : result.runs) {
    for (const train::Spike& spike : train::find_spikes(run.loss)) {
      ++count;
      height = std::max(height, spike.height);
      length = std::max(length, spike.length);
    }
  }
  if (count == 0) return {"0", "", ""};
  return {text(count), format("%.3f", height), text(length)};
}

/// The price of a step of the variant where it is least.
template <class Price>
double least(const std::vector<Result>& all, Price&& price) {
  double out = price(all[0]);
  for (const Result& result : all) out = std::min(out, price(result));
  return out;
}

inline const std::vector<std::string> row_names = {"",
                                                   "bits per byte, held-out text",
                                                   "loss there, nats a token",
                                                   "  change by the knock",
                                                   "  paper's change (training)",
                                                   "loss spikes, all seeds",
                                                   "  highest, nats",
                                                   "  longest, steps",
                                                   "parameters",
                                                   "training MFLOP a token",
                                                   "cache bytes a token (bf16)",
                                                   "seconds of training",
                                                   "seconds a step, median",
                                                   "training loss, equal FLOPs",
                                                   "training loss, equal seconds"};

/// Columns of cells: the names of the rows, then one a variant.
inline std::vector<std::vector<std::string>> make_table(const std::vector<Result>& all) {
  std::vector<std::vector<std::string>> columns = {row_names};
  const auto steps = static_cast<double>(all[0].runs[0].loss.size());
  const double flops = steps * least(all, [](const Result& r) { return r.step_flops(); });
  const double seconds = steps * least(all, [](const Result& r) { return r.step_seconds(); });
  for (const Result& result : all) {
    const models::ModelCost cost = result.cost();
    const auto final_of = [](double train::RunHistory::Evaluation::*value) {
      return [value](const train::RunHistory& run) { return run.evaluations.back().*value; };
    };
    std::vector<std::string> column = {
        result.name, summary(result.each(final_of(&train::RunHistory::Evaluation::bits_per_byte)), "%.4f"),
        summary(result.each(final_of(&train::RunHistory::Evaluation::loss)), "%.4f")};
    for (const std::string& cell : knock_changes(result, all)) column.push_back(cell);
    for (const std::string& cell : spike_cells(result)) column.push_back(cell);
    column.push_back(text(cost.parameters));
    column.push_back(format("%.3f", cost.training_flops_per_token / 1e6));
    column.push_back(text(2 * cost.cache_numbers_per_token));
    column.push_back(summary(result.each(total_seconds), "%.1f"));
    column.push_back(format("%.3f", result.step_seconds()));
    column.push_back(summary(loss_within(flops, result, result.step_flops()), "%.4f"));
    column.push_back(summary(loss_within(seconds, result, result.step_seconds()), "%.4f"));
    columns.push_back(std::move(column));
  }
  return columns;
}

/// Columns that a terminal needs for a text.
inline std::size_t width(const std::string& words) {
  return static_cast<std::size_t>(
      std::count_if(words.begin(), words.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

/// The table for a terminal, four variants side by side.
inline std::string to_text(const std::vector<std::vector<std::string>>& columns) {
  std::string out;
  for (std::size_t begin = 1; begin < columns.size(); begin += 4) {
    const std::size_t end = std::min(begin + 4, columns.size());
    for (std::size_t row = 0; row < row_names.size(); ++row) {
      std::string line = row_names[row];
      for (std::size_t i = begin, at = 30; i < end; ++i, at += 20) {
        line.append(at > width(line) ? at - width(line) : 1, ' ');
        line += columns[i][row];
      }
      line.erase(line.find_last_not_of(' ') + 1);
      out += line + "\n";
    }
    out += "\n";
  }
  return out;
}

}  // namespace compare
