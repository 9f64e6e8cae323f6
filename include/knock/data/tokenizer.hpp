#pragma once
// Byte-level byte-pair encoding: text <-> token ids, with training, and Hugging Face's `tokenizer.json` as its file.
//
// Text is first cut into pieces (words with their leading space, single digits, runs of punctuation, white space) by
// the regular expression of Qwen-2. The bytes of a piece are its first symbols; then, again and again, the adjacent
// pair of lowest merge rank becomes one symbol. Training finds the merges: the most frequent pair of the corpus is
// merged until the vocabulary is full (Sennrich et al. 2016; over bytes: Radford et al. 2019).
//
// Same text, same options: the vocabulary, merges and ids are those of the `tokenizers` package (BpeTrainer, Split +
// ByteLevel), ties included. Only characters younger than the Unicode tables of the installed PCRE2 (version 14 in
// PCRE2 10.42) may be cut differently. Every sequence of bytes, valid UTF-8 or not, survives decode(encode(bytes)).
//
//   auto tokenizer = data::Tokenizer::train(documents, 2048);
//   std::vector<int32_t> ids = tokenizer.encode("It is a truth universally acknowledged");
//   tokenizer.save("tokenizer.json");

#include <knock/core/error.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace knock::data {

struct TokenizerOptions {
  int64_t min_frequency = 0;                     ///< pairs seen less often are not merged
  std::vector<std::string> special_tokens = {};  ///< besides `<|endoftext|>`, which is always there, with id 0
};

/// The pieces of `text` within which merges happen, in order; together they are `text`. The regular expression sees
/// the valid UTF-8 stretches; bytes between them form pieces of their own.
std::vector<std::string_view> pre_tokenize(std::string_view text);

/// A byte-level BPE vocabulary. Immutable, so it may be used from many threads; copies are independent.
class Tokenizer {
 public:
  static constexpr std::string_view end_of_text = "<|endoftext|>";

  /// Learns a vocabulary of `vocab_size` tokens: the special tokens, the 256 bytes, then one token for each merge.
  /// A text too small for that many merges gives a smaller vocabulary: read `vocab_size()`.
  static Tokenizer train(std::span<const std::string> texts, int64_t vocab_size, const TokenizerOptions& options = {});

  /// Reads a `tokenizer.json`. Anything this class would not reproduce exactly (another model, normaliser or
  /// pre-tokenizer), and any damage, is an `Error` that names the file and what is wrong with it. `assume_nfc` says
  /// that texts will be in Unicode's form NFC: then a tokenizer is taken that would first bring them there.
  static Tokenizer load(const std::string& path, bool assume_nfc = false);
  /// The same from text in memory; `name` stands for the file in errors.
  static Tokenizer from_json(std::string_view json, std::string_view name, bool assume_nfc = false);

  /// Writes a `tokenizer.json` (atomically), byte for byte as the `tokenizers` package writes it.
  void save(const std::string& path) const;
  std::string to_json() const;

  /// Token ids of a text. Special tokens written out in it become their ids, as in the `tokenizers` package.
  std::vector<int32_t> encode(std::string_view text) const;
  /// Token ids of a text in which special tokens mean nothing: what untrusted text and training corpora need.
  std::vector<int32_t> encode_ordinary(std::string_view text) const;

  /// The bytes of the tokens, special tokens written out. Throws when an id is outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;
  /// The bytes of one token. They may be part of a character: a stream of them joins to the decoded text.
  std::string_view decode(int32_t id) const;

  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }
  /// Id of `<|endoftext|>`, which separates documents.
  int32_t eos_id() const { return eos_id_; }
  bool is_special(int32_t id) const;
  /// Id of a special token, or -1.
  int32_t special_id(std::string_view token) const;
  /// Bytes of text each id stands for, 0 for special tokens: turns losses into bits per byte.
  std::vector<int32_t> token_lengths() const;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;  // of the merged token
  };
  class Encoder;
  class Trainer;
  class Reader;

  Tokenizer() = default;
  void encode_pieces(std::string_view text, std::vector<int32_t>& ids) const;
  void encode_stretch(std::string_view text, std::vector<int32_t>& ids) const;
  void index();

  std::vector<std::string> tokens_;                  // bytes of each id
  std::vector<int32_t> specials_;                    // ids of the special tokens, ascending
  std::vector<std::pair<int32_t, int32_t>> merges_;  // by rank
  std::unordered_map<uint64_t, Merge> merge_of_;     // of a pair of ids, packed
  std::vector<int32_t> byte_id_;                     // of each of the 256 bytes
  int64_t model_size_ = 0;  // ids below are in the BPE vocabulary, the others only added tokens
  int32_t eos_id_ = -1;
};

}  // namespace knock::data

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_DATA_TOKENIZER)

#include <knock/core/parallel.hpp>
#include <knock/data/utf8.hpp>
#include <knock/io/file.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <set>
#include <utility>

