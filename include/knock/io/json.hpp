#pragma once
// A strict reader of small JSON documents (RFC 8259), for files that may be damaged or hostile: UTF-8 and escapes are
// checked, nesting is bounded, and every error names the file and the byte.
//
//   detail::JsonReader json(text, "load_safetensors", path);
//   json.object([&](const std::string& key) { if (key == "shape") ... else json.skip(); });
//   json.finish();

#include <knock/core/error.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace knock::io::detail {

/// A name as error messages show it: quoted, escaped, shortened.
std::string quote(std::string_view name);
/// Whether the bytes are well-formed UTF-8 (no overlong forms, no surrogates).
bool is_utf8(std::string_view bytes);
/// `text` as a JSON string, with its quotes.
std::string json_string(std::string_view text);

class JsonReader {
 public:
  /// Reads `text`; errors begin with `[op] source: `.
  JsonReader(std::string_view text, std::string_view op, std::string_view source)
      : text_(text), op_(op), source_(source) {}

  /// Reads an object; `member(key)` must read each value. A repeated key is an error.
  template <class Member>
  void object(Member&& member);
  /// Reads an array; `element()` must read each element.
  template <class Element>
  void array(Element&& element);
  std::string string();
  /// An integer from 0 to 2^63 - 1, written without sign, fraction or exponent.
  int64_t natural();
  /// Reads a value of any kind and drops it.
  void skip();
  /// Only white space may follow.
  void finish();

  [[noreturn]] void bad(std::string_view what) const;

 private:
  char peek();
  void expect(char c, std::string_view what);
  bool next_is(char c);
  void number();
  void literal(std::string_view word);
  void escape(std::string& out);
  uint32_t hex4();
  void enter();
  void check_new(std::vector<std::string>& keys) const;

  std::string_view text_;
  std::string op_, source_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

template <class Member>
void JsonReader::object(Member&& member) {
  enter();
  expect('{', "expected an object");
  std::vector<std::string> keys;
  if (!next_is('}')) {
    do {
      keys.push_back(string());
      expect(':', "expected ':'");
      member(static_cast<const std::string&>(keys.back()));
    } while (next_is(','));
    expect('}', "expected ',' or '}'");
  }
  check_new(keys);
  --depth_;
}

template <class Element>
void JsonReader::array(Element&& element) {
  enter();
  expect('[', "expected an array");
  if (!next_is(']')) {
    do element();
    while (next_is(','));
    expect(']', "expected ',' or ']'");
  }
  --depth_;
}

}  // namespace knock::io::detail

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_JSON)
#include <algorithm>
#include <limits>

namespace knock::io::detail {

/// Bytes of the well-formed UTF-8 character at the start of `s` (the table of Unicode 15, section 3.9); 0 when there is
/// none.
KNOCK_FUNC std::size_t utf8_length(std::string_view s) {
  const auto byte = [&](std::size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0U; };
  const auto tail = [&](std::size_t i) { return byte(i) >= 0x80U && byte(i) <= 0xBFU; };
  const unsigned lead = byte(0), second = byte(1);
  if (lead < 0x80U) return s.empty() ? 0 : 1;
  if (lead >= 0xC2U && lead <= 0xDFU) return tail(1) ? 2 : 0;
  if (lead >= 0xE0U && lead <= 0xEFU) {
    const bool fits = tail(1) && !(lead == 0xE0U && second < 0xA0U) && !(lead == 0xEDU && second > 0x9FU);
    return fits && tail(2) ? 3 : 0;
  }
  if (lead >= 0xF0U && lead <= 0xF4U) {
    const bool fits = tail(1) && !(lead == 0xF0U && second < 0x90U) && !(lead == 0xF4U && second > 0x8FU);
    return fits && tail(2) && tail(3) ? 4 : 0;
  }
  return 0;
}

KNOCK_FUNC bool is_utf8(std::string_view bytes) {
  while (!bytes.empty()) {
    const std::size_t length = utf8_length(bytes);
    if (length == 0) return false;
    bytes.remove_prefix(length);
  }
  return true;
}

KNOCK_FUNC std::string json_string(std::string_view text) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (code < 0x20) {
      out += "\\u00";
      out += digits[code >> 4];
      out += digits[code & 15U];
    } else {
      out += c;
    }
  }
  return out += '"';
}

KNOCK_FUNC std::string quote(std::string_view name) {
  constexpr std::size_t longest = 80;
  std::size_t end = std::min(name.size(), longest);
  while (end > 0 && !is_utf8(name.substr(0, end)) && longest - end < 4) --end;  // do not cut a character in two
  std::string out = json_string(name.substr(0, end));
  if (end < name.size()) out += "...";
  return out;
}

