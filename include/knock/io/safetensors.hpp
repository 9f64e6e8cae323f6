#pragma once
// Reading and writing safetensors files (https://github.com/huggingface/safetensors).
//
//   u64 N | N bytes of JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} | the elements
//
// little endian; offsets count from the end of the JSON text and cover the rest of the file without gap or overlap. The
// optional entry "__metadata__" maps strings to strings. A file that breaks any of this is refused with an Error of one
// line that names the file and the reason, before any element is read; what is allocated never exceeds what the file
// holds.
//
//   io::save_safetensors("model.safetensors", model.state_dict(), {{"step", "100"}});
//   StateDict weights = io::load_safetensors("model.safetensors");

#include <knock/autograd/grad_mode.hpp>
#include <knock/core/state_dict.hpp>
#include <knock/core/tensor.hpp>

#include <map>
#include <string>
#include <string_view>

namespace knock::io {

using Metadata = std::map<std::string, std::string>;

/// Writes the tensors (any strides, any device) and the metadata, to which `"format": "pt"` is added when it has none,
/// as loaders built on PyTorch ask. The file is complete or, on any error, the old one is untouched. The same input
/// gives the same bytes: names stand in the order of `tensors`, elements sorted by size so that each tensor is aligned.
void save_safetensors(const std::string& path, const StateDict& tensors, const Metadata& metadata = {});

/// All tensors of a file, in the order of their names' appearance; or of a model in several files, given its
/// `model.safetensors.index.json` or the folder with it (or with `model.safetensors`).
/// F32 F64 BF16 I32 I64 U8 are read as they are, BOOL as u8 and F16 as f32; other dtypes are an error.
StateDict load_safetensors(const std::string& path);

/// The same from the bytes of a file; `source` is its name in errors.
StateDict parse_safetensors(std::string_view bytes, std::string_view source = "memory");

/// The metadata of a file; of a model in several files, that of the first.
Metadata safetensors_metadata(const std::string& path);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_SAFETENSORS)
#include <knock/io/file.hpp>
#include <knock/io/json.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <sys/stat.h>

namespace knock::io {
namespace detail {

static_assert(std::endian::native == std::endian::little, "safetensors files are little endian");

inline constexpr const char* load_op = "load_safetensors";
inline constexpr int64_t most_header_bytes = 100'000'000;

/// How elements of a file become elements of a tensor.
struct StoredType {
  const char* name;
  int64_t bytes;
  DType dtype;
};
inline constexpr StoredType stored_types[] = {{"F32", 4, DType::f32}, {"F64", 8, DType::f64}, {"BF16", 2, DType::bf16},
                                              {"I32", 4, DType::i32}, {"I64", 8, DType::i64}, {"U8", 1, DType::u8},
                                              {"BOOL", 1, DType::u8}, {"F16", 2, DType::f32}};

/// One tensor of a header.
struct StoredTensor {
  std::string name;
  const StoredType* type = nullptr;
  Shape shape;
  int64_t begin = 0, end = 0;  ///< bytes, from the end of the JSON text
};

struct Header {
  Metadata metadata;
  std::vector<StoredTensor> tensors;
  std::string_view elements;
};

/// The f32 of a half-precision number (IEEE 754 binary16).
KNOCK_FUNC float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16, exponent = bits >> 10 & 0x1FU,
                 fraction = bits & 0x3FFU;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000U | fraction << 13);
  if (exponent == 0) return (sign != 0U ? -1.0F : 1.0F) * static_cast<float>(fraction) * 0x1p-24F;
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

KNOCK_FUNC StoredTensor read_entry(JsonReader& json, const std::string& name) {
  StoredTensor tensor;
  tensor.name = name;
  const std::string where = text("tensor ", quote(name), ": ");
  bool has_shape = false;
  std::vector<int64_t> offsets;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      const std::string dtype = json.string();
      for (const StoredType& type : stored_types)
        if (dtype == type.name) tensor.type = &type;
      if (!tensor.type)
        json.bad(text(where, "dtype ", quote(dtype), " is not supported (F32 F64 BF16 I32 I64 U8 BOOL F16 are)"));
    } else if (key == "shape") {
      has_shape = true;
      json.array([&] {
        const int64_t extent = json.natural();
        if (tensor.shape.rank() == max_rank) json.bad(text(where, "more than 8 dimensions"));
        tensor.shape.push_back(extent);
      });
    } else if (key == "data_offsets") {
      json.array([&] {
        offsets.push_back(json.natural());
        if (offsets.size() > 2) json.bad(text(where, "data_offsets must be two numbers"));
      });
    } else {
      json.bad(text(where, "unknown key ", quote(key)));
    }
  });
  if (!tensor.type || !has_shape || offsets.size() != 2) json.bad(text(where, "needs dtype, shape and data_offsets"));
  tensor.begin = offsets[0];
  tensor.end = offsets[1];
  return tensor;
}

