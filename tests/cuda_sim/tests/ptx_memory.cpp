// ld, st, atom, cp.async, ldmatrix and mma; what accesses cost; what is refused.

#include <algorithm>
#include <cmath>

#include "halves.hpp"
#include "ptx_program.hpp"

namespace {

using namespace cuda_sim;
using namespace cuda_sim::test;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <class F>
void check_threads(const std::string& body, const F& expected, const std::string& before = "") {
  const std::vector<uint32_t> results = results_of(body, {}, before);
  for (uint32_t t = 0; t < 32; ++t) {
    INFO(body << "\nthread " << t);
    CHECK(results[t] == static_cast<uint32_t>(expected(t)));
  }
}

/// The counters of a kernel of one warp; %rd1 is `buffer`, %r1 the thread.
Counters costs_of(const std::string& code, std::size_t bytes = 1 << 16) {
  const std::vector<char> zeros(bytes);
  const Buffer buffer(zeros.data(), bytes);
  const auto module = parse(kernel_text(
      ".reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .pred %p<4>;\nld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x;\n" + code,
      1, ".shared .align 16 .b8 values[16384];"));
  const Counters counters = run_kernel(*module, {}, {buffer.address()});
  take_reports();
  return counters;
}

std::string memory_fault(const std::string& code) {
  return fault_of(kernel_text(".reg .b32 %r<8>; .reg .b64 %rd<8>;\nmov.u32 %r1, %tid.x;\n" + code, 0,
                              ".shared .align 16 .b8 values[256];"));
}

}  // namespace

TEST_CASE("ptx memory: each width, with sign, from and to every space") {
  const uint8_t table[16] = {0x01, 0x82, 0x03, 0x84, 0x05, 0x86, 0x07, 0x88,
                             0x11, 0x92, 0x13, 0x94, 0x15, 0x96, 0x17, 0x98};
  const Buffer buffer(table, sizeof table);
  const std::string base = ".reg .b64 %base; mov.u64 %base, " + std::to_string(buffer.address()) + ";\n";
  const auto word = [&](uint32_t offset) {
    uint32_t value;
    std::memcpy(&value, table + offset, 4);
    return value;
  };
  check_threads(base + "ld.global.u8 %result, [%base+1];\n", [](uint32_t) { return 0x82; });
  check_threads(base + "ld.global.s8 %result, [%base+1];\n", [](uint32_t) { return 0xffffff82; });
  check_threads(base + "ld.global.u16 %result, [%base+2];\n", [](uint32_t) { return 0x8403; });
  check_threads(base + "ld.global.s16 %result, [%base+2];\n", [](uint32_t) { return 0xffff8403; });
  check_threads(base + "ld.global.nc.L1::no_allocate.L2::128B.u32 %result, [%base+4];\n",
                [&](uint32_t) { return word(4); });
  check_threads(base + "ld.global.s32 %rd1, [%base+4]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %result, %rd1;\n",
                [](uint32_t) { return 0xffffffff; });
  check_threads(base + "ld.global.u64 %rd1, [%base]; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %result, %rd1;\n",
                [&](uint32_t) { return word(4); });
  check_threads(base + "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%base]; xor.b32 %result, %r2, %r4;\n",
                [&](uint32_t) { return word(4) ^ word(12); });
  check_threads(base + "ld.global.v2.b64 {%rd1, %rd2}, [%base]; cvt.u32.u64 %result, %rd2;\n",
                [&](uint32_t) { return word(8); });
  check_threads(base + "ld.global.v4.u8 {%r1, %r2, %r3, %r4}, [%base+4]; or.b32 %result, %r2, %r3;\n",
                [](uint32_t) { return 0x87; });
  check_threads(base + "ld.relaxed.gpu.global.u32 %result, [%base];\n", [&](uint32_t) { return word(0); });
  check_threads(base + "ld.volatile.u32 %result, [%base];\n", [&](uint32_t) { return word(0); });
  const std::string shared = ".shared .align 16 .b8 values[1024];";
  const std::string mine = "shl.b32 %r1, %t, 4; mov.u32 %r2, values; add.u32 %r2, %r2, %r1;\n";
  check_threads(
      mine +
          "st.shared.v4.u32 [%r2], {%t, 5, %r1, 7}; ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r2];\nadd.u32 %result, "
          "%r3, %r5;\n",
      [](uint32_t t) { return 17 * t; }, shared);
  check_threads(
      mine +
          "st.shared.u8 [%r2+3], %t; st.shared.u16 [%r2], 0x1234; st.shared.u8 [%r2+2], 0; ld.shared.u32 %result, "
          "[%r2];\n",
      [](uint32_t t) { return t << 24 | 0x1234; }, shared);
  // The same memory by its generic address; lanes of one load in different spaces.
  check_threads(
      mine +
          "st.shared.u32 [%r2], %t; cvt.u64.u32 %rd1, %r2; cvta.shared.u64 %rd2, %rd1; ld.u32 %r3, [%rd2]; "
          "isspacep.shared %p1, %rd2;\n"
          "selp.u32 %result, %r3, 99, %p1;\n",
      [](uint32_t t) { return t; }, shared);
  check_threads(
      base + mine +
          "st.shared.u32 [%r2], %t; cvt.u64.u32 %rd1, %r2; cvta.shared.u64 %rd2, %rd1; setp.lt.u32 %p1, %t, 9; "
          "selp.b64 %rd3, %rd2, %base, %p1;\n"
          "ld.u32 %result, [%rd3]; isspacep.global %p2, %rd3; @%p2 add.u32 %result, %result, 1;\n",
      [&](uint32_t t) { return t < 9 ? t : word(0) + 1; }, shared);
  const std::string local = ".local .align 4 .b8 stack[64];\nmov.u64 %rd1, stack; cvta.local.u64 %rd2, %rd1;\n";
  check_threads(local +
                    "st.local.u32 [%rd1+8], %t; and.b32 %r1, %t, 1; cvt.u64.u32 %rd3, %r1; add.u64 %rd3, %rd3, %rd2; "
                    "ld.u32 %r3, [%rd2+8]; ld.local.u8 %r4, [stack+8];\n"
                    "isspacep.local %p1, %rd2; sub.u32 %r5, %r3, %r4; selp.u32 %result, %r5, 99, %p1;\n",
                [](uint32_t) { return 0; });
  check_threads(
      "ld.const.u32 %result, [numbers+4];\n", [](uint32_t) { return 22; },
      ".const .align 4 .b32 numbers[2] = {11, 22};");
  check_threads(
      "mov.u64 %rd1, variable; cvta.global.u64 %rd2, %rd1; ld.u32 %result, [%rd2];\n", [](uint32_t) { return 33; },
      ".global .align 4 .b32 variable = 33;");
  check_threads(
      "mov.b64 %rd1, p0; ld.param.u64 %rd2, [%rd1]; ld.param.u64 %rd3, [p0]; sub.u64 %rd4, %rd2, %rd3; cvt.u32.u64 "
      "%result, %rd4;\n",
      [](uint32_t) { return 0; });
}

