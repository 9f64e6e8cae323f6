// The simulated runtime: copies, streams, events, graphs, memory, errors, devices. Each case leaves nothing behind.

#include "runtime.hpp"
#include "child.hpp"
#include "counters.hpp"
#include "device_vector.cuh"
#include "memory.hpp"
#include "report.hpp"
#include "runtime_kernels.hpp"

#include <doctest/doctest.h>

#include <numeric>
#include <string>
#include <vector>

namespace {

struct Stream {
  cudaStream_t handle = nullptr;
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { cudaStreamCreateWithFlags(&handle, flags); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return handle; }
};

struct Event {
  cudaEvent_t handle = nullptr;
  explicit Event(unsigned flags = 0) { cudaEventCreateWithFlags(&handle, flags); }
  ~Event() { cudaEventDestroy(handle); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return handle; }
};

template <class T>
struct Pinned {
  T* data = nullptr;
  explicit Pinned(std::size_t size) { cudaMallocHost(reinterpret_cast<void**>(&data), size * sizeof(T)); }
  ~Pinned() { cudaFreeHost(data); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
};

// What the device holds now, without running anything that is queued.
float peek(const float* device) { return *reinterpret_cast<const float*>(cuda_sim::bytes_at(device)); }

bool is_clean() { return cuda_sim::take_reports().empty() && cudaGetLastError() == cudaSuccess; }

// In a process of its own, with a variable of the environment.
template <class Program>
Outcome run_with(const char* variable, const char* value, Program program) {
  return run_in_child([&] {
    setenv(variable, value, 1);
    program();
  });
}

void require(bool condition) {
  if (!condition) std::_Exit(7);
}

}  // namespace

TEST_CASE("cuda_sim copies: there and back, within the device, rows of a matrix, symbols") {
  const auto values = counting(1000);
  const DeviceVector<float> x(values), y(1000);
  CHECK(x.to_host() == values);
  cudaMemcpy(y.data(), x.data(), x.bytes(), cudaMemcpyDeviceToDevice);
  CHECK(y.to_host() == values);

  std::vector<float> block(6, -1);  // 2 rows of 3 out of a matrix of 10 columns
  cudaMemcpy2D(block.data(), 12, x.data() + 20, 40, 12, 2, cudaMemcpyDeviceToHost);
  CHECK(block == std::vector<float>{20, 21, 22, 30, 31, 32});

  const std::vector<float> coefficients{1, 2, 3, 4};
  CHECK(set_coefficients(coefficients.data(), 4) == cudaSuccess);
  const DeviceVector<float> z(std::vector<float>(4));
  launch_add_coefficients(z.data(), nullptr);
  CHECK(z.to_host() == coefficients);
  CHECK(read_count() == 4);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim copies: pageable memory is read when the call is made") {
  const Stream stream;
  const DeviceVector<float> x(4);
  std::vector<float> host(4, 1);
  cudaMemcpyAsync(x.data(), host.data(), 16, cudaMemcpyHostToDevice, stream);
  host.assign(4, 2);
  cudaStreamSynchronize(stream);
  CHECK(x.to_host() == std::vector<float>(4, 1));
  CHECK(is_clean());
}

TEST_CASE("cuda_sim copies: pinned memory is read when the copy runs") {
  const Stream stream;
  const DeviceVector<float> x(4);
  const Pinned<float> host(4);
  std::fill_n(host.data, 4, 1.f);
  cudaMemcpyAsync(x.data(), host.data, 16, cudaMemcpyHostToDevice, stream);
  host.data[0] = 2;  // a mistake: reported, and seen by the copy
  cudaStreamSynchronize(stream);
  CHECK(x.to_host() == std::vector<float>{2, 1, 1, 1});
  CHECK(cuda_sim::take_reports().size() == 1);
}

TEST_CASE("cuda_sim copies: other parts of a pinned page may be used meanwhile") {
  const Stream stream;
  const DeviceVector<float> x(std::vector<float>(4, 3));
  const Pinned<float> host(8);
  std::fill_n(host.data, 8, 1.f);
  cudaMemcpyAsync(host.data, x.data(), 16, cudaMemcpyDeviceToHost, stream);
  host.data[4] = 5;
  CHECK(host.data[5] == 1);
  cudaStreamSynchronize(stream);
  CHECK(host.data[0] == 3);
  CHECK(host.data[4] == 5);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: nothing runs before somebody waits, then in order") {
  const Stream stream;
  const DeviceVector<float> x(std::vector<float>{1});
  cudaDeviceSynchronize();
  launch_double(x.data(), stream);
  launch_add(x.data(), 1, 1, stream);
  launch_double(x.data(), stream);
  CHECK(peek(x.data()) == 1);
  CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
  CHECK(cudaGetLastError() == cudaErrorNotReady);
  cudaStreamSynchronize(stream);
  CHECK(peek(x.data()) == 6);
  CHECK(cudaStreamQuery(stream) == cudaSuccess);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: a loop of queries ends") {
  const Stream stream;
  const Event event;
  const DeviceVector<float> x(std::vector<float>{1});
  for (int i = 0; i < 3; ++i) launch_double(x.data(), stream);
  cudaEventRecord(event, stream);
  int queries = 0;
  while (cudaEventQuery(event) == cudaErrorNotReady) ++queries;
  CHECK(cudaGetLastError() == cudaErrorNotReady);
  CHECK(queries == 4);
  CHECK(peek(x.data()) == 8);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: an event orders two of them, whichever is waited for") {
  const Stream first, second;
  const Event event(cudaEventDisableTiming);
  const DeviceVector<float> x(std::vector<float>{1});
  launch_add(x.data(), 1, 1, first);
  cudaEventRecord(event, first);
  launch_add(x.data(), 1, 100, first);  // not waited for
  cudaStreamSynchronize(first);
  cudaStreamWaitEvent(second, event, 0);
  launch_double(x.data(), second);
  cudaStreamSynchronize(second);
  CHECK(peek(x.data()) == 204);

  launch_add(x.data(), 1, 1, first);
  cudaEventRecord(event, first);
  cudaStreamWaitEvent(second, event, 0);
  launch_double(x.data(), second);
  cudaStreamSynchronize(second);
  CHECK(peek(x.data()) == 410);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: the null stream and blocking streams take turns") {
  const Stream blocking(cudaStreamDefault);
  const DeviceVector<float> x(std::vector<float>{1});
  launch_add(x.data(), 1, 1, blocking);
  launch_double(x.data(), nullptr);
  launch_add(x.data(), 1, 1, blocking);
  cudaStreamSynchronize(blocking);
  CHECK(peek(x.data()) == 5);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: an unordered use is found in whatever order the host waits") {
  for (const bool second_first : {false, true}) {
    const Stream first, second;
    const DeviceVector<float> x(std::vector<float>{1});
    launch_add(x.data(), 1, 1, first);
    launch_double(x.data(), second);
    cudaStreamSynchronize(second_first ? second : first);
    cudaStreamSynchronize(second_first ? first : second);
    const auto reports = cuda_sim::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].find("no event or wait orders them") != std::string::npos);
  }
}

