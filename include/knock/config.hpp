#pragma once
// Build configuration: version, header-only or compiled, and the few macros the library uses.
//
// Header-only (the default): every function body stands in its header and is `inline`.
// Compiled: with KNOCK_COMPILED the bodies are left out, except in the translation units of `knock::compiled`, each of
// which defines KNOCK_BODIES_<FOLDER>_<FILE> for the headers whose bodies it holds.
//
// A virtual function whose body is not in its class is declared with KNOCK_FUNC there too: otherwise, header-only,
// every program that includes the header would get the class's vtable, and all that it reaches, compiled in.

#define KNOCK_VERSION_MAJOR 0
#define KNOCK_VERSION_MINOR 1
#define KNOCK_VERSION_PATCH 0
#define KNOCK_VERSION "0.1.0"

#ifdef KNOCK_COMPILED
#define KNOCK_HEADER_ONLY 0
#define KNOCK_FUNC
#else
#define KNOCK_HEADER_ONLY 1
#define KNOCK_FUNC inline
#endif

// KNOCK_HD marks what runs on host and device alike.
#ifdef __CUDACC__
#define KNOCK_HD __host__ __device__
#else
#define KNOCK_HD
#endif

// KNOCK_SIMD before a loop states that its iterations are independent, so that the compiler vectorises it. Where clang
// finds no way to (at -O0, or for types without vectors) it is not to warn.
#if defined(__clang__) && defined(_OPENMP)
#define KNOCK_SIMD _Pragma("clang diagnostic ignored \"-Wpass-failed\"") _Pragma("omp simd")
#elif defined(__clang__)
#define KNOCK_SIMD _Pragma("clang diagnostic ignored \"-Wpass-failed\"") _Pragma("clang loop vectorize(assume_safety)")
#elif defined(_OPENMP)
#define KNOCK_SIMD _Pragma("omp simd")
#elif defined(__GNUC__)
#define KNOCK_SIMD _Pragma("GCC ivdep")
#else
#define KNOCK_SIMD
#endif
