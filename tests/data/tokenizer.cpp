#include <knock/core/parallel.hpp>
#include <knock/data/tokenizer.hpp>
#include <knock/io/file.hpp>

#include <support/temporary_folder.hpp>

#include <functional>
#include <random>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

using namespace knock;
using data::Tokenizer;
using nlohmann::json;

namespace {

const std::string golden_path = KNOCK_TEST_DATA "/tokenizer.json";

const std::string& golden_text() {
  static const std::string text = io::read_file(golden_path);
  return text;
}

const json& golden() {
  static const json cases = json::parse(io::read_file(KNOCK_TEST_DATA "/tokenizer_cases.json"));
  return cases;
}

const Tokenizer& tokenizer() {
  static const Tokenizer loaded = Tokenizer::load(golden_path);
  return loaded;
}

std::string random_bytes(std::mt19937& draw, std::size_t length) {
  std::string bytes(length, '\0');
  for (char& byte : bytes) byte = static_cast<char>(draw());
  return bytes;
}

/// Checks ids, pre-tokens and the way back against the golden cases of a vocabulary.
void check_cases(const Tokenizer& vocabulary, const json& cases) {
  for (const json& item : cases) {
    const std::string text = item.at("text");
    CAPTURE(text);
    const std::vector<int32_t> ids = vocabulary.encode(text);
    CHECK(ids == item.at("ids").get<std::vector<int32_t>>());
    CHECK(vocabulary.decode(ids) == text);
    std::vector<std::size_t> pieces;
    for (const std::string_view piece : data::pre_tokenize(text)) pieces.push_back(piece.size());
    CHECK(pieces == item.at("pieces").get<std::vector<std::size_t>>());
  }
}

}  // namespace

TEST_CASE("tokenizer: training gives the vocabulary, merges and file of the tokenizers package") {
  const json& training = golden().at("training");
  const std::vector<std::string> texts = training.at("texts");
  const Tokenizer trained =
      Tokenizer::train(texts, training.at("vocab_size"), {.special_tokens = training.at("special_tokens")});
  CHECK(trained.vocab_size() == 700);
  CHECK(trained.to_json() == golden_text());
}

TEST_CASE("tokenizer: training breaks ties as the tokenizers package does") {
  const json& ties = golden().at("ties");
  const std::vector<std::string> texts = ties.at("texts");
  const Tokenizer trained = Tokenizer::train(texts, ties.at("vocab_size"), {.min_frequency = ties.at("min_frequency")});
  CHECK(json::parse(trained.to_json()).at("model").at("merges") == ties.at("merges"));
  check_cases(trained, ties.at("cases"));
}

TEST_CASE("tokenizer: ids and pre-tokens are those of the tokenizers package") {
  REQUIRE(golden().at("cases").size() > 90);
  check_cases(tokenizer(), golden().at("cases"));
}

TEST_CASE("tokenizer: a file is read and written without a change, merges as pairs or as strings") {
  CHECK(tokenizer().to_json() == golden_text());
  json file = json::parse(golden_text());
  for (json& merge : file["model"]["merges"]) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  CHECK(Tokenizer::from_json(file.dump(), "strings").to_json() == golden_text());

  const test::TemporaryFolder folder;
  tokenizer().save(folder / "tokenizer.json");
  CHECK(io::read_file(folder / "tokenizer.json") == golden_text());
  CHECK_THROWS_WITH_AS(tokenizer().save(folder / "none/x.json"), doctest::Contains("No such file"), Error);
}

TEST_CASE("tokenizer: any bytes come back from decode(encode(bytes))") {
  std::mt19937 draw(1);
  for (int b = 0; b < 256; ++b) {
    const std::string byte(1, static_cast<char>(b));
    CHECK(tokenizer().decode(tokenizer().encode(byte)) == byte);
  }
  const std::string_view stretches[] = {"the people",       "\xc3\xa9",    "\xe4\xbd", "\xff",     "\xed\xa0\x80",
                                        "\xf4\x90\x80\x80", "\xc0\xaf",    " \n",      "\xf0\x9f", "'s",
                                        "<|endoftext|>",    "\xe2\x80\xa8"};
  for (int repeat = 0; repeat < 2000; ++repeat) {
    std::string bytes;
    for (auto i = draw() % 20; i > 0; --i)
      bytes += draw() % 2 == 0 ? std::string(stretches[draw() % std::size(stretches)]) : random_bytes(draw, draw() % 4);
    CAPTURE(bytes);
    std::string joined;
    for (const std::string_view piece : data::pre_tokenize(bytes)) {
      CHECK(!piece.empty());
      joined += piece;
    }
    CHECK(joined == bytes);
    CHECK(tokenizer().decode(tokenizer().encode(bytes)) == bytes);
    CHECK(tokenizer().decode(tokenizer().encode_ordinary(bytes)) == bytes);
  }
}

