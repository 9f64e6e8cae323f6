// The experts' products by cuBLAS (core/products.hpp says when), which multiplies dense matrices of extents that the
// host knows. So rows of tokens are gathered before, SwiGLU and its gradient are launches of their own, and experts
// without rows are left out. cuBLAS stores matrices by columns: it makes out^T = b^T a^T, as in gemm.cpp.

#include "allocator.hpp"
#include "cublas.hpp"
#include "graph.hpp"
#include "grouped_gemm.cuh"
#include "kernels.hpp"
#include "team.cuh"
#include "transfer.hpp"

#include <knock/ops/pointwise_functors.hpp>

#include <mutex>
#include <optional>

namespace knock::cuda {
namespace {

void check_cublas(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    fail("moe_experts", "cuBLAS: ", cublasGetStatusString(status), " in ", call);
}

/// Addresses, passed as a parameter: a copy from the host would wait for buffers that copies before it have filled.
struct Places {
  static constexpr std::size_t most = 480;  // of the 4 KiB that parameters may have on every GPU
  const void* data[most];
};
__global__ void write_places(const __grid_constant__ Places from, int count, const void** to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) to[i] = from.data[i];
}
void write(const std::vector<const void*>& from, const void** to) {
  for (std::size_t first = 0; first < from.size(); first += Places::most) {
    const std::size_t count = std::min(Places::most, from.size() - first);
    Places places{};
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(first), count, places.data);
    launch("moe_write_places", write_places, Grid{1, 128}, places, static_cast<int>(count), to + first);
  }
}

/// c (m, n) = op(a) op(b), by columns.
struct Product {
  cublasOperation_t op_a, op_b;
  int64_t m, n, k;
  const void* a;
  int64_t pitch_a;
  const void* b;
  int64_t pitch_b;
  void* c;
  int64_t pitch_c;
};

/// Products of one dtype, each of its own extents.
class Group {
 public:
  explicit Group(DType dtype) : dtype_(dtype) {}

  void add(const Product& p) {
    op_a_.push_back(p.op_a), op_b_.push_back(p.op_b);
    m_.push_back(int_of(p.m)), n_.push_back(int_of(p.n)), k_.push_back(int_of(p.k));
    a_.push_back(p.a), b_.push_back(p.b), c_.push_back(p.c);
    pitch_a_.push_back(int_of(p.pitch_a)), pitch_b_.push_back(int_of(p.pitch_b)), pitch_c_.push_back(int_of(p.pitch_c));
  }

  /// Makes them, with `add` onto what c holds.
  void run(bool add) const {
    const std::size_t count = op_a_.size();
    if (count == 0) return;
    const Scratch places(static_cast<int64_t>(3 * count * sizeof(void*))), workspace(workspace_bytes);
    std::vector<const void*> all = a_;
    all.insert(all.end(), b_.begin(), b_.end());
    all.insert(all.end(), c_.begin(), c_.end());
    write(all, places.as<const void*>());
    if (dtype_ == DType::f64) {
      call<double>(count, add, places.as<void*>(), workspace.as<void>());
    } else {
      call<float>(count, add, places.as<void*>(), workspace.as<void>());
    }
    after_launch("moe_experts");
  }

 private:
  static int int_of(int64_t value) { return static_cast<int>(value); }  // of slots and features, which are below 2^31
  static constexpr int64_t workspace_bytes = int64_t{32} << 20;

  /// `places`: of all a, all b and all c, on the device.
  template <class Scale>
  void call(std::size_t count, bool add, void** places, void* workspace) const {
    static std::mutex one_at_a_time;  // a handle has one stream
    const std::lock_guard lock(one_at_a_time);
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const cublasHandle_t handle = Handles<cublasHandle_t, cublasCreate, cublasDestroy>::get(status);
    check_cublas(status, "cublasCreate");
    check_cublas(cublasSetStream(handle, current_stream()), "cublasSetStream");
    check_cublas(cublasSetWorkspace(handle, workspace, workspace_bytes), "cublasSetWorkspace");
    const std::vector<Scale> alpha(count, Scale(1)), beta(count, Scale(add ? 1 : 0));
    const std::vector<int> one_each(count, 1);
    const cudaDataType type = type_of(dtype_);
#if CUBLAS_VERSION >= 120500
    status = cublasGemmGroupedBatchedEx(handle, op_a_.data(), op_b_.data(), m_.data(), n_.data(), k_.data(),
                                        alpha.data(), places, type, pitch_a_.data(), places + count, type,
                                        pitch_b_.data(), beta.data(), places + 2 * count, type, pitch_c_.data(),
                                        static_cast<int>(count), one_each.data(), compute_type(dtype_));
#else
    status = CUBLAS_STATUS_NOT_SUPPORTED;
#endif
    check_cublas(status, "cublasGemmGroupedBatchedEx");
  }

