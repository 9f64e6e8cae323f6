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
#include <knock/train/chart.hpp>
#include <knock/train/json_lines.hpp>

#include <cmath>
#include <filesystem>
#include <iterator>
#include <vector>

namespace knock::train {
namespace detail {

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
  for (std::size_t value = 0; value < std::size(layer_values); ++value) {
    const auto found = line.find(layer_values[value].key);
    if (found == line.end() || !found->is_array()) continue;
    std::vector<Curve>& layers = out.layers[value];
    for (std::size_t i = 0; i < found->size(); ++i) {
      if (layers.size() <= i) layers.push_back({text("layer ", i), chart_color(i), {}});
      add(layers[i], step, number_of((*found)[i]));
    }
  }
}

}  // namespace detail

KNOCK_FUNC void write_curves(const std::string& log_path, const std::string& html_path) {
  detail::LogCurves c;
  detail::for_each_object(io::read_file(log_path),
                          [&](std::string_view, const auto& line) { detail::read_line(line, c); });
  std::string charts;
  charts += figure({"Loss", "nats per token", {c.loss, c.val_loss}});
  charts += figure({"Bits per byte", "held-out text", {c.val_bpb}});
  charts += figure({"Gradient norm", "before clipping", {c.grad_norm}});
  charts += figure({"Learning rate", "", {c.lr}});
  charts += figure({"Speed", "tokens per second", {c.tokens_per_s}});
  for (std::size_t value = 0; value < std::size(detail::layer_values); ++value)
    charts += figure({detail::layer_values[value].title, detail::layer_values[value].unit, c.layers[value]});
  std::string samples;
  for (const auto& [step, sample] : c.samples)
    samples += text("<h3>Sample at step ", step, "</h3><pre>", escape(sample), "</pre>\n");
  const std::string name = std::filesystem::absolute(log_path).lexically_normal().parent_path().filename().string();
  io::write_file(html_path, page(name, text("<main>\n", charts, "</main>\n", samples)));
}

}  // namespace knock::train
#endif
