#pragma once
// Small PTX programs, as text, run on the machine directly.

#include <doctest/doctest.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "machine.hpp"
#include "memory.hpp"
#include "report.hpp"
#include "shadow.hpp"

namespace cuda_sim::test {

/// Device memory of a test.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(allocate(bytes)), bytes_(bytes) {}
  Buffer(const void* from, std::size_t bytes) : Buffer(bytes) {
    std::memcpy(bytes_at(data_), from, bytes);
    write_range(data_, bytes);
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint64_t address() const { return reinterpret_cast<uint64_t>(data_); }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    std::memcpy(values.data(), bytes_at(data_), bytes_);
    return values;
  }

 private:
  void* data_;
  std::size_t bytes_;
};

/// What the simulator reported, one after another.
inline std::string findings() {
  std::string text;
  for (const std::string& finding : take_reports()) text += finding + "\n";
  return text;
}

struct Shape {
  uint32_t blocks = 1, threads = 32;
  std::size_t dynamic_shared_bytes = 0;
};

/// Runs the kernel `k` of a module; all its parameters have 64 bits.
inline Counters run_kernel(const Module& module, const Shape& shape, const std::vector<uint64_t>& parameters) {
  static uint64_t finished = 0;  // all that was begun before: one stream, one after another
  const uint64_t position = finished + 1;
  WorkOrder order;
  order.position = position;
  order.before = order.known = &finished;
  order.streams = order.known_streams = 1;
  order.name = "k";
  begin_work(order);
  finished = position;
  Counters counters;
  const Launch launch{{shape.blocks, 1, 1}, {shape.threads, 1, 1}, shape.dynamic_shared_bytes, parameters.data()};
  execute(*module.functions.at("k"), module, launch, counters);
  return counters;
}

inline std::string kernel_text(const std::string& body, int parameters, const std::string& before = "") {
  std::string text = ".version 8.0\n.target sm_80\n.address_size 64\n" + before + "\n.visible .entry k(";
  for (int i = 0; i < parameters; ++i) text += std::string(i > 0 ? ", " : "") + ".param .u64 p" + std::to_string(i);
  return text + ")\n{\n" + body + "\nret;\n}\n";
}