KNOCK_FUNC void JsonReader::bad(std::string_view what) const {
  fail(op_, source_, ": ", what, " at byte ", at_, " of the JSON text");
}

KNOCK_FUNC char JsonReader::peek() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
    ++at_;
  return at_ < text_.size() ? text_[at_] : '\0';
}

KNOCK_FUNC void JsonReader::expect(char c, std::string_view what) {
  if (peek() != c || at_ == text_.size()) bad(what);
  ++at_;
}

KNOCK_FUNC bool JsonReader::next_is(char c) {
  if (peek() != c) return false;
  ++at_;
  return true;
}

KNOCK_FUNC void JsonReader::enter() {
  constexpr int deepest = 32;
  if (++depth_ > deepest) bad("values nested too deeply");
}

KNOCK_FUNC void JsonReader::check_new(std::vector<std::string>& keys) const {
  std::sort(keys.begin(), keys.end());
  const auto repeated = std::adjacent_find(keys.begin(), keys.end());
  if (repeated != keys.end()) fail(op_, source_, ": key ", quote(*repeated), " appears twice");
}

KNOCK_FUNC uint32_t JsonReader::hex4() {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    const bool digit = c >= '0' && c <= '9', lower = c >= 'a' && c <= 'f', upper = c >= 'A' && c <= 'F';
    if (!digit && !lower && !upper) bad("bad \\u escape");
    value = value * 16 + static_cast<uint32_t>(digit ? c - '0' : lower ? c - 'a' + 10 : c - 'A' + 10);
  }
  return value;
}

KNOCK_FUNC void JsonReader::escape(std::string& out) {
  const char c = at_ < text_.size() ? text_[at_++] : '\0';
  constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
  const std::size_t simple = names.find(c);
  if (c != '\0' && simple != std::string_view::npos) {
    out += values[simple];
    return;
  }
  if (c != 'u') bad("unknown escape");
  uint32_t code = hex4();
  if (code >= 0xDC00 && code <= 0xDFFF) bad("lone surrogate");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (text_.substr(at_, 2) != "\\u") bad("lone surrogate");
    at_ += 2;
    const uint32_t low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) bad("lone surrogate");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 0x3F)), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  }
}

KNOCK_FUNC std::string JsonReader::string() {
  expect('"', "expected a string");
  std::string out;
  for (;;) {
    if (at_ == text_.size()) bad("string without end");
    const char c = text_[at_];
    if (c == '"') break;
    if (static_cast<unsigned char>(c) < 0x20) bad("control character in a string");
    if (c == '\\') {
      ++at_;
      escape(out);
      continue;
    }
    const std::size_t length = utf8_length(text_.substr(at_));
    if (length == 0) bad("malformed UTF-8");
    out.append(text_.substr(at_, length));
    at_ += length;
  }
  ++at_;
  return out;
}

KNOCK_FUNC int64_t JsonReader::natural() {
  const char first = peek();
  if (first < '0' || first > '9') bad("expected a non-negative integer");
  int64_t value = 0;
  const std::size_t start = at_;
  for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
    const int64_t digit = text_[at_] - '0';
    if (value > (std::numeric_limits<int64_t>::max() - digit) / 10) bad("number too large");
    value = value * 10 + digit;
  }
  if (first == '0' && at_ - start > 1) bad("number with a leading zero");
  const char after = at_ < text_.size() ? text_[at_] : '\0';
  if (after == '.' || after == 'e' || after == 'E') bad("expected an integer");
  return value;
}

KNOCK_FUNC void JsonReader::number() {
  const auto digits = [&] {
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == start) bad("bad number");
  };
  const auto at = [&](char c) { return at_ < text_.size() && text_[at_] == c; };
  if (at('-')) ++at_;
  const bool zero = at('0');
  const std::size_t start = at_;
  digits();
  if (zero && at_ - start > 1) bad("number with a leading zero");
  if (at('.')) ++at_, digits();
  if (at('e') || at('E')) {
    ++at_;
    if (at('+') || at('-')) ++at_;
    digits();
  }
}

KNOCK_FUNC void JsonReader::literal(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) bad("unknown value");
  at_ += word.size();
}

KNOCK_FUNC void JsonReader::skip() {
  switch (peek()) {
    case '{':
      return object([this](const std::string&) { skip(); });
    case '[':
      return array([this] { skip(); });
    case '"':
      static_cast<void>(string());
      return;
    case 't':
      return literal("true");
    case 'f':
      return literal("false");
    case 'n':
      return literal("null");
    default:
      return number();
  }
}

KNOCK_FUNC void JsonReader::finish() {
  peek();
  if (at_ < text_.size()) bad("text after the end");
}

}  // namespace knock::io::detail
#endif