#include <nlohmann/json.hpp>

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

namespace knock::data {
namespace detail {

// ---- pre-tokenizer
// ---------------------------------------------------------------------------------------------------

inline constexpr const char* qwen2_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// The same, as compiled: `tokenizers` takes \s to be the White_Space of Unicode, while PCRE2's also has U+180E.
inline constexpr const char* compiled_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\t-\r\x{85}\p{Z}\p{L}\p{N}]+[\r\n]*|)"
    R"([\t-\r\x{85}\p{Z}]*[\r\n]+|[\t-\r\x{85}\p{Z}]+(?![^\t-\r\x{85}\p{Z}])|[\t-\r\x{85}\p{Z}]+)";

/// The compiled pattern: shared by all threads, compiled at first use.
class Splitter {
 public:
  Splitter() {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(compiled_pattern), PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    check(code_ != nullptr, "tokenizer", "PCRE2 refuses the pre-tokenizer's pattern: error ", error, " at ", offset);
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, the interpreter does the same work
  }

  /// Calls `piece(std::string_view)` for each piece of `text`.
  template <class Piece>
  void operator()(std::string_view text, Piece&& piece) const {
    const std::unique_ptr<pcre2_match_data, Free> match(pcre2_match_data_create(1, nullptr));
    check(match != nullptr, "tokenizer", "out of memory");
    while (!text.empty()) {
      const std::size_t valid = utf8_valid_prefix(text);
      split_valid(text.substr(0, valid), match.get(), piece);
      std::size_t invalid = valid;
      while (invalid < text.size() && utf8_character(text, invalid) == 0) ++invalid;
      if (invalid > valid) piece(text.substr(valid, invalid - valid));
      text.remove_prefix(invalid);
    }
  }

 private:
  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  };

  template <class Piece>
  void split_valid(std::string_view text, pcre2_match_data* match, Piece&& piece) const {
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(match);
    std::size_t at = 0;
    while (at < text.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                    PCRE2_NO_UTF_CHECK, match, nullptr);
      check(found > 0 || found == PCRE2_ERROR_NOMATCH, "tokenizer", "PCRE2 error ", found, " while splitting text");
      if (found < 0) break;
      if (bounds[0] > at) piece(text.substr(at, bounds[0] - at));
      piece(text.substr(bounds[0], bounds[1] - bounds[0]));
      at = bounds[1];
    }
    if (at < text.size()) piece(text.substr(at));
  }

  std::unique_ptr<pcre2_code, Free> code_;
};

inline const Splitter& splitter() {
  static const Splitter instance;
  return instance;
}

/// The text in one stretch for each thread, as far as it is long enough; the pieces of the stretches are those of the
/// text. It is cut behind a line feed that a visible ASCII character follows: behind a line feed no alternative of the
/// pattern goes on with anything but white space, and none looks back.
inline std::vector<std::string_view> stretches(std::string_view text) {
  constexpr std::size_t least = std::size_t{1} << 15;
  const auto wanted = static_cast<std::size_t>(num_threads());
  const std::size_t length = std::max(text.size() / wanted + 1, least);
  std::vector<std::string_view> out;
  while (text.size() > length) {
    std::size_t cut = length;
    while (cut < text.size() && !(text[cut - 1] == '\n' && text[cut] > ' ' && text[cut] <= '~')) ++cut;
    out.push_back(text.substr(0, cut));
    text.remove_prefix(cut);
  }
  if (!text.empty()) out.push_back(text);
  return out;
}

// ---- the byte alphabet of tokenizer.json ---------------------------------------------------------------------------
// A token is written as one character for each of its bytes: the printable ones of Latin-1 stand for themselves, the
// other 68 bytes, in order, are U+0100 to U+0143 (GPT-2's bytes_to_unicode).

inline constexpr bool prints_as_itself(int byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

struct ByteAlphabet {
  std::array<uint16_t, 256> character{};  // of a byte
  std::array<int16_t, 0x144> byte{};      // of a character, -1 where there is none
  std::array<uint8_t, 256> in_order{};    // the bytes by ascending character

  constexpr ByteAlphabet() {
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const int code = prints_as_itself(b) ? b : next++;
      character[static_cast<std::size_t>(b)] = static_cast<uint16_t>(code);
    }
    for (auto& b : byte) b = -1;
    for (int b = 0; b < 256; ++b) byte[character[static_cast<std::size_t>(b)]] = static_cast<int16_t>(b);
    std::size_t n = 0;
    for (const int16_t b : byte)
      if (b >= 0) in_order[n++] = static_cast<uint8_t>(b);
  }
};
inline constexpr ByteAlphabet byte_alphabet;

/// The bytes of a token in the spelling of tokenizer.json (UTF-8).
inline std::string spelled(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    const unsigned code = byte_alphabet.character[static_cast<unsigned char>(c)];
    if (code < 0x80) {
      out.push_back(static_cast<char>(code));
    } else {
      out.push_back(static_cast<char>(0xc0 | (code >> 6)));
      out.push_back(static_cast<char>(0x80 | (code & 0x3f)));
    }
  }
  return out;
}

