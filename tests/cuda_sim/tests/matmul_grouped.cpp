// cublasGemmGroupedBatchedEx beside a plain triple loop: types, transposes, extents of each group; and what it refuses.

#include "child.hpp"
#include "device_vector.cuh"
#include "report.hpp"

#include <cublas_v2.h>

#include <doctest/doctest.h>

#include <deque>
#include <type_traits>
#include <vector>

#if CUBLAS_VERSION >= 120500

namespace {

/// c (m, n) = op(a) op(b) + beta c, by columns, without gaps.
struct One {
  int m, n, k;
  bool flip_a, flip_b;
};

/// Numbers that every type here holds, whose products and sums are exact.
template <class T>
std::vector<T> small_numbers(int count, int seed) {
  std::vector<T> out;
  for (int i = 0; i < count; ++i) out.push_back(static_cast<T>((i * 7 + seed * 5) % 11 - 5));
  return out;
}

template <class T>
constexpr cudaDataType type_of = std::is_same_v<T, double> ? CUDA_R_64F : CUDA_R_32F;

struct Call {
  bool pointers_on_host = false;
  int shift = 0;  ///< of the first operand, in elements
  cudaDataType type_of_c = CUDA_R_32F;
  bool written = true;  ///< the first operand
};

template <class T>
cublasStatus_t run(const std::vector<One>& all, T beta, std::vector<std::vector<T>>& c, const Call& how = {}) {
  cublasHandle_t handle = nullptr;
  REQUIRE(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
  std::deque<DeviceVector<T>> memory;
  std::vector<const void*> places[3];
  std::vector<int> m, n, k, lda, ldb, ldc;
  std::vector<cublasOperation_t> op_a, op_b;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& of = all[i];
    const int seed = static_cast<int>(i);
    const auto numbers_of_a = small_numbers<T>(of.m * of.k + how.shift, seed);
    if (how.written) {
      memory.emplace_back(numbers_of_a);
    } else {
      memory.emplace_back(numbers_of_a.size());
    }
    places[0].push_back(memory.back().data() + how.shift);
    memory.emplace_back(small_numbers<T>(of.k * of.n, seed + 1));
    places[1].push_back(memory.back().data());
    memory.emplace_back(c[i]);
    places[2].push_back(memory.back().data());
    m.push_back(of.m), n.push_back(of.n), k.push_back(of.k);
    lda.push_back(of.flip_a ? of.k : of.m), ldb.push_back(of.flip_b ? of.n : of.k), ldc.push_back(of.m);
    op_a.push_back(of.flip_a ? CUBLAS_OP_T : CUBLAS_OP_N), op_b.push_back(of.flip_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  }
  const DeviceVector<const void*> a_places(places[0]), b_places(places[1]), c_places(places[2]);
  const std::vector<T> alphas(all.size(), T(1)), betas(all.size(), beta);
  const std::vector<int> one_each(all.size(), 1);
  const bool wide = std::is_same_v<T, double>;
  const auto status = cublasGemmGroupedBatchedEx(
      handle, op_a.data(), op_b.data(), m.data(), n.data(), k.data(), alphas.data(),
      how.pointers_on_host ? places[0].data() : a_places.data(), type_of<T>, lda.data(), b_places.data(), type_of<T>,
      ldb.data(), betas.data(), const_cast<void* const*>(c_places.data()), wide ? CUDA_R_64F : how.type_of_c,
      ldc.data(), static_cast<int>(all.size()), one_each.data(), wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F);
  cudaDeviceSynchronize();
  for (std::size_t i = 0; i < all.size(); ++i) c[i] = memory[3 * i + 2].to_host();
  cublasDestroy(handle);
  return status;
}

template <class T>
std::vector<std::vector<T>> expected(const std::vector<One>& all, T beta, std::vector<std::vector<T>> c) {
  for (std::size_t g = 0; g < all.size(); ++g) {
    const auto& of = all[g];
    const auto a = small_numbers<T>(of.m * of.k, static_cast<int>(g));
    const auto b = small_numbers<T>(of.k * of.n, static_cast<int>(g) + 1);
    for (int i = 0; i < of.m; ++i)
      for (int j = 0; j < of.n; ++j) {
        T sum = 0;
        for (int l = 0; l < of.k; ++l)
          sum += a[static_cast<std::size_t>(of.flip_a ? i * of.k + l : l * of.m + i)] *
                 b[static_cast<std::size_t>(of.flip_b ? l * of.n + j : j * of.k + l)];
        T& to = c[g][static_cast<std::size_t>(j * of.m + i)];
        to = sum + beta * to;
      }
  }
  return c;
}

const std::vector<One> groups{{8, 5, 4, false, false}, {4, 1, 12, true, false}, {16, 8, 3, false, true}};

template <class T>
std::vector<std::vector<T>> results() {
  std::vector<std::vector<T>> c;
  for (const auto& of : groups) c.push_back(small_numbers<T>(of.m * of.n, 9));
  return c;
}

}  // namespace

TEST_CASE("cuBLAS: products of several extents equal a triple loop") {
  const auto check = [](auto zero) {
    using T = decltype(zero);
    for (const T beta : {T(0), T(1)}) {
      auto c = results<T>();
      const auto before = c;
      CHECK(run<T>(groups, beta, c) == CUBLAS_STATUS_SUCCESS);
      CHECK((c == expected<T>(groups, beta, before)));
    }
  };
  check(0.f);
  check(0.0);
  CHECK(cuda_sim::take_reports().empty());
}

TEST_CASE("cuBLAS: what a grouped product refuses") {
  const auto status = [](const std::vector<One>& all, const Call& how) {
    auto c = results<float>();
    return run<float>(all, 0.f, c, how);
  };
  CHECK(status(groups, {.type_of_c = CUDA_R_16BF}) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(cuda_sim::take_reports().at(0).find("these types") != std::string::npos);
  auto without_rows = groups;
  without_rows[1].k = 0;
  CHECK(status(without_rows, {}) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(cuda_sim::take_reports().at(0).find("an empty matrix") != std::string::npos);
  const auto findings = [&](const Call& how) { return run_in_child([&] { status(groups, how); }).findings; };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(has(findings({.pointers_on_host = true}), "pointers of A"));
  CHECK(has(findings({.shift = 1}), "multiples of 16 bytes"));
  CHECK(has(findings({.written = false}), "cuBLAS, as A"));
  CHECK(findings({}).empty());
}

#endif