/// Error unless the tensors' offsets fit their shapes and cover the elements exactly.
KNOCK_FUNC void check_layout(const Header& header, std::string_view source) {
  std::vector<const StoredTensor*> by_offset;
  for (const StoredTensor& tensor : header.tensors) {
    const auto refuse = [&](const auto&... why) {
      fail(load_op, source, ": tensor ", quote(tensor.name), ": ", why...);
    };
    constexpr int64_t limit = std::numeric_limits<int64_t>::max() / 16;
    int64_t count = 1;
    for (const int64_t extent : tensor.shape) {
      if (extent > 0 && count > limit / extent) refuse("shape ", tensor.shape, " has too many elements");
      count *= std::max<int64_t>(extent, 1);
    }
    if (tensor.shape.numel() == 0) count = 0;
    const auto available = static_cast<int64_t>(header.elements.size());
    if (tensor.begin > tensor.end || tensor.end > available)
      refuse("data_offsets [", tensor.begin, ", ", tensor.end, "] do not lie in the ", available,
             " bytes of the file's data");
    if (tensor.end - tensor.begin != count * tensor.type->bytes)
      refuse("shape ", tensor.shape, " of ", tensor.type->name, " takes ", count * tensor.type->bytes,
             " bytes, data_offsets give ", tensor.end - tensor.begin);
    by_offset.push_back(&tensor);
  }
  std::sort(by_offset.begin(), by_offset.end(), [](const StoredTensor* a, const StoredTensor* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  int64_t covered = 0;
  for (const StoredTensor* tensor : by_offset) {
    check(tensor->begin == covered, load_op, source, ": tensor ", quote(tensor->name), " starts at byte ",
          tensor->begin, " of the data, where ", covered,
          " was expected: ", tensor->begin < covered ? "an overlap" : "a gap");
    covered = tensor->end;
  }
  check(covered == static_cast<int64_t>(header.elements.size()), load_op, source, ": ",
        static_cast<int64_t>(header.elements.size()) - covered, " bytes after the last tensor belong to none");
}

KNOCK_FUNC Header read_header(std::string_view bytes, std::string_view source) {
  check(bytes.size() >= 8, load_op, source, ": ", static_cast<int64_t>(bytes.size()),
        " bytes are too few for a header");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  check(length <= static_cast<uint64_t>(most_header_bytes), load_op, source, ": header of ", length,
        " bytes exceeds the limit of ", most_header_bytes, "; is this a safetensors file?");
  check(length <= bytes.size() - 8, load_op, source, ": header of ", length, " bytes in a file of ",
        static_cast<int64_t>(bytes.size()), "; is the file cut off?");
  Header header;
  const std::string_view json_text = bytes.substr(8, static_cast<std::size_t>(length));
  header.elements = bytes.substr(8 + static_cast<std::size_t>(length));
  JsonReader json(json_text, load_op, source);
  if (!json_text.starts_with('{')) json.bad("header must start with '{'");
  json.object([&](const std::string& key) {
    if (key == "__metadata__") {
      json.object([&](const std::string& name) { header.metadata[name] = json.string(); });
    } else {
      header.tensors.push_back(read_entry(json, key));
    }
  });
  json.finish();
  check_layout(header, source);
  return header;
}

KNOCK_FUNC Tensor read_tensor(const Header& header, const StoredTensor& stored) {
  Tensor out = empty(stored.shape, {.dtype = stored.type->dtype});
  const char* from = header.elements.data() + stored.begin;  // of any alignment
  const bool half = std::string_view(stored.type->name) == "F16";
  const int64_t bytes = stored.end - stored.begin;
  if (bytes == 0) return out;
  if (!half) {
    std::memcpy(out.raw_data(), from, static_cast<std::size_t>(bytes));
    return out;
  }
  float* to = out.data<float>();
  for (int64_t i = 0; i < bytes / 2; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, from + 2 * i, 2);
    to[i] = half_to_float(bits);
  }
  return out;
}

/// A model in several files: which file holds each tensor, in the index's order.
struct ShardIndex {
  std::vector<std::pair<std::string, std::string>> file_of;
};

KNOCK_FUNC ShardIndex read_index(const std::string& path) {
  const std::string json_text = read_file(path, most_header_bytes);
  JsonReader json(json_text, load_op, path);
  ShardIndex index;
  bool has_map = false;
  json.object([&](const std::string& key) {
    if (key != "weight_map") return json.skip();
    has_map = true;
    json.object([&](const std::string& name) {
      const std::string file = json.string();
      if (file.empty() || file == "." || file == ".." ||
          file.find_first_of(std::string_view("/\0", 2)) != std::string::npos)
        json.bad(text(quote(file), " is not the name of a file in the index's folder"));
      index.file_of.emplace_back(name, file);
    });
  });
  json.finish();
  check(has_map, load_op, path, ": no \"weight_map\"");
  return index;
}

KNOCK_FUNC std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

/// The file that a path means: itself, or the model file of a folder.
KNOCK_FUNC std::string model_file(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) return path;
  for (const char* name : {"model.safetensors", "model.safetensors.index.json"}) {
    const std::string candidate = text(path, "/", name);
    if (::stat(candidate.c_str(), &info) == 0) return candidate;
  }
  fail(load_op, path, " holds neither model.safetensors nor model.safetensors.index.json");
}

