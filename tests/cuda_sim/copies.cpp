// Copies and fills.

#include "registration.hpp"
#include "streams.hpp"

#include <cstring>
#include <map>

namespace cuda_sim {
namespace {

enum class Place : uint8_t { host, pinned, device };

// `rows` rows of `width` bytes, `pitch` bytes apart on either side.
struct Copy {
  const char* function = nullptr;
  char* to = nullptr;
  const char* from = nullptr;
  std::size_t width = 0, rows = 1, to_pitch = 0, from_pitch = 0;

  std::size_t to_bytes() const { return (rows - 1) * to_pitch + width; }
  std::size_t from_bytes() const { return (rows - 1) * from_pitch + width; }
};

Place place_of(const void* address) {
  if (is_device_address(address)) return Place::device;
  return is_pinned(address) ? Place::pinned : Place::host;
}

const char* text_of(Place place) { return place == Place::device ? "device memory" : "host memory"; }

bool is_device(const void* address) { return place_of(address) == Place::device; }

bool fits(const void* address, std::size_t bytes) {
  const auto* byte = static_cast<const char*>(address);
  if (is_device_address(address)) {
    const auto* range = find(address);
    return range != nullptr && byte + bytes <= range->data + range->bytes;
  }
  return !is_pinned(address) || is_pinned_range(address, bytes);
}

// False after a report.
bool check_range(const char* function, const void* address, std::size_t bytes, const char* does) {
  if (fits(address, bytes)) return true;
  report(std::string(function) + " " + does + " " + std::to_string(bytes) + " bytes from " + describe_address(address));
  return false;
}

bool check_ranges(const Copy& copy) {
  return check_range(copy.function, copy.to, copy.to_bytes(), "writes") &&
         check_range(copy.function, copy.from, copy.from_bytes(), "reads");
}

bool fits_kind(const Copy& copy, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDefault) return true;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device == is_device(copy.to) && from_device == is_device(copy.from)) return true;
  report(std::string(copy.function) + " in the wrong direction: from " + text_of(place_of(copy.from)) + " to " +
         text_of(place_of(copy.to)));
  return false;
}

// A device copies in any order, so the result would be anything.
bool overlaps(const Copy& copy) {
  if (copy.to >= copy.from + copy.from_bytes() || copy.from >= copy.to + copy.to_bytes()) return false;
  report(std::string(copy.function) + " between overlapping ranges, " + describe_address(copy.from) + " and " +
         describe_address(copy.to));
  return true;
}

char* bytes_of(const char* address) { return is_device(address) ? bytes_at(address) : host_bytes(address); }

void count(const Copy& copy) {
  const bool to = is_device(copy.to), from = is_device(copy.from);
  Counters counters;
  counters.launches = 1;
  if (to) counters.global_bytes_written = counters.touched_bytes_written = copy.rows * copy.width;
  if (from) counters.global_bytes_read = counters.touched_bytes_read = copy.rows * copy.width;
  note_work(to && from ? "copy on device" : to ? "copy to device" : "copy to host", counters);
}

// Where nothing is executed: the bytes that fills left, by their last address.
struct Left {
  const char* begin = nullptr;
  int value = 0;
};
std::map<const char*, Left>& left_by_fills() {
  static auto* all = new std::map<const char*, Left>;
  return *all;
}

int value_left_by_fill(const char* address) {
  const auto found = left_by_fills().lower_bound(address);
  return found != left_by_fills().end() && found->second.begin <= address ? found->second.value : 0;
}

void copy_row(const Copy& copy, std::size_t row) {
  char* to = copy.to + row * copy.to_pitch;
  const char* from = copy.from + row * copy.from_pitch;
  if (!is_executing()) {
    if (!is_device(to)) std::memset(host_bytes(to), value_left_by_fill(from), copy.width);
    return;
  }
  if (is_device(to) && is_device(from)) {
    copy_range(to, from, copy.width);
  } else if (is_device(to)) {
    write_range(to, copy.width);
  } else if (is_device(from)) {
    read_range(from, copy.width, copy.function);
  }
  std::memmove(bytes_of(to), bytes_of(from), copy.width);
}

// The ranges are checked again: they may have been freed since.
void run(const Copy& copy) {
  if (!check_ranges(copy)) return set_sticky_error(cudaErrorIllegalAddress);
  count(copy);
  for (std::size_t row = 0; row < copy.rows; ++row) copy_row(copy, row);
}

HostUse host_use(const Copy& copy) {
  if (place_of(copy.to) == Place::pinned) return {copy.to, copy.to_bytes(), true};
  if (place_of(copy.from) == Place::pinned) return {copy.from, copy.from_bytes(), false};
  return {};
}