/// The inverse of `spelled`; false when a character is not of the alphabet. `token` is valid UTF-8.
inline bool unspell(std::string_view token, std::string& bytes) {
  bytes.clear();
  for (std::size_t i = 0; i < token.size();) {
    unsigned code = static_cast<unsigned char>(token[i++]);
    if (code >= 0xe0) return false;
    if (code >= 0xc0) code = ((code & 0x1f) << 6) | (static_cast<unsigned char>(token[i++]) & 0x3f);
    if (code >= byte_alphabet.byte.size() || byte_alphabet.byte[code] < 0) return false;
    bytes.push_back(static_cast<char>(byte_alphabet.byte[code]));
  }
  return true;
}

inline uint64_t pack(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

}  // namespace detail

KNOCK_FUNC std::vector<std::string_view> pre_tokenize(std::string_view text) {
  std::vector<std::string_view> pieces;
  detail::splitter()(text, [&](std::string_view piece) { pieces.push_back(piece); });
  return pieces;
}

// ---- encoding ------------------------------------------------------------------------------------------------------

/// Merges the symbols of one piece. A heap holds the mergeable pairs, lowest rank first, then leftmost; symbols are a
/// doubly linked list, so a piece of n bytes takes O(n log n) even when it is a megabyte of one letter.
class Tokenizer::Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void operator()(std::string_view piece, std::vector<int32_t>& ids) {
    start(piece);
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      const Candidate top = heap_.back();
      heap_.pop_back();
      Symbol& left = symbols_[static_cast<std::size_t>(top.at)];
      if (left.id < 0 || left.next < 0) continue;
      const Symbol right = symbols_[static_cast<std::size_t>(left.next)];
      const Merge* merge = find(left.id, right.id);
      if (merge == nullptr || merge->id != top.id) continue;  // one of the two has been merged since
      symbols_[static_cast<std::size_t>(left.next)].id = -1;
      left.id = top.id;
      left.next = right.next;
      if (right.next >= 0) {
        symbols_[static_cast<std::size_t>(right.next)].previous = top.at;
        propose(top.at);
      }
      if (left.previous >= 0) propose(left.previous);
    }
    for (const Symbol& symbol : symbols_)
      if (symbol.id >= 0) ids.push_back(symbol.id);
  }

 private:
  struct Symbol {
    int32_t id;  // -1: merged into the symbol before
    int64_t previous, next;
  };
  struct Candidate {
    int32_t rank, id;
    int64_t at;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };

  void start(std::string_view piece) {
    symbols_.clear();
    heap_.clear();
    const int64_t n = static_cast<int64_t>(piece.size());
    for (int64_t i = 0; i < n; ++i) {
      const auto byte = static_cast<unsigned char>(piece[static_cast<std::size_t>(i)]);
      symbols_.push_back({tokenizer_.byte_id_[byte], i - 1, i + 1 < n ? i + 1 : -1});
    }
    for (int64_t i = 0; i + 1 < n; ++i) propose(i);
  }

  const Merge* find(int32_t left, int32_t right) const {
    const auto found = tokenizer_.merge_of_.find(detail::pack(left, right));
    return found == tokenizer_.merge_of_.end() ? nullptr : &found->second;
  }

  void propose(int64_t at) {
    const Symbol& left = symbols_[static_cast<std::size_t>(at)];
    const Merge* merge = find(left.id, symbols_[static_cast<std::size_t>(left.next)].id);
    if (merge == nullptr) return;
    heap_.push_back({merge->rank, merge->id, at});
    std::push_heap(heap_.begin(), heap_.end());
  }

  const Tokenizer& tokenizer_;
  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
};

KNOCK_FUNC std::vector<int32_t> Tokenizer::encode_ordinary(std::string_view text) const {
  std::vector<int32_t> ids;
  encode_pieces(text, ids);
  return ids;
}

/// Appends the ids of a text without special tokens.
KNOCK_FUNC void Tokenizer::encode_pieces(std::string_view text, std::vector<int32_t>& ids) const {
  const std::vector<std::string_view> parts = detail::stretches(text);
  if (parts.size() < 2) return encode_stretch(text, ids);
  std::vector<std::vector<int32_t>> found(parts.size());
  parallel_tasks(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const auto part = static_cast<std::size_t>(i);
    encode_stretch(parts[part], found[part]);
  });
  for (const auto& part : found) ids.insert(ids.end(), part.begin(), part.end());
}

