#include "lexer.hpp"

#include <cctype>
#include <stdexcept>
#include <string>

namespace cuda_sim {
namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' || c == '.';
}

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> split() {
    while (skip_space(), at_ < text_.size() && text_[at_] != '\0') {
      if (text_[at_] == '"') {
        add(string_end());
      } else if (is_word(text_[at_])) {
        add_word(word_end());
      } else {
        add(at_ + 1);
      }
    }
    return std::move(tokens_);
  }

 private:
  bool starts(std::string_view what) const { return text_.substr(at_, what.size()) == what; }

  void skip_space() {
    while (at_ < text_.size()) {
      if (starts("//")) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (starts("/*")) {
        skip_comment();
      } else if (std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
        line_ += text_[at_++] == '\n';
      } else {
        return;
      }
    }
  }

  void skip_comment() {
    const std::size_t end = text_.find("*/", at_ + 2);
    if (end == std::string_view::npos) fail_at(line_, "a comment without an end", "/*");
    for (; at_ < end + 2; ++at_) line_ += text_[at_] == '\n';
  }

  std::size_t string_end() const {
    std::size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != '"') end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size()) fail_at(line_, "a string without an end", "\"");
    return end + 1;
  }

  std::size_t word_end() const {
    std::size_t end = at_;
    while (end < text_.size()) {
      if (is_word(text_[end])) {
        ++end;
      } else if (text_.substr(end, 2) == "::") {
        end += 2;
      } else {
        break;
      }
    }
    return end;
  }

  void add(std::size_t end) {
    tokens_.push_back({text_.substr(at_, end - at_), line_});
    at_ = end;
  }

  /// Inline assembly may write ".reg.b32" for ".reg .b32".
  void add_word(std::size_t end) {
    for (const std::string_view space : {".reg", ".param", ".local", ".shared"}) {
      if (starts(space) && at_ + space.size() < end && text_[at_ + space.size()] == '.') add(at_ + space.size());
    }
    add(end);
  }

  std::string_view text_;
  std::size_t at_ = 0;
  uint32_t line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> split_tokens(std::string_view text) { return Lexer(text).split(); }

void fail_at(uint32_t line, std::string_view what, std::string_view near) {
  std::string message = "ptx line " + std::to_string(line) + ": " + std::string(what);
  if (!near.empty()) message += " near '" + std::string(near) + "'";
  throw std::runtime_error(message);
}

}  // namespace cuda_sim