KNOCK_FUNC bool is_index(const std::string& file) { return file.ends_with(".json"); }

KNOCK_FUNC StateDict load_shards(const std::string& path) {
  const ShardIndex index = read_index(path);
  std::map<std::string, StateDict> files;
  StateDict out;
  for (const auto& [name, file] : index.file_of) {
    auto [entry, first] = files.try_emplace(file);
    if (first) entry->second = load_safetensors(folder_of(path) + file);
    const Tensor* found = entry->second.find(name);
    check(found != nullptr, load_op, path, ": tensor ", quote(name), " is not in ", quote(file));
    out.insert(name, *found);
  }
  for (const auto& [file, tensors] : files)
    for (const auto& [name, tensor] : tensors)
      check(out.contains(name), load_op, path, ": does not name tensor ", quote(name), " of ", quote(file));
  return out;
}

/// The JSON text of a file's header, padded so that the elements start at a multiple of 8. `order` is that of the
/// elements.
KNOCK_FUNC std::string header_text(const StateDict& tensors, const std::vector<const StateDict::Entry*>& order,
                                   const Metadata& metadata) {
  std::map<const Tensor*, int64_t> start;
  int64_t bytes = 0;
  for (const StateDict::Entry* entry : order) {
    start[&entry->second] = bytes;
    bytes += entry->second.numel() * size_of(entry->second.dtype());
  }
  std::string out = "{\"__metadata__\":{";
  const char* separator = "";
  for (const auto& [key, value] : metadata) {
    out += text(separator, json_string(key), ":", json_string(value));
    separator = ",";
  }
  out += "}";
  for (const auto& [name, tensor] : tensors) {
    const char* type = nullptr;
    for (const StoredType& stored : stored_types)
      if (!type && stored.dtype == tensor.dtype()) type = stored.name;
    out += text(",", json_string(name), ":{\"dtype\":\"", type, "\",\"shape\":[");
    for (int64_t i = 0; i < tensor.rank(); ++i) out += text(i ? "," : "", tensor.shape()[i]);
    const int64_t begin = start[&tensor];
    out += text("],\"data_offsets\":[", begin, ",", begin + tensor.numel() * size_of(tensor.dtype()), "]}");
  }
  out += "}";
  out.append((8 - out.size() % 8) % 8, ' ');
  return out;
}

}  // namespace detail

KNOCK_FUNC void save_safetensors(const std::string& path, const StateDict& tensors, const Metadata& metadata) {
  constexpr const char* op = "save_safetensors";
  Metadata all = metadata;
  all.try_emplace("format", "pt");
  for (const auto& [key, value] : all)
    check(detail::is_utf8(key) && detail::is_utf8(value), op, path, ": metadata ", detail::quote(key), " is not UTF-8");
  std::vector<const StateDict::Entry*> order;
  for (const StateDict::Entry& entry : tensors) {
    const auto& [name, tensor] = entry;
    check(tensor.defined(), op, path, ": tensor ", detail::quote(name), " is undefined");
    check(name != "__metadata__" && detail::is_utf8(name), op, path, ": ", detail::quote(name),
          " cannot name a tensor");
    order.push_back(&entry);
  }
  std::stable_sort(order.begin(), order.end(), [](const StateDict::Entry* a, const StateDict::Entry* b) {
    return size_of(a->second.dtype()) > size_of(b->second.dtype());
  });
  const std::string header = detail::header_text(tensors, order, all);
  const auto length = static_cast<int64_t>(header.size());
  check(length <= detail::most_header_bytes, op, path, ": header of ", length, " bytes exceeds the limit of ",
        detail::most_header_bytes);

  const NoGradGuard no_grad;
  AtomicFile file(op, path);
  file.write(&length, 8);
  file.write(header.data(), length);
  for (const StateDict::Entry* entry : order) {
    const Tensor dense = entry->second.contiguous().to(Device());
    file.write(dense.raw_data(), dense.numel() * size_of(dense.dtype()));
  }
  file.commit();
}

KNOCK_FUNC StateDict parse_safetensors(std::string_view bytes, std::string_view source) {
  const detail::Header header = detail::read_header(bytes, source);
  StateDict out;
  for (const detail::StoredTensor& stored : header.tensors)
    out.insert(stored.name, detail::read_tensor(header, stored));
  return out;
}

KNOCK_FUNC StateDict load_safetensors(const std::string& path) {
  const std::string file = detail::model_file(path);
  if (detail::is_index(file)) return detail::load_shards(file);
  const MappedFile mapped(detail::load_op, file);
  return parse_safetensors(mapped.bytes(), file);
}

KNOCK_FUNC Metadata safetensors_metadata(const std::string& path) {
  std::string file = detail::model_file(path);
  if (detail::is_index(file)) {
    const detail::ShardIndex index = detail::read_index(file);
    check(!index.file_of.empty(), "safetensors_metadata", file, ": names no tensor");
    file = detail::folder_of(file) + index.file_of.front().second;
  }
  const MappedFile mapped("safetensors_metadata", file);
  return detail::read_header(mapped.bytes(), file).metadata;
}

}  // namespace knock::io
#endif
