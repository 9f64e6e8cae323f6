#include <knock/knock.hpp>

#include "support/compare.hpp"
#include "support/temporary_folder.hpp"

#include <knock/io/file.hpp>
#include <knock/io/json.hpp>

#include <bit>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>

#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/stat.h>

using namespace knock;
using test::contains;
using test::error_of;

namespace {

/// The bytes of a file with this JSON text and this many bytes of data.
std::string file_of(std::string_view json, std::size_t data_bytes, std::size_t claimed_length) {
  std::string out(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) out[i] = static_cast<char>(claimed_length >> (8 * i));
  out += json;
  for (std::size_t i = 0; i < data_bytes; ++i) out += static_cast<char>(i);
  return out;
}
std::string file_of(std::string_view json, std::size_t data_bytes) { return file_of(json, data_bytes, json.size()); }

/// Element i of the tensors that tests/golden/safetensors_files.py writes.
double golden_value(int64_t i, std::string_view name) {
  if (name == "bool") return static_cast<double>(7 * i % 2);
  return static_cast<double>(7 * i % 11 - (name == "u8" || name == "odd" ? 0 : 5));
}

void check_golden(const StateDict& tensors, const char* name, const Shape& shape, DType dtype) {
  CAPTURE(name);
  const Tensor& x = tensors.at(name);
  CHECK(x.shape() == shape);
  CHECK(x.dtype() == dtype);
  const auto values = x.to_vector<double>();
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(values[i] == golden_value(static_cast<int64_t>(i), name));
}

std::string golden(std::string_view name) { return text(KNOCK_TEST_DATA, "/safetensors/", name); }

StateDict sample() {
  const Tensor x = randn({3, 5});
  return {{"weight", x},
          {"flags", from_data<uint8_t>({0, 1, 255}, {3})},
          {"deep.t", x.t()},
          {"wide", randn({2, 1, 3}, {.dtype = DType::f64}).slice(2, 0, 3, 2)},
          {"half", randn({7}, {.dtype = DType::bf16})},
          {"ids", randint(-5, 5, {2, 2})},
          {"small", randint(-5, 5, {1}, {.dtype = DType::i32}).expand({4, 1})},
          {"scalar", full({}, 2.5)},
          {"none", zeros({2, 0, 3}, {.dtype = DType::f64})},
          {"größe \"\\\n\x01", zeros({1})}};
}

}  // namespace

TEST_CASE("safetensors: what was saved is loaded, bit for bit and in order") {
  const test::TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  StateDict saved = sample();
  const float odd[] = {-0.0F, std::bit_cast<float>(0x7FC01234U), std::bit_cast<float>(1U), -INFINITY};
  saved.insert("odd", from_data(std::span<const float>(odd), {4}));
  io::save_safetensors(path, saved, {{"step", "7"}, {"ü", "\"\t\\"}});
  const StateDict loaded = io::load_safetensors(path);
  REQUIRE(loaded.size() == saved.size());
  auto entry = loaded.begin();
  for (const StateDict::Entry& expected : saved) {
    CAPTURE(expected.first);
    CHECK(entry->first == expected.first);
    CHECK(test::same_bits(entry->second, expected.second));
    CHECK(entry->second.is_contiguous());
    ++entry;
  }
  CHECK(io::safetensors_metadata(path) == io::Metadata{{"format", "pt"}, {"step", "7"}, {"ü", "\"\t\\"}});
}

TEST_CASE("safetensors: the same tensors give the same bytes, every element aligned") {
  const test::TemporaryFolder folder;
  const StateDict saved = sample();
  io::save_safetensors(folder / "a", saved);
  io::save_safetensors(folder / "b", saved);
  const std::string bytes = io::read_file(folder / "a");
  CHECK(bytes == io::read_file(folder / "b"));
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  CHECK(length % 8 == 0);
  CHECK(bytes[8] == '{');
  io::detail::JsonReader json(std::string_view(bytes).substr(8, length), "test", "a");
  json.object([&](const std::string& name) {
    json.object([&](const std::string& key) {
      if (key != "data_offsets") return json.skip();
      std::vector<int64_t> offsets;
      json.array([&] { offsets.push_back(json.natural()); });
      CHECK_MESSAGE(offsets[0] % size_of(saved.at(name).dtype()) == 0, name);
    });
  });

  io::save_safetensors(folder / "none", {});
  CHECK(io::load_safetensors(folder / "none").empty());
  CHECK(io::safetensors_metadata(folder / "none") == io::Metadata{{"format", "pt"}});
  io::save_safetensors(folder / "none", {}, {{"format", "np"}});
  CHECK(io::safetensors_metadata(folder / "none") == io::Metadata{{"format", "np"}});
}

