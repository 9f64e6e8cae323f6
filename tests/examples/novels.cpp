// The fetching and extracting of the default corpus, on a small package made here and with stand-ins for apt: no
// network.

#include <support/process.hpp>
#include <support/temporary_folder.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <random>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include <zlib.h>

namespace {

namespace fs = std::filesystem;

const std::vector<std::string> novels{"emma",       "mansfieldpark",  "northangerabbey",
                                      "persuasion", "prideprejudice", "sensesensibility"};

std::string big_endian(uint32_t value) {
  std::string out;
  for (const int shift : {24, 16, 8, 0}) out.push_back(static_cast<char>(value >> shift));
  return out;
}

std::string zlib_stream(const std::string& bytes) {
  std::string out(compressBound(bytes.size()), '\0');
  uLongf size = out.size();
  REQUIRE(compress(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(bytes.data()),
                   bytes.size()) == Z_OK);
  return out.substr(0, size);
}

// R's serialisation, version 3.
std::string r_object(const std::string& value) {
  return "X\n" + big_endian(3) + big_endian(0x040201) + big_endian(0x030500) + big_endian(5) + "UTF-8" + value;
}
std::string r_character(const std::string& text) {
  return big_endian(0x00040009) + big_endian(static_cast<uint32_t>(text.size())) + text;
}
std::string r_strings(const std::vector<std::string>& strings) {
  std::string out = big_endian(16) + big_endian(static_cast<uint32_t>(strings.size()));
  for (const std::string& text : strings) out += r_character(text);
  return out;
}
std::string r_list(const std::vector<std::string>& names, const std::vector<std::string>& values, bool first) {
  std::string out = big_endian(0x213) + big_endian(static_cast<uint32_t>(values.size()));
  for (const std::string& value : values) out += value;
  // The symbol `names` is written out the first time, then referred to.
  return out + big_endian(0x402) + (first ? big_endian(1) + r_character("names") : big_endian(0x1ff)) +
         r_strings(names) + big_endian(0xfe);
}

/// Lines of the made-up novel number `i`.
std::vector<std::string> lines_of(std::size_t i) {
  std::vector<std::string> lines{"", novels[i], "", "Chapter I"};
  for (std::size_t n = 0; n < 20 * (i + 1); ++n) lines.push_back("It was £" + std::to_string(n * n + i) + " a year.");
  return lines;
}

std::string text_of(std::size_t i) {
  std::string text;
  for (const std::string& line : lines_of(i)) text += line + "\n";
  text.pop_back();
  return text;
}

struct Database {
  std::string rdx, rdb;
};

Database database() {
  Database out;
  std::vector<std::string> places;
  for (std::size_t i = 0; i < novels.size(); ++i) {
    const std::string object = r_object(r_strings(lines_of(i)));
    const std::string record = big_endian(static_cast<uint32_t>(object.size())) + zlib_stream(object);
    places.push_back(big_endian(13) + big_endian(2) + big_endian(static_cast<uint32_t>(out.rdb.size())) +
                     big_endian(static_cast<uint32_t>(record.size())));
    out.rdb += record;
  }
  const std::string variables = r_list(novels, places, true), nothing = big_endian(0x13) + big_endian(0);
  const std::string logical = big_endian(10) + big_endian(1) + big_endian(1);
  out.rdx =
      zlib_stream(r_object(r_list({"variables", "references", "compressed"}, {variables, nothing, logical}, false)));
  return out;
}

const std::string extractor = KNOCK_EXAMPLES_DIR "/extract_novels";
const std::string fetcher = KNOCK_SOURCE_DIR "/examples/train_lm/fetch_novels.sh";

test::Outcome extract(const test::TemporaryFolder& folder, const Database& data) {
  folder.write("Rdata.rdx", data.rdx);
  folder.write("Rdata.rdb", data.rdb);
  fs::remove_all(folder / "novels");
  return test::run(extractor + " " + (folder / "Rdata") + " " + (folder / "novels"));
}

std::string contents(const std::string& path) { return test::run("cat " + path).out; }

bool one_line(const std::string& text) {
  return text.size() <= 300 && std::count(text.begin(), text.end(), '\n') == 1 && text.back() == '\n';
}

/// A folder with programs named apt-get and dpkg-deb that hand out a made-up package.
struct Stand {
  test::TemporaryFolder folder;

