#pragma once
// Reading the cases that tests/golden/{nn,attention}.py computed with PyTorch in f64.
#include <doctest/doctest.h>
#include <knock/knock.hpp>
#include <support/compare.hpp>

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace test {

using namespace knock;

inline const std::vector<std::string> golden_files = {
    KNOCK_TEST_DATA "/nn.safetensors", KNOCK_TEST_DATA "/lm.safetensors", KNOCK_TEST_DATA "/attention.safetensors",
    KNOCK_TEST_DATA "/attention_kinds.safetensors"};

inline const StateDict& golden() {
  static const StateDict data = [] {
    StateDict all;
    for (const std::string& file : golden_files)
      for (const auto& [name, tensor] : io::load_safetensors(file)) all.insert(name, tensor);
    return all;
  }();
  return data;
}

/// The options of a case.
inline nlohmann::json golden_options(const std::string& name) {
  for (const std::string& file : golden_files)
    if (const auto metadata = io::safetensors_metadata(file); metadata.count(name))
      return nlohmann::json::parse(metadata.at(name));
  FAIL("no golden case ", name);
  return {};
}

/// Cases below a prefix, such as "moe/", with their options.
inline std::vector<std::pair<std::string, nlohmann::json>> golden_cases(const std::string& prefix) {
  std::vector<std::pair<std::string, nlohmann::json>> out;
  for (const std::string& file : golden_files)
    for (const auto& [name, options] : io::safetensors_metadata(file))
      if (name.starts_with(prefix)) out.emplace_back(name, nlohmann::json::parse(options));
  REQUIRE(out.size() >= 2);
  return out;
}

/// The tensors CASE/GROUP/NAME by NAME.
inline StateDict golden_group(const std::string& at, const std::string& group) {
  StateDict out;
  const std::string prefix = at + "/" + group + "/";
  for (const auto& [name, tensor] : golden())
    if (name.starts_with(prefix)) out.insert(name.substr(prefix.size()), tensor);
  return out;
}

/// What a module's gradients are in the names of its state dict: a copy of the module whose values are the gradients.
template <class Module>
StateDict gradients_by_name(Module& module) {
  const NoGradGuard no_grad;
  for (const auto& [name, parameter] : module.named_parameters()) {
    const Tensor gradient = parameter.grad().defined() ? parameter.grad().clone() : zeros_like(parameter);
    Tensor(parameter).copy_(gradient);
  }
  return module.state_dict();
}

/// Every golden gradient against the module's.
template <class Module>
void check_gradients(Module& module, const StateDict& expected, double tolerance) {
  const StateDict actual = gradients_by_name(module);
  REQUIRE(expected.size() > 0);
  for (const auto& entry : expected) {
    INFO("gradient of ", entry.first);
    CHECK(distance(actual.at(entry.first), entry.second) <= tolerance);
  }
}

}  // namespace test