TEST_CASE("cuda_sim streams: functions of the host run in order") {
  const Stream stream;
  const DeviceVector<float> x(std::vector<float>{1});
  const Pinned<float> host(1);
  float seen = 0;
  struct Look {
    const float* from;
    float* to;
  } look{host.data, &seen};
  launch_double(x.data(), stream);
  cudaMemcpyAsync(host.data, x.data(), 4, cudaMemcpyDeviceToHost, stream);
  cudaLaunchHostFunc(
      stream, [](void* data) { *static_cast<Look*>(data)->to = *static_cast<Look*>(data)->from; }, &look);
  CHECK(seen == 0);
  cudaStreamSynchronize(stream);
  CHECK(seen == 2);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim streams: KNOCK_CUDA_SIM_EAGER runs at once, and still knows what was waited for") {
  const auto outcome = run_with("KNOCK_CUDA_SIM_EAGER", "1", [] {
    const Stream stream;
    const DeviceVector<float> x(std::vector<float>{1});
    launch_double(x.data(), stream);
    require(peek(x.data()) == 2);
    launch_double(x.data(), nullptr);
    cudaDeviceSynchronize();
  });
  CHECK(outcome.exit_code == 1);
  CHECK(outcome.findings.find("no event or wait orders them") != std::string::npos);
}