TEST_CASE("ptx memory: out of bounds, misaligned, another's stack") {
  CHECK(contains(memory_fault("shl.b32 %r2, %r1, 4; ld.shared.u32 %r3, [%r2]; mov.u32 %r4, values;"),
                 "lane 16: shared memory out of bounds: address 256 of 256 bytes"));
  CHECK(contains(memory_fault("st.shared.u32 [values+256], 1;"), "shared memory out of bounds"));
  CHECK(contains(memory_fault("mov.u32 %r2, values; sub.u32 %r2, %r2, 4; ld.shared.u32 %r3, [%r2];"),
                 "shared memory out of bounds"));
  CHECK(contains(memory_fault("ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [values+8];"),
                 "lane 0: address 8 is not aligned to 16 bytes"));
  CHECK(contains(memory_fault(".local .align 4 .b8 stack[8];\nst.local.u32 [stack+8], 1;"),
                 "local address 8 is out of bounds (8 bytes)"));
  CHECK(contains(
      memory_fault(
          ".local .align 4 .b8 stack[16];\nmov.u64 %rd1, stack; cvta.local.u64 %rd2, %rd1; ld.u32 %r2, [%rd2+16];"),
      "another thread's local memory"));
  const std::string outside =
      kernel_text(".reg .b64 %rd<2>; .reg .b32 %r<2>; ld.param.u64 %rd1, [p0]; ld.global.u32 %r1, [%rd1+64];", 1);
  const std::vector<char> zeros(64);
  const Buffer small(zeros.data(), 64);
  CHECK(fault_of(outside, {}, {small.address()}) == "");
  CHECK(contains(findings(), "[ld.global.u32]"));
}