TEST_CASE("safetensors: saving does not record and does not change the tensors") {
  const test::TemporaryFolder folder;
  const Tensor w = randn({2, 3}).requires_grad_();
  const Tensor y = (w * 2).t();
  io::save_safetensors(folder / "a", {{"w", w}, {"y", y}});
  const StateDict loaded = io::load_safetensors(folder / "a");
  CHECK(test::same_bits(loaded.at("y"), y));
  CHECK_FALSE(loaded.at("w").requires_grad());
  CHECK(w.requires_grad());
}

TEST_CASE("safetensors: files written by the Python package") {
  const StateDict dtypes = io::load_safetensors(golden("dtypes.safetensors"));
  CHECK(dtypes.size() == 8);
  check_golden(dtypes, "f32", {3, 5}, DType::f32);
  check_golden(dtypes, "f64", {3, 5}, DType::f64);
  check_golden(dtypes, "bf16", {3, 5}, DType::bf16);
  check_golden(dtypes, "f16", {3, 5}, DType::f32);
  check_golden(dtypes, "i32", {3, 5}, DType::i32);
  check_golden(dtypes, "i64", {3, 5}, DType::i64);
  check_golden(dtypes, "u8", {3, 5}, DType::u8);
  check_golden(dtypes, "bool", {3, 5}, DType::u8);
  const io::Metadata metadata = io::safetensors_metadata(golden("dtypes.safetensors"));
  CHECK(metadata.at("é\n\"") == "\t\\ 😀");
  CHECK(contains(metadata.at("made_by"), "safetensors "));

  const StateDict half = io::load_safetensors(golden("half.safetensors"));
  CHECK(test::same_bits(half.at("half").narrow(0, 0, 9), half.at("wide").narrow(0, 0, 9)));
  CHECK(std::isnan(half.at("half")[9].item()));

  const StateDict shapes = io::load_safetensors(golden("shapes.safetensors"));
  check_golden(shapes, "scalar", {}, DType::f32);
  check_golden(shapes, "none", {2, 0, 3}, DType::f32);
  check_golden(shapes, "odd", {3}, DType::u8);
  check_golden(shapes, "deep", {1, 2, 1, 3, 1, 2}, DType::f64);
  check_golden(shapes, "größe.\"0\"", {2}, DType::i64);
  CHECK(io::load_safetensors(golden("nothing.safetensors")).empty());
  CHECK(contains(error_of([] { io::load_safetensors(golden("i16.safetensors")); }),
                 "tensor \"narrow\": dtype \"I16\" is not supported"));
}

TEST_CASE("safetensors: a model in several files, by its index or its folder") {
  for (const char* path : {"sharded/model.safetensors.index.json", "sharded", "sharded/"}) {
    const StateDict model = io::load_safetensors(golden(path));
    REQUIRE(model.size() == 3);
    CHECK(model.begin()->first == "b");  // the index's order
    check_golden(model, "a", {2, 2}, DType::f32);
    check_golden(model, "b", {5}, DType::bf16);
    check_golden(model, "c", {3}, DType::i64);
    CHECK(io::safetensors_metadata(golden(path)).at("part") == "2");
  }

  const test::TemporaryFolder folder;
  io::save_safetensors(folder / "model.safetensors", {{"x", ones({2})}});
  CHECK(io::load_safetensors(folder.path()).size() == 1);
  const auto index_error = [&](const char* json) {
    const std::string path = folder.write("bad.json", json);
    return error_of([&] { io::load_safetensors(path); });
  };
  CHECK(contains(index_error(R"({"weight_map": {"x": "absent.safetensors"}})"), "absent.safetensors: No such file"));
  CHECK(contains(index_error(R"({"weight_map": {"y": "model.safetensors"}})"),
                 "tensor \"y\" is not in \"model.safetensors\""));
  io::save_safetensors(folder / "two.safetensors", {{"x", ones({2})}, {"y", ones({2})}});
  CHECK(contains(index_error(R"({"weight_map": {"x": "two.safetensors"}})"),
                 "does not name tensor \"y\" of \"two.safetensors\""));
  CHECK(contains(index_error(R"({"weight_map": {"x": "../model.safetensors"}})"), "is not the name of a file"));
  CHECK(contains(index_error(R"({"weight_map": {"x": "/etc/passwd"}})"), "is not the name of a file"));
  CHECK(contains(index_error(R"({"weight_map": {"x": ".."}})"), "is not the name of a file"));
  CHECK(contains(index_error(R"({"weight_map": {"x": ""}})"), "is not the name of a file"));
  CHECK(contains(index_error(R"({"weight_map": {"x": "model.safetensors\u0000"}})"), "is not the name of a file"));
  CHECK(contains(index_error(R"({"weight_map": {"x": 1}})"), "expected a string"));
  CHECK(contains(index_error(R"({"weight_map": {"x": "model.safetensors", "x": "model.safetensors"}})"),
                 "\"x\" appears twice"));
  CHECK(contains(index_error(R"({"metadata": {}})"), "no \"weight_map\""));
  CHECK(contains(index_error("[]"), "expected an object"));
  CHECK(contains(index_error(""), "expected an object"));
  CHECK(contains(index_error(R"({"weight_map": {}} x)"), "text after the end"));
  const test::TemporaryFolder empty;
  CHECK(contains(error_of([&] { io::load_safetensors(empty.path()); }), "holds neither model.safetensors nor"));
}