TEST_CASE("cuda_sim events: elapsed time") {
  const Event first, last, untimed(cudaEventDisableTiming);
  float milliseconds = -1;
  CHECK(cudaEventElapsedTime(&milliseconds, first, last) == cudaErrorInvalidResourceHandle);
  cudaEventRecord(first, nullptr);
  cudaEventRecord(last, nullptr);
  cudaEventRecord(untimed, nullptr);
  CHECK(cudaEventElapsedTime(&milliseconds, first, last) == cudaErrorNotReady);
  cudaEventSynchronize(last);
  CHECK(cudaEventElapsedTime(&milliseconds, first, last) == cudaSuccess);
  CHECK(milliseconds >= 0);
  CHECK(cudaEventElapsedTime(&milliseconds, first, untimed) == cudaErrorInvalidResourceHandle);
  cudaGetLastError();
  CHECK(is_clean());
}

TEST_CASE("cuda_sim memory: figures, out of memory, and room after a queued free") {
  const auto before = cuda_sim::memory_use();
  cuda_sim::set_memory_capacity(before.used + 1000);
  const Stream stream;
  void *first = nullptr, *second = nullptr;
  CHECK(cudaMalloc(&first, 600) == cudaSuccess);
  CHECK(reinterpret_cast<uintptr_t>(first) % 256 == 0);
  CHECK(cuda_sim::memory_use().used == before.used + 600);
  CHECK(cudaMalloc(&second, 600) == cudaErrorMemoryAllocation);
  CHECK(second == nullptr);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  std::size_t available = 0, total = 0;
  cudaMemGetInfo(&available, &total);
  CHECK(available == 400);
  CHECK(total == before.used + 1000);

  cudaFreeAsync(first, stream);
  CHECK(cudaMallocAsync(&second, 600, stream) == cudaSuccess);
  CHECK(second != first);
  cudaFree(second);
  cuda_sim::set_memory_capacity(0);
  CHECK(cuda_sim::memory_use().used == before.used);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim memory: KNOCK_CUDA_SIM_MEMORY is its size") {
  const auto outcome = run_with("KNOCK_CUDA_SIM_MEMORY", "3", [] {
    void* data = nullptr;
    require(cudaMalloc(&data, (3 << 20) + 1) == cudaErrorMemoryAllocation);
    require(cudaMalloc(&data, 3 << 20) == cudaSuccess);
    cudaFree(data);
  });
  CHECK(outcome.exit_code == 0);
}

TEST_CASE("cuda_sim memory: what a pointer is") {
  const DeviceVector<float> x(4);
  const Pinned<float> pinned(4);
  const float host = 0;
  const auto type = [](const void* address) {
    cudaPointerAttributes attributes{};
    cudaPointerGetAttributes(&attributes, address);
    return attributes.type;
  };
  CHECK(type(x.data() + 3) == cudaMemoryTypeDevice);
  CHECK(type(x.data() + 4) == cudaMemoryTypeUnregistered);
  CHECK(type(pinned.data) == cudaMemoryTypeHost);
  CHECK(type(&host) == cudaMemoryTypeUnregistered);
}

