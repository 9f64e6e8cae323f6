#pragma once
// The words of a PTX text.

#include <cstdint>
#include <string_view>
#include <vector>

namespace cuda_sim {

struct Token {
  std::string_view text;
  uint32_t line = 0;
};

/// Words (with their dots: "ld.global.f32", "%tid.x"), numbers, strings and single characters of punctuation.
std::vector<Token> split_tokens(std::string_view text);

/// "ptx line 12: ..."
[[noreturn]] void fail_at(uint32_t line, std::string_view what, std::string_view near);

}  // namespace cuda_sim