TEST_CASE("tokenizer: neither ids nor the vocabulary depend on the number of threads") {
  // Long enough to be cut for several threads; every kind of line end, and of what may stand around one.
  const std::string_view stretches[] = {"the people", " \n",    "\n",          "\n\n",    "\r\n", "!\n",
                                        "\n.",        "\n 's",  "\n\xc2\xa0x", "9\n",     "\n9",  "\xc3\xa9\n",
                                        "\n\t",       "\xff\n", "\n\xff",      "<|pad|>", " ",    "\n\xe2\x80\xa8"};
  std::mt19937 draw(3);
  std::vector<std::string> texts(3);
  for (std::string& text : texts)
    while (text.size() < 200000) text += stretches[draw() % std::size(stretches)];
  const int before = num_threads();
  set_num_threads(1);
  std::vector<std::vector<int32_t>> ids, ordinary;
  for (const std::string& text : texts) {
    ids.push_back(tokenizer().encode(text));
    ordinary.push_back(tokenizer().encode_ordinary(text));
  }
  const std::string trained = Tokenizer::train(texts, 400).to_json();
  for (const int threads : {2, 3, 8}) {
    set_num_threads(threads);
    CAPTURE(threads);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      CHECK(tokenizer().encode(texts[i]) == ids[i]);
      CHECK(tokenizer().encode_ordinary(texts[i]) == ordinary[i]);
    }
    CHECK(Tokenizer::train(texts, 400).to_json() == trained);
  }
  set_num_threads(before);
}

TEST_CASE("tokenizer: invalid bytes neither change nor join the pieces around them") {
  const std::vector<std::string_view> pieces = data::pre_tokenize("the\xff\xfe people\x80");
  CHECK(pieces == std::vector<std::string_view>{"the", "\xff\xfe", " people", "\x80"});
}

TEST_CASE("tokenizer: tokens decode one by one to the bytes of the text") {
  const std::string text = "naïve 🙂 中 <|pad|>";
  std::string joined;
  for (const int32_t id : tokenizer().encode(text)) joined += tokenizer().decode(id);
  CHECK(joined == text);
  CHECK_THROWS_WITH_AS(tokenizer().decode(700), "[decode] token id 700 is outside the vocabulary of 700", Error);
  CHECK_THROWS_AS(tokenizer().decode(-1), Error);
  CHECK_THROWS_AS(tokenizer().decode(std::vector<int32_t>{1, 700}), Error);
}

TEST_CASE("tokenizer: special tokens") {
  CHECK(tokenizer().eos_id() == 0);
  CHECK(tokenizer().special_id("<|pad|>") == 1);
  CHECK(tokenizer().special_id("the") == -1);
  CHECK(tokenizer().is_special(1));
  CHECK(!tokenizer().is_special(2));
  const std::string text = "<|endoftext|>the<|pad|>";
  CHECK(tokenizer().encode(text) == std::vector<int32_t>{0, tokenizer().encode("the").at(0), 1});
  for (const int32_t id : tokenizer().encode_ordinary(text)) CHECK(!tokenizer().is_special(id));

  const std::vector<int32_t> lengths = tokenizer().token_lengths();
  int64_t bytes = 0;
  for (const int32_t id : tokenizer().encode(text)) bytes += lengths[static_cast<std::size_t>(id)];
  CHECK(bytes == 3);  // "the": special tokens stand for no text
}

TEST_CASE("tokenizer: of special tokens that overlap, the leftmost and then the longest counts") {
  const std::vector<std::string> nothing;
  const Tokenizer t = Tokenizer::train(nothing, 300, {.special_tokens = {"<a>", "<a><b>", "a><"}});
  CHECK(t.vocab_size() == 4 + 256);
  CHECK(t.encode("<a><b><a>") == std::vector<int32_t>{2, 1});
  CHECK(t.encode("<a><a") == std::vector<int32_t>{1, t.encode_ordinary("<")[0], t.encode_ordinary("a")[0]});
  CHECK(t.encode("a><b>").front() == 3);
}

TEST_CASE("tokenizer: megabytes without a break take linear time") {
  std::string longs[] = {std::string(1 << 20, 'a'), std::string(1 << 20, ' ') + "x", std::string(1 << 20, '!'),
                         std::string(1 << 20, '\xff'), ""};
  for (int i = 0; i < 1 << 18; ++i) longs[4] += "the ";
  for (const std::string& text : longs) CHECK(tokenizer().decode(tokenizer().encode(text)) == text);
}

