#include <csignal>
// doctest would take the illegal instructions that support/amx executes: it watches a rarer signal in their place.
#undef SIGILL
#define SIGILL SIGSYS
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