TEST_CASE("ptx memory: atomics") {
  const auto check = [](const std::string& code, const std::string& type, uint64_t initial, uint64_t after) {
    const bool wide = bits_of(type) == 64;
    const Buffer buffer(&initial, 8);
    const auto module =
        parse(kernel_text(".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .f64 %fd<4>; ld.param.u64 %rd1, "
                          "[p0]; mov.u32 %r1, %tid.x; cvt.u64.u32 %rd2, %r1;\n" +
                              code,
                          1));
    run_kernel(*module, {2, 32}, {buffer.address()});
    INFO(code);
    CHECK(low_bits(buffer.read<uint64_t>()[0], wide ? 64 : 32) == after);
    CHECK(findings() == "");
  };
  check("atom.global.add.u32 %r2, [%rd1], %r1;", "u32", 5, 5 + 2 * 496);
  check("red.global.add.u64 [%rd1], %rd2;", "u64", 1ull << 40, (1ull << 40) + 992);
  check("atom.add.s32 %r2, [%rd1], -1;", "s32", 0, static_cast<uint32_t>(-64));
  check("cvt.rn.f32.u32 %f1, %r1; red.relaxed.gpu.global.add.f32 [%rd1], %f1;", "f32", 0,
        std::bit_cast<uint32_t>(992.0f));
  check("cvt.rn.f64.u32 %fd1, %r1; atom.global.add.f64 %fd2, [%rd1], %fd1;", "f64", 0, std::bit_cast<uint64_t>(992.0));
  check("red.global.add.noftz.bf16x2 [%rd1], 0x40003f80;", "b32", 0, 0x43004280);  // 64 times (2, 1)
  check("red.global.add.noftz.f16x2 [%rd1], 0x40003c00;", "b32", 0, 0x58005400);
  check("red.global.min.s32 [%rd1], -7;", "s32", 3, static_cast<uint32_t>(-7));
  check("red.global.max.u32 [%rd1], %r1;", "u32", 3, 31);
  check("red.global.max.s64 [%rd1], -3;", "s64", static_cast<uint64_t>(-9), static_cast<uint64_t>(-3));
  check("red.global.and.b32 [%rd1], 0xf0;", "b32", 0xff, 0xf0);
  check("red.global.or.b32 [%rd1], %r1;", "b32", 0x100, 0x11f);
  check("red.global.xor.b64 [%rd1], 1;", "b64", 6, 6);
  check("atom.global.inc.u32 %r2, [%rd1], 9;", "u32", 0, 64 % 10);
  check("atom.global.dec.u32 %r2, [%rd1], 9;", "u32", 0, 10 - 64 % 10);
  check("atom.global.exch.b32 %r2, [%rd1], %r1;", "b32", 77, 31);
  check("atom.global.cas.b32 %r2, [%rd1], %r1, 40;", "b32", 4, 40);
  check("atom.acq_rel.gpu.global.cas.b64 %rd3, [%rd1], %rd2, 40;", "b64", 4, 40);
  check_threads(
      "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [count], 100; bar.sync 0; atom.shared.add.u32 %result, [count], 1;\n",
      [](uint32_t t) { return 100 + t; }, ".shared .align 4 .b32 count;\n");
}

