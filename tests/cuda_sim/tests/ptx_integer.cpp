// Integer instructions against host arithmetic, over edge values, with all lanes active and with half of them.

#include <algorithm>
#include <limits>

#include "ptx_program.hpp"

namespace {

using namespace cuda_sim::test;

std::vector<uint64_t> edges(std::size_t bits) {
  std::vector<uint64_t> values = {0,  1,  2,  3,  5,   7,   8,   15,     16,         31,
                                  32, 33, 63, 64, 100, 255, 256, 0x8421, 0x12345678, 0xdeadbeef};
  const uint64_t top = uint64_t{1} << (bits - 1);
  for (const uint64_t value : {top, top - 1, top + 1, ~uint64_t{0}, ~uint64_t{1}, ~uint64_t{99}, top / 3}) {
    values.push_back(low_bits(value, bits));
  }
  return values;
}

std::vector<uint64_t> few_edges(std::size_t bits) {
  const uint64_t top = uint64_t{1} << (bits - 1);
  return {0, 1, 7, 31, 200, top, top - 1, low_bits(~uint64_t{0}, bits), low_bits(~uint64_t{4}, bits), top / 3};
}

template <class T>
struct Named;
#define NAMED(T, NAME)                        \
  template <>                                 \
  struct Named<T> {                           \
    static constexpr const char* name = NAME; \
  };
NAMED(uint16_t, "u16")
NAMED(uint32_t, "u32")
NAMED(uint64_t, "u64")
NAMED(int16_t, "s16")
NAMED(int32_t, "s32")
NAMED(int64_t, "s64")

__extension__ using Wide = __int128;

/// The type's name as signed and unsigned; `opcode` gets it as a suffix.
template <class T, class F>
void check_typed(const std::string& opcode, std::size_t count, const F& f, bool defined_for_zero = true) {
  const std::string type = Named<T>::name;
  std::string code = opcode + "." + type + " %x, %a";
  for (std::size_t i = 1; i < count; ++i) code += std::string(", %") + "abcd"[i];
  std::vector<Row> rows = combinations(count > 2 ? few_edges(8 * sizeof(T)) : edges(8 * sizeof(T)), count);
  for (Row& row : rows) {
    for (uint64_t& value : row) value = static_cast<uint64_t>(static_cast<T>(value));
  }
  if (!defined_for_zero) std::erase_if(rows, [](const Row& row) { return static_cast<T>(row[1]) == 0; });
  check_rows({code + ";", type, std::vector<std::string>(count, type)}, rows, [&](const Row& row) {
    const T a = static_cast<T>(row[0]), b = static_cast<T>(count > 1 ? row[1] : 0),
            c = static_cast<T>(count > 2 ? row[2] : 0);
    return static_cast<uint64_t>(f(Wide{a}, Wide{b}, Wide{c}));
  });
}

template <class F>
void check_all_types(const std::string& opcode, std::size_t count, const F& f) {
  check_typed<uint16_t>(opcode, count, f);
  check_typed<uint32_t>(opcode, count, f);
  check_typed<uint64_t>(opcode, count, f);
  check_typed<int16_t>(opcode, count, f);
  check_typed<int32_t>(opcode, count, f);
  check_typed<int64_t>(opcode, count, f);
}

template <class T>
void check_halves() {
  constexpr std::size_t bits = 8 * sizeof(T);
  const auto high = [](Wide product) { return product >> bits; };
  check_typed<T>("mul.lo", 2, [](Wide a, Wide b, Wide) { return a * b; });
  check_typed<T>("mad.lo", 3, [](Wide a, Wide b, Wide c) { return a * b + c; });
  check_typed<T>("mul.hi", 2, [&](Wide a, Wide b, Wide) { return high(a * b); });
  check_typed<T>("mad.hi", 3, [&](Wide a, Wide b, Wide c) { return high(a * b) + c; });
}

template <class T, class D>
void check_wide() {
  const std::string from = Named<T>::name, to = Named<D>::name;
  const std::vector<Row> rows = combinations(few_edges(8 * sizeof(T)), 3);
  check_rows({"mul.wide." + from + " %x, %a, %b;", to, {from, from, to}}, rows, [](const Row& row) {
    return static_cast<uint64_t>(Wide{static_cast<T>(row[0])} * Wide{static_cast<T>(row[1])});
  });
  check_rows({"mad.wide." + from + " %x, %a, %b, %c;", to, {from, from, to}}, rows, [](const Row& row) {
    return static_cast<uint64_t>(Wide{static_cast<T>(row[0])} * Wide{static_cast<T>(row[1])} +
                                 Wide{static_cast<D>(row[2])});
  });
}

template <class T>
void check_shifts() {
  const std::string type = Named<T>::name;
  const std::size_t bits = 8 * sizeof(T);
  std::vector<Row> rows;
  for (const uint64_t value : edges(bits)) {
    for (const uint64_t by :
         {0u, 1u, 5u, 15u, 16u, 17u, 31u, 32u, 33u, 63u, 64u, 65u, 255u, 256u, 0x80000000u, 0xffffffffu}) {
      rows.push_back({value, by});
    }
  }
  check_rows({"shl.b" + std::to_string(bits) + " %x, %a, %b;", type, {type, "u32"}}, rows,
             [&](const Row& row) { return row[1] >= bits ? 0 : row[0] << row[1]; });
  check_rows({"shr." + type + " %x, %a, %b;", type, {type, "u32"}}, rows, [&](const Row& row) {
    const T value = static_cast<T>(row[0]);
    if (row[1] >= bits) return value < 0 ? ~uint64_t{0} : 0;
    return static_cast<uint64_t>(Wide{value} >> row[1]);
  });
}

}  // namespace