TEST_CASE("safetensors: data at any alignment is read") {
  const std::string json =
      R"({"a":{"dtype":"F64","shape":[2],"data_offsets":[1,17]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  for (std::size_t padding = 0; padding < 8; ++padding) {
    std::string bytes = file_of(json + std::string(padding, ' '), 17);
    const double values[] = {1.5, -2.25};
    std::memcpy(bytes.data() + bytes.size() - 16, values, 16);
    const StateDict loaded = io::parse_safetensors(bytes);
    CHECK(loaded.at("a").to_vector<double>() == std::vector<double>{1.5, -2.25});
  }
}

TEST_CASE("safetensors: damaged files are refused with the reason, in one line, without large allocations") {
  struct Damage {
    std::string bytes;
    const char* reason;
  };
  const auto one = [](std::string_view entry, std::size_t data) { return file_of(text("{\"x\":", entry, "}"), data); };
  const auto deep = [](const char* open) {
    std::string out = "{\"__metadata__\":";
    for (int i = 0; i < 100; ++i) out += open;
    return out;
  };
  const char* good = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const auto second = [&](std::string_view offsets) {
    return file_of(
        text(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":)",
             offsets, "}}"),
        8);
  };
  const std::vector<Damage> cases = {
      // the length and the file's size
      {"", "0 bytes are too few"},
      {"\x02\0\0\0\0\0\0", "too few"},
      {file_of("{}", 0, 0), "must start with '{'"},
      {file_of("{}", 0, 1), "expected a string"},
      {file_of("{}", 0, 3), "header of 3 bytes in a file of 10; is the file cut off?"},
      {file_of("{}", 0, 100'000'001), "exceeds the limit of 100000000"},
      {file_of("{}", 0, ~std::size_t{0}), "exceeds the limit"},
      {file_of("{}", 0, std::size_t{1} << 63), "exceeds the limit"},
      {file_of("{}", 1), "1 bytes after the last tensor"},
      {one(good, 7), "do not lie in the 7 bytes"},
      {one(good, 9), "1 bytes after the last tensor"},
      // the JSON text
      {file_of(" {}", 0), "must start with '{'"},
      {file_of("[]", 0), "must start with '{'"},
      {file_of("{} x", 0), "text after the end"},
      {file_of(std::string_view("{}\0", 3), 0), "text after the end"},
      {file_of("{", 0), "expected a string"},
      {file_of("{\"x\"}", 0), "expected ':'"},
      {file_of("{\"x\":1}", 0), "expected an object"},
      {file_of("{\"x\":null}", 0), "expected an object"},
      {file_of("{\"x", 0), "string without end"},
      {file_of("{\"x\\q\":1}", 0), "unknown escape"},
      {file_of("{\"\\u12g4\":1}", 0), "bad \\u escape"},
      {file_of("{\"\\ud800\":1}", 0), "lone surrogate"},
      {file_of("{\"\\ud800\\u0041\":1}", 0), "lone surrogate"},
      {file_of("{\"\\udc00\":1}", 0), "lone surrogate"},
      {file_of("{\"\xff\":1}", 0), "malformed UTF-8"},
      {file_of("{\"\xc0\xaf\":1}", 0), "malformed UTF-8"},
      {file_of("{\"\xed\xa0\x80\":1}", 0), "malformed UTF-8"},
      {file_of("{\"\xf4\x90\x80\x80\":1}", 0), "malformed UTF-8"},
      {file_of("{\"\xe2\x82", 0), "malformed UTF-8"},
      {file_of("{\"a\nb\":1}", 0), "control character"},
      {file_of(text("{\"x\":", good, ",}"), 8), "expected a string"},
      {file_of(text("{\"x\":", good, ",\"x\":", good, "}"), 8), "\"x\" appears twice"},
      {file_of(
           R"({"\u0078":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
           2),
       "\"x\" appears twice"},
      {file_of(deep("{\"a\":"), 0), "expected a string"},
      {file_of(deep("["), 0), "expected an object"},
      // the metadata
      {file_of(R"({"__metadata__":{"a":1}})", 0), "expected a string"},
      {file_of(R"({"__metadata__":{"a":{}}})", 0), "expected a string"},
      {file_of(R"({"__metadata__":[]})", 0), "expected an object"},
      {file_of(R"({"__metadata__":{"a":"b","a":"b"}})", 0), "\"a\" appears twice"},
      {file_of(R"({"__metadata__":{},"__metadata__":{}})", 0), "appears twice"},
      // an entry
      {one("{}", 0), "needs dtype, shape and data_offsets"},
      {one(R"({"dtype":"F32","shape":[2]})", 0), "needs dtype, shape"},
      {one(R"({"dtype":"F32","data_offsets":[0,4]})", 4), "needs dtype, shape"},
      {one(R"({"shape":[1],"data_offsets":[0,4]})", 4), "needs dtype, shape"},
      {one(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})", 4), "\"dtype\" appears twice"},
      {one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1})", 4), "unknown key \"extra\""},
      {one(R"({"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]})", 1), "dtype \"F8_E4M3\" is not supported"},
      {one(R"({"dtype":"f32","shape":[1],"data_offsets":[0,4]})", 4), "dtype \"f32\" is not supported"},
      {one(R"({"dtype":1,"shape":[1],"data_offsets":[0,4]})", 4), "expected a string"},
      {one(R"({"dtype":"U8","shape":1,"data_offsets":[0,1]})", 1), "expected an array"},
      {one(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})", 1), "expected a non-negative integer"},
      {one(R"({"dtype":"U8","shape":[1.0],"data_offsets":[0,1]})", 1), "expected an integer"},
      {one(R"({"dtype":"U8","shape":[1e0],"data_offsets":[0,1]})", 1), "expected an integer"},
      {one(R"({"dtype":"U8","shape":[01],"data_offsets":[0,1]})", 1), "leading zero"},
      {one(R"({"dtype":"U8","shape":["1"],"data_offsets":[0,1]})", 1), "expected a non-negative integer"},
      {one(R"({"dtype":"U8","shape":[1,],"data_offsets":[0,1]})", 1), "expected a non-negative integer"},
      {one(R"({"dtype":"U8","shape":[1 1],"data_offsets":[0,1]})", 1), "expected ',' or ']'"},
      {one(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", 1), "more than 8 dimensions"},
      {one(R"({"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]})", 1), "number too large"},
      {one(R"({"dtype":"U8","shape":[99999999999999999999999999],"data_offsets":[0,1]})", 1), "number too large"},
      {one(R"({"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,1]})", 1), "too many elements"},
      {one(R"({"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]})", 0), "too many elements"},
      {one(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0), "too many elements"},
      {one(R"({"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]})", 0), "too many elements"},
      {one(R"({"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]})", 1),
       "do not lie in the 1 bytes"},
      {one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", 4), "takes 8 bytes, data_offsets give 4"},
      {one(R"({"dtype":"F32","shape":[],"data_offsets":[0,0]})", 0), "takes 4 bytes, data_offsets give 0"},
      {one(R"({"dtype":"F32","shape":[0],"data_offsets":[0,4]})", 4), "takes 0 bytes"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[0]})", 1), "needs dtype, shape"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1,2]})", 1), "must be two numbers"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})", 1), "do not lie in"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[0,9223372036854775807]})", 1), "do not lie in"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[9223372036854775806,9223372036854775807]})", 1),
       "do not lie in"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,0]})", 1), "number too large"},
      {one(R"({"dtype":"U8","shape":[1],"data_offsets":[1,2]})", 2),
       "starts at byte 1 of the data, where 0 was expected: a gap"},
      // two entries
      {second("[0,4]"), "an overlap"},
      {second("[3,7]"), "an overlap"},
      {second("[2,6]"), "an overlap"},
      {second("[4,9]"), "do not lie in"},
      {file_of(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
           8),
       "tensor \"b\" starts at byte 4 of the data, where 2 was expected: a gap"},
  };
  REQUIRE(cases.size() >= 40);
  const test::TemporaryFolder folder;
  memory::reset_peak();
  const int64_t peak = memory::stats().peak_bytes;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    CAPTURE(i);
    const auto& [bytes, reason] = cases[i];
    const std::string path = folder.write("x.safetensors", bytes);
    const std::string error = error_of([&] { io::load_safetensors(path); });
    CHECK_MESSAGE(contains(error, reason), error);
    CHECK(contains(error, "[load_safetensors] " + path));
    CHECK_FALSE(contains(error, "\n"));
    CHECK(error_of([&] { io::safetensors_metadata(path); }) == error);
  }
  CHECK(memory::stats().peak_bytes == peak);
}