TEST_CASE("ptx memory: atomics of every type give the old value and leave the new one") {
  const std::vector<Row> rows =
      combinations({0, 1, 5, 0x7fffffff, 0x80000000, 0xfffffff0, 0x7fffffffffffffff, 0x8000000000000000, ~0ULL}, 2);
  const auto check = [&](const std::string& operation, const std::string& type,
                         uint64_t (*expected)(int64_t, int64_t)) {
    INFO(operation << " " << type);
    const std::size_t bits = bits_of(type);
    const std::string width = plain(type);
    const auto module =
        parse(kernel_text(".reg .b64 %rd1; .reg ." + width + " %b, %old; ld.param.u64 %rd1, [p0]; ld.global." + width +
                              " %b, [%rd1+8];\natom.global." + operation + "." + type +
                              " %old, [%rd1], %b; st.global." + width + " [%rd1+16], %old;",
                          1));
    const auto extended = [&](uint64_t value) {  // as the type sees it; u64 is left out
      return bits == 64       ? static_cast<int64_t>(value)
             : type[0] == 's' ? int64_t{static_cast<int32_t>(value)}
                              : int64_t{static_cast<uint32_t>(value)};
    };
    for (const Row& row : rows) {
      const uint64_t memory[3] = {low_bits(row[0], bits), low_bits(row[1], bits), 0};
      const Buffer buffer(memory, sizeof memory);
      run_kernel(*module, {1, 1}, {buffer.address()});
      const auto after = buffer.read<uint64_t>();
      CHECK(after[0] == low_bits(expected(extended(row[0]), extended(row[1])), bits));
      CHECK(after[2] == memory[0]);
    }
  };
  for (const char* type : {"u32", "s32", "u64", "s64"})
    check("add", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(a) + static_cast<uint64_t>(b); });
  for (const char* type : {"u32", "s32", "s64"}) {
    check("min", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(std::min(a, b)); });
    check("max", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(std::max(a, b)); });
  }
  check("min", "u64",
        [](int64_t a, int64_t b) { return std::min(static_cast<uint64_t>(a), static_cast<uint64_t>(b)); });
  check("max", "u64",
        [](int64_t a, int64_t b) { return std::max(static_cast<uint64_t>(a), static_cast<uint64_t>(b)); });
  for (const char* type : {"b32", "b64"}) {
    check("and", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(a & b); });
    check("or", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(a | b); });
    check("xor", type, [](int64_t a, int64_t b) { return static_cast<uint64_t>(a ^ b); });
    check("exch", type, [](int64_t, int64_t b) { return static_cast<uint64_t>(b); });
  }
}

TEST_CASE("ptx memory: fences, prefetches and sleep change nothing, ldu is a load") {
  const uint32_t table[2] = {7, 9};
  const Buffer buffer(table, sizeof table);
  const std::string base = ".reg .b64 %base; mov.u64 %base, " + std::to_string(buffer.address()) + ";\n";
  for (const char* nothing :
       {"membar.gl;", "membar.cta;", "fence.acq_rel.gpu;", "fence.sc.sys;", "prefetch.global.L2 [%base];",
        "prefetchu.L1 [%base];", "nanosleep.u32 20;", "applypriority.global.L2::evict_normal [%base], 128;"})
    check_threads(base + "mov.u32 %result, %t;\n" + nothing + "\n", [](uint32_t t) { return t; });
  check_threads(base + "ldu.global.u32 %result, [%base+4];\n", [](uint32_t) { return 9; });
  const std::string discard = "mov.u64 %rd1, " + std::to_string(buffer.address()) + "; discard.global.L2 [%rd1], 128;";
  CHECK(contains(memory_fault(discard), "discard"));  // leaves memory undefined: not modelled
  CHECK(buffer.read<uint32_t>() == std::vector<uint32_t>{7, 9});
}

TEST_CASE("ptx memory: sectors and bank conflicts") {
  const auto sectors = [](const std::string& code) {
    const Counters counters = costs_of(code);
    CHECK(counters.global_requests == 1);
    return std::pair(counters.global_sectors, counters.global_ideal_sectors);
  };
  using Pair = std::pair<uint64_t, uint64_t>;
  const auto strided = [](int stride) { return "mad.wide.u32 %rd2, %r1, " + std::to_string(stride) + ", %rd1;\n"; };
  CHECK(sectors(strided(4) + "ld.global.u32 %r2, [%rd2];") == Pair(4, 4));
  CHECK(sectors(strided(4) + "ld.global.u32 %r2, [%rd2+4];") == Pair(5, 4));
  CHECK(sectors(strided(16) + "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd2];") == Pair(16, 16));
  CHECK(sectors(strided(128) + "st.global.u32 [%rd2], %r1;") == Pair(32, 4));
  CHECK(sectors("ld.global.u32 %r2, [%rd1];") == Pair(1, 1));
  CHECK(sectors("xor.b32 %r3, %r1, 21; mad.wide.u32 %rd2, %r3, 4, %rd1; ld.global.u32 %r2, [%rd2];") == Pair(4, 4));
  const auto wavefronts = [](const std::string& code) {
    const Counters counters = costs_of("mov.u32 %r3, values;\n" + code);
    return std::pair(counters.shared_wavefronts, counters.shared_ideal_wavefronts);
  };
  const auto shared = [](int stride) { return "mad.lo.u32 %r4, %r1, " + std::to_string(stride) + ", %r3;\n"; };
  CHECK(wavefronts(shared(4) + "st.shared.u32 [%r4], %r1;") == Pair(1, 1));
  CHECK(wavefronts(shared(8) + "st.shared.u32 [%r4], %r1;") == Pair(2, 1));
  CHECK(wavefronts(shared(128) + "st.shared.u32 [%r4], %r1;") == Pair(32, 1));
  CHECK(wavefronts(shared(132) + "st.shared.u32 [%r4], %r1;") == Pair(1, 1));
  CHECK(wavefronts("ld.shared.u32 %r5, [%r3];") == Pair(1, 1));
  CHECK(wavefronts(shared(16) + "st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};") == Pair(4, 4));
  CHECK(wavefronts(shared(256) + "st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};") == Pair(32, 4));
  CHECK(wavefronts(shared(80) + "st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};") == Pair(4, 4));
  CHECK(wavefronts(shared(16) + "st.shared.v2.u32 [%r4], {%r1, %r1};") == Pair(4, 2));
  const Counters bytes = costs_of(strided(4) + "ld.global.u32 %r2, [%rd2]; st.global.u32 [%rd2], %r2;");
  CHECK(bytes.global_bytes_read == 128);
  CHECK(bytes.global_bytes_written == 128);
}

