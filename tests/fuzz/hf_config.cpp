// libFuzzer target: any text given as a config.json is read or refused with knock::Error of one line; what is read and
// has sizes that a training accepts is written, and read back to the same text.
//
//   cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_hf_config
//   build/fuzz/tests/fuzz_hf_config -max_total_time=60 CORPUS tests/golden/hf_config

#include <knock/interop/hf_config.hpp>

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace knock;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const io::HfConfig read = io::parse_hf_config(bytes, "config.json");
    models::check_config(read.model);
    const std::string written = io::hf_config_text(read.model, {.max_positions = 8});
    if (io::hf_config_text(io::parse_hf_config(written, "written").model, {.max_positions = 8}) != written)
      std::abort();
  } catch (const Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) std::abort();
  }
  return 0;
}