  DType dtype_;
  std::vector<cublasOperation_t> op_a_, op_b_;
  std::vector<int> m_, n_, k_, pitch_a_, pitch_b_, pitch_c_;
  std::vector<const void*> a_, b_, c_;
};

constexpr int64_t piece = sizeof(uint4);

bool in_pieces(const void* data, DType dtype, int64_t n) {
  return reinterpret_cast<std::uintptr_t>(data) % piece == 0 && n > 0 && n * size_of(dtype) % piece == 0;
}
bool in_pieces(const SortedRows& x) { return in_pieces(x.data, x.dtype, x.n); }
bool in_pieces(const ExpertMatrices& x) {
  return in_pieces(x.data, x.dtype, x.n) &&
         (!x.second || (in_pieces(x.second, x.dtype, x.n) && in_pieces(nullptr, x.dtype, x.first_rows)));
}

char* at(const void* data, DType dtype, int64_t element) {
  return static_cast<char*>(const_cast<void*>(data)) + element * size_of(dtype);
}

/// Rows of an expert's matrix that lie in one array.
struct Stretch {
  int64_t first, rows;
  void* data;
};
int stretches(const ExpertMatrices& x) { return x.second ? 2 : 1; }
Stretch stretch(const ExpertMatrices& x, int64_t expert, int i) {
  const int64_t first = i == 0 ? 0 : x.first_rows;
  const int64_t rows = !x.second ? x.rows : i == 0 ? x.first_rows : x.rows - x.first_rows;
  return {first, rows, at(i == 0 ? x.data : x.second, x.dtype, expert * rows * x.n)};
}

/// to (rows, n) from the rows' tokens, in pieces.
__global__ void gather_rows(int64_t pieces, int64_t of_row, const int32_t* token_of, const uint4* from, uint4* to) {
  for (int64_t i = thread_in_grid(); i < pieces; i += threads_in_grid())
    to[i] = from[token_of[i / of_row] * of_row + i % of_row];
}

/// Sorted rows, gathered where they are those of tokens.
class Gathered {
 public:
  Gathered(const Experts& experts, const SortedRows& rows) : rows_(rows) {
    if (!rows.by_token) return;
    const int64_t of_row = rows.n * size_of(rows.dtype) / piece, pieces = experts.starts[experts.count] * of_row;
    memory_.emplace(pieces * piece);
    launch("moe_gather_rows", gather_rows, grid_for(pieces), pieces, of_row, experts.token_of,
           static_cast<const uint4*>(rows.data), memory_->as<uint4>());
    rows_.data = memory_->as<void>();
  }
  /// From element `col` of a row on.
  const void* row(int64_t i, int64_t col = 0) const { return at(rows_.data, rows_.dtype, i * rows_.n + col); }

 private:
  SortedRows rows_;
  std::optional<Scratch> memory_;
};

/// da (rows, F) is the gradient of the unweighted activation; a warp takes 32 columns of a row.
template <class T>
__global__ void gate_backward(int64_t rows, const T* da, const __grid_constant__ GatedBackward gate) {
  using C = compute_t<T>;
  static_assert(gate_part == warp_size);
  const int64_t parts = parts_of(gate.ffn), padded = parts * gate_part;
  for (int64_t i = thread_in_grid(); i < rows * padded; i += threads_in_grid()) {
    const int64_t row = i / padded, col = i % padded;
    C share = 0;
    if (col < gate.ffn) {
      const T* const hidden = static_cast<const T*>(gate.hidden) + row * 2 * gate.ffn + col;
      T* const dhidden = static_cast<T*>(gate.dhidden) + row * 2 * gate.ffn + col;
      const C weight = static_cast<C>(static_cast<const T*>(gate.weights)[gate.order[row]]);
      const GateGradient<C> made(static_cast<C>(hidden[0]), static_cast<C>(hidden[gate.ffn]),
                                 static_cast<C>(da[row * gate.ffn + col]), weight);
      dhidden[0] = T(made.dgate), dhidden[gate.ffn] = T(made.dup);
      static_cast<T*>(gate.weighted)[row * gate.ffn + col] = T(made.weighted);
      share = made.share;
    }
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) share += __shfl_xor_sync(0xffffffffU, share, step);
    if (threadIdx.x % warp_size == 0) static_cast<C*>(gate.parts)[row * parts + col / gate_part] = share;
  }
}

bool fits(const RowsProduct& p) {
  return p.a.dtype == p.b.dtype && p.a.dtype == p.out.dtype && in_pieces(p.a) && in_pieces(p.b) && in_pieces(p.out);
}

/// out_e (M, N) = a^T b of an expert's rows.
void add_products(const Experts& experts, const RowsProduct& p, const Gathered& a, const Gathered& b, Group& group) {
  for (int64_t e = 0; e < experts.count; ++e)
    for (int i = 0; i < stretches(p.out); ++i) {
      const int64_t begin = experts.starts[e], rows = experts.starts[e + 1] - begin;
      const Stretch out = stretch(p.out, e, i);
      if (rows > 0)
        group.add({CUBLAS_OP_N, CUBLAS_OP_T, p.b.n, out.rows, rows, b.row(begin), p.b.n, a.row(begin, out.first), p.a.n,
                   out.data, p.out.n});
    }
}

