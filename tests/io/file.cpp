#include <knock/io/file.hpp>

#include <support/temporary_folder.hpp>

#include <csignal>
#include <filesystem>

#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/stat.h>

using namespace knock;

TEST_CASE("file: what was written is read back") {
  const test::TemporaryFolder folder;
  const std::string path = folder / "a.bin";
  std::string bytes(3'000'001, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * i >> 3);
  io::write_file(path, bytes);
  CHECK(io::read_file(path) == bytes);
  io::write_file(path, "");
  CHECK(io::read_file(path).empty());
}

TEST_CASE("file: reading refuses what is missing, no file, too large or broken") {
  const test::TemporaryFolder folder;
  const auto contains = [](const char* words) { return doctest::Contains(words); };
  CHECK_THROWS_WITH_AS(io::read_file(folder / "none"), contains("none: No such file or directory"), Error);
  CHECK_THROWS_WITH_AS(io::read_file(folder.path()), contains("is not a regular file"), Error);
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THROWS_WITH_AS(io::read_file(folder / "pipe"), contains("pipe is not a regular file"), Error);
  CHECK(io::read_file(folder.write("five", "12345"), 5) == "12345");
  CHECK_THROWS_WITH_AS(io::read_file(folder / "five", 4), contains("five is larger than 4 bytes"), Error);
  CHECK_THROWS_WITH_AS(io::read_file("/proc/self/mem"), contains("cannot read /proc/self/mem"), Error);
}

TEST_CASE("file: a write that fails leaves the old file and nothing else") {
  const test::TemporaryFolder folder;
  CHECK_THROWS_WITH_AS(io::write_file(folder / "none/a", "x"), doctest::Contains("none/a: No such file"), Error);
  const std::string path = folder.write("a", "old");

  // A limit on the size of files stands for a full disk: write(2) fails after some bytes.
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  struct rlimit small = before;
  small.rlim_cur = 10'000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  CHECK_THROWS_WITH_AS(io::write_file(path, std::string(20'000, 'x')), doctest::Contains("cannot write"), Error);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);

  CHECK(io::read_file(path) == "old");
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) ++files;
  CHECK(files == 1);
}