TEST_CASE("ptx cp.async: nothing is there before the wait, groups, zeros") {
  std::vector<uint32_t> source(256);
  for (uint32_t i = 0; i < 256; ++i) source[i] = 1000 + i;
  const Buffer buffer(source.data(), 1024);
  const std::string shared = ".shared .align 16 .b8 values[1024];";
  const std::string begin = ".reg .b64 %base; mov.u64 %base, " + std::to_string(buffer.address()) +
                            ";\nshl.b32 %r1, %t, 4; mov.u32 %r2, values; add.u32 %r2, %r2, %r1; cvt.u64.u32 %rd1, %r1; "
                            "add.u64 %rd1, %rd1, %base;\n";
  check_threads(
      begin +
          "cp.async.cg.shared.global.L2::128B [%r2], [%rd1], 16; cp.async.commit_group; cp.async.wait_group 0; "
          "ld.shared.u32 %result, [%r2+4];\n",
      [](uint32_t t) { return 1001 + 4 * t; }, shared);
  check_threads(
      begin + "cp.async.ca.shared.global [%r2+8], [%rd1+4], 4; cp.async.wait_all; ld.shared.u32 %result, [%r2+8];\n",
      [](uint32_t t) { return 1001 + 4 * t; }, shared);
  check_threads(
      begin +
          "and.b32 %r3, %t, 1; shl.b32 %r3, %r3, 3; cp.async.cg.shared.global [%r2], [%rd1], 16, %r3; "
          "cp.async.wait_all; ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2];\n"
          "add.u32 %result, %r5, %r6;\n",
      [](uint32_t t) { return t % 2 == 1 ? 1001 + 4 * t : 0; }, shared);
  // With one group open only the older one has arrived; the other's bytes may not be read yet.
  check_threads(
      begin +
          "cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group; cp.async.ca.shared.global [%r2+4], "
          "[%rd1+4], 4; cp.async.commit_group;\n"
          "cp.async.wait_group 1; ld.shared.u32 %result, [%r2]; cp.async.wait_group 0;\n",
      [](uint32_t t) { return 1000 + 4 * t; }, shared);
  const std::string body =
      ".reg .b32 %r<8>; .reg .b64 %rd<4>; ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 "
      "%r3, values; add.u32 %r4, %r3, %r2;\n"
      "st.shared.u32 [%r4], 5; cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group; ld.shared.u32 %r5, "
      "[%r4]; st.global.u32 [%rd1+128], %r5;\n";
  const auto module = parse(kernel_text(body, 1, shared));
  run_kernel(*module, {1, 1}, {buffer.address()});
  CHECK(buffer.read<uint32_t>()[32] == 5);
  CHECK(contains(findings(), "[ld.shared.u32]"));
  CHECK(contains(memory_fault("mov.u64 %rd1, 0; cp.async.cg.shared.global [values+8], [%rd1], 16;"),
                 "is not aligned to 16"));
}