TEST_CASE("tokenizer: training on little or nothing") {
  const std::vector<std::string> nothing, little{"abab", ""};
  CHECK(Tokenizer::train(nothing, 1000).vocab_size() == 257);
  const Tokenizer t = Tokenizer::train(little, 1000);
  CHECK(t.vocab_size() == 259);  // ab, abab
  CHECK(t.decode(258) == "abab");
  CHECK(Tokenizer::from_json(t.to_json(), "t").encode("abab") == std::vector<int32_t>{258});
  CHECK(Tokenizer::train(little, 258).vocab_size() == 258);
  CHECK(Tokenizer::train(little, 1000, {.min_frequency = 2}).vocab_size() == 258);
}

TEST_CASE("tokenizer: training refuses impossible options") {
  const std::vector<std::string> texts{"text"};
  const auto contains = [](const char* words) { return doctest::Contains(words); };
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, 256), contains("vocab_size 256 is too small: 257 tokens"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, -1), contains("too small"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, int64_t{1} << 40), contains("too large"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, 300, {.special_tokens = {"word"}}), contains("ordinary text"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, 300, {.special_tokens = {""}}), contains("ordinary text"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::train(texts, 300, {.special_tokens = {"<\xff>"}}), contains("not valid UTF-8"),
                       Error);
}

TEST_CASE("tokenizer: damaged and foreign files are refused, each with its reason") {
  struct Damage {
    std::function<void(json&)> edit;
    const char* reason;
  };
  const Damage damages[] = {
      {[](json& f) { f = json::array(); }, "not a JSON object"},
      {[](json& f) { f.erase("model"); }, "'model' is missing"},
      {[](json& f) { f["model"] = 3; }, "'model' must be of type object"},
      {[](json& f) { f["model"].erase("type"); }, "'type' is missing"},
      {[](json& f) { f["model"]["type"] = "Unigram"; }, "model type 'Unigram' is not supported"},
      {[](json& f) { f["model"]["type"] = "a\nb" + std::string(99, 'x'); }, "model type 'a?bxxx"},
      {[](json& f) { f["model"]["dropout"] = 0.1; }, "dropout is not supported"},
      {[](json& f) { f["model"]["unk_token"] = "<unk>"; }, "unk_token is not supported"},
      {[](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }, "end_of_word_suffix is not supported"},
      {[](json& f) { f["model"]["byte_fallback"] = true; }, "byte_fallback is not supported"},
      {[](json& f) { f["model"]["ignore_merges"] = "yes"; }, "'ignore_merges' is not a boolean"},
      {[](json& f) {
         f["normalizer"] = {{"type", "NFKC"}};
       },
       "normalizer is not supported"},
      {[](json& f) {
         f["normalizer"] = {{"type", "NFC"}};
       },
       "brings texts to Unicode's form NFC first"},
      {[](json& f) { f["truncation"] = json::object(); }, "truncation is not supported"},
      {[](json& f) { f["decoder"]["type"] = "WordPiece"; }, "decoder must be ByteLevel"},
      {[](json& f) { f["decoder"] = nullptr; }, "'decoder' must be of type object"},
      {[](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"}, {"single", json::array()}};
       },
       "post_processor must be"},
      {[](json& f) { f["pre_tokenizer"] = nullptr; }, "'pre_tokenizer' must be of type object"},
      {[](json& f) { f["pre_tokenizer"] = f["pre_tokenizer"]["pretokenizers"][1]; }, "not 'ByteLevel'"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"].erase(0); }, "Sequence of Split and ByteLevel"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+b"; }, "pattern"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; }, "must be isolated"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["invert"] = true; }, "must be isolated"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][1].erase("use_regex"); }, "use_regex = false"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; }, "add_prefix_space"},
      {[](json& f) { f["added_tokens"][0]["content"] = "<|end|>"; }, "no added token <|endoftext|>"},
      {[](json& f) { f["added_tokens"][0]["id"] = 5; }, "another id in the vocabulary"},
      {[](json& f) { f["added_tokens"][0]["id"] = -1; }, "the id of token '<|endoftext|>' is not one of"},
      {[](json& f) { f["added_tokens"][1].erase("id"); }, "added token '<|pad|>' has no id"},
      {[](json& f) { f["added_tokens"][1]["lstrip"] = true; }, "lstrip = true, which is not supported"},
      {[](json& f) { f["added_tokens"][1]["content"] = ""; }, "an added token is empty"},
      {[](json& f) { f["added_tokens"][1]["content"] = "<|new|>"; }, "belongs to the vocabulary"},
      {[](json& f) { f["added_tokens"].push_back(f["added_tokens"][1]); }, "'<|pad|>' is there twice"},
      {[](json& f) { f["added_tokens"].push_back(7); }, "an added token is not an object"},
      {[](json& f) {
         f["added_tokens"].push_back({{"content", "<|x|>"}, {"id", 701}});
       },
       "is not one of 0 to 700"},
      {[](json& f) { f["model"]["vocab"]["the"] = 699; }, "id 699 is given twice"},
      {[](json& f) { f["model"]["vocab"]["the"] = 700; }, "the id of token 'the' is not one of 0 to 699"},
      {[](json& f) { f["model"]["vocab"]["the"] = 1.5; }, "the id of token 'the' is not one of 0 to 699"},
      {[](json& f) { f["model"]["vocab"]["中"] = 700; }, "characters outside the byte alphabet"},
      {[](json& f) { f["model"]["vocab"][""] = 700; }, "characters outside the byte alphabet"},
      {[](json& f) { f["model"]["vocab"].erase("!"); }, "the id of token"},
      {[](json& f) { f["model"]["vocab"] = json::array(); }, "'vocab' must be of type object"},
      {[](json& f) {
         f["model"]["merges"].push_back({"the", "zzz"});
       },
       "names 'zzz', which is not in the vocabulary"},
      {[](json& f) {
         f["model"]["merges"].push_back({"<|pad|>", "a"});
       },
       "names '<|pad|>'"},
      {[](json& f) {
         f["model"]["merges"].push_back({"z", "q"});
       },
       "gives a token that is not in the vocabulary"},
      {[](json& f) { f["model"]["merges"].push_back(f["model"]["merges"][3]); }, "is there twice"},
      {[](json& f) {
         f["model"]["merges"].push_back({"a", "b", "c"});
       },
       "neither a string nor a pair"},
      {[](json& f) { f["model"]["merges"].push_back("ab"); }, "not two tokens with a space between"},
      {[](json& f) { f["model"]["merges"].push_back("a b c"); }, "not two tokens with a space between"},
      {[](json& f) { f["model"].erase("merges"); }, "'merges' is missing"},
  };
  for (const Damage& damage : damages) {
    json file = json::parse(golden_text());
    damage.edit(file);
    CAPTURE(damage.reason);
    try {
      (void)Tokenizer::from_json(file.dump(), "some/tokenizer.json");
      FAIL_CHECK("accepted");
    } catch (const Error& error) {
      const std::string what = error.what();
      CHECK(what.starts_with("[load_tokenizer] some/tokenizer.json: "));
      CHECK(what.find(damage.reason) != std::string::npos);
      CHECK(what.find('\n') == std::string::npos);
      CHECK(what.size() <= 300);
    }
  }
}