TEST_CASE("cuda_sim errors: a kernel's fault stays until the device is reset") {
  const auto outcome = run_in_child([] {
    const DeviceVector<float> x(std::vector<float>(4));
    launch_fault(x.data(), nullptr);
    require(cudaGetLastError() == cudaSuccess);  // it has not run
    require(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
    require(cudaGetLastError() == cudaErrorIllegalAddress);
    require(cudaGetLastError() == cudaErrorIllegalAddress);
    void* data = nullptr;
    require(cudaMalloc(&data, 4) == cudaErrorIllegalAddress);
    require(cuda_sim::take_reports().size() == 1);
    require(cudaDeviceReset() == cudaSuccess);
    require(cudaGetLastError() == cudaSuccess);
    require(cudaMalloc(&data, 4) == cudaSuccess);
    require(cudaFree(data) == cudaSuccess);
    std::_Exit(0);
  });
  CHECK(outcome.exit_code == 0);
}

TEST_CASE("cuda_sim errors: names, texts, and a last error for each call") {
  CHECK(std::string(cudaGetErrorName(cudaErrorMemoryAllocation)) == "cudaErrorMemoryAllocation");
  CHECK(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
  CHECK(std::string(cudaGetErrorString(cudaSuccess)) == "no error");
  CHECK(cudaSetDevice(99) == cudaErrorInvalidDevice);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidDevice);
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
  CHECK(cudaPeekAtLastError() == cudaSuccess);
}

TEST_CASE("cuda_sim launches: shared memory, attributes, occupancy") {
  CHECK(plain_attributes().sharedSizeBytes == 1024);
  CHECK(plain_attributes().maxThreadsPerBlock == 512);
  CHECK(launch_plain(2, 512, 47 << 10) == cudaSuccess);
  CHECK(launch_plain(2, 512, 48 << 10) == cudaErrorInvalidValue);
  CHECK(launch_plain(2, 513, 0) == cudaErrorLaunchOutOfResources);
  CHECK(allow_shared(163 << 10) == cudaErrorInvalidValue);  // with the fixed KiB it is too much
  CHECK(allow_shared(162 << 10) == cudaSuccess);
  CHECK(launch_plain(2, 512, 162 << 10) == cudaSuccess);
  CHECK(plain_blocks_per_processor(512, 0) == 4);
  CHECK(plain_blocks_per_processor(32, 0) == 32);
  CHECK(plain_blocks_per_processor(32, 50 << 10) == 3);
  cudaDeviceSynchronize();
  CHECK(cuda_sim::take_reports().size() == 3);
  cudaGetLastError();
}

TEST_CASE("cuda_sim graphs: replays with the captured parameters") {
  const Stream stream, branch;
  const Event forked(cudaEventDisableTiming), joined(cudaEventDisableTiming);
  const DeviceVector<float> x(std::vector<float>{1}), y(std::vector<float>{0});
  const Pinned<float> host(1);
  cudaDeviceSynchronize();
  float value = 1;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  launch_add(x.data(), 1, value, stream);
  cudaEventRecord(forked, stream);
  cudaStreamWaitEvent(branch, forked, 0);
  launch_add(y.data(), 1, 10, branch);
  cudaEventRecord(joined, branch);
  launch_double(x.data(), stream);
  cudaStreamWaitEvent(stream, joined, 0);
  cudaMemcpyAsync(host.data, x.data(), 4, cudaMemcpyDeviceToHost, stream);
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  value = 100;
  std::size_t nodes = 0;
  cudaGraphGetNodes(graph, nullptr, &nodes);
  CHECK(nodes == 4);
  CHECK(peek(x.data()) == 1);  // captured, not run

  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  cudaGraphDestroy(graph);
  const Stream other;
  for (int step = 0; step < 3; ++step) cudaGraphLaunch(executable, other);
  CHECK(peek(x.data()) == 1);
  cudaStreamSynchronize(other);
  CHECK(host.data[0] == 22);  // ((1 + 1) * 2 + 1) * 2 ...
  CHECK(peek(y.data()) == 30);
  cudaGraphExecDestroy(executable);
  CHECK(is_clean());
}

TEST_CASE("cuda_sim graphs: memory is allocated in a relaxed capture alone") {
  const Stream stream;
  cudaGraph_t graph = nullptr;
  void* data = nullptr;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  CHECK(cudaMalloc(&data, 64) == cudaSuccess);
  cudaMemsetAsync(data, 0, 64, stream);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  cudaGraphDestroy(graph);
  CHECK(cudaFree(data) == cudaSuccess);
  CHECK(is_clean());

  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  CHECK(cudaMalloc(&data, 64) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  CHECK(cuda_sim::take_reports().size() == 1);
  cudaGetLastError();
}

TEST_CASE("cuda_sim streams: what the host waited for is counted, what it knew to be finished is not") {
  const Stream stream;
  const Event event(cudaEventDisableTiming);
  const DeviceVector<float> x(std::vector<float>{1});
  cudaDeviceSynchronize();
  const uint64_t before = cuda_sim::host_waits();
  launch_add(x.data(), 1, 1, stream);
  cudaEventRecord(event, stream);
  launch_add(x.data(), 1, 1, stream);
  CHECK(cuda_sim::host_waits() == before);
  cudaEventSynchronize(event);
  cudaEventSynchronize(event);
  CHECK(cuda_sim::host_waits() == before + 1);
  cudaStreamSynchronize(stream);
  cudaStreamSynchronize(stream);
  cudaDeviceSynchronize();
  CHECK(cuda_sim::host_waits() == before + 2);
}

TEST_CASE("cuda_sim counters: launches by kernel, bytes of copies") {
  cuda_sim::reset_kernel_counters();
  const DeviceVector<float> x(counting(256));
  launch_add(x.data(), 256, 1, nullptr);
  launch_add(x.data(), 256, 1, nullptr);
  x.to_host();
  const auto& counters = cuda_sim::kernel_counters();
  const auto& add = counters.at("(anonymous namespace)::add");
  CHECK(add.launches == 2);
  CHECK(add.global_bytes_read == 2 * 1024);
  CHECK(add.global_bytes_written == 2 * 1024);
  CHECK(add.global_sectors == add.global_ideal_sectors);
  CHECK(counters.at("copy to device").global_bytes_written == 1024);
  CHECK(counters.at("copy to host").global_bytes_read == 1024);
}

TEST_CASE("cuda_sim devices: one like an A100") {
  int count = 0, major = 0, shared = 0;
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess);
  CHECK(count == 1);
  cudaDeviceProp properties{};
  cudaGetDeviceProperties(&properties, 0);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  CHECK(properties.major == 8);
  CHECK(major == 8);
  CHECK(shared == 163 << 10);
  CHECK(properties.multiProcessorCount == 108);
}

TEST_CASE("cuda_sim devices: none") {
  const auto outcome = run_with("KNOCK_CUDA_SIM_DEVICES", "0", [] {
    int count = -1;
    void* data = nullptr;
    require(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0);
    require(cudaMalloc(&data, 4) == cudaErrorNoDevice);
    require(cudaSetDevice(0) == cudaErrorNoDevice);
  });
  CHECK(outcome.exit_code == 0);
  CHECK(outcome.findings == "");
}

TEST_CASE("cuda_sim devices: no driver, and one that is older than the program") {
  for (const int version : {0, 11080}) {
    const auto outcome = run_with("KNOCK_CUDA_SIM_DRIVER", std::to_string(version).c_str(), [version] {
      int count = -1, driver = -1;
      require(cudaDriverGetVersion(&driver) == cudaSuccess && driver == version);
      require(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver && count == 0);
    });
    CHECK(outcome.exit_code == 0);
    CHECK(outcome.findings == "");
  }
}

TEST_CASE("cuda_sim devices: two, copies between them") {
  const auto outcome = run_with("KNOCK_CUDA_SIM_DEVICES", "2", [] {
    const auto values = counting(100);
    const DeviceVector<float> x(values);
    cudaSetDevice(1);
    const Stream stream;
    {
      const DeviceVector<float> y(100);
      require(cudaMemcpyPeerAsync(y.data(), 1, x.data(), 0, x.bytes(), stream) == cudaSuccess);
      cudaStreamSynchronize(stream);
      require(y.to_host() == values);
      require(cuda_sim::memory_use(1).used == 400);
    }
    int can = 0;
    require(cudaDeviceCanAccessPeer(&can, 0, 1) == cudaSuccess && can == 1);
    require(cudaDeviceEnablePeerAccess(0, 0) == cudaSuccess);
    require(cudaDeviceEnablePeerAccess(0, 0) == cudaErrorPeerAccessAlreadyEnabled);
    cudaSetDevice(0);
  });
  CHECK(outcome.findings == "");
  CHECK(outcome.exit_code == 0);
}