void clear_experts_without_rows(const Experts& experts, const ExpertMatrices& out) {
  for (int64_t e = 0; e < experts.count; ++e)
    for (int i = 0; i < stretches(out) && experts.starts[e] == experts.starts[e + 1]; ++i) {
      const Stretch of = stretch(out, e, i);
      fill({of.data, out.dtype, {of.rows * out.n}, {1}}, 0);
    }
}

}  // namespace

std::vector<int64_t> starts_for_cublas(const Experts& experts) {
  if (!experts_by_cublas() || experts.slots == 0) return {};
  check(
      CUBLAS_VERSION >= 120500, "moe_experts",
      "products of experts by cuBLAS were asked for, which CUDA has from 12.5 on; this program was built with an older "
      "one");
  refuse_in_graph("a product of experts by cuBLAS, which needs their numbers of rows on the host,");
  std::vector<int64_t> starts(static_cast<std::size_t>(experts.count) + 1);
  to_host(starts.data(), experts.offsets, static_cast<int64_t>(starts.size() * sizeof(int64_t)));
  return starts;
}

bool rows_times_experts_cublas(const GroupedProblem& p, bool b_by_k) {
  const DType dtype = p.a.dtype;
  const Experts& experts = p.experts;
  if (!experts.starts || p.matrices.dtype != dtype || p.out_dtype != dtype || !in_pieces(p.a) ||
      !in_pieces(p.matrices) || !in_pieces(p.out, dtype, p.n))
    return false;
  const Gathered a(experts, p.a);
  const int count = stretches(p.matrices);
  Group group(dtype);
  for (int i = 0; i < count; ++i) {
    for (int64_t e = 0; e < experts.count; ++e) {
      const int64_t begin = experts.starts[e], rows = experts.starts[e + 1] - begin;
      const Stretch b = stretch(p.matrices, e, i);
      if (rows == 0) continue;
      if (b_by_k) {  // a part of K
        group.add({CUBLAS_OP_N, CUBLAS_OP_N, p.n, rows, b.rows, b.data, p.n, a.row(begin, b.first), p.k,
                   at(p.out, dtype, begin * p.n), p.n});
      } else {  // a part of the columns
        group.add({CUBLAS_OP_T, CUBLAS_OP_N, b.rows, rows, p.k, b.data, p.k, a.row(begin), p.k,
                   at(p.out, dtype, begin * p.n + b.first), p.n});
      }
    }
    if (!b_by_k && i + 1 < count) continue;
    group.run(b_by_k && i > 0);
    group = Group(dtype);
  }
  return true;
}

bool gate_experts_cublas(const GroupedProblem& p, const Gated& out) {
  GroupedProblem product = p;
  product.out = out.hidden, product.out_dtype = p.a.dtype;
  if (!rows_times_experts_cublas(product, false)) return false;
  const int64_t rows = p.experts.starts[p.experts.count], ffn = out.ffn;
  const auto columns = [&](void* data, int64_t first, int64_t pitch) {
    return Array{at(data, p.a.dtype, first), p.a.dtype, {rows, ffn}, {pitch, 1}};
  };
  gated(Gate::silu, 1, columns(out.hidden, 0, 2 * ffn), columns(out.hidden, ffn, 2 * ffn), columns(out.active, 0, ffn));
  return true;
}

bool gate_experts_backward_cublas(const GroupedProblem& p, const GatedBackward& gate) {
  if (!p.experts.starts) return false;
  const int64_t rows = p.experts.starts[p.experts.count];
  const Scratch da(p.experts.slots * gate.ffn * size_of(p.a.dtype));
  GroupedProblem product = p;
  product.out = da.as<void>(), product.out_dtype = p.a.dtype;
  if (!rows_times_experts_cublas(product, true)) return false;
  dispatch_float(p.a.dtype, "moe_experts", [&]<class T>(Type<T>) {
    launch("moe_gate_backward", gate_backward<T>, grid_for(rows * parts_of(gate.ffn) * gate_part), rows,
           da.as<const T>(), gate);
  });
  return true;
}

bool experts_from_rows_cublas(const Experts& experts, const RowsProduct& first, const RowsProduct& second, bool add) {
  if (!experts.starts || !fits(first) || !fits(second) || first.a.dtype != second.a.dtype) return false;
  Group group(first.a.dtype);
  const Gathered a[] = {{experts, first.a}, {experts, second.a}}, b[] = {{experts, first.b}, {experts, second.b}};
  add_products(experts, first, a[0], b[0], group);
  add_products(experts, second, a[1], b[1], group);
  group.run(add);
  if (add) return true;
  clear_experts_without_rows(experts, first.out);
  clear_experts_without_rows(experts, second.out);
  return true;
}

}  // namespace knock::cuda
