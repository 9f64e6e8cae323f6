#pragma once
// The lines of a log.jsonl. For bodies: it brings the JSON library along.

#include <nlohmann/json.hpp>

#include <algorithm>
#include <string_view>

namespace knock::train::detail {

/// Calls f(line, json) for each line that is a JSON object. Others, such as the last one of a run that was killed, are
/// passed over.
template <class F>
void for_each_object(std::string_view log, F&& f) {
  for (std::size_t begin = 0; begin < log.size();) {
    const std::size_t end = std::min(log.find('\n', begin), log.size());
    const std::string_view line = log.substr(begin, end - begin);
    if (const auto json = nlohmann::json::parse(line, nullptr, false); json.is_object()) f(line, json);
    begin = end + 1;
  }
}

}  // namespace knock::train::detail