KNOCK_FUNC void Tokenizer::encode_stretch(std::string_view text, std::vector<int32_t>& ids) const {
  // Most pieces occur many times: a piece seen before is copied from where its ids stand in the output.
  struct Seen {
    std::size_t begin, count;
  };
  constexpr std::size_t longest = 64, most = std::size_t{1} << 20;  // what is worth remembering
  std::unordered_map<std::string_view, Seen> seen;
  Encoder merge(*this);
  detail::splitter()(text, [&](std::string_view piece) {
    if (piece.size() == 1) {
      ids.push_back(byte_id_[static_cast<unsigned char>(piece[0])]);
      return;
    }
    const auto found = piece.size() <= longest ? seen.find(piece) : seen.end();
    if (found != seen.end()) {
      const Seen where = found->second;
      for (std::size_t i = 0; i < where.count; ++i) ids.push_back(ids[where.begin + i]);
      return;
    }
    const std::size_t begin = ids.size();
    merge(piece, ids);
    if (piece.size() <= longest && seen.size() < most) seen.emplace(piece, Seen{begin, ids.size() - begin});
  });
}

KNOCK_FUNC std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  // Special tokens are cut out first: the leftmost, and of those that start there the longest.
  std::vector<int32_t> ids;
  std::vector<std::size_t> next(specials_.size(), 0);  // where each occurs next
  std::size_t at = 0;
  while (at < text.size()) {
    std::size_t begin = std::string_view::npos, best = 0;
    for (std::size_t i = 0; i < specials_.size(); ++i) {
      const std::string& token = tokens_[static_cast<std::size_t>(specials_[i])];
      if (next[i] != std::string_view::npos && (next[i] < at || at == 0)) next[i] = text.find(token, at);
      const bool better = next[i] < begin || (next[i] == begin && begin != std::string_view::npos &&
                                              token.size() > tokens_[static_cast<std::size_t>(specials_[best])].size());
      if (better) {
        begin = next[i];
        best = i;
      }
    }
    const std::size_t end = std::min(begin, text.size());
    encode_pieces(text.substr(at, end - at), ids);
    if (begin == std::string_view::npos) break;
    ids.push_back(specials_[best]);
    at = begin + tokens_[static_cast<std::size_t>(specials_[best])].size();
  }
  return ids;
}

// ---- decoding and look-up ------------------------------------------------------------------------------------------

KNOCK_FUNC std::string_view Tokenizer::decode(int32_t id) const {
  check(id >= 0 && id < vocab_size(), "decode", "token id ", id, " is outside the vocabulary of ", vocab_size());
  return tokens_[static_cast<std::size_t>(id)];
}

KNOCK_FUNC std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string bytes;
  for (const int32_t id : ids) bytes += decode(id);
  return bytes;
}

KNOCK_FUNC bool Tokenizer::is_special(int32_t id) const {
  return std::binary_search(specials_.begin(), specials_.end(), id);
}

KNOCK_FUNC int32_t Tokenizer::special_id(std::string_view token) const {
  for (const int32_t id : specials_)
    if (tokens_[static_cast<std::size_t>(id)] == token) return id;
  return -1;
}

KNOCK_FUNC std::vector<int32_t> Tokenizer::token_lengths() const {
  std::vector<int32_t> lengths;
  for (const std::string& token : tokens_) lengths.push_back(static_cast<int32_t>(token.size()));
  for (const int32_t id : specials_) lengths[static_cast<std::size_t>(id)] = 0;
  return lengths;
}

/// Derives what encoding needs from tokens_, specials_ and merges_.
KNOCK_FUNC void Tokenizer::index() {
  std::sort(specials_.begin(), specials_.end());
  eos_id_ = special_id(end_of_text);
  std::unordered_map<std::string_view, int32_t> id_of;
  for (int32_t id = 0; id < vocab_size(); ++id)
    if (!is_special(id)) id_of.emplace(tokens_[static_cast<std::size_t>(id)], id);
  byte_id_.assign(256, -1);
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    const auto found = id_of.find(std::string_view(&byte, 1));
    if (found != id_of.end()) byte_id_[static_cast<std::size_t>(b)] = found->second;
  }
  merge_of_.reserve(merges_.size());
  std::string joined;
  for (std::size_t rank = 0; rank < merges_.size(); ++rank) {
    const auto [left, right] = merges_[rank];
    joined.assign(tokens_[static_cast<std::size_t>(left)]).append(tokens_[static_cast<std::size_t>(right)]);
    merge_of_.emplace(detail::pack(left, right), Merge{static_cast<int32_t>(rank), id_of.at(joined)});
  }
}

// ---- training ------------------------------------------------------------------------------------------------------

/// Counts pairs over the distinct pieces once, then keeps the counts up to date: a merge touches only the pieces that
/// hold its pair. The heap's entries may be out of date; one is corrected and put back when it comes up.
class Tokenizer::Trainer {
 public:
  Trainer(std::span<const std::string> texts, int64_t vocab_size, const TokenizerOptions& options)
      : vocab_size_(vocab_size), min_frequency_(std::max<int64_t>(options.min_frequency, 1)) {
    add_special(std::string(end_of_text));
    for (const std::string& token : options.special_tokens) add_special(token);
    for (const uint8_t byte : detail::byte_alphabet.in_order) add_token(std::string(1, static_cast<char>(byte)));
    check(vocab_size >= tokenizer_.vocab_size(), "train_tokenizer", "vocab_size ", vocab_size,
          " is too small: ", tokenizer_.vocab_size(), " tokens are needed for the 256 bytes and the special tokens");
    check(vocab_size <= max_vocab_size, "train_tokenizer", "vocab_size ", vocab_size, " is too large: at most ",
          max_vocab_size);
    read_words(texts);
    count_pairs();
  }

