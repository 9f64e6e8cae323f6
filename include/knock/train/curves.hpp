#pragma once
// The curves of a run as one HTML page that needs nothing else: plain SVG drawn from log.jsonl.

#include <string>

namespace knock::train {

/// Reads a log.jsonl and writes the page. Lines that are no JSON objects (the last one of a run that was killed) are
/// passed over. Errors: the log cannot be read, the page cannot be written.
void write_curves(const std::string& log_path, const std::string& html_path);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_CURVES)
#include <knock/core/error.hpp>
#include <knock/io/file.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

namespace knock::train {
namespace detail {

/// One line of a chart: points (step, value).
struct Curve {
  std::string name, color;
  std::vector<std::pair<double, double>> points;
  bool dots = false;  ///< few points: mark each
};

struct Chart {
  std::string title, unit;
  std::vector<Curve> curves;
};

inline std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, std::abs(value) >= 1e4 && std::abs(value) < 1e9 ? "%.0f" : "%.4g", value);
  return buffer;
}

/// About `count` round numbers in the range, 1, 2 or 5 times a power of ten apart.
inline std::vector<double> grid_lines(double low, double high, int count) {
  const double raw = (high - low) / count, power = std::pow(10, std::floor(std::log10(raw)));
  const double digit = raw / power;
  const double step = power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
  std::vector<double> out;
  for (int i = 0; i <= 2 * count; ++i)
    if (const double at = std::ceil(low / step) * step + i * step; at <= high)
      out.push_back(std::abs(at) < step / 2 ? 0 : at);
  return out;
}

/// At most `count` points, each the mean of its neighbourhood.
inline std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points,
                                                      std::size_t count) {
  if (points.size() <= count) return points;
  std::vector<std::pair<double, double>> out;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t begin = i * points.size() / count, end = (i + 1) * points.size() / count;
    double x = 0, y = 0;
    for (std::size_t j = begin; j < end; ++j) x += points[j].first, y += points[j].second;
    const auto n = static_cast<double>(end - begin);
    out.emplace_back(x / n, y / n);
  }
  return out;
}

inline std::string escape(const std::string& text_in) {
  std::string out;
  for (const char c : text_in) out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return out;
}

/// A chart as SVG, 640 x 300 units.
inline std::string draw(const Chart& chart) {
  constexpr double left = 62, right = 628, top = 16, bottom = 262;
  constexpr double infinite = std::numeric_limits<double>::infinity();
  double x_low = infinite, x_high = -infinite, y_low = infinite, y_high = -infinite;
  for (const Curve& curve : chart.curves) {
    for (const auto& [x, y] : curve.points) {
      x_low = std::min(x_low, x), x_high = std::max(x_high, x);
      y_low = std::min(y_low, y), y_high = std::max(y_high, y);
    }
  }
  if (!(x_low <= x_high)) return "";
  if (x_low == x_high) x_low -= 1, x_high += 1;
  const double pad = y_low == y_high ? std::max(std::abs(y_low) * 0.1, 1e-9) : (y_high - y_low) * 0.05;
  y_low -= pad, y_high += pad;
  const auto px = [&](double x) { return left + (x - x_low) / (x_high - x_low) * (right - left); };
  const auto py = [&](double y) { return bottom - (y - y_low) / (y_high - y_low) * (bottom - top); };

  std::string svg = "<svg viewBox='0 0 640 300' role='img' aria-label='" + escape(chart.title) + "'>";
  for (const double y : grid_lines(y_low, y_high, 5)) {
    svg += text("<line class='grid' x1='", left, "' x2='", right, "' y1='", number(py(y)), "' y2='", number(py(y)),
                "'/><text x='", left - 6, "' y='", number(py(y) + 4), "' text-anchor='end'>", number(y), "</text>");
  }
  for (const double x : grid_lines(x_low, x_high, 6))
    svg += text("<text x='", number(px(x)), "' y='280' text-anchor='middle'>", number(x), "</text>");
  svg += text("<text x='", right, "' y='296' text-anchor='end'>step</text>");
  for (const Curve& curve : chart.curves) {
    std::string path;
    for (const auto& [x, y] : curve.points) path += text(path.empty() ? "" : " ", number(px(x)), ",", number(py(y)));
    svg += "<polyline fill='none' stroke='" + curve.color + "' points='" + path + "'/>";
    if (!curve.dots) continue;
    for (const auto& [x, y] : curve.points)
      svg += text("<circle r='3' fill='", curve.color, "' cx='", number(px(x)), "' cy='", number(py(y)), "'/>");
  }
  return svg + "</svg>";
}

/// A value that steps log for each layer with experts.
struct LayerValue {
  const char *key, *title, *unit;
};
inline constexpr LayerValue layer_values[] = {
    {"load_entropy", "Expert load entropy", "1: even, 0: one expert takes all"},
    {"max_violation", "Busiest expert", "load over the mean, less 1"},
    {"router_logit_max", "Largest router logit", "absolute"},
    {"dropped", "Dropped choices", "share beyond the experts' capacity"}};

