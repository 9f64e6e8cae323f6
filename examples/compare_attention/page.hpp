#pragma once
// The comparison as one page: table, curves, the paper's figures, the configuration.

#include <string>
#include <utility>
#include <vector>

#include "results.hpp"

namespace compare {

inline std::string to_html(const Table& table) {
  std::string out = "<div class=\"wide\"><table>\n";
  for (std::size_t row = 0; row < table.size(); ++row) {
    out += "<tr>";
    for (std::size_t i = 0; i < table[row].size(); ++i) {
      const char* tag = row == 0 || i == 0 ? "th" : "td";
      out += text("<", tag, ">", train::escape(table[row][i]), "</", tag, ">");
    }
    out += "</tr>\n";
  }
  return out + "</table></div>\n";
}

/// value(step) over what the steps cost, from `first` on, in at most `count` points.
template <class F>
std::vector<std::pair<double, double>> series(const Result& result, std::size_t first, double price, std::size_t count,
                                              F&& value) {
  std::vector<std::pair<double, double>> out;
  for (std::size_t step = first; step < result.runs[0].loss.size(); ++step)
    out.emplace_back(static_cast<double>(step + 1) * price, value(step));
  return train::thinned(out, count);
}

inline double mean_loss(const Result& result, std::size_t step) {
  return mean(result.each([step](const train::RunHistory& run) { return run.loss[step]; }));
}

/// Losses, each the mean of the seeds, without the steep first twentieth.
template <class Price>
std::string loss_chart(const std::vector<Result>& all, const std::string& x_axis, Price&& price) {
  train::Chart chart{
      "Training loss by " + x_axis, "nats a token, mean of the seeds, after the first steps", {}, x_axis};
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto loss = [&](std::size_t step) { return mean_loss(all[i], step); };
    const std::size_t first = all[i].runs[0].loss.size() / 20;
    chart.curves.push_back({all[i].name, train::chart_color(i), series(all[i], first, price(all[i]), 100, loss)});
  }
  return train::figure(std::move(chart));
}

/// How far each variant's loss is from the first one's, for each seed and in the mean.
inline std::string difference_chart(const std::vector<Result>& all) {
  constexpr std::size_t points = 30;
  const Result& base = all[0];
  train::Chart chart{"Training loss less that of " + base.name, "same seed, same step; bold: the mean", {}};
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::size_t seeds = all[i].runs.size();
    for (std::size_t seed = 0; i > 0 && seeds > 1 && seed < seeds; ++seed) {
      const auto one = [&](std::size_t step) { return all[i].runs[seed].loss[step] - base.runs[seed].loss[step]; };
      chart.curves.push_back({"", train::chart_color(i), series(all[i], 0, 1, points, one), false, true});
    }
    const auto average = [&](std::size_t step) { return mean_loss(all[i], step) - mean_loss(base, step); };
    chart.curves.push_back({all[i].name, train::chart_color(i), series(all[i], 0, 1, points, average)});
  }
  return train::figure(std::move(chart));
}

inline std::string validation_chart(const std::vector<Result>& all) {
  train::Chart chart{"Bits per byte", "held-out text, mean of the seeds; the last point takes all of it", {}};
  for (std::size_t i = 0; i < all.size(); ++i) {
    train::Curve curve{all[i].name, train::chart_color(i), {}, true};
    for (std::size_t at = 0; at < all[i].runs[0].evaluations.size(); ++at) {
      const auto value = [at](const train::RunHistory& run) { return run.evaluations[at].bits_per_byte; };
      curve.points.emplace_back(static_cast<double>(all[i].runs[0].evaluations[at].step), mean(all[i].each(value)));
    }
    chart.curves.push_back(std::move(curve));
  }
  return train::figure(std::move(chart));
}

inline std::string make_page(const std::vector<Result>& all, const train::Config& config) {
  const train::TrainOptions& t = config.train;
  std::string body =
      text("<p>", all[0].runs.size(), " seeds of ", t.steps, " steps, ", t.batch_size * t.seq_len * t.grad_accum,
           " tokens a step. With one seed every variant sees the same tokens in the same order, and a knocked model ",
           "starts as the plain one. ± is the standard deviation over the seeds.</p>\n");
  body += to_html(make_table(all));
  body +=
      "<p>Change by the knock: the loss less that of the same kind without knocks, seed by seed; the paper gives "
      "training "
      "losses. A "
      "loss spike is a run of steps whose loss exceeds the median of the last 128 steps by more than 6 times their "
      "median absolute deviation; its height is the excess. The losses at equal FLOPs and equal seconds are means over "
      "a tenth of the steps, the last ones before the cheapest or fastest variant ends: a dearer one has not finished "
      "its schedule of the learning rate there. Seconds are those of one machine with all else that ran on it; curves "
      "and losses by seconds take the median step.</p>\n";
  body += "<main>\n";
  body += loss_chart(all, "step", [](const Result&) { return 1.0; });
  body += loss_chart(all, "TFLOP", [](const Result& result) { return result.step_flops() / 1e12; });
  body += loss_chart(all, "seconds", [](const Result& result) { return result.step_seconds(); });
  if (all.size() > 1) body += difference_chart(all);
  body += validation_chart(all) + "</main>\n" + paper_tables;
  body += text("<details><summary>Configuration without the variants</summary><pre>",
               train::escape(train::to_toml(config)), "</pre></details>\n");
  return train::page("attention compared", body);
}

}  // namespace compare
