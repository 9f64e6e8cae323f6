// What ptxas makes of the PTX that all other tests execute, for each architecture that the back-end is built for:
// without a warning or a register spill, and within the limits of machine_code.txt, which are those of CUDA 13.0: other
// releases share out registers in their own way.
//
// KNOCK_WRITE_LIMITS=FILE writes the limits that hold now, for the kernels that machine_code.txt names and all others.

#include <modules.hpp>

#include <doctest/doctest.h>
#include <cuda/support/machine_code_limits.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using namespace machine_code;

/// Of one kernel, or the most of several.
struct Use {
  int registers = 0, shared_bytes = 0, threads = 0;

  void join(const Use& other) {
    registers = std::max(registers, other.registers), shared_bytes = std::max(shared_bytes, other.shared_bytes);
    threads = std::max(threads, other.threads);
  }
};

/// Warps of 64 that a multiprocessor holds, as far as registers (given out by 8 a thread), shared memory (1 KiB of
/// which a block takes for itself), and its 32 blocks allow.
int resident_warps(const Use& use, int dynamic_bytes, const Architecture& on) {
  const int warps = use.threads / 32, registers = (use.registers + 7) / 8 * 8 * 32;
  const int by_registers = 65536 / registers / warps;
  const int by_shared = on.shared_bytes / (use.shared_bytes + dynamic_bytes + 1024);
  return std::min({64 / warps, 32, by_registers, by_shared}) * warps;
}

/// The number behind `word`, or before it.
int number_before(const std::string& text, const std::string& word) {
  const std::size_t at = text.find(word);
  if (at == std::string::npos) return 0;
  const std::size_t begin = text.find_last_not_of("0123456789", at - 1) + 1;
  return std::atoi(text.substr(begin, at - begin).c_str());
}

/// Threads of a block that the PTX gives each kernel, by mangled name.
std::map<std::string, int> block_sizes(std::string_view ptx) {
  std::map<std::string, int> sizes;
  std::istringstream lines{std::string(ptx)};
  std::string kernel;
  for (std::string line; std::getline(lines, line);) {
    if (const std::size_t at = line.find(".entry "); at != std::string::npos)
      kernel = line.substr(at + 7, line.find('(') - at - 7);
    if (line.starts_with(".maxntid ")) sizes[kernel] = std::atoi(line.c_str() + 9);
  }
  return sizes;
}

class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern = (fs::temp_directory_path() / "knock-sass-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~ScratchFolder() { fs::remove_all(path); }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  fs::path path;
};

/// What ptxas says of each kernel of a module; its warnings and spilled registers fail the test.
std::map<std::string, Use> assemble(std::string_view ptx, const Architecture& on, const fs::path& folder) {
  const std::string source = (folder / "kernels.ptx").string(), log = (folder / "log").string();
  std::ofstream(source) << ptx;
  const std::string command = std::string(KNOCK_PTXAS) + " -v -lineinfo -arch=sm_" + std::to_string(on.number) +
                              " -o " + (folder / "kernels.cubin").string() + " " + source + " >" + log + " 2>&1";
  const int status = std::system(command.c_str());
  CHECK(status == 0);
  const std::map<std::string, int> sizes = block_sizes(ptx);
  std::map<std::string, Use> uses;
  Use use;
  std::string kernel;
  std::ifstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("ptxas info") && line.find("spill") == std::string::npos) FAIL_CHECK(line);
    if (const std::size_t at = line.find("Function properties for "); at != std::string::npos)
      kernel = line.substr(at + 24);
    if (line.find("spill stores") != std::string::npos) {
      CAPTURE(cuda_sim::shown_name(kernel.c_str()));
      CHECK(number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads") == 0);
    }
    if (line.find(": Used ") == std::string::npos) continue;
    use.registers = number_before(line, " registers"), use.shared_bytes = number_before(line, " bytes smem");
    const auto size = sizes.find(kernel);
    use.threads = size == sizes.end() ? 256 : size->second;
    uses[without_namespaces(cuda_sim::shown_name(kernel.c_str()))] = use;
    use = {};
  }
  return uses;
}

std::map<std::string, Use> assemble_all(const Architecture& on) {
  const ScratchFolder folder;
  std::map<std::string, Use> all;
  for (const std::string_view ptx : cuda_sim::registered_ptx())
    for (const auto& [kernel, use] : assemble(ptx, on, folder.path)) all[kernel].join(use);
  return all;
}

/// All lines anew: of the kernels that have one, and one for each other family.
void write_limits(const char* path) {
  const std::map<std::string, Limit> before = read_limits();
  std::map<std::string, Limit> now;
  for (std::size_t a = 0; a < architectures.size(); ++a) {
    for (const auto& [kernel, use] : assemble_all(architectures[a])) {
      const std::string& known = limit_of(kernel, before);
      const bool is_first = !now.contains(known.empty() ? family(kernel) : known) ||
                            now[known.empty() ? family(kernel) : known].registers[a] == 0;
      Limit& limit = now[known.empty() ? family(kernel) : known];
      if (!known.empty()) limit.dynamic_bytes = before.at(known).dynamic_bytes;
      const int warps = resident_warps(use, limit.dynamic_bytes, architectures[a]);
      limit.registers[a] = std::max(limit.registers[a], use.registers);
      limit.shared_bytes[a] = std::max(limit.shared_bytes[a], use.shared_bytes);
      limit.warps[a] = is_first ? warps : std::min(limit.warps[a], warps);
    }
  }
  std::ofstream file(path);
  std::ifstream old(limits_file);
  for (std::string line; std::getline(old, line) && line.starts_with("#");) file << line << '\n';
  for (const auto& [kernel, limit] : now) {
    char line[256];
    std::snprintf(line, sizeof line, "%-44s | %6d   %3d %3d %3d   %5d %5d %5d   %2d %2d %2d\n", kernel.c_str(),
                  limit.dynamic_bytes, limit.registers[0], limit.registers[1], limit.registers[2],
                  limit.shared_bytes[0], limit.shared_bytes[1], limit.shared_bytes[2], limit.warps[0], limit.warps[1],
                  limit.warps[2]);
    file << line;
  }
}

void check_limits(std::size_t a) {
  if (const char* path = std::getenv("KNOCK_WRITE_LIMITS")) {
    if (a == 0) write_limits(path);
    return;
  }
  const bool limited = std::string_view(KNOCK_CUDA_VERSION).starts_with("13.0");
  const std::map<std::string, Limit> limits = read_limits();
  const std::map<std::string, Use> uses = assemble_all(architectures[a]);
  CHECK(uses.size() > 500);
  for (const auto& entry : uses) {
    const std::string& kernel = entry.first;
    const Use& use = entry.second;
    CAPTURE(kernel);
    if (!limited) continue;
    const std::string& name = limit_of(kernel, limits);
    if (name.empty()) {
      FAIL_CHECK("no limit; KNOCK_WRITE_LIMITS=FILE writes them");
      continue;
    }
    const Limit& limit = limits.at(name);
    CHECK(use.registers <= limit.registers[a]);
    CHECK(use.shared_bytes <= limit.shared_bytes[a]);
    CHECK(resident_warps(use, limit.dynamic_bytes, architectures[a]) >= limit.warps[a]);
  }
}

}  // namespace

TEST_CASE("machine code: sm_80") { check_limits(0); }
TEST_CASE("machine code: sm_90") { check_limits(1); }
#if KNOCK_CUDA_KNOWS_SM_100
TEST_CASE("machine code: sm_100") { check_limits(2); }
#endif
