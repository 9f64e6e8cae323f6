#include <knock/data/corpus.hpp>
#include <knock/data/utf8.hpp>

#include <support/temporary_folder.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include <doctest/doctest.h>

using namespace knock;
using data::Corpus;
using data::read_corpus;
using Strings = std::vector<std::string>;

namespace {

doctest::Contains contains(const char* words) { return doctest::Contains(words); }

}  // namespace

TEST_CASE("corpus: a single file holds out its tail, cut after a line") {
  const test::TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 100; ++i) text += "line " + std::to_string(100 + i) + "\n";  // 9 bytes each
  const std::string path = folder.write("a.txt", text);
  const Corpus corpus = read_corpus(path, {.val_fraction = 0.2});
  REQUIRE(corpus.train.size() == 1);
  REQUIRE(corpus.valid.size() == 1);
  CHECK(corpus.train.texts[0] + corpus.valid.texts[0] == text);
  CHECK(corpus.valid.texts[0].starts_with("line 18"));
  CHECK(corpus.valid.bytes() == 19 * 9);
  CHECK(corpus.train.names[0] == path);
}

TEST_CASE("corpus: a tail without a line end is cut between characters") {
  const test::TemporaryFolder folder;
  for (const double fraction : {0.01, 0.3, 0.5, 0.66, 0.75}) {
    const Corpus corpus = read_corpus(folder.write("a.txt", "🙂é中🙂é中"), {.val_fraction = fraction});
    CHECK(corpus.train.texts[0] + corpus.valid.texts[0] == "🙂é中🙂é中");
    CHECK(data::utf8_valid_prefix(corpus.valid.texts[0]) == corpus.valid.texts[0].size());
    CHECK(!corpus.valid.texts[0].empty());
    CHECK(!corpus.train.texts[0].empty());
  }
  CHECK_THROWS_WITH_AS(read_corpus(folder.write("b.txt", "🙂")), contains("b.txt is too short to hold out"), Error);
}

TEST_CASE("corpus: a folder is read by name, with its sub-folders, and holds out its last documents") {
  const test::TemporaryFolder folder;
  folder.write("b.txt", std::string(300, 'b'));
  folder.write("a/z.TXT", std::string(300, 'z'));
  folder.write("c.txt", std::string(60, 'c'));
  folder.write("d.txt", std::string(60, 'd'));
  folder.write("empty.txt", "");
  folder.write("notes.md", "\xff");
  const Corpus corpus = read_corpus(folder.path());
  CHECK(corpus.train.names == Strings{"a/z.TXT", "b.txt"});
  CHECK(corpus.valid.names == Strings{"c.txt", "d.txt"});  // d alone is less than a tenth
  CHECK(corpus.train.texts == Strings{std::string(300, 'z'), std::string(300, 'b')});
  CHECK(corpus.train.bytes() == 600);

  const Corpus most = read_corpus(folder.path(), {.val_fraction = 0.99});
  CHECK(most.train.names == Strings{"a/z.TXT"});
  const Corpus least = read_corpus(folder.path(), {.val_fraction = 1e-9});
  CHECK(least.valid.names == Strings{"d.txt"});
  const Corpus none = read_corpus(folder.path(), {.val_fraction = 0});
  CHECK(none.train.size() == 4);
  CHECK(none.valid.size() == 0);
}

TEST_CASE("corpus: train/ and valid/ are the split") {
  const test::TemporaryFolder folder;
  folder.write("train/b.txt", "two");
  folder.write("train/x/a.txt", "three");
  folder.write("valid/a.txt", "one");
  const Corpus corpus = read_corpus(folder.path(), {.val_fraction = 0.5});
  CHECK(corpus.train.texts == Strings{"two", "three"});
  CHECK(corpus.valid.texts == Strings{"one"});
  folder.write("stray.txt", "x");
  CHECK_THROWS_WITH_AS(read_corpus(folder.path()), contains("but stray.txt is in neither"), Error);
  std::filesystem::remove(folder / "stray.txt");
  std::filesystem::remove(folder / "valid/a.txt");
  CHECK_THROWS_WITH_AS(read_corpus(folder.path()), contains("/valid has no .txt files"), Error);
}