TEST_CASE("tokenizer: a byte without a token, in a file otherwise whole, is refused") {
  // Token "!" (byte 33, id 2) becomes the longer "!!!!!": ids stay without a gap, and no merge uses it.
  json file = json::parse(golden_text());
  json& vocab = file["model"]["vocab"];
  vocab["!!!!!!!!!"] = vocab.at("!");
  vocab.erase("!");
  json kept = json::array();
  for (const json& merge : file["model"]["merges"])
    if ((merge[0].get<std::string>() + merge[1].get<std::string>()).find('!') == std::string::npos)
      kept.push_back(merge);
  file["model"]["merges"] = kept;
  CHECK_THROWS_WITH_AS(Tokenizer::from_json(file.dump(), "f"),
                       "[load_tokenizer] f: the vocabulary lacks a token for byte 33", Error);
}

TEST_CASE("tokenizer: what is not JSON is refused") {
  const auto contains = [](const char* words) { return doctest::Contains(words); };
  CHECK_THROWS_WITH_AS(Tokenizer::from_json("", "f"), contains("f: not valid JSON at byte 1"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::from_json("{\"model\": \"\xff\"}", "f"), contains("not valid JSON at byte"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::from_json("{\"a\": 1, \"a\": 2}", "f"), contains("key 'a' is there twice"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::from_json("{\"a\": 1e99999}", "f"), contains("not valid JSON"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::from_json(std::string(1'000'000, '['), "f"), contains("nested deeper"), Error);
  CHECK_THROWS_WITH_AS(Tokenizer::load("/nowhere/t.json"), contains("cannot open /nowhere/t.json: No such file"),
                       Error);
}

TEST_CASE("tokenizer: a file cut short is always refused, one with a changed byte never breaks the reader") {
  const std::string& whole = golden_text();
  for (std::size_t length = 0; length < whole.size(); length += 211)
    CHECK_THROWS_AS(Tokenizer::from_json(std::string_view(whole).substr(0, length), "cut"), Error);

  std::mt19937 draw(5);
  const std::string text = "the people said: naïve \xff";
  int accepted = 0;
  for (int repeat = 0; repeat < 400; ++repeat) {
    std::string file = whole;
    file[draw() % file.size()] = static_cast<char>(draw());
    try {
      const Tokenizer changed = Tokenizer::from_json(file, "changed");
      CHECK(changed.decode(changed.encode(text)) == text);
      ++accepted;
    } catch (const Error&) {
    }
  }
  CHECK(accepted < 400);
}
