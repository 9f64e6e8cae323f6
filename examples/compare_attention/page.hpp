#pragma once
// The comparison as one page: table, curves, the paper's figures, the configuration.

#include <string>
#include <utility>
#include <vector>

#include "results.hpp"

namespace compare {

inline std::string to_html(const std::vector<std::vector<std::string>>& columns) {
  std::string out = "<div class=\"wide\"><table>\n";
  for (std::size_t row = 0; row < row_names.size(); ++row) {
    out += "<tr>";
    for (std::size_t i = 0; i < columns.size(); ++i) {
      const char* tag = row == 0 || i == 0 ? "th" : "td";
      out += text("<", tag, ">", train::escape(columns[i][row]), "</", tag, ">");
    }
    out += "</tr>\n";
  }
  return out + "</table></div>\n";
}

/// Mean over the seeds of the training loss, less that of `base` when given, behind each step; `x_of(run, step)` is
/// where the step stands, or the next one's price for it.
template <class Price>
train::Curve loss_curve(const Result& result, std::size_t color, Price&& price) {
  train::Curve curve{result.name, train::chart_color(color), {}};
  const std::size_t steps = result.runs[0].loss.size();
  double x = 0;
  for (std::size_t step = 0; step < steps; ++step) {
    x += mean(result.each([&](const train::RunHistory& run) { return price(result, run, step); }));
    curve.points.emplace_back(x, mean(result.each([&](const train::RunHistory& run) { return run.loss[step]; })));
  }
  curve.points = train::thinned(curve.points, 100);
  return curve;
}

template <class Price>
std::string loss_chart(const std::vector<Result>& all, const std::string& x_axis, Price&& price) {
  train::Chart chart{"Training loss by " + x_axis, "nats a token, mean of the seeds", {}, x_axis};
  for (std::size_t i = 0; i < all.size(); ++i) chart.curves.push_back(loss_curve(all[i], i, price));
  return train::figure(std::move(chart));
}

/// How far each variant's loss is from the first one's, for each seed and in the mean.
inline std::string difference_chart(const std::vector<Result>& all) {
  constexpr std::size_t points = 30;
  train::Chart chart{"Training loss less that of " + all[0].name, "same seed, same step; bold: the mean", {}};
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::size_t steps = all[i].runs[0].loss.size(), seeds = all[i].runs.size();
    train::Curve average{all[i].name, train::chart_color(i), {}};
    std::vector<train::Curve> single(seeds, {"", train::chart_color(i), {}, false, true});
    for (std::size_t step = 0; step < steps; ++step) {
      double sum = 0;
      for (std::size_t seed = 0; seed < seeds; ++seed) {
        const double difference = all[i].runs[seed].loss[step] - all[0].runs[seed].loss[step];
        single[seed].points.emplace_back(static_cast<double>(step + 1), difference);
        sum += difference;
      }
      average.points.emplace_back(static_cast<double>(step + 1), sum / static_cast<double>(seeds));
    }
    if (i > 0 && seeds > 1) {
      for (train::Curve& curve : single) {
        curve.points = train::thinned(curve.points, points);
        chart.curves.push_back(std::move(curve));
      }
    }
    average.points = train::thinned(average.points, points);
    chart.curves.push_back(std::move(average));
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
      "<p>Change by the knock: loss on the held-out text less that of the same kind without knocks, seed by seed. A "
      "loss spike is a run of steps whose loss exceeds the median of the last 128 steps by more than 6 times their "
      "median absolute deviation; its height is the excess. The losses at equal FLOPs and equal seconds are means over "
      "a tenth of the steps, the last ones before the cheapest or fastest variant ends: a dearer one has not finished "
      "its schedule of the learning rate there. Seconds are those of this machine with all else that ran on it.</p>\n";
  body += "<main>\n";
  const auto one = [](const Result&, const train::RunHistory&, std::size_t) { return 1.0; };
  const auto tflop = [](const Result& result, const train::RunHistory&, std::size_t) {
    return result.step_flops() / 1e12;
  };
  const auto seconds = [](const Result&, const train::RunHistory& run, std::size_t step) { return run.step_s[step]; };
  body += loss_chart(all, "step", one) + loss_chart(all, "TFLOP", tflop) + loss_chart(all, "seconds", seconds);
  if (all.size() > 1) body += difference_chart(all);
  body += validation_chart(all) + "</main>\n" + paper_tables;
  body += text("<details><summary>Configuration without the variants</summary><pre>",
               train::escape(train::to_toml(config)), "</pre></details>\n");
  return train::page("attention compared", body);
}

}  // namespace compare
