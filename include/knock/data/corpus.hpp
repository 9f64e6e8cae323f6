#pragma once
// A user's text: one file or a folder of .txt files, checked to be text, and split into training and validation parts.
//
//   folder with train/ and valid/ in it   they are the split
//   folder with several .txt files        whole documents are held out, the last ones by name
//   one file                              its tail is held out
//
// Sub-folders are read too; files are ordered by their path in bytes, so the split is the same everywhere.

#include <knock/core/error.hpp>
#include <knock/data/tokenizer.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace knock::data {

/// Texts with where they came from. `names[i]` belongs to `texts[i]`.
struct Documents {
  std::vector<std::string> names;
  std::vector<std::string> texts;  ///< valid UTF-8 without zero bytes; a byte order mark has been taken away

  std::size_t size() const { return texts.size(); }
  /// Length of all texts together.
  int64_t bytes() const;
};

struct Corpus {
  Documents train, valid;
};

struct CorpusOptions {
  double val_fraction = 0.1;  ///< of the bytes, in [0, 1); 0: nothing is held out (a folder's own valid/ still is)
};

/// Reads a corpus. Throws when the path is missing, holds no .txt files or only empty ones, or when a file cannot be
/// read or is not text (a zero byte, or invalid UTF-8: the error gives the file and the offset).
/// With a `val_fraction` above 0 neither part is empty.
Corpus read_corpus(const std::string& path, const CorpusOptions& options = {});

/// The documents as one stream of tokens: `<|endoftext|>` before each document and after the last, so that every token
/// of text has a token before it to be predicted from.
std::vector<int32_t> tokenize(const Documents& documents, const Tokenizer& tokenizer);

}  // namespace knock::data

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_DATA_CORPUS)

#include <knock/data/utf8.hpp>
#include <knock/io/file.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

namespace knock::data {
namespace detail {

inline void check_text(const std::string& path, std::string_view bytes) {
  const bool utf16 = bytes.starts_with("\xff\xfe") || bytes.starts_with("\xfe\xff");
  check(!utf16, "read_corpus", path, " is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8");
  const std::size_t valid = utf8_valid_prefix(bytes), zero = bytes.substr(0, valid).find('\0');
  check(zero == std::string_view::npos, "read_corpus", path, " is not text: zero byte at offset ",
        static_cast<int64_t>(zero));
  check(valid == bytes.size(), "read_corpus", path, " is not text: invalid UTF-8 at byte offset ",
        static_cast<int64_t>(valid));
}

inline std::string read_text(const std::string& path) {
  std::string bytes = io::read_file(path);
  if (bytes.starts_with("\xef\xbb\xbf")) bytes.erase(0, 3);
  check_text(path, bytes);
  return bytes;
}

/// Paths of the .txt files below a folder, relative to it, sorted.
inline std::vector<std::string> text_files(const std::filesystem::path& folder) {
  std::vector<std::string> files;
  std::error_code error;
  std::filesystem::recursive_directory_iterator at(folder, error), end;
  for (; !error && at != end; at.increment(error)) {
    std::string extension = at->path().extension().string();
    for (char& c : extension) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    std::error_code unknown;  // a broken link is for reading to complain about
    if (extension == ".txt" && !at->is_directory(unknown))
      files.push_back(at->path().lexically_relative(folder).generic_string());
  }
  if (error) fail("read_corpus", "cannot list ", folder.string(), ": ", error.message());
  std::sort(files.begin(), files.end());
  return files;
}

/// Reads the files that are not empty.
inline Documents read_documents(const std::filesystem::path& folder, const std::vector<std::string>& files) {
  check(!files.empty(), "read_corpus", folder.string(), " has no .txt files");
  Documents documents;
  for (const std::string& file : files) {
    std::string text = read_text((folder / file).string());
    if (text.empty()) continue;
    documents.names.push_back(file);
    documents.texts.push_back(std::move(text));
  }
  check(documents.size() > 0, "read_corpus", "the .txt files of ", folder.string(), " are all empty");
  return documents;
}

/// Holds out the tail of one document, cut after a line where there is one in reach, else between two characters.
inline Corpus split_tail(Documents documents, double val_fraction) {
  std::string& text = documents.texts.front();
  const auto held_out = std::llround(static_cast<double>(text.size()) * val_fraction);
  std::size_t cut = text.size() - static_cast<std::size_t>(std::max<long long>(held_out, 1));
  const std::size_t line = text.find('\n', cut);
  if (line < cut + (text.size() - cut) / 2)
    cut = line + 1;
  else
    while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) --cut;
  check(cut > 0, "read_corpus", documents.names.front(), " is too short to hold out a part of it for validation");
  Corpus corpus;
  corpus.valid = {{documents.names.front() + " (tail)"}, {text.substr(cut)}};
  text.resize(cut);
  corpus.train = std::move(documents);
  return corpus;
}

/// Holds out the last documents, as many as it takes to reach the fraction, but never the first.
inline Corpus split_documents(Documents documents, double val_fraction) {
  const double wanted = static_cast<double>(documents.bytes()) * val_fraction;
  std::size_t kept = documents.size();
  double held_out = 0;
  while (kept > 1 && (kept == documents.size() || held_out < wanted))
    held_out += static_cast<double>(documents.texts[--kept].size());
  Corpus corpus{std::move(documents), {}};
  const auto move_tail = [kept](std::vector<std::string>& from, std::vector<std::string>& to) {
    to.assign(std::make_move_iterator(from.begin() + static_cast<std::ptrdiff_t>(kept)),
              std::make_move_iterator(from.end()));
    from.resize(kept);
  };
  move_tail(corpus.train.names, corpus.valid.names);
  move_tail(corpus.train.texts, corpus.valid.texts);
  return corpus;
}

/// A folder that brings its own split: everything in it must belong to one of the two parts.
inline Corpus read_split_folder(const std::filesystem::path& folder) {
  for (const std::string& file : text_files(folder))
    check(file.starts_with("train/") || file.starts_with("valid/"), "read_corpus", folder.string(),
          " has train/ and valid/, but ", file, " is in neither");
  return {read_documents(folder / "train", text_files(folder / "train")),
          read_documents(folder / "valid", text_files(folder / "valid"))};
}

}  // namespace detail

