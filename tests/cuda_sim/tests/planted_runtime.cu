// Mistakes in the use of streams, events, memory, copies, launches and graphs.

#include "device_vector.cuh"
#include "planted_bugs.hpp"

#include <cstdlib>

namespace {

__global__ void fill(float* y, float value) { y[threadIdx.x] = value; }
__global__ void add_one(float* y) { y[threadIdx.x] += 1; }
__global__ void __launch_bounds__(128) bounded(float* y) { y[threadIdx.x] = 1; }

__global__ void through_shared(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}

__constant__ float coefficients[8];
__global__ void read_coefficients(float* y) { y[threadIdx.x] = coefficients[threadIdx.x]; }

struct Stream {
  cudaStream_t handle = nullptr;
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { cudaStreamCreateWithFlags(&handle, flags); }
  ~Stream() { cudaStreamDestroy(handle); }
  operator cudaStream_t() const { return handle; }
};

struct Event {
  cudaEvent_t handle = nullptr;
  Event() { cudaEventCreateWithFlags(&handle, cudaEventDisableTiming); }
  ~Event() { cudaEventDestroy(handle); }
  operator cudaEvent_t() const { return handle; }
};

struct Pinned {
  float* data = nullptr;
  explicit Pinned(std::size_t size, float value = 0) {
    cudaMallocHost(&data, size * sizeof(float));
    for (std::size_t i = 0; i < size; ++i) data[i] = value;
  }
  ~Pinned() { cudaFreeHost(data); }
};

constexpr std::size_t bytes = 32 * sizeof(float);

// What a compiler must not drop.
volatile float sink = 0;

// ---- streams, events and the host ----

template <bool wrong>
void result_before_wait() {
  const DeviceVector<float> y(32);
  const Pinned host(32);
  const Stream stream;
  fill<<<1, 32, 0, stream>>>(y.data(), 5);
  cudaMemcpyAsync(host.data, y.data(), bytes, cudaMemcpyDeviceToHost, stream);
  if (!wrong) cudaStreamSynchronize(stream);
  sink = host.data[3];
  cudaStreamSynchronize(stream);
}

template <bool wrong>
void waits_for_wrong_stream() {
  const DeviceVector<float> y(32);
  const Pinned host(32);
  const Stream stream, other;
  fill<<<1, 32, 0, stream>>>(y.data(), 5);
  cudaMemcpyAsync(host.data, y.data(), bytes, cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(wrong ? other : stream);
  sink = host.data[3];
  cudaStreamSynchronize(stream);
}

// The buffer is filled again while the last upload may still read it.
template <bool wrong>
void upload_overwritten() {
  const DeviceVector<float> x(32);
  const Pinned host(32, 1);
  const Stream stream;
  const Event uploaded;
  cudaMemcpyAsync(x.data(), host.data, bytes, cudaMemcpyHostToDevice, stream);
  cudaEventRecord(uploaded, stream);
  if (!wrong) cudaEventSynchronize(uploaded);
  host.data[0] = 2;
  cudaStreamSynchronize(stream);
}

template <bool wrong>
void two_streams_without_event() {
  const DeviceVector<float> y(32);
  const Stream first, second;
  const Event filled;
  fill<<<1, 32, 0, first>>>(y.data(), 5);
  cudaEventRecord(filled, first);
  if (!wrong) cudaStreamWaitEvent(second, filled);
  add_one<<<1, 32, 0, second>>>(y.data());
  cudaDeviceSynchronize();
}

// The event says nothing of what is queued after it.
template <bool wrong>
void event_recorded_too_early() {
  const DeviceVector<float> y(32);
  const Stream first, second;
  const Event event;
  if (wrong) cudaEventRecord(event, first);
  fill<<<1, 32, 0, first>>>(y.data(), 5);
  if (!wrong) cudaEventRecord(event, first);
  cudaStreamWaitEvent(second, event);
  add_one<<<1, 32, 0, second>>>(y.data());
  cudaDeviceSynchronize();
}

// The next batch is uploaded over the one that the kernel still uses.
template <bool wrong>
void upload_over_what_is_used() {
  const DeviceVector<float> x(counting(32));
  const Pinned host(32, 1);
  const Stream compute, uploads;
  const Event used;
  add_one<<<1, 32, 0, compute>>>(x.data());
  cudaEventRecord(used, compute);
  if (!wrong) cudaStreamWaitEvent(uploads, used);
  cudaMemcpyAsync(x.data(), host.data, bytes, cudaMemcpyHostToDevice, uploads);
  cudaDeviceSynchronize();
}

template <bool wrong>
void kernel_before_upload() {
  const DeviceVector<float> x(32);
  const Pinned host(32, 1);
  const Stream compute, uploads;
  const Event uploaded;
  cudaMemcpyAsync(x.data(), host.data, bytes, cudaMemcpyHostToDevice, uploads);
  cudaEventRecord(uploaded, uploads);
  if (!wrong) cudaStreamWaitEvent(compute, uploaded);
  add_one<<<1, 32, 0, compute>>>(x.data());
  cudaDeviceSynchronize();
}

// Non-blocking streams do not take turns with the null stream.
template <bool wrong>
void null_stream_beside_nonblocking() {
  const DeviceVector<float> y(32);
  const Stream stream(wrong ? cudaStreamNonBlocking : cudaStreamDefault);
  fill<<<1, 32, 0, stream>>>(y.data(), 5);
  add_one<<<1, 32>>>(y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void stream_used_after_destruction() {
  const DeviceVector<float> y(32);
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  if (wrong) cudaStreamDestroy(stream);
  fill<<<1, 32, 0, stream>>>(y.data(), 5);
  cudaDeviceSynchronize();
  if (!wrong) cudaStreamDestroy(stream);
}

template <bool wrong>
void event_used_after_destruction() {
  cudaEvent_t event = nullptr;
  cudaEventCreate(&event);
  if (wrong) cudaEventDestroy(event);
  cudaEventRecord(event, nullptr);
  cudaDeviceSynchronize();
  if (!wrong) cudaEventDestroy(event);
}

void CUDART_CB synchronize_device(void*) { cudaDeviceSynchronize(); }
void CUDART_CB do_nothing(void*) {}

template <bool wrong>
void host_function_calls_api() {
  cudaLaunchHostFunc(nullptr, wrong ? synchronize_device : do_nothing, nullptr);
  cudaDeviceSynchronize();
}

// ---- memory ----

template <bool wrong>
void freed_twice() {
  void* data = nullptr;
  cudaMalloc(&data, 128);
  cudaFree(data);
  if (wrong) cudaFree(data);
}

template <bool wrong>
void freed_in_the_middle() {
  char* data = nullptr;
  cudaMalloc(&data, 1024);
  if (wrong) cudaFree(data + 256);
  cudaFree(data);
}

template <bool wrong>
void never_freed() {
  void* data = nullptr;
  cudaMalloc(&data, 128);
  if (!wrong) cudaFree(data);
}

template <bool wrong>
void pinned_never_freed() {
  void* data = nullptr;
  cudaMallocHost(&data, 128);
  if (!wrong) cudaFreeHost(data);
}

template <bool wrong>
void stream_never_destroyed() {
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  if (!wrong) cudaStreamDestroy(stream);
}

template <bool wrong>
void event_never_destroyed() {
  cudaEvent_t event = nullptr;
  cudaEventCreate(&event);
  if (!wrong) cudaEventDestroy(event);
}

// Another stream may still use what is freed.
template <bool wrong>
void freed_in_another_stream() {
  const Stream first, second;
  const Event used;
  float* data = nullptr;
  cudaMallocAsync(&data, bytes, first);
  fill<<<1, 32, 0, first>>>(data, 1);
  cudaEventRecord(used, first);
  if (!wrong) cudaStreamWaitEvent(second, used);
  cudaFreeAsync(data, second);
  cudaDeviceSynchronize();
}

template <bool wrong>
void freed_before_use_in_stream() {
  const Stream stream;
  float* data = nullptr;
  cudaMallocAsync(&data, bytes, stream);
  if (wrong) cudaFreeAsync(data, stream);
  fill<<<1, 32, 0, stream>>>(data, 1);
  if (!wrong) cudaFreeAsync(data, stream);
  cudaStreamSynchronize(stream);
}

template <bool wrong>
void host_reads_device_memory() {
  const DeviceVector<float> x(counting(32));
  sink = wrong ? x.data()[3] : x.to_host()[3];
}

template <bool wrong>
void host_writes_device_memory() {
  const DeviceVector<float> x(counting(32));
  if (wrong) {
    x.data()[3] = 1;
  } else {
    cudaMemset(x.data(), 0, 4);
  }
  cudaDeviceSynchronize();
}

template <bool wrong>
void host_reads_freed_pinned_memory() {
  float* data = nullptr;
  cudaMallocHost(&data, bytes);
  data[0] = 1;
  if (wrong) cudaFreeHost(data);
  sink = data[0];
  if (!wrong) cudaFreeHost(data);
}

// ---- copies ----

template <bool wrong>
void copy_in_wrong_direction() {
  const std::vector<float> host(32);
  const DeviceVector<float> x(32);
  cudaMemcpy(x.data(), host.data(), bytes, wrong ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice);
}

template <bool wrong>
void copy_too_long() {
  const std::vector<float> host(64);
  const DeviceVector<float> x(32);
  cudaMemcpy(x.data(), host.data(), wrong ? 2 * bytes : bytes, cudaMemcpyHostToDevice);
}

template <bool wrong>
void copy_rows_too_long() {
  const std::vector<float> host(64);
  const DeviceVector<float> x(32);
  cudaMemcpy2D(x.data(), 32, host.data(), 64, 32, wrong ? 5 : 4, cudaMemcpyHostToDevice);
}

template <bool wrong>
void copy_of_freed() {
  std::vector<float> host(32);
  float* data = nullptr;
  cudaMalloc(&data, bytes);
  cudaMemset(data, 0, bytes);
  if (wrong) cudaFree(data);
  cudaMemcpy(host.data(), data, bytes, cudaMemcpyDeviceToHost);
  if (!wrong) cudaFree(data);
}

template <bool wrong>
void copy_of_what_was_not_written() {
  const DeviceVector<float> x(32);
  cudaMemset(x.data(), 0, wrong ? bytes - 4 : bytes);
  x.to_host();
}

// What was not written is not written in the copy either.
template <bool wrong>
void copy_of_a_copy() {
  const DeviceVector<float> x(32), y(32);
  cudaMemset(x.data(), 0, wrong ? bytes - 4 : bytes);
  cudaMemcpy(y.data(), x.data(), bytes, cudaMemcpyDeviceToDevice);
  y.to_host();
}

template <bool wrong>
void copy_to_overlapping() {
  const DeviceVector<float> x(counting(32));
  cudaMemcpy(x.data() + (wrong ? 15 : 16), x.data(), 16 * sizeof(float), cudaMemcpyDeviceToDevice);
  cudaDeviceSynchronize();
}

template <bool wrong>
void fill_too_long() {
  const DeviceVector<float> x(32);
  cudaMemset(x.data(), 0, wrong ? bytes + 1 : bytes);
}

template <bool wrong>
void fill_of_host_memory() {
  std::vector<float> host(32);
  const DeviceVector<float> x(32);
  cudaMemset(wrong ? host.data() : x.data(), 0, bytes);
}

template <bool wrong>
void symbol_too_long() {
  const std::vector<float> values(16);
  cudaMemcpyToSymbol(coefficients, values.data(), wrong ? 36 : 32);
  const DeviceVector<float> y(8);
  read_coefficients<<<1, 8>>>(y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void pinned_freed_too_early() {
  const DeviceVector<float> x(32);
  float* host = nullptr;
  cudaMallocHost(&host, bytes);
  for (int i = 0; i < 32; ++i) host[i] = 1;
  if (wrong) cudaFreeHost(host);
  cudaMemcpyAsync(x.data(), host, bytes, cudaMemcpyHostToDevice, nullptr);
  cudaDeviceSynchronize();
  if (!wrong) cudaFreeHost(host);
}

// ---- launches ----

void launch_fill(dim3 grid, dim3 block) {
  const DeviceVector<float> y(1024);
  fill<<<grid, block>>>(y.data(), 1);
  cudaDeviceSynchronize();
}

template <bool wrong>
void block_too_large() {
  launch_fill(1, wrong ? 2048 : 1024);
}

template <bool wrong>
void grid_empty() {
  launch_fill(wrong ? 0 : 1, 32);
}

template <bool wrong>
void grid_too_high() {
  launch_fill(dim3(1, wrong ? 65536 : 1), 32);
}

template <bool wrong>
void more_threads_than_bounds() {
  const DeviceVector<float> y(256);
  bounded<<<1, wrong ? 256 : 128>>>(y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void shared_without_opt_in() {
  const DeviceVector<float> y(32);
  if (!wrong) cudaFuncSetAttribute(through_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  through_shared<<<1, 32, 64 << 10>>>(y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void shared_beyond_opt_in() {
  const int most = 163 << 10;
  cudaFuncSetAttribute(through_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, wrong ? most + 1 : most);
}

// ---- graphs ----

struct Graph {
  cudaGraphExec_t executable = nullptr;

  // Captures what `queue` does in the stream.
  template <class Queue>
  Graph(cudaStream_t stream, Queue queue) {
    cudaGraph_t graph = nullptr;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    queue();
    if (cudaStreamEndCapture(stream, &graph) != cudaSuccess) return;
    cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
  }
  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
  }
};

template <bool wrong>
void graph_after_free() {
  const Stream stream;
  float* data = nullptr;
  cudaMalloc(&data, bytes);
  const Graph graph(stream, [&] { fill<<<1, 32, 0, stream>>>(data, 1); });
  if (wrong) cudaFree(data);
  cudaGraphLaunch(graph.executable, stream);
  cudaStreamSynchronize(stream);
  if (!wrong) cudaFree(data);
}

template <bool wrong>
void fork_never_joined() {
  const Stream stream, branch;
  const DeviceVector<float> x(32);
  const Event forked, joined;
  const Graph graph(stream, [&] {
    cudaEventRecord(forked, stream);
    cudaStreamWaitEvent(branch, forked);
    fill<<<1, 32, 0, branch>>>(x.data(), 1);
    cudaEventRecord(joined, branch);
    if (!wrong) cudaStreamWaitEvent(stream, joined);
  });
}

template <bool wrong>
void wait_in_capture() {
  const Stream stream;
  const DeviceVector<float> x(32);
  const Graph graph(stream, [&] {
    fill<<<1, 32, 0, stream>>>(x.data(), 1);
    if (wrong) cudaStreamSynchronize(stream);
  });
}

template <bool wrong>
void allocation_in_capture() {
  const Stream stream;
  void* data = nullptr;
  if (!wrong) cudaMalloc(&data, bytes);
  const Graph graph(stream, [&] {
    if (wrong) cudaMalloc(&data, bytes);
  });
  cudaFree(data);
}

template <bool wrong>
void graph_never_destroyed() {
  const Stream stream;
  const DeviceVector<float> x(32);
  cudaGraph_t graph = nullptr;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  fill<<<1, 32, 0, stream>>>(x.data(), 1);
  cudaStreamEndCapture(stream, &graph);
  if (!wrong) cudaGraphDestroy(graph);
}

// The result of a replay is read without a wait.
template <bool wrong>
void graph_result_before_wait() {
  const Stream stream;
  const DeviceVector<float> x(32);
  const Pinned host(32);
  const Graph graph(stream, [&] {
    fill<<<1, 32, 0, stream>>>(x.data(), 1);
    cudaMemcpyAsync(host.data, x.data(), bytes, cudaMemcpyDeviceToHost, stream);
  });
  for (int step = 0; step < 2; ++step) {
    cudaGraphLaunch(graph.executable, stream);
    if (!wrong || step == 0) cudaStreamSynchronize(stream);
    sink = host.data[0];
  }
  cudaStreamSynchronize(stream);
}

#define BOTH(name) name<true>, name<false>

PlantedBug bug(const char* name, const char* finding, void (*wrong)(), void (*right)()) {
  return {name, wrong, finding, right};
}

}  // namespace

std::vector<PlantedBug> planted_runtime_bugs() {
  return {
      bug("result read before the wait", "host code reads pinned memory", BOTH(result_before_wait)),
      bug("wait for the wrong stream", "host code reads pinned memory", BOTH(waits_for_wrong_stream)),
      bug("upload overwritten", "host code writes pinned memory", BOTH(upload_overwritten)),
      bug("two streams, no event", "no event or wait orders them", BOTH(two_streams_without_event)),
      bug("event recorded too early", "no event or wait orders them", BOTH(event_recorded_too_early)),
      bug("upload over what is used", "no event or wait orders them", BOTH(upload_over_what_is_used)),
      bug("kernel before the upload", "no event or wait orders them", BOTH(kernel_before_upload)),
      bug("null stream beside a non-blocking one", "no event or wait orders", BOTH(null_stream_beside_nonblocking)),
      bug("stream used after its destruction", "after cudaStreamDestroy", BOTH(stream_used_after_destruction)),
      bug("event used after its destruction", "after cudaEventDestroy", BOTH(event_used_after_destruction)),
      bug("host function calls the API", "must not call the CUDA API", BOTH(host_function_calls_api)),

      bug("freed twice", "cudaFree of freed memory", BOTH(freed_twice)),
      bug("freed in the middle", "cudaFree of byte 256", BOTH(freed_in_the_middle)),
      bug("never freed", "leak: allocation", BOTH(never_freed)),
      bug("pinned memory never freed", "leak: 1 ranges of pinned memory", BOTH(pinned_never_freed)),
      bug("stream never destroyed", "leak: 1 streams", BOTH(stream_never_destroyed)),
      bug("event never destroyed", "leak: 1 events", BOTH(event_never_destroyed)),
      bug("freed in another stream", "no event or wait orders them", BOTH(freed_in_another_stream)),
      bug("freed before its use in a stream", "freed memory", BOTH(freed_before_use_in_stream)),
      bug("host reads device memory", "dereferences a device address", BOTH(host_reads_device_memory)),
      bug("host writes device memory", "dereferences a device address", BOTH(host_writes_device_memory)),
      bug("host reads freed pinned memory", "pinned memory that was freed", BOTH(host_reads_freed_pinned_memory)),

      bug("copy in the wrong direction", "in the wrong direction", BOTH(copy_in_wrong_direction)),
      bug("copy too long", "cudaMemcpy writes 256 bytes", BOTH(copy_too_long)),
      bug("copy of too many rows", "cudaMemcpy2D writes", BOTH(copy_rows_too_long)),
      bug("copy of freed memory", "freed memory", BOTH(copy_of_freed)),
      bug("copy of what was not written", "byte 124 of", BOTH(copy_of_what_was_not_written)),
      bug("copy of a copy of it", "byte 124 of", BOTH(copy_of_a_copy)),
      bug("copy to an overlapping range", "overlapping", BOTH(copy_to_overlapping)),
      bug("fill too long", "cudaMemset writes 129 bytes", BOTH(fill_too_long)),
      bug("fill of host memory", "cudaMemset of host memory", BOTH(fill_of_host_memory)),
      bug("copy past the end of a symbol", "of a symbol of 32", BOTH(symbol_too_long)),
      bug("pinned memory freed before its copy", "pinned", BOTH(pinned_freed_too_early)),

      bug("block of 2048 threads", "no device takes this grid or block", BOTH(block_too_large)),
      bug("empty grid", "no device takes this grid or block", BOTH(grid_empty)),
      bug("grid of 65536 rows", "no device takes this grid or block", BOTH(grid_too_high)),
      bug("more threads than __launch_bounds__", "__launch_bounds__", BOTH(more_threads_than_bounds)),
      bug("64 KiB of shared memory without opt-in", "without the opt-in", BOTH(shared_without_opt_in)),
      bug("opt-in beyond 163 KiB", "has at most", BOTH(shared_beyond_opt_in)),

      bug("graph replayed after cudaFree", "freed memory", BOTH(graph_after_free)),
      bug("fork never joined in a capture", "has not been joined", BOTH(fork_never_joined)),
      bug("wait in a capture", "not while a stream is captured", BOTH(wait_in_capture)),
      bug("allocation in a capture", "not while a stream is captured", BOTH(allocation_in_capture)),
      bug("graph never destroyed", "leak: 1 graphs", BOTH(graph_never_destroyed)),
      bug("result of a replay read before the wait", "host code reads pinned memory", BOTH(graph_result_before_wait)),
  };
}
