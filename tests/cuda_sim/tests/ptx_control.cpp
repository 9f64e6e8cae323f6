// Divergence and reconvergence, calls, barriers, warp collectives, special registers; and what is refused.

#include <algorithm>

#include "ptx_program.hpp"

namespace {

using namespace cuda_sim;
using namespace cuda_sim::test;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// The results of all threads are what `expected` says of the thread.
template <class F>
void check_threads(const std::string& body, const F& expected, const Shape& shape = {},
                   const std::string& before = "") {
  const std::vector<uint32_t> results = results_of(body, shape, before);
  for (uint32_t t = 0; t < shape.threads; ++t) {
    INFO(body << "\nthread " << t);
    CHECK(results[t] == static_cast<uint32_t>(expected(t)));
  }
}

std::string message_of(const std::string& text) {
  try {
    parse(text);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("ptx parse: errors name the line") {
  CHECK(contains(message_of(".version 8.0\n.nonsense\n"), "ptx line 2: unknown directive near '.nonsense'"));
  CHECK(contains(message_of(".visible .entry k()\n{\nbra MISSING;\n}\n"), "ptx line 3: no such label near 'MISSING'"));
  CHECK(contains(message_of(".visible .entry k()\n{\n.reg .b32 %r<2>;\nadd.u32 %r0, %r1, 1\nret;\n}\n"),
                 "ptx line 5: expected ;"));
  CHECK(contains(message_of(".visible .entry k()\n{\n.reg .nothing %r<2>;\n}\n"),
                 "ptx line 3: registers of an unknown type"));
  CHECK(contains(message_of(".visible .entry k()\n{\nL: ret;\nL: ret;\n}\n"), "a label is defined twice"));
  CHECK(contains(message_of(".visible .entry k()\n{\nret;\n"), "unexpected end"));
  CHECK(contains(message_of("/* comment"), "ptx line 1: a comment without an end"));
}

TEST_CASE("ptx parse: what a module declares") {
  const auto module = parse(
      ".version 8.0\n.target sm_80\n.address_size 64\n.file 1 \"/src/kernel.cu\"\n"
      ".global .align 4 .b32 table[3] = {1, -2, 0f3F800000};\n.const .align 8 .u64 address = table;\n"
      ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 8 .b8 unused[4096];\n"
      ".visible .entry k(.param .u8 a, .param .align 8 .b8 b[12], .param .u64 c)\n.maxntid 128, 2, 1\n.minnctapersm "
      "2\n{\n"
      ".shared .align 4 .b8 own[100];\n.reg .b32 %r<3>;\nmov.u32 %r1, own;\nmov.u32 %r2, dynamic;\nret;\n}\n"
      ".visible .entry fixed()\n.reqntid 64, 1, 1\n{\nret;\n}\n");
  const Function& k = *module->functions.at("k");
  CHECK(k.entry);
  CHECK(k.parameters.at(1).offset == 8);
  CHECK(k.parameters.at(1).bytes == 12);
  CHECK(k.parameters.at(2).offset == 24);
  CHECK(k.parameter_bytes == 32);
  CHECK(k.static_shared_bytes == 100);
  CHECK(k.max_threads == 256);
  CHECK(module->functions.at("fixed")->required_threads[0] == 64);
  CHECK(module->files.at(1) == "/src/kernel.cu");
  const Variable& table = module->variables.at("table");
  CHECK(table.bytes == 12);
  uint32_t values[3];
  std::memcpy(values, bytes_at(table.address), sizeof values);
  CHECK(values[1] == 0xfffffffe);
  CHECK(values[2] == 0x3f800000);
  uint64_t address = 0;
  std::memcpy(&address, bytes_at(module->variables.at("address").address), 8);
  CHECK(address == reinterpret_cast<uint64_t>(table.address));
}

TEST_CASE("ptx unknown: an instruction that the machine does not know faults where it is executed") {
  const std::string module =
      ".version 8.0\n.file 3 \"/src/odd.cu\"\n.visible .entry k(.param .u64 p0)\n{\n.reg .b32 %r<4>;\n.reg .pred "
      "%p<2>;\n"
      ".loc 3 17 5\nmov.u32 %r1, %tid.x;\nsetp.eq.u32 %p1, %r1, 99;\n@%p1 frobnicate.b32 %r2, %r1;\n";
  CHECK(fault_of(module + "ret;\n}\n", {}, {0}) == "");
  const std::string fault = fault_of(module + ".loc 3 18 1\nfrobnicate.b32 %r2, %r1;\nret;\n}\n", {}, {0});
  CHECK(contains(fault, "k: block (0,0,0) warp 0 lanes ffffffff, odd.cu:18 [frobnicate.b32]"));
  CHECK(contains(fault, "unknown instruction"));
  const auto fault_at = [](const std::string& code) {
    return fault_of(kernel_text(".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>;\n" + code, 0));
  };
  CHECK(contains(fault_at("add.rn.f32.wrong %f1, %f2, %f3;"), "unknown modifier .wrong"));
  CHECK(contains(fault_at("add.u32 %r1, %rd1, 1;"), "a register of another width"));
  CHECK(contains(fault_at("mov.u64 %rd1, %clock64;"), "unknown name %clock64"));
  CHECK(contains(fault_at("trap;"), "[trap]: the kernel gave up"));
}

TEST_CASE("ptx findings: code of CUDA's own headers is named by the line that it was inlined to") {
  const auto fault_at = [](const std::string& path) {
    return fault_of(".file 1 \"/src/user.cu\"\n.file 2 \"" + path +
                    "\"\n.visible .entry k()\n{\n.loc 2 99 1, function_name L, inlined_at 1 12 3\ntrap;\nret;\n}\n");
  };
  CHECK(contains(fault_at("/usr/local/cuda/targets/x86_64-linux/include/sm_30_intrinsics.hpp"), "user.cu:12 [trap]"));
  CHECK(contains(fault_at("/src/helpers.cuh"), "helpers.cuh:99 [trap]"));
}

TEST_CASE("ptx divergence: if and else meet again") {
  check_threads(
      "and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN;\n"
      "add.u32 %result, %t, 100; bra MEET;\nEVEN: mul.lo.u32 %result, %t, 3;\n"
      "MEET: activemask.b32 %r2; setp.ne.u32 %p2, %r2, 0xffffffff; @%p2 mov.u32 %result, 0;\n",
      [](uint32_t t) { return t % 2 == 0 ? 3 * t : t + 100; });
}

TEST_CASE("ptx divergence: nested loops with other trip counts in each lane") {
  check_threads(
      "mov.u32 %result, 0; mov.u32 %r1, 0;\n"
      "OUTER: mov.u32 %r2, 0;\n"
      "INNER: mad.lo.u32 %result, %r1, %r2, %result; add.u32 %result, %result, 1; add.u32 %r2, %r2, 1;\n"
      "rem.u32 %r3, %t, 5; setp.le.u32 %p1, %r2, %r3; @%p1 bra INNER;\n"
      "add.u32 %r1, %r1, 1; setp.le.u32 %p2, %r1, %t; @%p2 bra OUTER;\n"
      "activemask.b32 %r4; setp.ne.u32 %p3, %r4, 0xffffffff; @%p3 mov.u32 %result, 0;\n",
      [](uint32_t t) {
        uint32_t sum = 0;
        for (uint32_t i = 0; i <= t; ++i) {
          for (uint32_t j = 0; j <= t % 5; ++j) sum += i * j + 1;
        }
        return sum;
      });
}

TEST_CASE("ptx divergence: lanes that exit early, counted lanes and branches") {
  const auto module =
      parse(kernel_text(".reg .b32 %r<8>; .reg .pred %p<4>;\nmov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 "
                        "exit;\nadd.u32 %r2, %r1, 1;\n"
                        "setp.lt.u32 %p2, %r1, 16; @%p2 bra LOW; add.u32 %r2, %r1, 2;\nLOW: add.u32 %r2, %r1, 3;\n",
                        0));
  const Counters counters = run_kernel(*module, {}, {});
  CHECK(counters.warp_instructions == 9);
  // 32 * 2 + 8 exit + 24 * 2 + 8 branch + 16 add + 24 add + 24 ret
  CHECK(counters.lane_instructions == 64 + 8 + 48 + 8 + 16 + 24 + 24);
  CHECK(counters.divergent_branches == 1);
}

TEST_CASE("ptx divergence: brx.idx") {
  check_threads(
      "and.b32 %r1, %t, 3;\nTABLE: .branchtargets A, B, C, A;\nbrx.idx %r1, TABLE;\n"
      "A: mov.u32 %result, 10; bra.uni MEET;\nB: mov.u32 %result, 20; bra.uni MEET;\nC: mov.u32 %result, 30;\nMEET:\n",
      [](uint32_t t) { return t % 4 == 1   ? 20
                              : t % 4 == 2 ? 30
                                           : 10; });
  CHECK(contains(
      fault_of(kernel_text(".reg .b32 %r<2>; mov.u32 %r1, 2;\nT: .branchtargets A, A;\nbrx.idx %r1, T;\nA:", 0)),
      "entry 2 of a branch table"));
}

TEST_CASE("ptx divergence: lanes that spin for others of their warp let them run") {
  check_threads(
      "setp.eq.u32 %p1, %t, 31; @%p1 st.shared.u32 [flag], 0; bar.sync 0; @%p1 bra SIGNAL;\n"
      "SPIN: ld.relaxed.cta.shared.u32 %r1, [flag]; setp.ne.u32 %p2, %r1, 7; @%p2 bra SPIN; bra MEET;\n"
      "SIGNAL: st.relaxed.cta.shared.u32 [flag], 7;\nMEET: mov.u32 %result, 1;\n",
      [](uint32_t) { return 1; }, {}, ".shared .align 4 .b32 flag;");
}

TEST_CASE("ptx call: arguments, results, recursion, pointers, divergent calls") {
  const std::string square =
      ".func (.param .b32 out) square(.param .b32 x)\n{\n.reg .b32 %r<3>; ld.param.b32 %r1, [x]; mul.lo.u32 %r2, %r1, "
      "%r1;\nst.param.b32 [out], %r2; ret;\n}\n";
  const std::string call =
      "{ .param .b32 a; .param .b32 r; st.param.b32 [a], %t; call (r), square, (a); ld.param.b32 %result, [r]; }\n";
  check_threads(
      call, [](uint32_t t) { return t * t; }, {1, 40}, square);
  check_threads(
      "mov.u32 %result, 5; setp.lt.u32 %p1, %t, 7; @!%p1 bra SKIP;\n" + call + "SKIP:\n",
      [](uint32_t t) { return t < 7 ? t * t : 5; }, {}, square);
  const std::string factorial =
      ".func (.param .b32 out) factorial(.param .b32 n)\n{\n.reg .b32 %r<6>; .reg .pred %p1;\nld.param.b32 %r1, [n]; "
      "mov.u32 %r2, 1;\n"
      "setp.lt.u32 %p1, %r1, 2; @%p1 bra DONE;\nsub.u32 %r3, %r1, 1;\n{ .param .b32 a; .param .b32 r; st.param.b32 "
      "[a], %r3; call (r), factorial, (a);\n"
      "ld.param.b32 %r4, [r]; }\nmul.lo.u32 %r2, %r4, %r1;\nDONE: st.param.b32 [out], %r2; ret;\n}\n";
  check_threads(
      "rem.u32 %r1, %t, 11; { .param .b32 a; .param .b32 r; st.param.b32 [a], %r1; call (r), factorial, (a); "
      "ld.param.b32 %result, [r]; }\n",
      [](uint32_t t) {
        uint32_t product = 1;
        for (uint32_t i = 2; i <= t % 11; ++i) product *= i;
        return product;
      },
      {}, factorial);
  const std::string twice =
      ".func (.param .b32 out) twice(.param .b32 x)\n{\n.reg .b32 %r<3>; ld.param.b32 %r1, [x]; shl.b32 %r2, %r1, "
      "1;\nst.param.b32 [out], %r2; ret;\n}\n";
  check_threads(
      "mov.u64 %rd1, square; mov.u64 %rd2, twice; and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 0; selp.b64 %rd3, %rd1, "
      "%rd2, %p1;\n"
      "{ .param .b32 a; .param .b32 r; st.param.b32 [a], %t; P: .callprototype (.param .b32 _) _ (.param .b32 _); call "
      "(r), %rd3, (a), P;\n"
      "ld.param.b32 %result, [r]; }\n",
      [](uint32_t t) { return t % 2 == 0 ? t * t : 2 * t; }, {}, square + twice);
  const std::string indexed =
      ".func (.param .b32 out) second(.param .align 4 .b8 x[8])\n{\n.reg .b32 %r<3>; .reg .b64 %rd<3>; mov.b64 %rd1, "
      "x;\n"
      "ld.param.b32 %r1, [%rd1+4]; st.param.b32 [out], %r1; ret;\n}\n";
  check_threads(
      "{ .param .align 4 .b8 a[8]; .param .b32 r; st.param.b32 [a], 1; st.param.b32 [a+4], %t; call (r), second, (a);\n"
      "ld.param.b32 %result, [r]; }\n",
      [](uint32_t t) { return t; }, {}, indexed);
  CHECK(contains(fault_of(kernel_text("call outside;", 0, ".extern .func outside;")),
                 "a call of outside, which this module only declares"));
  const std::string endless = ".func endless()\n{\n.local .align 4 .b8 big[4096];\ncall endless;\nret;\n}\n";
  CHECK(contains(fault_of(kernel_text("call endless;", 0, endless)), "stack overflow"));
}

TEST_CASE("ptx call: shared variables of functions, of the kernel and dynamic ones do not overlap") {
  const std::string before =
      ".shared .align 4 .b32 common;\n.extern .shared .align 16 .b8 dynamic[];\n"
      ".func (.param .b32 out) peek()\n{\n.reg .b32 %r<2>; ld.shared.u32 %r1, [common]; st.param.b32 [out], %r1; "
      "ret;\n}\n";
  check_threads(
      ".shared .align 4 .b8 own[128];\nshl.b32 %r1, %t, 2; mov.u32 %r2, own; add.u32 %r2, %r2, %r1; st.shared.u32 "
      "[%r2], %t;\n"
      "mov.u32 %r3, dynamic; add.u32 %r3, %r3, %r1; st.shared.u32 [%r3], 1000;\n"
      "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [common], 70000; bar.sync 0;\n"
      "{ .param .b32 r; call (r), peek; ld.param.b32 %r4, [r]; }\n"
      "ld.shared.u32 %r5, [%r2]; ld.shared.u32 %r6, [%r3]; add.u32 %result, %r4, %r5; add.u32 %result, %result, %r6;\n",
      [](uint32_t t) { return 71000 + t; }, {1, 32, 128}, before);
}

TEST_CASE("ptx barrier: all warps, named barriers, reductions") {
  const std::string shared = ".shared .align 4 .b8 values[1024];";
  const std::string mirror =
      "shl.b32 %r1, %t, 2; mov.u32 %r2, values; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %t;\nbar.sync 0;\n"
      "mov.u32 %r4, %ntid.x; sub.u32 %r5, %r4, %t; sub.u32 %r5, %r5, 1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r2; "
      "ld.shared.u32 %result, [%r5];\n";
  check_threads(
      mirror, [](uint32_t t) { return 95 - t; }, {1, 96}, shared);
  // The first two warps meet at barrier 1, without the third.
  check_threads("setp.ge.u32 %p1, %t, 64; @%p1 bra OUT; bar.sync 1, 64;\nOUT: mov.u32 %result, 4;\n",
                [](uint32_t) { return 4; }, {1, 96});
  // The first warp only arrives, the second one waits for it.
  check_threads(
      "mov.u32 %r9, values; setp.lt.u32 %p1, %t, 32; @!%p1 bra WAIT; mov.u32 %result, 1; setp.eq.u32 %p2, %t, 5; @%p2 "
      "st.shared.u32 [%r9], 9; "
      "bar.arrive 2, 64; bra OUT;\n"
      "WAIT: bar.sync 2, 64; ld.shared.u32 %result, [%r9];\nOUT:\n",
      [](uint32_t t) { return t < 32 ? 1 : 9; }, {1, 64}, shared);
  check_threads("setp.lt.u32 %p1, %t, 37; bar.red.popc.u32 %result, 0, %p1;\n", [](uint32_t) { return 37; }, {1, 96});
  check_threads(
      "setp.lt.u32 %p1, %t, 37; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1; bar.red.and.pred %p4, 0, "
      "!%p5;\n"
      "selp.u32 %result, 1, 0, %p2; @%p3 add.u32 %result, %result, 2;\n",
      [](uint32_t) { return 2; }, {1, 96});
}

TEST_CASE("ptx barrier: divergence and deadlock are faults that say who waits where") {
  const std::string prologue = ".reg .b32 %r<4>; .reg .pred %p<4>; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;\n";
  CHECK(contains(fault_of(kernel_text(prologue + "@%p1 bra A; bar.sync 0; bra B;\nA: bar.sync 0;\nB:", 0), {1, 64}),
                 "barrier divergence: other threads wait at ptx:"));
  const std::string half = fault_of(
      kernel_text(prologue + "setp.eq.u32 %p2, %r1, 3; @%p2 bra B; bar.sync 0;\nB: bar.warp.sync 0xffffffff;", 0),
      {1, 64});
  CHECK(contains(half, "deadlock: warp 0 lanes fffffff7 wait at"));
  CHECK(contains(half, "(barrier)"));
  CHECK(contains(half, "warp 0 lanes 00000008 wait at"));
  CHECK(contains(fault_of(kernel_text(prologue + "bar.sync 17;", 0)), "barrier number 17"));
  CHECK(contains(fault_of(kernel_text(prologue + "bar.sync 1, 40;", 0), {1, 64}), "no multiple of 32"));
}

TEST_CASE("ptx warp: shfl in all modes and segments") {
  for (const uint32_t width : {32u, 16u, 8u, 4u}) {
    const uint32_t segment = (32 - width) << 8;
    const auto code = [&](const std::string& mode, uint32_t by, uint32_t clamp) {
      return "mul.lo.u32 %r1, %t, 7; mov.u32 %r2, " + std::to_string(by) + ";\nshfl.sync." + mode +
             ".b32 %r3|%p1, %r1, %r2, " + std::to_string(segment | clamp) +
             ", 0xffffffff;\nselp.u32 %r4, 1000, 0, %p1; add.u32 %result, %r3, %r4;\n";
    };
    for (const uint32_t by : {0u, 1u, 3u, 7u, 31u}) {
      const auto from = [&](uint32_t t, uint32_t other, bool inside) {
        return 7 * (inside ? other : t) + (inside ? 1000 : 0);
      };
      check_threads(code("bfly", by, 31), [&](uint32_t t) { return from(t, t ^ by, (t ^ by) / width <= t / width); });
      check_threads(code("down", by, 31), [&](uint32_t t) { return from(t, t + by, t % width + by < width); });
      check_threads(code("up", by, 0), [&](uint32_t t) { return from(t, t - by, t % width >= by); });
      check_threads(code("idx", by, 31), [&](uint32_t t) { return from(t, t / width * width + by % width, true); });
    }
  }
  // One segment: a path of its own.
  check_threads("shfl.sync.bfly.b32 %result, %t, 5, 31, -1;\n", [](uint32_t t) { return t ^ 5; });
  check_threads("shfl.sync.idx.b32 %result, %t, 9, 31, -1;\n", [](uint32_t) { return 9; });
  check_threads("shfl.sync.down.b32 %result, %t, 4, 31, -1;\n", [](uint32_t t) { return t + 4 < 32 ? t + 4 : t; });
  check_threads("shfl.sync.up.b32 %result|%p1, %t, 4, 0, -1; @!%p1 mov.u32 %result, 77;\n",
                [](uint32_t t) { return t >= 4 ? t - 4 : 77; });
}

TEST_CASE("ptx warp: lanes of a mask wait for one another") {
  check_threads(
      "and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN;\n"
      "shfl.sync.idx.b32 %result, %t, 31, 31, 0xaaaaaaaa; bra MEET;\n"
      "EVEN: shfl.sync.idx.b32 %result, %t, 30, 31, 0x55555555;\nMEET: shfl.sync.idx.b32 %r2, %t, 3, 31, -1; add.u32 "
      "%result, %result, %r2;\n",
      [](uint32_t t) { return (t % 2 == 0 ? 30 : 31) + 3; });
  check_threads(
      "and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN; bar.warp.sync -1; bra MEET;\nEVEN: bar.warp.sync "
      "-1;\nMEET: mov.u32 %result, %t;\n",
      [](uint32_t t) { return t; });
  const std::string prologue = ".reg .b32 %r<4>; .reg .pred %p<4>; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16;\n";
  const auto fault_at = [&](const std::string& code, uint32_t threads = 32) {
    return fault_of(kernel_text(prologue + code, 0), {1, threads});
  };
  CHECK(contains(fault_at("@!%p1 bra OUT; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\nOUT: bar.sync 0;"),
                 "deadlock: warp 0 lanes 0000ffff wait at ptx:8 [shfl.sync.bfly.b32] (for lanes of the warp)"));
  CHECK(contains(fault_at("@!%p1 bra OUT; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\nOUT:"),
                 "deadlock: warp 0 lanes 0000ffff wait at ptx:8 [shfl.sync.bfly.b32]"));
  CHECK(contains(fault_at("@!%p1 exit; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"),
                 "names lanes that exited or do not exist (live: 0000ffff)"));
  CHECK(contains(fault_at("@!%p1 bra OUT; shfl.sync.idx.b32 %r2, %r1, 20, 31, 0xffff;\nOUT:"),
                 "lane 0 shuffles from lane 20, which is not in the member mask"));
  CHECK(contains(fault_at("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", 48),
                 "member mask ffffffff names lanes that exited or do not exist"));
  CHECK(contains(fault_at("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffff;"), "lane 16 is not in its own member mask"));
  CHECK(contains(fault_at("shfl.sync.bfly.b32 %r2, %r1, 1, 31, %r1;"), "lanes give different member masks"));
}

TEST_CASE("ptx warp: vote, match, redux, activemask") {
  const std::string odd = "and.b32 %r1, %t, 1; setp.ne.u32 %p1, %r1, 0;\n", show = "selp.u32 %result, 1, 0, %p2;\n";
  check_threads(odd + "vote.sync.ballot.b32 %result, %p1, -1;\n", [](uint32_t) { return 0xaaaaaaaa; });
  check_threads(odd + "vote.sync.ballot.b32 %result, !%p1, -1;\n", [](uint32_t) { return 0x55555555; });
  check_threads(odd + "vote.sync.any.pred %p2, %p1, -1;\n" + show, [](uint32_t) { return 1; });
  check_threads(odd + "vote.sync.all.pred %p2, %p1, -1;\n" + show, [](uint32_t) { return 0; });
  check_threads(odd + "vote.sync.uni.pred %p2, %p1, -1;\n" + show, [](uint32_t) { return 0; });
  check_threads("and.b32 %r1, %t, 3; match.any.sync.b32 %result, %r1, -1;\n",
                [](uint32_t t) { return 0x11111111u << (t % 4); });
  check_threads("match.all.sync.b32 %result|%p1, 5, -1; @!%p1 mov.u32 %result, 0;\n",
                [](uint32_t) { return 0xffffffff; });
  check_threads("match.all.sync.b32 %result|%p1, %t, -1;\n", [](uint32_t) { return 0; });
  check_threads("cvt.u64.u32 %rd1, %t; and.b64 %rd1, %rd1, 1; match.any.sync.b64 %result, %rd1, -1;\n",
                [](uint32_t t) { return t % 2 == 0 ? 0x55555555 : 0xaaaaaaaa; });
  check_threads("cvt.u64.u32 %rd1, %t; shl.b64 %rd1, %rd1, 32; match.all.sync.b64 %result|%p1, %rd1, -1;\n",
                [](uint32_t) { return 0; });
  check_threads("mov.u64 %rd1, 5; match.all.sync.b64 %result|%p1, %rd1, -1; @!%p1 mov.u32 %result, 0;\n",
                [](uint32_t) { return 0xffffffff; });
  check_threads("redux.sync.add.u32 %result, %t, -1;\n", [](uint32_t) { return 496; });
  check_threads("sub.u32 %r1, %t, 5; redux.sync.min.s32 %result, %r1, -1;\n", [](uint32_t) { return -5; });
  check_threads("sub.u32 %r1, %t, 5; redux.sync.min.u32 %result, %r1, -1;\n", [](uint32_t) { return 0; });
  check_threads("sub.u32 %r1, %t, 5; redux.sync.max.s32 %result, %r1, -1;\n", [](uint32_t) { return 26; });
  check_threads("sub.u32 %r1, %t, 5; redux.sync.max.u32 %result, %r1, -1;\n",
                [](uint32_t) { return static_cast<uint32_t>(-1); });
  check_threads("or.b32 %r1, %t, 64; redux.sync.and.b32 %result, %r1, -1;\n", [](uint32_t) { return 64; });
  check_threads("redux.sync.or.b32 %result, %t, -1;\n", [](uint32_t) { return 31; });
  check_threads("redux.sync.xor.b32 %result, %t, -1;\n", [](uint32_t) { return 0; });
  check_threads("mov.u32 %result, 0; setp.lt.u32 %p1, %t, 5; @%p1 activemask.b32 %result;\n",
                [](uint32_t t) { return t < 5 ? 31 : 0; });
}

TEST_CASE("ptx special registers") {
  const auto special = [](const std::string& name) { return "mov.u32 %result, " + name + ";\n"; };
  const Shape shape{1, 96, 64};
  check_threads(
      special("%laneid"), [](uint32_t t) { return t % 32; }, shape);
  check_threads(
      special("%warpid"), [](uint32_t t) { return t / 32; }, shape);
  check_threads(
      special("%ntid.x"), [](uint32_t) { return 96; }, shape);
  check_threads(
      special("%nctaid.x"), [](uint32_t) { return 1; }, shape);
  check_threads(
      special("%tid.y"), [](uint32_t) { return 0; }, shape);
  check_threads(
      special("%lanemask_lt"), [](uint32_t t) { return (uint64_t{1} << (t % 32)) - 1; }, shape);
  check_threads(
      special("%lanemask_le"), [](uint32_t t) { return (uint64_t{2} << (t % 32)) - 1; }, shape);
  check_threads(
      special("%lanemask_eq"), [](uint32_t t) { return 1u << (t % 32); }, shape);
  check_threads(
      special("%lanemask_gt"), [](uint32_t t) { return ~((uint64_t{2} << (t % 32)) - 1); }, shape);
  check_threads(
      special("%lanemask_ge"), [](uint32_t t) { return ~((uint64_t{1} << (t % 32)) - 1); }, shape);
  check_threads(
      special("%dynamic_smem_size"), [](uint32_t) { return 64; }, shape);
  check_threads(
      special("WARP_SZ"), [](uint32_t) { return 32; }, shape);
}

TEST_CASE("ptx launch: bounds of a kernel") {
  const auto refused = [](const std::string& attributes, uint32_t threads) {
    return fault_of(".visible .entry k()\n" + attributes + "\n{\nret;\n}\n", {1, threads});
  };
  CHECK(contains(refused(".maxntid 64, 1, 1", 96), "__launch_bounds__(64)"));
  CHECK(refused(".maxntid 64, 1, 1", 64) == "");
  CHECK(contains(refused(".reqntid 64, 1, 1", 32), ".reqntid"));
  CHECK(contains(refused("", 1025), "1025 threads in a block"));
}

TEST_CASE("ptx order: other orders of warps and blocks give the same results") {
  const std::string body =
      "shl.b32 %r1, %t, 2; mov.u32 %r2, values; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %t;\nbar.sync 0;\n"
      "xor.b32 %r4, %r1, 128; add.u32 %r5, %r2, %r4; ld.shared.u32 %result, [%r5];\n";
  for (const char* order : {"forward", "reverse", "random:1", "random:2"}) {
    setenv("KNOCK_CUDA_SIM_ORDER", order, 1);
    setenv("KNOCK_CUDA_SIM_QUANTUM", "3", 1);
    check_threads(
        body, [](uint32_t t) { return t ^ 32; }, {1, 128}, ".shared .align 4 .b8 values[512];");
  }
  unsetenv("KNOCK_CUDA_SIM_ORDER");
  unsetenv("KNOCK_CUDA_SIM_QUANTUM");
}
