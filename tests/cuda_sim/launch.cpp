// Launches: what a GPU would refuse is refused, the rest is queued with a copy of the parameters.

#include "registration.hpp"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

namespace cuda_sim {
namespace {

struct Configuration {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

std::vector<Configuration>& pushed_configurations() {
  static thread_local std::vector<Configuration> stack;
  return stack;
}

std::string text_of(const Configuration& of) {
  std::ostringstream text;
  text << "<<<(" << of.grid.x << ", " << of.grid.y << ", " << of.grid.z << "), (" << of.block.x << ", " << of.block.y
       << ", " << of.block.z << "), " << of.shared_bytes << ">>>";
  return text.str();
}

uint64_t threads_of(const dim3& block) { return uint64_t{block.x} * block.y * block.z; }

bool fits_hardware(const dim3& grid, const dim3& block) {
  const bool grid_fits =
      grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
  return grid_fits && block.z <= 64 && threads_of(block) > 0 && threads_of(block) <= 1024;
}

bool fits_bounds(const Function& function, const dim3& block) {
  if (function.max_threads != 0 && threads_of(block) > function.max_threads) return false;
  const auto& required = function.required_threads;
  return required[0] == 0 || (required[0] == block.x && required[1] == block.y && required[2] == block.z);
}

cudaError_t check_configuration(const Kernel& kernel, const Configuration& configuration) {
  const auto refused = [&](cudaError_t error, const std::string& why) {
    return refuse(error, "launch of " + kernel.shown + text_of(configuration) + ": " + why);
  };
  const auto& function = *kernel.function;
  if (!fits_hardware(configuration.grid, configuration.block)) {
    return refused(cudaErrorInvalidConfiguration, "no device takes this grid or block");
  }
  if (!fits_bounds(function, configuration.block)) {
    return refused(cudaErrorLaunchOutOfResources, "the block is not as its __launch_bounds__ say");
  }
  const auto shared = configuration.shared_bytes + function.static_shared_bytes;
  const bool opted_in = configuration.shared_bytes <= kernel.dynamic_shared_limit && kernel.has_shared_limit;
  if (shared > default_shared_bytes && !opted_in) {
    return refused(cudaErrorInvalidValue, std::to_string(shared) + " bytes of shared memory without the opt-in " +
                                              "(cudaFuncAttributeMaxDynamicSharedMemorySize)");
  }
  return cudaSuccess;
}

std::shared_ptr<std::vector<char>> copy_parameters(const Function& function, void** arguments) {
  auto block = std::make_shared<std::vector<char>>(function.parameter_bytes);
  for (std::size_t i = 0; i < function.parameters.size(); ++i) {
    std::memcpy(block->data() + function.parameters[i].offset, arguments[i], function.parameters[i].bytes);
  }
  return block;
}

void run(const Kernel& kernel, const Configuration& of, const std::vector<char>& parameters) {
  Launch launch;
  launch.grid = {of.grid.x, of.grid.y, of.grid.z};
  launch.block = {of.block.x, of.block.y, of.block.z};
  launch.dynamic_shared_bytes = of.shared_bytes;
  launch.parameters = parameters.data();
  launch.notes_touched = is_work_watched();
  Counters counters;
  if (!is_executing()) {
    counters.launches = 1;
    return note_work(kernel.shown, counters);
  }
  try {
    execute(*kernel.function, *kernel.binary->module, launch, counters);
    if (was_out_of_bounds()) set_sticky_error(cudaErrorIllegalAddress);
  } catch (const Fault& fault) {
    std::string what = fault.what();
    if (what.starts_with(kernel.name)) what.replace(0, kernel.name.size(), kernel.shown);
    report(what);
    set_sticky_error(cudaErrorLaunchFailure);
  }
  note_work(kernel.shown, counters);
}

cudaError_t launch(const void* host_function, const Configuration& configuration, void** arguments) {
  if (device_count() == 0) return cudaErrorNoDevice;
  auto* kernel = kernel_of(host_function);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (const auto error = check_configuration(*kernel, configuration); error != cudaSuccess) return error;
  kernel->dynamic_shared_asked = std::max(kernel->dynamic_shared_asked, configuration.shared_bytes);
  return submit(configuration.stream, {kernel->shown, [=, parameters = copy_parameters(*kernel->function, arguments)] {
                                         run(*kernel, configuration, *parameters);
                                       }});
}

cudaError_t set_shared_limit(Kernel& kernel, int bytes) {
  const auto most = most_shared_bytes() - kernel.function->static_shared_bytes;
  if (bytes < 0 || static_cast<std::size_t>(bytes) > most) {
    return refuse(cudaErrorInvalidValue, kernel.shown + ": " + std::to_string(bytes) +
                                             " bytes of dynamic shared memory, a " +
                                             "device of compute capability 8.0 has at most " + std::to_string(most));
  }
  kernel.dynamic_shared_limit = static_cast<std::size_t>(bytes);
  kernel.has_shared_limit = true;
  return cudaSuccess;
}

}  // namespace
}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

unsigned CUDARTAPI __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  pushed_configurations().push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t CUDARTAPI __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const auto configuration = pushed_configurations().back();
  pushed_configurations().pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t CUDARTAPI __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host_function));
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernel(const void* host_function, dim3 grid, dim3 block, void** arguments,
                                       size_t shared_bytes, cudaStream_t stream) {
  return api([&] { return launch(host_function, {grid, block, shared_bytes, stream}, arguments); });
}

cudaError_t CUDARTAPI __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                         size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host_function,
                                          void** arguments) {
  if (config->numAttrs > 0) fatal("launch attributes are not modelled");
  return cudaLaunchKernel(host_function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                          config->stream);
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* host_function, cudaFuncAttribute attribute, int value) {
  return api([&] {
    auto* kernel = kernel_of(host_function);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) return set_shared_limit(*kernel, value);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    return cudaErrorInvalidValue;
  });
}

// Registers are ptxas' affair: none is told.
cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host_function) {
  return api([&] {
    const auto* kernel = kernel_of(host_function);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    const auto& function = *kernel->function;
    *attributes = {};
    attributes->sharedSizeBytes = function.static_shared_bytes;
    attributes->localSizeBytes = function.local_bytes;
    attributes->maxThreadsPerBlock = function.max_threads != 0 ? static_cast<int>(function.max_threads) : 1024;
    attributes->ptxVersion = attributes->binaryVersion = 80;
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(kernel->dynamic_shared_limit);
    return cudaSuccess;
  });
}

// As far as threads, blocks and shared memory limit it: registers are ptxas' affair.
cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host_function, int threads,
                                                                    size_t dynamic_shared_bytes) {
  return api([&] {
    const auto* kernel = kernel_of(host_function);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (threads <= 0 || threads > 1024) return cudaErrorInvalidValue;
    constexpr std::size_t reserved_per_block = 1024, most_blocks = 32, most_warps = 64;
    const auto shared = kernel->function->static_shared_bytes + dynamic_shared_bytes + reserved_per_block;
    const auto by_warps = most_warps / ((static_cast<std::size_t>(threads) + 31) / 32);
    *blocks = static_cast<int>(std::min({most_blocks, by_warps, shared_bytes_of_processor / shared}));
    return cudaSuccess;
  });
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host_function,
                                                                             int threads, size_t dynamic_shared_bytes,
                                                                             unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, host_function, threads, dynamic_shared_bytes);
}

}  // extern "C"
