#pragma once
// Line charts as SVG, and pages of them that need nothing else.

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace knock::train {

/// One line of a chart.
struct Curve {
  std::string name, color;  ///< without a name it is not in the legend
  std::vector<std::pair<double, double>> points;
  bool dots = false;   ///< few points: mark each
  bool faint = false;  ///< one of many that belong together
};

struct Chart {
  std::string title, unit;
  std::vector<Curve> curves;
  std::string x_axis = "step";
};

/// Colours that can be told apart on light and dark pages; they come again after eight.
std::string chart_color(std::size_t i);
/// At most `count` points, each the mean of its neighbourhood.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points, std::size_t count);
/// A chart with its title and a legend that gives last values; empty when no curve has points. Long curves are thinned.
std::string figure(Chart chart);
/// A whole page.
std::string page(std::string_view title, std::string_view body);
/// A number in a few characters.
std::string short_number(double value);
/// Text as HTML.
std::string escape(std::string_view text_in);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_CHART)
#include <knock/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>

namespace knock::train {
namespace detail {

/// About `count` round numbers in the range, 1, 2 or 5 times a power of ten apart, and at least `apart`.
inline std::vector<double> grid_lines(double low, double high, int count, double apart = 0) {
  const double raw = std::max((high - low) / count, apart), power = std::pow(10, std::floor(std::log10(raw)));
  const double digit = raw / power;
  const double step = power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
  std::vector<double> out;
  for (int i = 0; i <= 2 * count; ++i)
    if (const double at = std::ceil(low / step) * step + i * step; at <= high)
      out.push_back(std::abs(at) < step / 2 ? 0 : at);
  return out;
}

inline constexpr std::string_view page_style = R"(
  :root { color-scheme: light dark; --line: #8884; }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1340px; padding: 0 1rem; }
  main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.5rem; margin: 1rem 0; }
  figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
  figcaption { font-weight: 600; }
  svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
  polyline { stroke-width: 1.6; stroke-linejoin: round; } .grid { stroke: var(--line); }
  .entry { white-space: nowrap; }
  .faint { stroke-width: 1; opacity: .5; }
  table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; font-weight: 600; white-space: nowrap; }
  th, td { padding: .2rem .8rem .2rem 0; text-align: left; white-space: pre; border-bottom: 1px solid var(--line); }
  td { font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
  p { margin: .3rem 0 0; } small { font-weight: 400; opacity: .7; }
  pre { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 1rem; }
)";

/// Where values stand in a chart of 640 x 300 units.
struct Frame {
  static constexpr double left = 62, right = 628, top = 16, bottom = 262;
  double x_low = std::numeric_limits<double>::infinity(), x_high = -x_low, y_low = x_low, y_high = -x_low;
  bool x_whole = true;  // steps, which have no halves

  explicit Frame(const std::vector<Curve>& curves) {
    for (const Curve& curve : curves) {
      for (const auto& [x, y] : curve.points) {
        x_low = std::min(x_low, x), x_high = std::max(x_high, x), x_whole = x_whole && x == std::floor(x);
        y_low = std::min(y_low, y), y_high = std::max(y_high, y);
      }
    }
    if (x_low == x_high) x_low -= 1, x_high += 1;
    const double around_one = y_low == 0 ? 1 : std::abs(y_low) * 0.1;
    const double pad = y_low == y_high ? around_one : (y_high - y_low) * 0.05;
    y_low -= pad, y_high += pad;
  }
  bool empty() const { return !(x_low <= x_high); }
  std::string x(double value) const { return short_number(left + (value - x_low) / (x_high - x_low) * (right - left)); }
  std::string y(double value, double shift = 0) const {
    return short_number(bottom - (value - y_low) / (y_high - y_low) * (bottom - top) + shift);
  }
};

inline std::string draw_axes(const Frame& frame, const std::string& x_axis) {
  std::string svg;
  for (const double y : grid_lines(frame.y_low, frame.y_high, 5)) {
    svg += text("<line class='grid' x1='", frame.left, "' x2='", frame.right, "' y1='", frame.y(y), "' y2='",
                frame.y(y), "'/><text x='", frame.left - 6, "' y='", frame.y(y, 4), "' text-anchor='end'>",
                short_number(y), "</text>");
  }
  for (const double x : grid_lines(frame.x_low, frame.x_high, 6, frame.x_whole ? 1 : 0))
    svg += text("<text x='", frame.x(x), "' y='280' text-anchor='middle'>", short_number(x), "</text>");
  return svg + text("<text x='", frame.right, "' y='296' text-anchor='end'>", escape(x_axis), "</text>");
}

inline std::string draw_curve(const Frame& frame, const Curve& curve) {
  std::string path, dots;
  for (const auto& [x, y] : curve.points) {
    path += text(path.empty() ? "" : " ", frame.x(x), ",", frame.y(y));
    if (curve.dots)
      dots += text("<circle r='3' fill='", curve.color, "' cx='", frame.x(x), "' cy='", frame.y(y), "'/>");
  }
  return text("<polyline ", curve.faint ? "class='faint' " : "", "fill='none' stroke='", curve.color, "' points='",
              path, "'/>", dots);
}

}  // namespace detail

KNOCK_FUNC std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points,
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

KNOCK_FUNC std::string escape(std::string_view text_in) {
  std::string out;
  for (const char c : text_in) out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return out;
}

KNOCK_FUNC std::string short_number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, std::abs(value) >= 1e4 && std::abs(value) < 1e9 ? "%.0f" : "%.4g", value);
  return buffer;
}

KNOCK_FUNC std::string chart_color(std::size_t i) {
  constexpr const char* colors[] = {"#4c78a8", "#f58518", "#e45756", "#72b7b2",
                                    "#54a24b", "#b279a2", "#9d755d", "#eeca3b"};
  return colors[i % std::size(colors)];
}

KNOCK_FUNC std::string figure(Chart chart) {
  std::string legend, curves;
  for (Curve& curve : chart.curves) curve.points = thinned(curve.points, 500);
  const detail::Frame frame(chart.curves);
  if (frame.empty()) return "";
  for (const Curve& curve : chart.curves) {
    if (curve.points.empty()) continue;
    curves += detail::draw_curve(frame, curve);
    if (!curve.name.empty())
      legend += text("<span class='entry'><span style='color:", curve.color, "'>&#9632;</span> ", escape(curve.name),
                     " <b>", short_number(curve.points.back().second), "</b></span> ");
  }
  const std::string unit = chart.unit.empty() ? "" : " <small>" + escape(chart.unit) + "</small>";
  return text("<figure><figcaption>", escape(chart.title), unit, "</figcaption><svg viewBox='0 0 655 300' role='img' ",
              "aria-label='", escape(chart.title), "'>", detail::draw_axes(frame, chart.x_axis), curves, "</svg><p>",
              legend, "</p></figure>\n");
}

KNOCK_FUNC std::string page(std::string_view title, std::string_view body) {
  return text("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">",
              "<meta name=\"viewport\" content=\"width=device-width\">\n<title>knock: ", escape(title),
              "</title>\n<style>", detail::page_style, "</style></head><body>\n<h1>", escape(title), "</h1>\n", body,
              "</body></html>\n");
}

}  // namespace knock::train
#endif
