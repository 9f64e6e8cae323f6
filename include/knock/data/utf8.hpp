#pragma once
// UTF-8 validity as in RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF.

#include <knock/config.hpp>

#include <cstddef>
#include <string_view>

namespace knock::data {

/// Number of bytes (1 to 4) of the character that starts at `at`, or 0 where the bytes there are not valid UTF-8.
std::size_t utf8_character(std::string_view text, std::size_t at);

/// Offset of the first byte that is not part of a valid character; `text.size()` when all of the text is valid.
std::size_t utf8_valid_prefix(std::string_view text);

}  // namespace knock::data

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_DATA_UTF8)

namespace knock::data {

KNOCK_FUNC std::size_t utf8_character(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead < 0xc2 || lead > 0xf4) return 0;
  const std::size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (text.size() - at < length) return 0;
  // The second byte's range excludes overlong forms (e0, f0), surrogates (ed) and code points above U+10FFFF (f4).
  const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (byte(1) < low || byte(1) > high) return 0;
  for (std::size_t i = 2; i < length; ++i)
    if ((byte(i) & 0xc0) != 0x80) return 0;
  return length;
}

KNOCK_FUNC std::size_t utf8_valid_prefix(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t length = utf8_character(text, at);
    if (length == 0) break;
    at += length;
  }
  return at;
}

}  // namespace knock::data

#endif
