// Writes the novels of the R package janeaustenr as text files: PREFIX.rdx and PREFIX.rdb -> FOLDER/train/emma.txt,
// ..., FOLDER/valid/persuasion.txt, the one held out for validation. Lines are joined by '\n', without one at the end.
//
//   extract_novels /usr/lib/R/site-library/janeaustenr/data/Rdata FOLDER
//
// An R "lazy-load" database: the .rdx is a gzipped R object, a list whose element `variables` maps each name to
// (offset, length) of a record in the .rdb. A record is the uncompressed size (32 bits, big-endian), then a zlib stream
// that holds the variable in R's serialisation: XDR, that is, big-endian throughout ("R Internals", section 1.8).

#include <knock/data/utf8.hpp>
#include <knock/io/file.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <zlib.h>

using knock::check;
using knock::fail;

namespace {

constexpr const char* held_out = "persuasion";
constexpr const char* novels[] = {"emma",       "mansfieldpark",  "northangerabbey",
                                  "persuasion", "prideprejudice", "sensesensibility"};
constexpr std::size_t max_unpacked = std::size_t{1} << 26;

/// Unpacks a zlib stream or a gzip file.
std::string unpack(std::string_view packed, const std::string& what) {
  z_stream stream{};
  check(inflateInit2(&stream, 15 + 32) == Z_OK, "extract_novels", "out of memory");
  std::string out(std::min(max_unpacked, 4096 + 8 * packed.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  int status = Z_OK;
  while (status == Z_OK) {
    if (stream.total_out == out.size()) {
      if (out.size() >= max_unpacked) break;
      out.resize(std::min(max_unpacked, 2 * out.size()));
    }
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + stream.total_out);
    stream.avail_out = static_cast<uInt>(out.size() - stream.total_out);
    status = inflate(&stream, Z_NO_FLUSH);
  }
  out.resize(stream.total_out);
  inflateEnd(&stream);
  check(status == Z_STREAM_END, "extract_novels", what,
        " cannot be unpacked: ", status == Z_OK ? "it is too large" : "the data are damaged");
  return out;
}

/// An R object, as much of one as these files need.
struct Value {
  std::vector<int32_t> integers;
  std::vector<std::string> strings;
  std::vector<Value> elements;
  std::vector<std::string> names;  // of the elements

  const Value& operator[](const std::string& name) const {
    const auto found = std::find(names.begin(), names.end(), name);
    const auto index = static_cast<std::size_t>(found - names.begin());
    check(index < elements.size(), "extract_novels", "the index has no entry '", name, "'");
    return elements[index];
  }
};

/// Reads R's XDR serialisation, versions 2 and 3.
class Reader {
 public:
  Reader(std::string_view bytes, const std::string& what) : bytes_(bytes), what_(what) {}

  Value read() {
    require(take(2) == "X\n", "not in R's XDR format");
    const int32_t version = integer();
    take(8);  // the R versions that wrote it and that can read it
    require(version == 2 || version == 3, "of an unknown version");
    if (version == 3) take(length());  // native encoding
    return value(0);
  }

 private:
  enum Type {
    symbol = 1,
    pair_list = 2,
    character = 9,
    logical = 10,
    integer_vector = 13,
    string_vector = 16,
    list = 19,
    nil = 254,
    reference = 255
  };
  static constexpr int has_attributes = 0x200, has_tag = 0x400, max_depth = 32;

  void require(bool condition, const char* problem) const {
    check(condition, "extract_novels", what_, " is ", problem);
  }

  std::string_view take(std::size_t count) {
    require(count <= bytes_.size(), "cut short or damaged");
    const std::string_view taken = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return taken;
  }

  int32_t integer() {
    uint32_t bits = 0;
    for (const char byte : take(4)) bits = bits << 8 | static_cast<unsigned char>(byte);
    return static_cast<int32_t>(bits);
  }

  /// A count; what is counted takes at least a byte each, so a damaged one cannot ask for much memory.
  std::size_t length() {
    const int32_t count = integer();
    require(count >= 0 && static_cast<std::size_t>(count) <= bytes_.size(), "cut short or damaged");
    return static_cast<std::size_t>(count);
  }

  std::string characters() {
    require((integer() & 0xff) == character, "damaged: a string was expected");
    return std::string(take(length()));
  }

  std::string tag() {
    const int32_t flags = integer();
    if ((flags & 0xff) == symbol) return symbols_.emplace_back(characters());
    require((flags & 0xff) == reference, "damaged: a name was expected");
    const auto index = static_cast<std::size_t>(flags >> 8);
    require(index >= 1 && index <= symbols_.size(), "damaged: a name refers to none");
    return symbols_[index - 1];
  }

  Value value(int depth) {
    require(depth < max_depth, "nested too deeply");
    const int32_t flags = integer();
    Value out;
    switch (flags & 0xff) {
      case nil:
        return out;
      case logical:
      case integer_vector:
        for (std::size_t n = length(); n > 0; --n) out.integers.push_back(integer());
        break;
      case string_vector:
        for (std::size_t n = length(); n > 0; --n) out.strings.push_back(characters());
        break;
      case list:
        for (std::size_t n = length(); n > 0; --n) out.elements.push_back(value(depth + 1));
        break;
      default:
        require(false, "not made of text, numbers and lists alone");
    }
    if (flags & has_attributes) read_attributes(out, depth);
    return out;
  }

  void read_attributes(Value& owner, int depth) {
    for (int32_t flags; (flags = integer(), (flags & 0xff) == pair_list);) {
      require((flags & has_tag) != 0, "damaged: an attribute has no name");
      const bool names = tag() == "names";
      Value attribute = value(depth + 1);
      if (names) owner.names = std::move(attribute.strings);
    }
  }

  std::string_view bytes_;
  std::string what_;
  std::vector<std::string> symbols_;
};

/// The text of one variable.
std::string novel(std::string_view database, const Value& place, const std::string& name) {
  check(place.integers.size() == 2, "extract_novels", "the index has no place for '", name, "'");
  const auto offset = static_cast<std::size_t>(place.integers[0]), size = static_cast<std::size_t>(place.integers[1]);
  check(
      place.integers[0] >= 0 && place.integers[1] > 4 && offset <= database.size() && size <= database.size() - offset,
      "extract_novels", "the database ends before '", name, "'");
  const std::string object = unpack(database.substr(offset + 4, size - 4), name);
  const Value lines = Reader(object, name).read();
  check(!lines.strings.empty(), "extract_novels", name, " has no lines");
  std::string text;
  for (const std::string& line : lines.strings)
    text.append(text.empty() && &line == &lines.strings[0] ? "" : "\n") += line;
  check(knock::data::utf8_valid_prefix(text) == text.size(), "extract_novels", name, " is not UTF-8");
  return text;
}

void extract(const std::string& prefix, const std::string& folder) {
  const std::string index = unpack(knock::io::read_file(prefix + ".rdx"), "the index");
  const std::string database = knock::io::read_file(prefix + ".rdb");
  const Value root = Reader(index, "the index").read();
  for (const std::string name : novels) {
    const std::string part = knock::text(folder, name == held_out ? "/valid" : "/train");
    std::error_code error;
    std::filesystem::create_directories(part, error);
    if (error) fail("extract_novels", "cannot make ", part, ": ", error.message());
    knock::io::write_file(knock::text(part, "/", name, ".txt"), novel(database, root["variables"][name], name));
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: extract_novels PREFIX FOLDER (reads PREFIX.rdx and PREFIX.rdb)\n");
    return 2;
  }
  try {
    extract(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