TEST_CASE("corpus: a byte order mark is taken away, line ends are kept") {
  const test::TemporaryFolder folder;
  const Corpus corpus = read_corpus(folder.write("a.txt", "\xef\xbb\xbfone\r\n"), {.val_fraction = 0});
  CHECK(corpus.train.texts[0] == "one\r\n");
}

TEST_CASE("corpus: what cannot be read as text is refused, with file and offset") {
  const test::TemporaryFolder folder;
  const auto read = [&](std::string_view bytes) { return read_corpus(folder.write("a.txt", bytes)); };
  CHECK_THROWS_WITH_AS(read_corpus(folder / "none"), contains("there is no file or folder '"), Error);
  CHECK_THROWS_WITH_AS(read_corpus(""), "[read_corpus] there is no file or folder ''", Error);
  CHECK_THROWS_WITH_AS(read_corpus(folder.path()), contains("has no .txt files"), Error);
  CHECK_THROWS_WITH_AS(read(""), contains("a.txt is empty"), Error);
  CHECK_THROWS_WITH_AS(read_corpus(folder.path()), contains("are all empty"), Error);
  CHECK_THROWS_WITH_AS(read(std::string_view("abc\0d\xff", 6)), contains("not text: zero byte at offset 3"), Error);
  CHECK_THROWS_WITH_AS(read("abc\xff"), contains("a.txt is not text: invalid UTF-8 at byte offset 3"), Error);
  CHECK_THROWS_WITH_AS(read("ab\xc3"), contains("offset 2"), Error);
  CHECK_THROWS_WITH_AS(read(std::string_view("\xff\xfe"
                                             "a\0",
                                             4)),
                       contains("is UTF-16, not UTF-8"), Error);
  CHECK_THROWS_WITH_AS(read_corpus("/proc/self/mem"), contains("cannot read /proc/self/mem"), Error);
  folder.write("a.txt", "text");
  std::filesystem::create_symlink("/nowhere/b.txt", folder / "b.txt");
  CHECK_THROWS_WITH_AS(read_corpus(folder.path()), contains("b.txt: No such file or directory"), Error);
  for (const double fraction : {-0.1, 1.0, std::nan("")})
    CHECK_THROWS_WITH_AS(read_corpus(folder / "a.txt", {.val_fraction = fraction}), contains("is not in [0, 1)"),
                         Error);
}

TEST_CASE("utf8: what is valid and where it ends") {
  CHECK(data::utf8_valid_prefix("") == 0);
  for (const char* valid : {"a", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
                            "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"})
    CHECK(data::utf8_character(valid, 0) == std::string_view(valid).size());
  for (const char* invalid : {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xc2", "\xc2\x41", "\xe0\x9f\xbf", "\xe1\x80",
                              "\xe1\x80\x41", "\xed\xa0\x80", "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf", "\xf0\x90\x80",
                              "\xf1\x80\x80\x41", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff"}) {
    CHECK(data::utf8_character(invalid, 0) == 0);
    CHECK(data::utf8_valid_prefix(std::string("aé") + invalid) == 3);
  }
}

TEST_CASE("corpus: documents become one stream with separators") {
  const std::vector<std::string> nothing;
  const data::Tokenizer tokenizer = data::Tokenizer::train(nothing, 257);
  const data::Documents documents{{"a", "b"}, {"A<|endoftext|>", "B"}};
  const std::vector<int32_t> stream = data::tokenize(documents, tokenizer);
  REQUIRE(stream.size() == 1 + 14 + 1 + 1 + 1);
  CHECK(stream.front() == tokenizer.eos_id());
  CHECK(stream.back() == tokenizer.eos_id());
  CHECK(std::count(stream.begin(), stream.end(), tokenizer.eos_id()) == 3);  // text that looks like one is text
  CHECK(tokenizer.decode(stream) == "<|endoftext|>A<|endoftext|><|endoftext|>B<|endoftext|>");
}