// Pageable memory is read when the call is made.
Operation staged(Copy copy) {
  if (!is_executing()) return {copy.function, [=] { run(copy); }};
  auto stage = std::make_shared<std::vector<char>>(copy.from, copy.from + copy.from_bytes());
  return {copy.function, [copy, stage]() mutable {
            copy.from = stage->data();
            run(copy);
          }};
}

bool writes_pageable(const Copy& copy) { return place_of(copy.to) == Place::host; }

cudaError_t submit_copy(const Copy& copy, cudaMemcpyKind kind, cudaStream_t handle) {
  auto* stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (copy.width == 0 || copy.rows == 0) return cudaSuccess;
  if (!fits_kind(copy, kind)) return cudaErrorInvalidMemcpyDirection;
  if (!check_ranges(copy) || overlaps(copy)) return cudaErrorInvalidValue;
  if (is_capturing(*stream)) return submit(handle, {copy.function, [=] { run(copy); }, host_use(copy)});
  if (place_of(copy.from) == Place::host) return submit(handle, staged(copy));
  const auto error = submit(handle, {copy.function, [=] { run(copy); }, host_use(copy)});
  if (error != cudaSuccess || !writes_pageable(copy)) return error;
  wait_for(*stream);
  return sticky_error();
}

// The host waits, except for a copy within the device.
cudaError_t copy_now(const Copy& copy, cudaMemcpyKind kind) {
  if (device_count() == 0) return cudaErrorNoDevice;
  const auto error = submit_copy(copy, kind, nullptr);
  if (error != cudaSuccess || (is_device(copy.to) && is_device(copy.from))) return error;
  wait_for(*stream_of(nullptr));
  return sticky_error();
}

Copy make_copy(const char* function, void* to, const void* from, std::size_t bytes) {
  return {function, static_cast<char*>(to), static_cast<const char*>(from), bytes};
}

Copy make_copy_2d(const char* function, void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                  std::size_t width, std::size_t rows) {
  return {function, static_cast<char*>(to), static_cast<const char*>(from), width, rows, to_pitch, from_pitch};
}

bool pitches_fit(const Copy& copy) { return copy.width <= copy.to_pitch && copy.width <= copy.from_pitch; }

struct Fill {
  const char* function = nullptr;
  char* data = nullptr;
  int value = 0;
  std::size_t width = 0, rows = 1, pitch = 0;

  std::size_t bytes() const { return (rows - 1) * pitch + width; }
};

bool check_fill(const Fill& fill) {
  if (is_device(fill.data)) return check_range(fill.function, fill.data, fill.bytes(), "writes");
  report(std::string(fill.function) + " of host memory");
  return false;
}

void run(const Fill& fill) {
  if (!check_fill(fill)) return set_sticky_error(cudaErrorIllegalAddress);
  Counters counters;
  counters.launches = 1;
  counters.global_bytes_written = counters.touched_bytes_written = fill.rows * fill.width;
  note_work("fill", counters);
  if (fill.rows == 1) left_by_fills()[fill.data + fill.width - 1] = {fill.data, fill.value};
  if (!is_executing()) return;
  for (std::size_t row = 0; row < fill.rows; ++row) {
    char* data = fill.data + row * fill.pitch;
    write_range(data, fill.width);
    std::memset(bytes_at(data), fill.value, fill.width);
  }
}

cudaError_t submit_fill(const Fill& fill, cudaStream_t stream) {
  if (device_count() == 0) return cudaErrorNoDevice;
  if (fill.width == 0 || fill.rows == 0) return cudaSuccess;
  if (fill.rows > 1 && fill.width > fill.pitch) return cudaErrorInvalidPitchValue;
  if (!check_fill(fill)) return cudaErrorInvalidValue;
  return submit(stream, {fill.function, [=] { run(fill); }});
}

cudaError_t check_peers(const void* to, int to_device, const void* from, int from_device) {
  if (to_device < 0 || to_device >= device_count() || from_device < 0 || from_device >= device_count()) {
    return cudaErrorInvalidDevice;
  }
  const auto is_on = [](const void* address, int device) {
    const auto* range = find(address);
    return range == nullptr || range->device == device;
  };
  if (is_on(to, to_device) && is_on(from, from_device)) return cudaSuccess;
  return refuse(cudaErrorInvalidValue, "cudaMemcpyPeer: the memory is of another device");
}