TEST_CASE("ptx integer: add, sub, min, max, logic") {
  check_all_types("add", 2, [](Wide a, Wide b, Wide) { return a + b; });
  check_all_types("sub", 2, [](Wide a, Wide b, Wide) { return a - b; });
  check_all_types("min", 2, [](Wide a, Wide b, Wide) { return std::min(a, b); });
  check_all_types("max", 2, [](Wide a, Wide b, Wide) { return std::max(a, b); });
  check_all_types("sad", 3, [](Wide a, Wide b, Wide c) { return (a > b ? a - b : b - a) + c; });
  for (const char* type : {"b16", "b32", "b64"}) {
    const std::vector<Row> rows = combinations(edges(bits_of(type)), 2);
    const std::string suffix = std::string(".") + type;
    check_rows({"and" + suffix + " %x, %a, %b;", type, {type, type}}, rows, [](const Row& r) { return r[0] & r[1]; });
    check_rows({"or" + suffix + " %x, %a, %b;", type, {type, type}}, rows, [](const Row& r) { return r[0] | r[1]; });
    check_rows({"xor" + suffix + " %x, %a, %b;", type, {type, type}}, rows, [](const Row& r) { return r[0] ^ r[1]; });
    check_rows({"not" + suffix + " %x, %a;", type, {type, type}}, rows, [](const Row& r) { return ~r[0]; });
    check_rows({"cnot" + suffix + " %x, %a;", type, {type, type}}, rows,
               [](const Row& r) { return r[0] == 0 ? 1u : 0u; });
  }
}

TEST_CASE("ptx integer: abs, neg, saturated sums") {
  const auto magnitude = [](Wide a, Wide, Wide) { return a < 0 ? -a : a; };
  const auto negated = [](Wide a, Wide, Wide) { return -a; };
  check_typed<int16_t>("abs", 1, magnitude);
  check_typed<int32_t>("abs", 1, magnitude);
  check_typed<int64_t>("abs", 1, magnitude);
  check_typed<int16_t>("neg", 1, negated);
  check_typed<int32_t>("neg", 1, negated);
  check_typed<int64_t>("neg", 1, negated);
  const auto clamp = [](Wide value) {
    return std::clamp<Wide>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
  };
  check_typed<int32_t>("add.sat", 2, [&](Wide a, Wide b, Wide) { return clamp(a + b); });
  check_typed<int32_t>("sub.sat", 2, [&](Wide a, Wide b, Wide) { return clamp(a - b); });
}