  Tokenizer run() {
    while (tokenizer_.vocab_size() < vocab_size_ && !heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      Candidate top = std::move(heap_.back());
      heap_.pop_back();
      const int64_t count = pairs_.at(top.pair);
      if (top.count != count) {
        top.count = count;
        push(std::move(top));
        continue;
      }
      if (count < min_frequency_) break;
      const auto left = static_cast<int32_t>(top.pair >> 32), right = static_cast<int32_t>(top.pair & 0xffffffff);
      const int32_t merged = add_token(tokenizer_.tokens_[static_cast<std::size_t>(left)] +
                                       tokenizer_.tokens_[static_cast<std::size_t>(right)]);
      tokenizer_.merges_.emplace_back(left, right);
      for (const int64_t word : top.words) merge_in(word, left, right, merged);
      push_new_pairs();
    }
    tokenizer_.model_size_ = tokenizer_.vocab_size();
    tokenizer_.index();
    return std::move(tokenizer_);
  }

 private:
  static constexpr int64_t max_vocab_size = int64_t{1} << 22;

  struct Word {
    std::size_t begin, length;  // its symbols in symbols_
    int64_t count;
  };
  struct Candidate {
    int64_t count;
    uint64_t pair;
    std::vector<int64_t> words;                     // that hold the pair
    bool operator<(const Candidate& other) const {  // equal counts: the pair of lower ids comes first
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  void add_special(std::string token) {
    check(utf8_valid_prefix(token) == token.size(), "train_tokenizer", "a special token is not valid UTF-8");
    check(pre_tokenize(token).size() > 1, "train_tokenizer", "special token '", token,
          "' could also come from ordinary text: write it like <|name|>");
    if (ids_.count(token) == 0) tokenizer_.specials_.push_back(add_token(std::move(token)));
  }

  /// Id of a token, which joins the vocabulary if it is not yet there.
  int32_t add_token(std::string token) {
    const auto [entry, is_new] = ids_.emplace(token, static_cast<int32_t>(tokenizer_.tokens_.size()));
    if (is_new) tokenizer_.tokens_.push_back(std::move(token));
    return entry->second;
  }

  /// Counts the distinct pieces: each stretch by itself, then all together in the order of the text.
  void read_words(std::span<const std::string> texts) {
    struct Counts {
      std::vector<std::pair<std::string_view, int64_t>> words;  // in the order in which they come first
      std::unordered_map<std::string_view, std::size_t> index;

      void add(std::string_view word, int64_t count) {
        const auto [entry, is_new] = index.emplace(word, words.size());
        if (is_new) words.emplace_back(word, 0);
        words[entry->second].second += count;
      }
    };
    std::vector<std::string_view> parts;
    for (const std::string& text : texts)
      for (const std::string_view part : detail::stretches(text)) parts.push_back(part);
    std::vector<Counts> counts(parts.size());
    parallel_tasks(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      const auto part = static_cast<std::size_t>(i);
      detail::splitter()(parts[part], [&](std::string_view piece) { counts[part].add(piece, 1); });
    });
    Counts all;
    for (const Counts& part : counts)
      for (const auto& [word, count] : part.words) all.add(word, count);
    for (const auto& [word, count] : all.words) {
      words_.push_back({symbols_.size(), word.size(), count});
      for (const char byte : word) symbols_.push_back(ids_.at(std::string(1, byte)));
    }
  }

  void count_pairs() {
    for (std::size_t w = 0; w < words_.size(); ++w) {
      const Word& word = words_[w];
      for (std::size_t i = word.begin; i + 1 < word.begin + word.length; ++i)
        add_pair(detail::pack(symbols_[i], symbols_[i + 1]), static_cast<int64_t>(w));
    }
    push_new_pairs();
  }

  void add_pair(uint64_t pair, int64_t word) {
    pairs_[pair] += words_[static_cast<std::size_t>(word)].count;
    std::vector<int64_t>& words = new_pairs_[pair];
    if (words.empty() || words.back() != word) words.push_back(word);
  }

  void push_new_pairs() {
    for (auto& [pair, words] : new_pairs_) {
      const int64_t count = pairs_.at(pair);
      if (count > 0) push({count, pair, std::move(words)});
    }
    new_pairs_.clear();
  }

  void push(Candidate candidate) {
    heap_.push_back(std::move(candidate));
    std::push_heap(heap_.begin(), heap_.end());
  }