TEST_CASE("ptx ldmatrix and movmatrix") {
  // Element (r, c) of matrix m is 64 m + 8 r + c; rows lie 16 bytes apart.
  const std::string fill =
      "shl.b32 %r1, %t, 4; mov.u32 %r2, values; add.u32 %r2, %r2, %r1; shl.b32 %r3, %t, 3; mov.u32 %r4, 0;\n"
      "FILL: add.u32 %r5, %r3, %r4; shl.b32 %r6, %r4, 1; add.u32 %r6, %r6, %r2; st.shared.u16 [%r6], %r5;\n"
      "add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 8; @%p1 bra FILL; bar.warp.sync -1;\n";
  const std::string shared = ".shared .align 16 .b8 values[512];";
  const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
  for (const uint32_t matrix : {0u, 1u, 2u, 3u}) {
    const std::string take = "mov.u32 %result, %r" + std::to_string(10 + matrix) + ";\n";
    check_threads(
        fill + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];\n" + take,
        [&](uint32_t t) { return pair(64 * matrix + 2 * t, 64 * matrix + 2 * t + 1); }, shared);
    check_threads(
        fill + "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];\n" + take,
        [&](uint32_t t) { return pair(64 * matrix + 16 * (t % 4) + t / 4, 64 * matrix + 16 * (t % 4) + 8 + t / 4); },
        shared);
  }
  check_threads(
      fill + "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r10, %r11}, [%r2]; mov.u32 %result, %r11;\n",
      [&](uint32_t t) { return pair(64 + 2 * t, 65 + 2 * t); }, shared);
  check_threads(
      fill +
          "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r2]; movmatrix.sync.aligned.m8n8.trans.b16 %result, "
          "%r10;\n",
      [&](uint32_t t) { return pair(16 * (t % 4) + t / 4, 16 * (t % 4) + 8 + t / 4); }, shared);
}

namespace {

/// d = a b + c for small integers, which every type holds exactly: a (m, k), b (k, n), c (m, n).
struct Product {
  uint32_t m, n, k;
  static int a(uint32_t i, uint32_t l) { return static_cast<int>((3 * i + 5 * l) % 7) - 3; }
  static int b(uint32_t l, uint32_t j) { return static_cast<int>((2 * l + 3 * j) % 5) - 2; }
  static int c(uint32_t i, uint32_t j) { return static_cast<int>(i) - static_cast<int>(j); }
  int d(uint32_t i, uint32_t j) const {
    int sum = c(i, j);
    for (uint32_t l = 0; l < k; ++l) sum += a(i, l) * b(l, j);
    return sum;
  }
};

using Fragment = std::function<uint32_t(uint32_t lane, uint32_t index)>;

/// Runs an mma whose a, b and c registers are as given, and returns d's, four for each lane.
std::vector<uint32_t> run_mma(const std::string& opcode, std::size_t a_count, std::size_t b_count, const Fragment& a,
                              const Fragment& b, const Fragment& c) {
  std::vector<uint32_t> in(32 * 12), zeros(32 * 4);
  for (uint32_t l = 0; l < 32; ++l) {
    for (uint32_t i = 0; i < a_count; ++i) in[12 * l + i] = a(l, i);
    for (uint32_t i = 0; i < b_count; ++i) in[12 * l + 4 + i] = b(l, i);
    for (uint32_t i = 0; i < 4; ++i) in[12 * l + 8 + i] = c(l, i);
  }
  const Buffer operands(in.data(), in.size() * 4), results(zeros.data(), zeros.size() * 4);
  const auto list = [](const std::string& name, std::size_t count) {
    std::string text = "{";
    for (std::size_t i = 0; i < count; ++i) text += (i > 0 ? ", %" : "%") + name + std::to_string(i);
    return text + "}";
  };
  const auto module =
      parse(kernel_text(".reg .b32 %t; .reg .b64 %rd<6>; .reg .b32 %a<4>; .reg .b32 %b<4>; .reg .b32 %c<4>; .reg .b32 "
                        "%d<4>;\nld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];\n"
                        "mov.u32 %t, %tid.x; mad.wide.u32 %rd2, %t, 48, %rd0; mad.wide.u32 %rd3, %t, 16, %rd1;\n"
                        "ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%rd2]; ld.global.v4.b32 {%b0, %b1, %b2, %b3}, "
                        "[%rd2+16]; ld.global.v4.b32 {%c0, %c1, %c2, %c3}, [%rd2+32];\n" +
                            opcode + " " + list("d", 4) + ", " + list("a", a_count) + ", " + list("b", b_count) + ", " +
                            list("c", 4) + ";\nst.global.v4.b32 [%rd3], {%d0, %d1, %d2, %d3};",
                        2));
  const Counters counters = run_kernel(*module, {}, {operands.address(), results.address()});
  CHECK(counters.mma == 1);
  CHECK(findings() == "");
  return results.read<uint32_t>();
}

void check_mma(const std::string& opcode, const Product& product, std::size_t a_count, std::size_t b_count,
               const Fragment& a, const Fragment& b) {
  const auto row = [](uint32_t l, uint32_t i) { return l / 4 + 8 * (i / 2); };
  const auto column = [](uint32_t l, uint32_t i) { return 2 * (l % 4) + i % 2; };
  const std::vector<uint32_t> d = run_mma(opcode, a_count, b_count, a, b, [&](uint32_t l, uint32_t i) {
    return std::bit_cast<uint32_t>(static_cast<float>(Product::c(row(l, i), column(l, i))));
  });
  for (uint32_t l = 0; l < 32; ++l) {
    for (uint32_t i = 0; i < 4; ++i) {
      INFO(opcode << " lane " << l << " register " << i);
      CHECK(std::bit_cast<float>(d[4 * l + i]) == static_cast<float>(product.d(row(l, i), column(l, i))));
    }
  }
}

template <class T>
void check_half_mma(const std::string& type) {
  const auto pair = [](int low, int high) {
    return narrow<T>(static_cast<float>(low)).bits | uint32_t{narrow<T>(static_cast<float>(high)).bits} << 16;
  };
  const Fragment a = [&](uint32_t l, uint32_t i) {
    const uint32_t row = l / 4 + 8 * (i % 2), column = 2 * (l % 4) + 8 * (i / 2);
    return pair(Product::a(row, column), Product::a(row, column + 1));
  };
  const Fragment b = [&](uint32_t l, uint32_t i) {
    const uint32_t row = 2 * (l % 4) + 8 * i, column = l / 4;
    return pair(Product::b(row, column), Product::b(row + 1, column));
  };
  const std::string types = ".row.col.f32." + type + "." + type + ".f32";
  check_mma("mma.sync.aligned.m16n8k16" + types, {16, 8, 16}, 4, 2, a, b);
  check_mma("mma.sync.aligned.m16n8k8" + types, {16, 8, 8}, 2, 1, a, b);
}

}  // namespace

