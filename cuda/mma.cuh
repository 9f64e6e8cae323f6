#pragma once
// The instructions that C++ does not name, one wrapper each: products of small matrices on the tensor cores, loads of
// their operands, and copies that run beside the computation. (PTX ISA: mma.sync, ldmatrix, cp.async.)
//
// A warp computes D (16, 8) += A (16, 16) B (16, 8) for bf16 operands. Lane l holds, with group = l / 4 and
// pair = 2 (l % 4),
//   a[0] = A[group][pair ..], a[1] = A[group + 8][pair ..], a[2] = A[group][pair + 8 ..], a[3] = A[group + 8][pair + 8
//   ..] b[0] = B[pair ..][group], b[1] = B[pair + 8 ..][group]                     (two bf16 in each register) d[0],
//   d[1] = D[group][pair], D[group][pair + 1];   d[2], d[3] the same of row group + 8

#include <cuda_bf16.h>

#include <cstdint>

namespace knock::cuda {

/// d += a b
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Four matrices (8, 8) of bf16: lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, the
/// elements (l / 4, 2 (l % 4)) and the next.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same with each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// A matrix (8, 8) of bf16 transposed: a lane gives and gets the elements (l / 4, 2 (l % 4)) and the next.
__device__ inline uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(matrix));
  return y;
}

/// Begins to copy 16 bytes to shared memory; with `bytes` = 0 it begins to write zeros, and `from` is not read.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
/// The copies that this thread began since the last call are one group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most the `pending` newest groups of this thread are on their way. Others see the data behind a
/// barrier.
template <int pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// 2^x to about 2 units in the last place; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two bf16 in one register, `low` first in memory.
__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline float2 unpack(uint32_t both) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

}  // namespace knock::cuda