  Stand() {
    const Database data = database();
    folder.write("package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdx", data.rdx);
    folder.write("package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", data.rdb);
    program("dpkg-deb", "cp -r " + (folder / "package") + " \"$3\"");
    program("apt-get", "case \"$*\" in *download*) : >r-cran-janeaustenr_1_all.deb;; esac");
  }
  void program(const std::string& name, const std::string& script) const {
    folder.write("bin/" + name, "#!/bin/sh\necho $0 >>" + (folder / "calls") + "\n" + script + "\n");
    fs::permissions(folder / ("bin/" + name), fs::perms::owner_all);
  }
  test::Outcome fetch() const {
    return test::run("PATH=" + (folder / "bin") + ":$PATH " + fetcher + " " + (folder / "data/novels") + " " +
                     extractor);
  }
  int calls() const { return std::stoi("0" + test::run("cat " + (folder / "calls") + " | wc -l").out); }
  /// What lies beside the novels: nothing, unless something was left behind.
  std::string listing() const { return test::run("ls -A " + (folder / "data")).out; }
};

}  // namespace

TEST_CASE("novels: the extractor joins the lines of each variable and holds one out") {
  const test::TemporaryFolder folder;
  const test::Outcome outcome = extract(folder, database());
  CHECK(outcome.err == "");
  REQUIRE(outcome.code == 0);
  for (std::size_t i = 0; i < novels.size(); ++i) {
    const std::string part = novels[i] == "persuasion" ? "novels/valid/" : "novels/train/";
    CHECK(contents(folder / (part + novels[i] + ".txt")) == text_of(i));
  }
}

TEST_CASE("novels: the extractor refuses what is damaged in one line") {
  const test::TemporaryFolder folder;
  const Database whole = database();
  const auto refused = [&](const Database& data, const char* reason) {
    const test::Outcome outcome = extract(folder, data);
    CAPTURE(reason);
    CHECK(outcome.code == 1);
    CHECK(one_line(outcome.err));
    CHECK(outcome.err.find(reason) != std::string::npos);
  };
  refused({"", whole.rdb}, "the index cannot be unpacked: the data are damaged");
  refused({whole.rdx.substr(0, 100), whole.rdb}, "the index cannot be unpacked");
  refused({zlib_stream("A\n"), whole.rdb}, "the index is not in R's XDR format");
  refused({zlib_stream(r_object(big_endian(16) + big_endian(0x7fffffff))), whole.rdb}, "cut short or damaged");
  refused({zlib_stream(r_object(big_endian(3))), whole.rdb}, "not made of text, numbers and lists alone");
  refused({zlib_stream(r_object(r_strings({"x"}))), whole.rdb}, "no entry 'variables'");
  refused({whole.rdx, whole.rdb.substr(0, whole.rdb.size() / 2)}, "the database ends before");
  std::string changed = whole.rdb;
  changed[40] ^= 4;
  refused({whole.rdx, changed}, "emma cannot be unpacked: the data are damaged");
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += big_endian(0x13) + big_endian(1);
  refused({zlib_stream(r_object(deep)), whole.rdb}, "nested too deeply");
  refused({zlib_stream(std::string(std::size_t{1} << 27, ' ')), whole.rdb}, "it is too large");

  const test::Outcome missing = test::run(extractor + " /nowhere/Rdata " + (folder / "novels"));
  CHECK(missing.code == 1);
  CHECK(missing.err == "[read_file] cannot open /nowhere/Rdata.rdx: No such file or directory\n");
  CHECK(test::run(extractor).code == 2);
}

