#pragma once
// A variant is an attention kind with knocks: gqa, gqa+linear, gqa+v=mlp+q=linear.

#include <knock/train.hpp>

#include <string>
#include <vector>

namespace compare {

using namespace knock;

/// `config` as one of the things to be compared.
struct Variant {
  std::string name;
  train::Config config;
};

/// One word behind a +: `linear` knocks on q, k and v where the kind has them, `mlp` and `gate` on v, `q=linear` on q.
inline void add_knock(train::Config& config, const std::string& word) {
  const auto set = [&](const std::string& assignment) { train::apply_override(config, "model.knock." + assignment); };
  if (word.find('=') != std::string::npos) return set(word);
  set("v=" + word);
  if (word != "linear") return;
  set("q=linear");
  if (config.model.attention != nn::AttentionVariant::gta) set("k=linear");  // its keys are the values' state
}

/// An error names the variant and what is wrong with it.
inline Variant make_variant(const std::string& name, train::Config config) {
  try {
    const std::size_t plus = name.find('+');
    train::apply_override(config, "model.attention=" + name.substr(0, plus));
    config.model.knock = {};
    for (std::size_t begin = plus; begin != std::string::npos;) {
      const std::size_t end = name.find('+', begin + 1);
      add_knock(config, name.substr(begin + 1, end - begin - 1));
      begin = end;
    }
    train::check_config(config);
  } catch (const Error& error) {
    throw Error(text("variant ", name, ": ", error.what()));
  }
  return {name, config};
}

inline std::vector<Variant> make_variants(const std::vector<std::string>& names, const train::Config& config) {
  std::vector<Variant> out;
  for (const std::string& name : names) {
    for (const Variant& earlier : out) check(earlier.name != name, "compare", "variant ", name, " is named twice");
    out.push_back(make_variant(name, config));
  }
  return out;
}

}  // namespace compare