/// What a log holds, as curves.
struct LogCurves {
  Curve loss{"training", "#4c78a8", {}}, val_loss{"validation", "#e45756", {}, true};
  Curve val_bpb{"validation", "#e45756", {}, true};
  Curve lr{"learning rate", "#72b7b2", {}}, grad_norm{"gradient norm", "#f58518", {}};
  Curve tokens_per_s{"tokens/s", "#54a24b", {}};
  std::vector<Curve> layers[std::size(layer_values)];  // in the order of layer_values, a curve a layer
  std::vector<std::pair<int64_t, std::string>> samples;
};

inline void read_line(const nlohmann::json& line, LogCurves& out) {
  const auto number_of = [](const nlohmann::json& value) { return value.is_number() ? value.get<double>() : NAN; };
  const auto add = [](Curve& curve, double step, double value) {
    constexpr double limit = 1e30;  // what cannot be drawn is left out
    if (std::abs(step) < limit && std::abs(value) < limit) curve.points.emplace_back(step, value);
  };
  const double step = line.contains("step") ? number_of(line["step"]) : NAN;
  const auto take = [&](const char* key, Curve& curve) {
    if (line.contains(key)) add(curve, step, number_of(line[key]));
  };
  take("loss", out.loss);
  take("val_loss", out.val_loss);
  take("val_bpb", out.val_bpb);
  take("lr", out.lr);
  take("grad_norm", out.grad_norm);
  take("tokens_per_s", out.tokens_per_s);
  if (const auto found = line.find("sample"); found != line.end() && found->is_string() && std::abs(step) < 1e15)
    out.samples.emplace_back(static_cast<int64_t>(step), found->get<std::string>());
  constexpr const char* colors[] = {"#4c78a8", "#f58518", "#e45756", "#72b7b2",
                                    "#54a24b", "#b279a2", "#9d755d", "#eeca3b"};
  for (std::size_t value = 0; value < std::size(layer_values); ++value) {
    const auto found = line.find(layer_values[value].key);
    if (found == line.end() || !found->is_array()) continue;
    std::vector<Curve>& layers = out.layers[value];
    for (std::size_t i = 0; i < found->size(); ++i) {
      if (layers.size() <= i) layers.push_back({text("layer ", i), colors[i % 8], {}});
      add(layers[i], step, number_of((*found)[i]));
    }
  }
}

inline std::string figure(Chart chart) {
  std::string legend;
  for (Curve& curve : chart.curves) {
    curve.points = thinned(curve.points, 500);
    if (curve.points.empty()) continue;
    legend += text("<span style='color:", curve.color, "'>&#9632;</span> ", escape(curve.name), " <b>",
                   number(curve.points.back().second), "</b> ");
  }
  const std::string svg = draw(chart);
  if (svg.empty()) return "";
  const std::string unit = chart.unit.empty() ? "" : " <small>" + escape(chart.unit) + "</small>";
  return "<figure><figcaption>" + escape(chart.title) + unit + "</figcaption>" + svg + "<p>" + legend +
         "</p></figure>\n";
}

inline constexpr const char* page_head = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>knock: training curves</title>
<style>
  :root { color-scheme: light dark; --line: #8884; }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1340px; padding: 0 1rem; }
  main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.5rem; }
  figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
  figcaption { font-weight: 600; }
  svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
  polyline { stroke-width: 1.6; stroke-linejoin: round; } .grid { stroke: var(--line); }
  p { margin: .3rem 0 0; } small { font-weight: 400; opacity: .7; }
  pre { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 1rem; }
</style></head><body>
)";

}  // namespace detail

KNOCK_FUNC void write_curves(const std::string& log_path, const std::string& html_path) {
  const std::string log = io::read_file(log_path);
  detail::LogCurves c;
  for (std::size_t begin = 0; begin < log.size();) {
    const std::size_t end = std::min(log.find('\n', begin), log.size());
    const auto line = nlohmann::json::parse(log.begin() + static_cast<std::ptrdiff_t>(begin),
                                            log.begin() + static_cast<std::ptrdiff_t>(end), nullptr, false);
    if (line.is_object()) detail::read_line(line, c);
    begin = end + 1;
  }
  const std::string name = std::filesystem::absolute(log_path).lexically_normal().parent_path().filename().string();
  std::string page = text(detail::page_head, "<h1>", detail::escape(name), "</h1>\n<main>\n");
  page += detail::figure({"Loss", "nats per token", {c.loss, c.val_loss}});
  page += detail::figure({"Bits per byte", "held-out text", {c.val_bpb}});
  page += detail::figure({"Gradient norm", "before clipping", {c.grad_norm}});
  page += detail::figure({"Learning rate", "", {c.lr}});
  page += detail::figure({"Speed", "tokens per second", {c.tokens_per_s}});
  for (std::size_t value = 0; value < std::size(detail::layer_values); ++value)
    page += detail::figure({detail::layer_values[value].title, detail::layer_values[value].unit, c.layers[value]});
  page += "</main>\n";
  for (const auto& [step, sample] : c.samples)
    page += text("<h3>Sample at step ", step, "</h3><pre>", detail::escape(sample), "</pre>\n");
  io::write_file(html_path, page + "</body></html>\n");
}

}  // namespace knock::train
#endif