  void merge_in(int64_t index, int32_t left, int32_t right, int32_t merged) {
    Word& word = words_[static_cast<std::size_t>(index)];
    int32_t* symbols = symbols_.data() + word.begin;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < word.length; ++i) {
      if (symbols[i] != left || i + 1 == word.length || symbols[i + 1] != right) {
        symbols[kept++] = symbols[i];
        continue;
      }
      if (kept > 0) {
        pairs_[detail::pack(symbols[kept - 1], left)] -= word.count;
        add_pair(detail::pack(symbols[kept - 1], merged), index);
      }
      if (i + 2 < word.length) {
        pairs_[detail::pack(right, symbols[i + 2])] -= word.count;
        add_pair(detail::pack(merged, symbols[i + 2]), index);
      }
      symbols[kept++] = merged;
      ++i;
    }
    word.length = kept;
  }

  Tokenizer tokenizer_;
  int64_t vocab_size_, min_frequency_;
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<int32_t> symbols_;  // of all words, one after the other
  std::vector<Word> words_;
  std::unordered_map<uint64_t, int64_t> pairs_;                   // how often each pair occurs
  std::unordered_map<uint64_t, std::vector<int64_t>> new_pairs_;  // not yet in the heap
  std::vector<Candidate> heap_;
};

KNOCK_FUNC Tokenizer Tokenizer::train(std::span<const std::string> texts, int64_t vocab_size,
                                      const TokenizerOptions& options) {
  return Trainer(texts, vocab_size, options).run();
}

// ---- tokenizer.json ------------------------------------------------------------------------------------------------

/// Checks a parsed tokenizer.json part by part and builds the tokenizer from it.
class Tokenizer::Reader {
 public:
  using Json = nlohmann::json;

  Reader(std::string_view name, bool assume_nfc) : name_(name), assume_nfc_(assume_nfc) {}

  Tokenizer read(std::string_view json) {
    const Json root = parse(json);
    require(root.is_object(), "the file is not a JSON object");
    check_normalizer(root);
    for (const char* key : {"truncation", "padding"})
      require(is_null(root, key), key, " is not supported: it must be null");
    check_pre_tokenizer(member(root, "pre_tokenizer", Json::value_t::object));
    require(type_of(member(root, "decoder", Json::value_t::object)) == "ByteLevel", "decoder must be ByteLevel");
    if (!is_null(root, "post_processor")) check_post_processor(member(root, "post_processor", Json::value_t::object));
    const Json& model = member(root, "model", Json::value_t::object);
    check_model(model);
    const Json& added = member(root, "added_tokens", Json::value_t::array);
    const Json& vocab = member(model, "vocab", Json::value_t::object);
    require(vocab.size() + added.size() <= max_tokens, "more than ", max_tokens, " tokens");
    read_added(added);
    read_vocab(vocab, added.size());
    read_merges(member(model, "merges", Json::value_t::array));
    tokenizer_.index();
    check_bytes();
    return std::move(tokenizer_);
  }

 private:
  static constexpr std::size_t max_tokens = std::size_t{1} << 22, max_depth = 16;

  template <class... Pieces>
  void require(bool condition, const Pieces&... pieces) const {
    if (!condition) fail("load_tokenizer", name_, ": ", pieces...);
  }

  /// A string of the file, shortened, without control characters: fit for an error of one line.
  static std::string quoted(std::string_view text) {
    std::string out = "'";
    std::size_t i = 0;
    while (i < text.size() && i < 40) {
      const std::size_t length = utf8_character(text, i);
      const bool control = static_cast<unsigned char>(text[i]) < 0x20 || text[i] == 0x7f;
      out.append(control ? std::string_view("?") : text.substr(i, length));
      i += length;
    }
    return out + (i < text.size() ? "...'" : "'");
  }