TEST_CASE("ptx integer: mul and mad, low, high and wide") {
  check_halves<uint16_t>();
  check_halves<int16_t>();
  check_halves<uint32_t>();
  check_halves<int32_t>();
  check_halves<int64_t>();
  // Products of two unsigned 64-bit numbers do not fit Wide.
  __extension__ using Unsigned = unsigned __int128;
  const std::vector<Row> rows = combinations(few_edges(64), 3);
  const auto product = [](const Row& r) { return Unsigned{r[0]} * r[1]; };
  check_rows({"mul.lo.u64 %x, %a, %b;", "u64", {"u64", "u64", "u64"}}, rows,
             [&](const Row& r) { return static_cast<uint64_t>(product(r)); });
  check_rows({"mul.hi.u64 %x, %a, %b;", "u64", {"u64", "u64", "u64"}}, rows,
             [&](const Row& r) { return static_cast<uint64_t>(product(r) >> 64); });
  check_rows({"mad.hi.u64 %x, %a, %b, %c;", "u64", {"u64", "u64", "u64"}}, rows,
             [&](const Row& r) { return static_cast<uint64_t>(product(r) >> 64) + r[2]; });
  check_wide<uint16_t, uint32_t>();
  check_wide<int16_t, int32_t>();
  check_wide<uint32_t, uint64_t>();
  check_wide<int32_t, int64_t>();
}

TEST_CASE("ptx integer: mul24 and mad24") {
  const auto low24 = [](Wide a) { return static_cast<Wide>(static_cast<uint32_t>(a) & 0xffffff); };
  const auto extended24 = [](Wide a) {
    return static_cast<Wide>(static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8);
  };
  check_typed<uint32_t>("mul24.lo", 2, [&](Wide a, Wide b, Wide) { return low24(a) * low24(b); });
  check_typed<int32_t>("mul24.lo", 2, [&](Wide a, Wide b, Wide) { return extended24(a) * extended24(b); });
  check_typed<uint32_t>("mad24.lo", 3, [&](Wide a, Wide b, Wide c) { return low24(a) * low24(b) + c; });
  check_typed<int32_t>("mad24.lo", 3, [&](Wide a, Wide b, Wide c) { return extended24(a) * extended24(b) + c; });
}

TEST_CASE("ptx integer: div and rem") {
  const auto quotient = [](Wide a, Wide b, Wide) { return a / b; };
  const auto remainder = [](Wide a, Wide b, Wide) { return a % b; };
  const auto check = [&]<class T>(T) {
    check_typed<T>("div", 2, quotient, false);
    check_typed<T>("rem", 2, remainder, false);
  };
  check(uint16_t{});
  check(int16_t{});
  check(uint32_t{});
  check(int32_t{});
  check(uint64_t{});
  check(int64_t{});
  const std::string by_zero = kernel_text(".reg .b32 %r<4>; mov.u32 %r1, %tid.x; div.u32 %r2, 7, %r1;", 0);
  CHECK(fault_of(by_zero).find("lane 0: integer division by zero") != std::string::npos);
}

TEST_CASE("ptx integer: shifts") {
  check_shifts<uint16_t>();
  check_shifts<uint32_t>();
  check_shifts<uint64_t>();
  check_shifts<int16_t>();
  check_shifts<int32_t>();
  check_shifts<int64_t>();
  std::vector<Row> rows;
  for (const uint64_t low : {0x0ull, 0x12345678ull, 0xffffffffull, 0x80000001ull}) {
    for (const uint64_t high : {0x0ull, 0xcafebabeull, 0xffffffffull}) {
      for (const uint64_t by : {0ull, 1ull, 8ull, 31ull, 32ull, 33ull, 40ull, 0xffffffffull})
        rows.push_back({low, high, by});
    }
  }
  const auto both = [](const Row& row) { return row[1] << 32 | row[0]; };
  const auto clamped = [](const Row& row) { return std::min<uint64_t>(row[2], 32); };
  const std::vector<std::string> types = {"b32", "b32", "u32"};
  check_rows({"shf.l.clamp.b32 %x, %a, %b, %c;", "b32", types}, rows,
             [&](const Row& r) { return clamped(r) == 32 ? r[0] : both(r) << clamped(r) >> 32; });
  check_rows({"shf.r.clamp.b32 %x, %a, %b, %c;", "b32", types}, rows,
             [&](const Row& r) { return both(r) >> clamped(r); });
  check_rows({"shf.l.wrap.b32 %x, %a, %b, %c;", "b32", types}, rows,
             [&](const Row& r) { return both(r) << (r[2] & 31) >> 32; });
  check_rows({"shf.r.wrap.b32 %x, %a, %b, %c;", "b32", types}, rows,
             [&](const Row& r) { return both(r) >> (r[2] & 31); });
}

