#include <knock/io/file.hpp>
#include <knock/io/folder.hpp>

#include <support/temporary_folder.hpp>

#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>

#include <doctest/doctest.h>

using namespace knock;
namespace fs = std::filesystem;

namespace {

std::size_t entries(const std::string& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

}  // namespace

TEST_CASE("write_folder: a new folder, then one in its place, and nothing else") {
  const test::TemporaryFolder folder;
  const std::string target = folder / "a/b";
  for (const std::string text : {"first", "second"}) {
    io::write_folder(target, [&](const std::string& temporary) {
      CHECK(fs::is_empty(temporary));
      io::write_file(temporary + "/" + text, text);
    });
    CHECK(io::read_file(target + "/" + text) == text);
    CHECK(entries(target) == 1);
    CHECK(entries(folder / "a") == 1);
  }
}

TEST_CASE("write_folder: what fails leaves the folder that was there") {
  const test::TemporaryFolder folder;
  folder.write("target/file", "old");
  CHECK_THROWS_WITH(io::write_folder(folder / "target",
                                     [&](const std::string& temporary) {
                                       io::write_file(temporary + "/file", "new");
                                       throw std::runtime_error("the disk is on fire");
                                     }),
                    "the disk is on fire");
  CHECK(io::read_file(folder / "target/file") == "old");
  CHECK(entries(folder.path()) == 1);
  CHECK_THROWS_AS(io::write_folder(folder / "target/file/below", [](const std::string&) {}), Error);
}

TEST_CASE("FolderLock: one holder at a time, released when it goes") {
  const test::TemporaryFolder folder;
  const std::string path = folder / "new/run";
  auto first = std::make_unique<io::FolderLock>(path);
  CHECK(fs::is_empty(path));
  CHECK_THROWS_WITH_AS(io::FolderLock(std::string(path)), doctest::Contains(("is writing into " + path).c_str()),
                       Error);
  first.reset();
  const io::FolderLock second(path);
  CHECK_THROWS_AS(io::FolderLock(std::string(path)), Error);
}

TEST_CASE("FolderLock: a folder that cannot be made is named") {
  const test::TemporaryFolder folder;
  const std::string path = folder.write("file", "x") + "/run";
  CHECK_THROWS_WITH_AS(io::FolderLock(std::string(path)), doctest::Contains(path.c_str()), Error);
}
