#pragma once
// How many kernels were launched, for tests that compare values too. The simulator counts them; a GPU does not, where
// such checks are left out.

#if __has_include(<counters.hpp>)
#include <counters.hpp>
#endif

#include <cstdint>
#include <string>

namespace test {

#if __has_include(<counters.hpp>)
inline constexpr bool counts_launches = true;
inline void forget_launches() { cuda_sim::reset_kernel_counters(); }
using cuda_sim::launches;
#else
inline constexpr bool counts_launches = false;
inline void forget_launches() {}
inline uint64_t launches(const std::string& = "") { return 0; }
#endif

}  // namespace test