TEST_CASE("novels: no change of a byte of the index makes the extractor crash") {
  const test::TemporaryFolder folder;
  const Database whole = database();
  std::vector<std::string> places(novels.size(), big_endian(13) + big_endian(2) + big_endian(0) + big_endian(100));
  const std::string index = r_object(r_list({"variables"}, {r_list(novels, places, true)}, false));
  std::mt19937 draw(4);
  for (int repeat = 0; repeat < 150; ++repeat) {
    std::string changed = index;
    changed[draw() % changed.size()] = static_cast<char>(draw());
    const test::Outcome outcome = extract(folder, {zlib_stream(changed), whole.rdb});
    CHECK(outcome.code == 1);  // a place of 100 bytes is always wrong
    CHECK(one_line(outcome.err));
  }
}

TEST_CASE("novels: fetching is done once, and again when a file was damaged") {
  const Stand stand;
  const test::Outcome first = stand.fetch();
  CHECK(first.err == "");
  REQUIRE(first.code == 0);
  CHECK(first.out.find("valid/persuasion.txt") != std::string::npos);
  CHECK(first.out.find("another edition") != std::string::npos);  // it is
  CHECK(stand.listing() == "novels\n");
  const int calls = stand.calls();
  CHECK(calls == 2);

  CHECK(stand.fetch().out == first.out);
  CHECK(stand.calls() == calls);

  stand.folder.write("data/novels/train/emma.txt", "damaged");
  CHECK(stand.fetch().out == first.out);
  CHECK(stand.calls() == 2 * calls);
  CHECK(contents(stand.folder / "data/novels/train/emma.txt") == text_of(0));
  CHECK(stand.listing() == "novels\n");
}

TEST_CASE("novels: fetching fails in one line and leaves nothing") {
  const auto refused = [](const Stand& stand, const std::string& reason) {
    const test::Outcome outcome = stand.fetch();
    CAPTURE(reason);
    CHECK(outcome.code == 1);
    CHECK(one_line(outcome.err));
    CHECK(outcome.err.find(reason) != std::string::npos);
    CHECK(stand.listing() == "");
  };
  {
    const Stand stand;
    stand.program("apt-get", "echo 'E: Failed to fetch http://deb.example.org  Temporary failure resolving'; exit 100");
    refused(stand, "fetch_novels: cannot read Debian's package lists: Failed to fetch http://deb.example.org");
  }
  {
    const Stand stand;
    stand.program("apt-get", "case \"$*\" in *download*) echo 'E: Unable to locate package'; exit 100;; esac");
    refused(stand, "fetch_novels: cannot download r-cran-janeaustenr: Unable to locate package");
  }
  {
    const Stand stand;
    stand.program("dpkg-deb", "echo 'tar: x: Cannot write: No space left on device'; echo more; exit 2");
    refused(stand, "fetch_novels: cannot unpack r-cran-janeaustenr: tar: x: Cannot write: No space left on device");
  }
  {
    const Stand stand;
    fs::remove(stand.folder / "package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb");
    refused(stand, "fetch_novels: cannot extract the novels: [read_file] cannot open");
  }
}

TEST_CASE("novels: a folder that holds something else is not touched") {
  const Stand stand;
  stand.folder.write("data/novels/mine.txt", "mine");
  const test::Outcome outcome = stand.fetch();
  CHECK(outcome.code == 1);
  CHECK(outcome.err.find("exists and holds something else") != std::string::npos);
  CHECK(contents(stand.folder / "data/novels/mine.txt") == "mine");
}

TEST_CASE("novels: without apt the error says what to do") {
  const Stand stand;
  const test::Outcome outcome =
      test::run("mkdir " + (stand.folder / "few") +
                "; for p in sh cut cat dirname sha256sum ls; do ln -s $(command -v $p) " + (stand.folder / "few") +
                "/; done; PATH=" + (stand.folder / "few") + " " + fetcher + " " + (stand.folder / "data/n"));
  CHECK(outcome.code == 1);
  CHECK(outcome.err.starts_with("fetch_novels: apt-get is missing"));
  CHECK(outcome.err.find("--data.path=FOLDER") != std::string::npos);
}