TEST_CASE("ptx integer: lop3") {
  const std::vector<Row> rows = combinations({0x0, 0xffffffff, 0xf0f0f0f0, 0x12345678, 0xdeadbeef}, 3);
  for (const uint32_t table : {0x00u, 0xffu, 0x80u, 0xfeu, 0x96u, 0xcau, 0xe8u, 0x1bu, 0x42u, 0x3cu}) {
    check_rows({"lop3.b32 %x, %a, %b, %c, " + std::to_string(table) + ";", "b32", {"b32", "b32", "b32"}}, rows,
               [&](const Row& r) {
                 uint64_t result = 0;
                 for (int i = 0; i < 32; ++i) {
                   const uint64_t index = (r[0] >> i & 1) << 2 | (r[1] >> i & 1) << 1 | (r[2] >> i & 1);
                   result |= uint64_t{table >> index & 1} << i;
                 }
                 return result;
               });
  }
}

TEST_CASE("ptx integer: prmt") {
  std::vector<Row> rows;
  for (const uint64_t selectors : {0x3210u, 0x7654u, 0x0123u, 0x4567u, 0xfedcu, 0x8888u, 0x5410u, 0x7632u, 0x1b3fu}) {
    rows.push_back({0x12f48056, 0x9abcde7f, selectors});
  }
  const auto byte = [](const Row& r, uint32_t selector) {
    const uint64_t value = (r[1] << 32 | r[0]) >> (8 * (selector & 7)) & 0xff;
    return (selector & 8) != 0 ? (value >= 128 ? 0xffu : 0u) : value;
  };
  const std::vector<std::string> types = {"b32", "b32", "b32"};
  check_rows({"prmt.b32 %x, %a, %b, %c;", "b32", types}, rows, [&](const Row& r) {
    uint64_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) result |= byte(r, static_cast<uint32_t>(r[2] >> (4 * i) & 15)) << (8 * i);
    return result;
  });
  const std::vector<Row> modes = {{0x44332211, 0x88776655, 0},
                                  {0x44332211, 0x88776655, 1},
                                  {0x44332211, 0x88776655, 2},
                                  {0x44332211, 0x88776655, 3}};
  const auto from_table = [](std::vector<uint64_t> results) {
    return [results](const Row& r) { return results[r[2]]; };
  };
  check_rows({"prmt.b32.f4e %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x44332211, 0x55443322, 0x66554433, 0x77665544}));
  check_rows({"prmt.b32.b4e %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x66778811, 0x77881122, 0x88112233, 0x11223344}));
  check_rows({"prmt.b32.rc8 %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x11111111, 0x22222222, 0x33333333, 0x44444444}));
  check_rows({"prmt.b32.ecl %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x44332211, 0x44332222, 0x44333333, 0x44444444}));
  check_rows({"prmt.b32.ecr %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x11111111, 0x22222211, 0x33332211, 0x44332211}));
  check_rows({"prmt.b32.rc16 %x, %a, %b, %c;", "b32", types}, modes,
             from_table({0x22112211, 0x44334433, 0x22112211, 0x44334433}));
}

TEST_CASE("ptx integer: bfe and bfi") {
  std::vector<Row> rows;
  for (const uint64_t value :
       {0x0ull, 0x123456789abcdef0ull, 0xffffffffffffffffull, 0x80000000ull, 0x7fffffffull, 0x8000000000000000ull}) {
    for (const uint64_t from : {0u, 1u, 7u, 30u, 31u, 32u, 40u, 63u, 64u, 255u, 256u}) {
      for (const uint64_t length : {0u, 1u, 4u, 31u, 32u, 33u, 63u, 64u, 255u}) rows.push_back({value, from, length});
    }
  }
  // Bit by bit, as the definition has it.
  const auto extract = [](uint64_t value, uint32_t bits, const Row& row, bool is_signed) {
    const uint64_t from = row[1] & 255, length = row[2] & 255;
    const uint64_t last = std::min<uint64_t>(from + length - 1, bits - 1);
    const uint64_t sign = is_signed && length != 0 ? value >> last & 1 : 0;
    uint64_t result = 0;
    for (uint64_t i = 0; i < bits; ++i) {
      const uint64_t bit = i < length && from + i < bits ? value >> (from + i) & 1 : sign;
      result |= bit << i;
    }
    return result;
  };
  check_rows({"bfe.u32 %x, %a, %b, %c;", "u32", {"u32", "u32", "u32"}}, rows,
             [&](const Row& r) { return extract(low_bits(r[0], 32), 32, r, false); });
  check_rows({"bfe.s32 %x, %a, %b, %c;", "s32", {"s32", "u32", "u32"}}, rows,
             [&](const Row& r) { return extract(low_bits(r[0], 32), 32, r, true); });
  check_rows({"bfe.u64 %x, %a, %b, %c;", "u64", {"u64", "u32", "u32"}}, rows,
             [&](const Row& r) { return extract(r[0], 64, r, false); });
  check_rows({"bfe.s64 %x, %a, %b, %c;", "s64", {"s64", "u32", "u32"}}, rows,
             [&](const Row& r) { return extract(r[0], 64, r, true); });
  const auto insert = [](uint32_t bits, const Row& row) {
    uint64_t result = 0x5555555555555555;
    const uint64_t from = row[1] & 255, length = row[2] & 255;
    for (uint64_t i = 0; i < length && from + i < bits; ++i) {
      result = (result & ~(uint64_t{1} << (from + i))) | (row[0] >> i & 1) << (from + i);
    }
    return result;
  };
  check_rows({"bfi.b32 %x, %a, 0x55555555, %b, %c;", "b32", {"b32", "u32", "u32"}}, rows,
             [&](const Row& r) { return insert(32, r); });
  check_rows({"bfi.b64 %x, %a, 0x5555555555555555, %b, %c;", "b64", {"b64", "u32", "u32"}}, rows,
             [&](const Row& r) { return insert(64, r); });
}

TEST_CASE("ptx integer: popc, clz, bfind, brev, bmsk") {
  const std::vector<Row> rows32 = combinations(edges(32), 1), rows64 = combinations(edges(64), 1);
  check_rows({"popc.b32 %x, %a;", "u32", {"b32"}}, rows32,
             [](const Row& r) { return static_cast<uint64_t>(std::popcount(r[0])); });
  check_rows({"popc.b64 %x, %a;", "u32", {"b64"}}, rows64,
             [](const Row& r) { return static_cast<uint64_t>(std::popcount(r[0])); });
  check_rows({"clz.b32 %x, %a;", "u32", {"b32"}}, rows32,
             [](const Row& r) { return static_cast<uint64_t>(std::countl_zero(static_cast<uint32_t>(r[0]))); });
  check_rows({"clz.b64 %x, %a;", "u32", {"b64"}}, rows64,
             [](const Row& r) { return static_cast<uint64_t>(std::countl_zero(r[0])); });
  const auto find = [](uint64_t value, int bits) {
    return value == 0 ? ~uint64_t{0} : static_cast<uint64_t>(bits - 1 - (std::countl_zero(value) - (64 - bits)));
  };
  check_rows({"bfind.u32 %x, %a;", "u32", {"u32"}}, rows32, [&](const Row& r) { return find(r[0], 32); });
  check_rows({"bfind.u64 %x, %a;", "u32", {"u64"}}, rows64, [&](const Row& r) { return find(r[0], 64); });
  check_rows({"bfind.s32 %x, %a;", "u32", {"s32"}}, rows32,
             [&](const Row& r) { return find(low_bits(static_cast<int32_t>(r[0]) < 0 ? ~r[0] : r[0], 32), 32); });
  check_rows({"bfind.s64 %x, %a;", "u32", {"s64"}}, rows64,
             [&](const Row& r) { return find(static_cast<int64_t>(r[0]) < 0 ? ~r[0] : r[0], 64); });
  check_rows({"bfind.shiftamt.u32 %x, %a;", "u32", {"u32"}}, rows32,
             [&](const Row& r) { return r[0] == 0 ? ~uint64_t{0} : 31 - find(r[0], 32); });
  const auto reversed = [](uint64_t value, int bits) {
    uint64_t result = 0;
    for (int i = 0; i < bits; ++i) result |= (value >> i & 1) << (bits - 1 - i);
    return result;
  };
  check_rows({"brev.b32 %x, %a;", "b32", {"b32"}}, rows32, [&](const Row& r) { return reversed(r[0], 32); });
  check_rows({"brev.b64 %x, %a;", "b64", {"b64"}}, rows64, [&](const Row& r) { return reversed(r[0], 64); });
  check_rows({"bmsk.clamp.b32 %x, %a, %b;", "b32", {"b32", "b32"}}, combinations({0, 1, 5, 31, 32, 33, 100}, 2),
             [](const Row& r) {
               uint64_t result = 0;
               for (uint64_t i = r[0]; i < r[0] + r[1] && i < 32; ++i) result |= uint64_t{1} << i;
               return result;
             });
}

TEST_CASE("ptx integer: carries") {
  const std::vector<Row> rows = combinations(few_edges(32), 3);
  // (a, b) + (b, c): the high word gets the low one's carry.
  const auto wide = [](uint64_t low, uint64_t high) { return high << 32 | low; };
  const std::string high_word = "\naddc.u32 %x, %b, %c;";
  check_rows({"add.cc.u32 %x, %a, %b;" + high_word, "u32", {"u32", "u32", "u32"}}, rows,
             [&](const Row& r) { return (wide(r[0], r[1]) + wide(r[1], r[2])) >> 32; });
  check_rows({"sub.cc.u32 %x, %a, %b;\nsubc.u32 %x, %b, %c;", "u32", {"u32", "u32", "u32"}}, rows,
             [&](const Row& r) { return (wide(r[0], r[1]) - wide(r[1], r[2])) >> 32; });
  check_rows({"add.cc.u32 %x, %a, %a;\naddc.cc.u32 %x, %b, %b;\naddc.u32 %x, %c, 0;", "u32", {"u32", "u32", "u32"}},
             rows, [&](const Row& r) { return r[2] + (r[1] >> 31); });
  check_rows({"mad.lo.cc.u32 %x, %a, %b, %c;\nmadc.hi.u32 %x, %a, %b, 0;", "u32", {"u32", "u32", "u32"}}, rows,
             [&](const Row& r) { return (r[0] * r[1] + r[2]) >> 32; });
  const std::vector<Row> rows64 = combinations(few_edges(64), 3);
  check_rows({"add.cc.u64 %x, %a, %b;\naddc.u64 %x, %b, %c;", "u64", {"u64", "u64", "u64"}}, rows64,
             [&](const Row& r) { return r[1] + r[2] + (r[0] + r[1] < r[0] ? 1 : 0); });
  check_rows({"sub.cc.s64 %x, %a, %b;\nsubc.s64 %x, %b, %c;", "s64", {"s64", "s64", "s64"}}, rows64,
             [&](const Row& r) { return r[1] - r[2] - (r[0] < r[1] ? 1 : 0); });
}

TEST_CASE("ptx integer: dp4a") {
  const std::vector<Row> rows = combinations({0x0, 0x01020304, 0x80ff7f01, 0xffffffff, 0x7f7f7f7f}, 3);
  const auto dot = [](const Row& r, bool a_signed, bool b_signed) {
    int64_t sum = static_cast<int64_t>(r[2]);
    for (int i = 0; i < 4; ++i) {
      const auto byte = [&](uint64_t word, bool is_signed) {
        const int64_t value = static_cast<int64_t>(word >> (8 * i) & 0xff);
        return is_signed && value > 127 ? value - 256 : value;
      };
      sum += byte(r[0], a_signed) * byte(r[1], b_signed);
    }
    return static_cast<uint64_t>(sum);
  };
  const std::vector<std::string> types = {"b32", "b32", "b32"};
  check_rows({"dp4a.u32.u32 %x, %a, %b, %c;", "b32", types}, rows, [&](const Row& r) { return dot(r, false, false); });
  check_rows({"dp4a.s32.s32 %x, %a, %b, %c;", "b32", types}, rows, [&](const Row& r) { return dot(r, true, true); });
  check_rows({"dp4a.u32.s32 %x, %a, %b, %c;", "b32", types}, rows, [&](const Row& r) { return dot(r, false, true); });
}

TEST_CASE("ptx integer: logic of predicates") {
  const std::vector<Row> rows = combinations({0, 1}, 2);
  const std::string set = "setp.ne.u32 %p0, %a, 0;\nsetp.ne.u32 %p1, %b, 0;\n", select = "\nselp.u32 %x, 1, 0, %p2;";
  const std::vector<std::string> types = {"u32", "u32"};
  check_rows({set + "and.pred %p2, %p0, %p1;" + select, "u32", types}, rows, [](const Row& r) { return r[0] & r[1]; });
  check_rows({set + "or.pred %p2, %p0, %p1;" + select, "u32", types}, rows, [](const Row& r) { return r[0] | r[1]; });
  check_rows({set + "xor.pred %p2, %p0, %p1;" + select, "u32", types}, rows, [](const Row& r) { return r[0] ^ r[1]; });
  check_rows({set + "not.pred %p2, %p0;" + select, "u32", types}, rows, [](const Row& r) { return 1 - r[0]; });
  check_rows({set + "mov.pred %p2, %p1;" + select, "u32", types}, rows, [](const Row& r) { return r[1]; });
}