  Json parse(std::string_view json) const {
    std::vector<std::set<std::string>> keys;  // seen in the objects that are open
    const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
      require(depth <= static_cast<int>(max_depth), "nested deeper than ", max_depth, " levels");
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key) {
        const std::string& key = value.template get_ref<const std::string&>();
        require(keys.back().insert(key).second, "key ", quoted(key), " is there twice");
      }
      return true;
    };
    try {
      return Json::parse(json.begin(), json.end(), watch);
    } catch (const Json::parse_error& error) {
      fail("load_tokenizer", name_, ": not valid JSON at byte ", error.byte);
    } catch (const Json::exception&) {  // a number that no type can hold
      fail("load_tokenizer", name_, ": not valid JSON");
    }
  }

  static bool is_null(const Json& object, const char* key) {
    const auto found = object.find(key);
    return found == object.end() || found->is_null();
  }

  const Json& member(const Json& object, const char* key, Json::value_t type) const {
    const auto found = object.find(key);
    require(found != object.end(), "'", key, "' is missing");
    require(found->type() == type, "'", key, "' must be of type ", Json(type).type_name());
    return *found;
  }

  std::string type_of(const Json& object) const {
    return member(object, "type", Json::value_t::string).get<std::string>();
  }

  bool flag(const Json& object, const char* key) const {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null()) return false;
    require(found->is_boolean(), "'", key, "' is not a boolean");
    return found->get<bool>();
  }

  void check_normalizer(const Json& root) const {
    if (is_null(root, "normalizer")) return;
    const bool nfc = type_of(member(root, "normalizer", Json::value_t::object)) == "NFC";
    require(nfc, "normalizer is not supported: it must be null");
    require(assume_nfc_,
            "brings texts to Unicode's form NFC first, which is not done here; assume-nfc takes them as "
            "they are (most texts are NFC)");
  }

  void check_pre_tokenizer(const Json& part) const {
    require(type_of(part) == "Sequence", "pre_tokenizer must be a Sequence of Split and ByteLevel, not ",
            quoted(type_of(part)));
    const Json& steps = member(part, "pretokenizers", Json::value_t::array);
    require(steps.size() == 2 && steps[0].is_object() && steps[1].is_object() && type_of(steps[0]) == "Split" &&
                type_of(steps[1]) == "ByteLevel",
            "pre_tokenizer must be a Sequence of Split and ByteLevel");
    const Json& pattern = member(steps[0], "pattern", Json::value_t::object);
    require(member(pattern, "Regex", Json::value_t::string).get_ref<const std::string&>() == detail::qwen2_pattern,
            "the pattern of the pre_tokenizer is not that of Qwen-2");
    require(member(steps[0], "behavior", Json::value_t::string) == "Isolated" && !flag(steps[0], "invert"),
            "the Split of the pre_tokenizer must be isolated and not inverted");
    require(!flag(steps[1], "add_prefix_space"), "add_prefix_space is not supported");
    // Absent means true here.
    require(steps[1].contains("use_regex") && !flag(steps[1], "use_regex"), "ByteLevel must have use_regex = false");
  }

  /// One that adds no tokens to a text.
  void check_post_processor(const Json& part) const {
    const Json text_alone = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
    const bool adds_nothing = type_of(part) == "TemplateProcessing" &&
                              member(part, "single", Json::value_t::array) == Json::array({text_alone});
    require(adds_nothing || type_of(part) == "ByteLevel",
            "post_processor must be null, ByteLevel, or a template that adds no tokens");
  }

  void check_model(const Json& model) const {
    require(type_of(model) == "BPE", "model type ", quoted(type_of(model)), " is not supported: it must be BPE");
    for (const char* key : {"dropout", "unk_token"}) require(is_null(model, key), key, " is not supported");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      require(is_null(model, key) || member(model, key, Json::value_t::string).get_ref<const std::string&>().empty(),
              key, " is not supported");
    for (const char* key : {"fuse_unk", "byte_fallback", "ignore_merges"})
      require(!flag(model, key), key, " is not supported");
  }

  int32_t id_of(const Json& value, std::size_t limit, std::string_view token) const {
    require(value.is_number_unsigned() && value.get<uint64_t>() < limit, "the id of token ", quoted(token),
            " is not one of 0 to ", limit - 1);
    return value.get<int32_t>();
  }

  void read_added(const Json& added) {
    for (const Json& entry : added) {
      require(entry.is_object(), "an added token is not an object");
      const std::string& content = member(entry, "content", Json::value_t::string).get_ref<const std::string&>();
      require(!content.empty(), "an added token is empty");
      for (const char* key : {"single_word", "lstrip", "rstrip", "normalized"})
        require(!flag(entry, key), "added token ", quoted(content), " has ", key, " = true, which is not supported");
      const auto found = entry.find("id");
      require(found != entry.end(), "added token ", quoted(content), " has no id");
      require(added_.emplace(content, id_of(*found, max_tokens, content)).second, "added token ", quoted(content),
              " is there twice");
    }
    require(added_.count(std::string(end_of_text)) == 1, "there is no added token ", end_of_text);
  }

  void read_vocab(const Json& vocab, std::size_t added) {
    std::size_t size = vocab.size();
    for (const auto& [token, id] : added_) size += vocab.contains(token) ? 0 : 1;
    require(added <= size, "an added token is there twice");
    std::vector<char> taken(size, 0);
    tokenizer_.tokens_.resize(size);
    const auto place = [&](const std::string& token, int32_t id, std::string bytes) {
      require(taken[static_cast<std::size_t>(id)] == 0, "id ", id, " is given twice, the second time to ",
              quoted(token));
      taken[static_cast<std::size_t>(id)] = 1;
      tokenizer_.tokens_[static_cast<std::size_t>(id)] = std::move(bytes);
    };
    std::string bytes;
    for (const auto& [token, value] : vocab.items()) {
      const int32_t id = id_of(value, size, token);
      const auto special = added_.find(token);
      if (special == added_.end()) {
        require(!token.empty() && detail::unspell(token, bytes), "token ", quoted(token),
                " has characters outside the byte alphabet");
        place(token, id, bytes);
        ids_.emplace(token, id);
      } else {
        require(special->second == id, "added token ", quoted(token), " has another id in the vocabulary");
        place(token, id, token);
      }
    }
    for (const auto& [token, id] : added_) {
      require(static_cast<std::size_t>(id) < size, "the id of token ", quoted(token), " is not one of 0 to ", size - 1);
      if (!vocab.contains(token)) {
        require(static_cast<std::size_t>(id) >= vocab.size(), "id ", id, " of added token ", quoted(token),
                " belongs to the vocabulary");
        place(token, id, token);
      }
      tokenizer_.specials_.push_back(id);
    }
    tokenizer_.model_size_ = static_cast<int64_t>(vocab.size());
  }

  void read_merges(const Json& merges) {
    require(merges.size() <= max_tokens, "more than ", max_tokens, " merges");
    std::set<std::pair<int32_t, int32_t>> seen;
    for (const Json& entry : merges) {
      const auto [left, right] = sides(entry);
      const std::pair<int32_t, int32_t> pair{merge_side(left), merge_side(right)};
      require(ids_.count(left + right) == 1, "merge of ", quoted(left), " and ", quoted(right),
              " gives a token that is not in the vocabulary");
      require(seen.insert(pair).second, "the merge of ", quoted(left), " and ", quoted(right), " is there twice");
      tokenizer_.merges_.push_back(pair);
    }
  }

  std::pair<std::string, std::string> sides(const Json& entry) const {
    if (entry.is_string()) {
      const std::string& both = entry.get_ref<const std::string&>();
      const std::size_t space = both.find(' ');
      require(space != std::string::npos && both.find(' ', space + 1) == std::string::npos, "merge ", quoted(both),
              " is not two tokens with a space between them");
      return {both.substr(0, space), both.substr(space + 1)};
    }
    require(entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string(),
            "a merge is neither a string nor a pair of strings");
    return {entry[0].get<std::string>(), entry[1].get<std::string>()};
  }

  int32_t merge_side(const std::string& token) const {
    const auto found = ids_.find(token);
    require(found != ids_.end(), "a merge names ", quoted(token), ", which is not in the vocabulary");
    return found->second;
  }

  void check_bytes() const {
    for (std::size_t b = 0; b < 256; ++b)
      require(tokenizer_.byte_id_[b] >= 0, "the vocabulary lacks a token for byte ", static_cast<int>(b));
  }

  std::string name_;
  bool assume_nfc_;
  Tokenizer tokenizer_;
  std::unordered_map<std::string, int32_t> added_;  // content -> id
  std::unordered_map<std::string, int32_t> ids_;    // spelling -> id, without the special tokens
};