TEST_CASE("ptx mma: bf16, f16 and tf32 with f32 sums") {
  check_half_mma<BFloat>("bf16");
  check_half_mma<Half>("f16");
  // The low 13 bits of a tf32 operand are not read.
  const auto tf32 = [](int value) { return std::bit_cast<uint32_t>(static_cast<float>(value)) | 0x1abc; };
  const Fragment a = [&](uint32_t l, uint32_t i) { return tf32(Product::a(l / 4 + 8 * (i % 2), l % 4 + 4 * (i / 2))); };
  const Fragment b = [&](uint32_t l, uint32_t i) { return tf32(Product::b(l % 4 + 4 * i, l / 4)); };
  check_mma("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", {16, 8, 8}, 4, 2, a, b);
  check_mma("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", {16, 8, 4}, 2, 1, a, b);
}

TEST_CASE("ptx mma: f64") {
  check_threads(
      ".reg .f64 %a; .reg .f64 %b; .reg .f64 %c<2>; .reg .f64 %d<2>;\nshr.u32 %r1, %t, 2; and.b32 %r2, %t, 3; "
      "mad.lo.u32 %r3, %r1, 4, %r2; cvt.rn.f64.u32 %a, %r3;\n"
      "mad.lo.u32 %r4, %r2, 8, %r1; cvt.rn.f64.u32 %b, %r4; mov.f64 %c0, 0d3FF0000000000000; mov.f64 %c1, %c0;\n"
      "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a}, {%b}, {%c0, %c1};\ncvt.rzi.u32.f64 %result, "
      "%d1;\n",
      [](uint32_t t) {
        uint32_t sum = 1;  // row t / 4 of a[i][l] = 4 i + l, column 2 (t % 4) + 1 of b[l][j] = 8 l + j
        for (uint32_t l = 0; l < 4; ++l) sum += (4 * (t / 4) + l) * (8 * l + 2 * (t % 4) + 1);
        return sum;
      });
}

TEST_CASE("ptx mma: all lanes take part") {
  const std::string code =
      ".reg .b32 %r<16>; .reg .pred %p1; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra SKIP;\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r8}, {%r2, %r3, %r4, "
      "%r5};\nSKIP: bar.sync 0;";
  CHECK(contains(fault_of(kernel_text(code, 0)), "deadlock"));
}