TEST_CASE("safetensors: every cut of a good file is refused, every changed byte read or refused") {
  const test::TemporaryFolder folder;
  io::save_safetensors(folder / "a", {{"x", randn({3})}, {"y", randint(0, 9, {2, 2})}}, {{"k", "v"}});
  const std::string bytes = io::read_file(folder / "a");
  for (std::size_t length = 0; length < bytes.size(); ++length)
    CHECK_THROWS_AS(io::parse_safetensors(std::string_view(bytes).substr(0, length)), Error);
  std::size_t refused = 0, read = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const char change : {'\x01', '\x80', '\x22'}) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ change);
      error_of([&] { io::parse_safetensors(damaged); }).empty() ? ++read : ++refused;
    }
  }
  CHECK(refused > 3 * 100);
  CHECK(read >= 3 * 44);  // changed elements are still elements
}

TEST_CASE("safetensors: what is missing or no file is named") {
  const test::TemporaryFolder folder;
  CHECK(contains(error_of([&] { io::load_safetensors(folder / "absent"); }), "absent: No such file or directory"));
  CHECK(contains(error_of([&] { io::load_safetensors(folder / "absent.json"); }), "absent.json: No such file"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error_of([&] { io::load_safetensors(folder / "pipe"); }), "pipe is not a regular file"));
}