KNOCK_FUNC Tokenizer Tokenizer::from_json(std::string_view json, std::string_view name, bool assume_nfc) {
  return Reader(name, assume_nfc).read(json);
}

KNOCK_FUNC Tokenizer Tokenizer::load(const std::string& path, bool assume_nfc) {
  constexpr int64_t max_bytes = int64_t{1} << 28;
  return from_json(io::read_file(path, max_bytes), path, assume_nfc);
}

KNOCK_FUNC void Tokenizer::save(const std::string& path) const { io::write_file(path, to_json()); }

KNOCK_FUNC std::string Tokenizer::to_json() const {
  using Json = nlohmann::ordered_json;
  const auto spelling = [&](int32_t id) {
    const std::string& token = tokens_[static_cast<std::size_t>(id)];
    return is_special(id) ? token : detail::spelled(token);
  };
  const auto byte_level = [](bool add_prefix_space, bool use_regex) {
    return Json{{"type", "ByteLevel"},
                {"add_prefix_space", add_prefix_space},
                {"trim_offsets", true},
                {"use_regex", use_regex}};
  };
  Json added = Json::array();
  for (const int32_t id : specials_)
    added.push_back({{"id", id},
                     {"content", spelling(id)},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  const Json split = {
      {"type", "Split"}, {"pattern", {{"Regex", detail::qwen2_pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
  Json vocab = Json::object();
  auto& entries = vocab.get_ref<Json::object_t&>();
  for (int32_t id = 0; id < model_size_; ++id)  // the vector underneath: the map's own insertion searches all of it
    entries.Json::object_t::Container::emplace_back(spelling(id), id);
  Json merges = Json::array();
  for (const auto& [left, right] : merges_) merges.push_back(Json::array({spelling(left), spelling(right)}));
  const Json root = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", std::move(added)},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", Json::array({split, byte_level(false, false)})}}},
      {"post_processor", nullptr},
      {"decoder", byte_level(true, true)},  // of a decoder, only the type has a meaning
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", false},
        {"vocab", std::move(vocab)},
        {"merges", std::move(merges)}}}};
  return root.dump(2);
}

}  // namespace knock::data

#endif