// The place of a part of a symbol's variable; null, after a report, where there is none.
char* address_in_symbol(const void* symbol, std::size_t offset, std::size_t bytes) {
  const auto* variable = variable_of(symbol);
  if (variable == nullptr) return nullptr;
  if (offset + bytes <= variable->bytes) return static_cast<char*>(variable->address) + offset;
  report("a copy of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of a symbol of " +
         std::to_string(variable->bytes));
  return nullptr;
}

}  // namespace
}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

cudaError_t CUDARTAPI cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return api([&] { return copy_now(make_copy("cudaMemcpy", to, from, bytes), kind); });
}

cudaError_t CUDARTAPI cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                      cudaStream_t stream) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    return submit_copy(make_copy("cudaMemcpyAsync", to, from, bytes), kind, stream);
  });
}

cudaError_t CUDARTAPI cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                   size_t rows, cudaMemcpyKind kind) {
  return api([&] {
    const auto copy = make_copy_2d("cudaMemcpy2D", to, to_pitch, from, from_pitch, width, rows);
    return pitches_fit(copy) ? copy_now(copy, kind) : cudaErrorInvalidPitchValue;
  });
}

cudaError_t CUDARTAPI cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                        size_t rows, cudaMemcpyKind kind, cudaStream_t stream) {
  return api([&] {
    if (device_count() == 0) return cudaErrorNoDevice;
    const auto copy = make_copy_2d("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, rows);
    return pitches_fit(copy) ? submit_copy(copy, kind, stream) : cudaErrorInvalidPitchValue;
  });
}

cudaError_t CUDARTAPI cudaMemset(void* data, int value, size_t bytes) {
  return api([&] { return submit_fill({"cudaMemset", static_cast<char*>(data), value, bytes}, nullptr); });
}

cudaError_t CUDARTAPI cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return api([&] { return submit_fill({"cudaMemsetAsync", static_cast<char*>(data), value, bytes}, stream); });
}

cudaError_t CUDARTAPI cudaMemset2DAsync(void* data, size_t pitch, int value, size_t width, size_t rows,
                                        cudaStream_t stream) {
  return api([&] {
    return submit_fill({"cudaMemset2DAsync", static_cast<char*>(data), value, width, rows, pitch}, stream);
  });
}

cudaError_t CUDARTAPI cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t bytes,
                                          cudaStream_t stream) {
  return api([&] {
    if (const auto error = check_peers(to, to_device, from, from_device); error != cudaSuccess) return error;
    return submit_copy(make_copy("cudaMemcpyPeerAsync", to, from, bytes), cudaMemcpyDeviceToDevice, stream);
  });
}

cudaError_t CUDARTAPI cudaMemcpyPeer(void* to, int to_device, const void* from, int from_device, size_t bytes) {
  return cudaMemcpyPeerAsync(to, to_device, from, from_device, bytes, nullptr);
}

cudaError_t CUDARTAPI cudaGetSymbolAddress(void** address, const void* symbol) {
  return api([&] {
    *address = address_in_symbol(symbol, 0, 0);
    return *address != nullptr ? cudaSuccess : cudaErrorInvalidSymbol;
  });
}

cudaError_t CUDARTAPI cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  return api([&] {
    const auto* variable = variable_of(symbol);
    if (variable == nullptr) return cudaErrorInvalidSymbol;
    *bytes = variable->bytes;
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                                         cudaMemcpyKind kind) {
  return api([&] {
    auto* to = address_in_symbol(symbol, offset, bytes);
    if (to == nullptr) return cudaErrorInvalidSymbol;
    return copy_now(make_copy("cudaMemcpyToSymbol", to, from, bytes), kind);
  });
}

cudaError_t CUDARTAPI cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                              cudaMemcpyKind kind, cudaStream_t stream) {
  return api([&] {
    auto* to = address_in_symbol(symbol, offset, bytes);
    if (to == nullptr) return cudaErrorInvalidSymbol;
    return submit_copy(make_copy("cudaMemcpyToSymbolAsync", to, from, bytes), kind, stream);
  });
}

cudaError_t CUDARTAPI cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                           cudaMemcpyKind kind) {
  return api([&] {
    const auto* from = address_in_symbol(symbol, offset, bytes);
    if (from == nullptr) return cudaErrorInvalidSymbol;
    return copy_now(make_copy("cudaMemcpyFromSymbol", to, from, bytes), kind);
  });
}

cudaError_t CUDARTAPI cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                                cudaMemcpyKind kind, cudaStream_t stream) {
  return api([&] {
    const auto* from = address_in_symbol(symbol, offset, bytes);
    if (from == nullptr) return cudaErrorInvalidSymbol;
    return submit_copy(make_copy("cudaMemcpyFromSymbolAsync", to, from, bytes), kind, stream);
  });
}

}  // extern "C"
