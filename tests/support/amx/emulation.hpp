#pragma once
// The matrix unit's instructions (Intel AMX) on processors without one, for tests. Such a processor stops at each with
// an illegal instruction; the handler of that signal reads the bytes as the processor would have and does what they say
// to tiles of its own. So the code that is tested is the code that users run.
//
// From the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: encodings and operations of
// LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED and TDPBF16PS. As in the processor, each thread has tiles and
// a configuration of its own; using them without one ends the program. Nested, shifted and smaller tiles are not known.

namespace test {

/// From now on in this process; nothing happens where the processor has the instructions. False where they cannot be
/// emulated: only Linux on x86-64 with AVX-512 for bf16.
bool emulate_amx();

}  // namespace test