TEST_CASE("safetensors: a save that fails is one clear error and leaves the old file alone") {
  const test::TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  io::save_safetensors(path, {{"old", ones({1})}});
  const std::string before = io::read_file(path);
  const auto refused = [&](const StateDict& tensors, const io::Metadata& metadata = {}) {
    return error_of([&] { io::save_safetensors(path, tensors, metadata); });
  };
  CHECK(contains(refused({{"x", Tensor()}}), "tensor \"x\" is undefined"));
  CHECK(contains(refused({{"__metadata__", ones({1})}}), "cannot name a tensor"));
  CHECK(contains(refused({{"\xff", ones({1})}}), "cannot name a tensor"));
  CHECK(contains(refused({}, {{"k", "\xff"}}), "metadata \"k\" is not UTF-8"));
  CHECK(contains(error_of([&] { io::save_safetensors(folder / "none/a", {}); }), "none/a: No such file"));

  struct rlimit limit {};  // stands for a full disk: write(2) fails after some bytes
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  struct rlimit small = limit;
  small.rlim_cur = 100'000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string full = refused({{"big", zeros({100'000})}});
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(contains(full, "[save_safetensors] cannot write " + path + ": File too large"));

  CHECK(io::read_file(path) == before);
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) ++files;
  CHECK(files == 1);
}

TEST_CASE("json: strings, numbers and nesting are read strictly") {
  const auto read = [](std::string_view json) { return io::detail::JsonReader(json, "test", "text").string(); };
  CHECK(read(R"("\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac\ud83d\ude00é€😀")") == "\"\\/\b\f\n\r\tAé€😀é€😀");
  const auto skip = [](std::string_view json) {
    io::detail::JsonReader reader(json, "test", "text");
    reader.skip();
    reader.finish();
  };
  for (const char* good :
       {"0", "-0", "10.25e-3", "1E+2", "[]", "{}", "[1, [2, {\"a\": null}], true, false]", " \"x\" \n"})
    CHECK_MESSAGE(error_of([&] { skip(good); }).empty(), good);
  for (const char* bad : {"", "-", "01", "1.", ".5", "1e", "+1", "[1,]", "[,1]", "{\"a\":1,}", "{a:1}", "nul", "truex",
                          "1 2", "'x'", "[1}", "\"\\x\"", "NaN", "Infinity"})
    CHECK_MESSAGE(!error_of([&] { skip(bad); }).empty(), bad);
  std::string nested(32, '[');
  CHECK(error_of([&] { skip(nested + std::string(32, ']')); }).empty());
  nested += '[';
  CHECK(contains(error_of([&] { skip(nested + std::string(33, ']')); }), "nested too deeply"));
  CHECK(contains(error_of([&] { skip(std::string(1'000'000, '[')); }), "nested too deeply"));
  CHECK(io::detail::quote(std::string(200, 'x')).size() == 85);
  CHECK(io::detail::json_string("a\"\\\x01é") == "\"a\\\"\\\\\\u0001é\"");
}
