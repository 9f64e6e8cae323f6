// libFuzzer target: any bytes given as a safetensors file, and any text given as the JSON of one, are read or refused
// with knock::Error, within the sanitizers' rules and without memory beyond what the bytes hold.
//
//   cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_safetensors
//   build/fuzz/tests/fuzz_safetensors -max_total_time=60 CORPUS tests/golden/safetensors

#include <knock/autograd/view.hpp>
#include <knock/io/safetensors.hpp>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace {

void read(std::string_view bytes) {
  try {
    const knock::StateDict tensors = knock::io::parse_safetensors(bytes);
    for (const auto& [name, tensor] : tensors) {
      const auto size = static_cast<std::size_t>(tensor.numel() * knock::size_of(tensor.dtype()));
      if (size > 2 * bytes.size()) std::abort();
    }
  } catch (const knock::Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  read(bytes);
  // Again as JSON text that ends at the first NUL, followed by the elements: the length need not be guessed.
  const std::size_t length = std::min(bytes.find('\0'), size);
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  file += bytes.substr(0, length);
  if (length < size) file += bytes.substr(length + 1);
  read(file);
  return 0;
}
