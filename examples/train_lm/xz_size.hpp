#pragma once
// The size that `xz -9e` compresses a text to, without writing a file; 0 when it lacks the memory (700 MB).

#include <lzma.h>

#include <cstdint>
#include <string_view>
#include <vector>

inline std::size_t xz_size(std::string_view text) {
  std::vector<uint8_t> out(lzma_stream_buffer_bound(text.size()));
  std::size_t size = 0;
  const lzma_ret result = lzma_easy_buffer_encode(9 | LZMA_PRESET_EXTREME, LZMA_CHECK_CRC64, nullptr,
                                                  reinterpret_cast<const uint8_t*>(text.data()), text.size(),
                                                  out.data(), &size, out.size());
  return result == LZMA_OK ? size : 0;
}