/// What a fault says; "" when there is none.
inline std::string fault_of(const std::string& text, const Shape& shape = {},
                            const std::vector<uint64_t>& parameters = {}) {
  const std::unique_ptr<Module> module = parse(text);
  try {
    run_kernel(*module, shape, parameters);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

/// A kernel of one block that writes 32-bit results, thread i at index i, from its register %result.
inline std::vector<uint32_t> results_of(const std::string& body, const Shape& shape = {},
                                        const std::string& before = "") {
  const std::string prologue =
      ".reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .pred %p<16>; .reg .b32 %result; .reg .b32 %t;\n"
      ".reg .b64 %out<4>;\nmov.u32 %t, %tid.x;\n";
  const std::string epilogue =
      "\nld.param.u64 %out0, [p0];\nmul.wide.u32 %out1, %t, 4;\nadd.s64 %out2, %out0, %out1;\n"
      "st.global.u32 [%out2], %result;\n";
  const std::unique_ptr<Module> module = parse(kernel_text(prologue + body + epilogue, 1, before));
  const std::vector<uint32_t> unwritten(shape.threads, 0xcccccccc);
  Buffer out(unwritten.data(), shape.threads * 4);
  run_kernel(*module, shape, {out.address()});
  CHECK(findings() == "");
  return out.read<uint32_t>();
}

/// One instruction (or lines of several) over a table of operands. Registers: %a, %b, %c, %d of the types given, the
/// result %x; %p0 to %p3 are predicates.
struct Instructions {
  std::string code;
  std::string result_type;                 ///< "b32": of %x, and as it is stored
  std::vector<std::string> operand_types;  ///< of %a, ...
};

inline std::size_t bits_of(const std::string& type) {
  const std::size_t digits = type.find_first_of("0123456789");
  return type.ends_with("x2") ? 32 : static_cast<std::size_t>(std::stoi(type.substr(digits)));
}
/// The type of the same width for registers and memory.
inline std::string plain(const std::string& type) { return "b" + std::to_string(bits_of(type)); }

/// Each line under the guard that only every second lane passes.
inline std::string guarded(const std::string& code) {
  std::string text = "@%even ";
  for (const char c : code) text += c == '\n' ? std::string("\n@%even ") : std::string(1, c);
  return text;
}

constexpr uint64_t untouched = 0x5a5a5a5a5a5a5a5a;

/// Rows of operands, 8 bytes each, to results of 8 bytes.
inline std::vector<uint64_t> run_rows(const Instructions& of, const std::vector<std::vector<uint64_t>>& rows,
                                      bool all_lanes) {
  const std::size_t count = of.operand_types.size(), padded = (rows.size() + 31) / 32 * 32;
  std::vector<uint64_t> in(padded * count);
  for (std::size_t i = 0; i < padded * count; ++i) in[i] = rows[std::min(i / count, rows.size() - 1)][i % count];
  const std::vector<uint64_t> none(padded, untouched);
  const Buffer operands(in.data(), in.size() * 8), results(none.data(), padded * 8);
  std::string body = ".reg .pred %p<4>; .reg .pred %even; .reg .b64 %q<6>; .reg .b32 %i<6>; .reg ." +
                     plain(of.result_type) +
                     " %x;\n"
                     "mov.u32 %i0, %tid.x; mov.u32 %i1, %ctaid.x; mad.lo.u32 %i2, %i1, 32, %i0;\n"
                     "and.b32 %i3, %i0, 1; setp.eq.u32 %even, %i3, 0;\n"
                     "ld.param.u64 %q0, [p0]; ld.param.u64 %q1, [p1]; mad.wide.u32 %q2, %i2, " +
                     std::to_string(8 * count) +
                     ", %q0;\n"
                     "mad.wide.u32 %q3, %i2, 8, %q1;\n" +
                     (bits_of(of.result_type) == 64   ? "mov.b64 %x, 0;\n"
                      : bits_of(of.result_type) == 32 ? "mov.b32 %x, 0;\n"
                                                      : "mov.b16 %x, 0;\n");
  for (std::size_t i = 0; i < count; ++i) {
    const std::string name = std::string("%") + "abcd"[i], type = plain(of.operand_types[i]);
    body +=
        ".reg ." + type + " " + name + "; ld.global." + type + " " + name + ", [%q2+" + std::to_string(8 * i) + "];\n";
  }
  const std::string store = "st.global." + plain(of.result_type) + " [%q3], %x;";
  body += all_lanes ? of.code + "\n" + store : guarded(of.code) + "\n@%even " + store;
  const std::unique_ptr<Module> module = parse(kernel_text(body, 2));
  run_kernel(*module, {static_cast<uint32_t>(padded / 32), 32}, {operands.address(), results.address()});
  return results.read<uint64_t>();
}

inline uint64_t low_bits(uint64_t value, std::size_t bits) {
  return bits == 64 ? value : value & ((uint64_t{1} << bits) - 1);
}

using Row = std::vector<uint64_t>;
using Expected = std::function<uint64_t(const Row&)>;
/// Whether a result may stand for the expected one.
using Accepts = std::function<bool(uint64_t result, uint64_t expected)>;

/// Compares with host arithmetic, once with all lanes active and once with every second one.
inline void check_rows(const Instructions& of, const std::vector<Row>& rows, const Expected& expected,
                       const Accepts& accepts = std::equal_to<uint64_t>()) {
  INFO(of.code);
  const std::size_t bits = bits_of(of.result_type);
  for (const bool all_lanes : {true, false}) {
    const std::vector<uint64_t> results = run_rows(of, rows, all_lanes);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const bool active = all_lanes || i % 32 % 2 == 0;
      const uint64_t result = low_bits(results[i], bits), want = low_bits(expected(rows[i]), bits);
      const bool right = active ? accepts(result, want) : results[i] == untouched;
      if (right) continue;
      INFO("operands: " << std::hex << rows[i][0] << " " << (rows[i].size() > 1 ? rows[i][1] : 0) << " "
                        << (rows[i].size() > 2 ? rows[i][2] : 0) << ", all lanes: " << all_lanes);
      CHECK(result == want);
    }
  }
  CHECK(findings() == "");
}

/// All combinations of the values, for `count` operands.
inline std::vector<Row> combinations(const std::vector<uint64_t>& values, std::size_t count) {
  std::vector<Row> rows{{}};
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<Row> longer;
    for (const Row& row : rows) {
      for (const uint64_t value : values) {
        longer.push_back(row);
        longer.back().push_back(value);
      }
    }
    rows = std::move(longer);
  }
  return rows;
}

}  // namespace cuda_sim::test
