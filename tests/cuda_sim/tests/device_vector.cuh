#pragma once
// Device memory for tests: an array, filled from the host or not at all.

#include <cuda_runtime.h>

#include <cstddef>
#include <numeric>
#include <vector>

template <class T>
class DeviceVector {
 public:
  explicit DeviceVector(std::size_t size) : size_(size) { cudaMalloc(&data_, size * sizeof(T)); }
  explicit DeviceVector(const std::vector<T>& values) : DeviceVector(values.size()) {
    cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~DeviceVector() { cudaFree(data_); }
  DeviceVector(const DeviceVector&) = delete;
  DeviceVector& operator=(const DeviceVector&) = delete;

  T* data() const { return data_; }
  std::size_t bytes() const { return size_ * sizeof(T); }
  std::vector<T> to_host() const {
    std::vector<T> values(size_);
    cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// 0, 1, 2, ...
template <class T = float>
std::vector<T> counting(std::size_t size) {
  std::vector<T> values(size);
  std::iota(values.begin(), values.end(), T{});
  return values;
}