KNOCK_FUNC int64_t Documents::bytes() const {
  int64_t sum = 0;
  for (const std::string& text : texts) sum += static_cast<int64_t>(text.size());
  return sum;
}

KNOCK_FUNC Corpus read_corpus(const std::string& path, const CorpusOptions& options) {
  const double val_fraction = options.val_fraction;
  check(val_fraction >= 0 && val_fraction < 1, "read_corpus", "val_fraction ", val_fraction, " is not in [0, 1)");
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  check(status.type() != fs::file_type::not_found, "read_corpus", "there is no file or folder '", path, "'");
  check(fs::exists(status), "read_corpus", "cannot open ", path, ": ", error.message());
  Documents documents;
  if (fs::is_directory(status)) {
    const fs::path folder(path);
    if (fs::is_directory(folder / "train", error) && fs::is_directory(folder / "valid", error))
      return detail::read_split_folder(folder);
    documents = detail::read_documents(folder, detail::text_files(folder));
  } else {
    documents = {{path}, {detail::read_text(path)}};
    check(documents.bytes() > 0, "read_corpus", path, " is empty");
  }
  if (val_fraction == 0) return {std::move(documents), {}};
  return documents.size() == 1 ? detail::split_tail(std::move(documents), val_fraction)
                               : detail::split_documents(std::move(documents), val_fraction);
}

KNOCK_FUNC std::vector<int32_t> tokenize(const Documents& documents, const Tokenizer& tokenizer) {
  std::vector<int32_t> stream{tokenizer.eos_id()};
  for (const std::string& text : documents.texts) {
    const std::vector<int32_t> ids = tokenizer.encode_ordinary(text);
    stream.insert(stream.end(), ids.begin(), ids.end());
    stream.push_back(tokenizer.eos_id());
  }
  return stream;
}

}  // namespace knock::data

#endif
