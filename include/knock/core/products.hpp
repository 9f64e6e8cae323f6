#pragma once
// Choices of how GPUs multiply matrices. They hold for all devices of the process and for what is asked for from then
// on; a graph (core/graph.hpp) replays what was chosen at its capture. The CPU's products know none.

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace knock {

namespace detail {

inline bool environment_says(const char* name, std::string_view what) {
  const char* const value = std::getenv(name);
  return value && value == what;
}

inline std::atomic<bool>& tf32_choice() {
  static std::atomic<bool> choice{environment_says("KNOCK_CUDA_TF32", "1")};
  return choice;
}

inline std::atomic<bool>& cublas_experts_choice() {
  static std::atomic<bool> choice{environment_says("KNOCK_CUDA_EXPERTS", "cublas")};
  return choice;
}

}  // namespace detail

/// Whether cuBLAS may round the operands of f32 products to TF32 (10 bits of mantissa instead of 23), as
/// `torch.backends.cuda.matmul.allow_tf32` says in PyTorch. By default, and for all products of our own kernels
/// (attention, routers, experts), f32 is f32. KNOCK_CUDA_TF32=1 chooses it for a whole program.
inline bool allow_tf32() { return detail::tf32_choice().load(std::memory_order_relaxed); }
inline void set_allow_tf32(bool allow) { detail::tf32_choice().store(allow, std::memory_order_relaxed); }

/// Whether cuBLAS makes the products of experts (`cublasGemmGroupedBatchedEx`, CUDA 12.5 or newer) instead of our own
/// kernels. It wants to know on the host how many rows each expert has: moe_experts then waits for the device once
/// forward and once backward, and cannot be part of a graph. What cuBLAS does not take stays ours: products of two
/// dtypes (f32 gradients of bf16 rows) and rows that are no pieces of 16 bytes. KNOCK_CUDA_EXPERTS=cublas chooses it
/// for a whole program.
inline bool experts_by_cublas() { return detail::cublas_experts_choice().load(std::memory_order_relaxed); }
inline void set_experts_by_cublas(bool chosen) {
  detail::cublas_experts_choice().store(chosen, std::memory_order_relaxed);
}

}  // namespace knock
