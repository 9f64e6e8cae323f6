// launches, bytes and FLOPs of a training step on NVIDIA GPUs, and the time of rooflines; needs nvcc, no GPU
//
//   ./run bench gpu-ledger [--config NAME] [--micro-batches N] [--rows N] [--json] [--model.key=value]
//   NAME: moe-2b3-a0b44 (default) or another of train_step's; in bf16
//
// The step is that of the configuration, 512 micro-batches for moe-2b3-a0b44 and 1 for the others, or N: forward and
// backward of each, then clipping and AdamW. The launches
// are those of the CUDA back-end's own host code at the full size, executed by nobody; bytes and FLOPs of its kernels
// are measured where cuda_sim executes a model of the same proportions (ledger.hpp). The model itself is made in host
// memory: 4 bytes a parameter.
//
// A kernel's time is the longer of what its bytes and its FLOPs take at a GPU's published peaks: no launch takes time,
// and nothing runs below its peak. So the sum is a lower limit, and the MFU an upper one. MFU counts the model's FLOPs
// (models::cost); the kernels' own, with recomputed scores and padded tiles, are what takes time.
#include "measure.hpp"
#include "shapes.hpp"

#ifndef BENCH_CUDA_SIM
int main() {
  std::fprintf(stderr, "gpu_ledger: needs nvcc 12.4 or newer, and a build with tests (it runs on their simulator)\n");
  return 1;
}
#else
#include "ledger.hpp"

#include <fstream>
#include <sstream>

using namespace knock;
using bench::ledger::Row;
using bench::ledger::Rows;

namespace {

/// Dense peaks (without sparsity) of NVIDIA's data sheets, SXM boards, in FLOP and bytes a second. mma.sync, which our
/// own kernels use, reaches 62.9% of Hopper's peak on average (Luo et al., arXiv 2402.13499); 0: nothing is published.
struct Gpu {
  const char* name;
  double bf16, f32, bandwidth, mma_sync;
};
constexpr Gpu gpus[] = {{"A100", 312e12, 19.5e12, 2.039e12, 1},  // 80 GB
                        {"H100", 989.4e12, 66.9e12, 3.35e12, 0.629},
                        {"H200", 989.4e12, 66.9e12, 4.8e12, 0.629},
                        {"B200", 2250e12, 75e12, 7.7e12, 0}};

bool is_product_of_library(const Row& row) { return row.kernel.starts_with("cublasLt"); }

double seconds(const Row& row, const Gpu& gpu, bool by_mma_sync = false) {
  const double share = by_mma_sync && !is_product_of_library(row) ? gpu.mma_sync : 1;
  return std::max(row.bytes / gpu.bandwidth, row.tensor_flop / (gpu.bf16 * share) + row.f32_flop / gpu.f32);
}

// ---- the two runs

/// A model of the same proportions that the simulator executes within a minute: two layers, up to eight experts, heads
/// of the same size and as many to a group, rows to an expert and words to a token as their sizes are reduced.
train::Config reduced(const train::Config& full) {
  train::Config out = full;
  models::MoeLmConfig& m = out.model;
  const auto times = [](int64_t n, double factor, int64_t unit) {
    return std::max<int64_t>(std::llround(static_cast<double>(n) * factor / static_cast<double>(unit)), 1) * unit;
  };
  m.hidden = std::min<int64_t>(m.hidden, 384);
  const double size = static_cast<double>(m.hidden) / static_cast<double>(full.model.hidden);
  m.layers = std::min<int64_t>(m.layers, 2);
  m.expert_ffn = times(m.expert_ffn, size, 128), m.dense_ffn = times(m.dense_ffn, size, 128);
  m.q_heads = m.q_heads / m.kv_heads, m.kv_heads = 1;
  m.experts = std::min<int64_t>(m.experts, std::max<int64_t>(8, m.top_k));
  const double share = m.experts > 0 ? static_cast<double>(m.experts) / static_cast<double>(full.model.experts) : 1;
  const int64_t tokens = full.train.batch_size * full.train.seq_len;
  out.train.batch_size = 1;
  out.train.seq_len = std::clamp<int64_t>(times(tokens, size * share, 64), 64, 512);
  m.vocab_size = times(m.vocab_size, static_cast<double>(out.train.seq_len) / static_cast<double>(tokens), 8);
  return out;
}

/// A device with as many fewer multiprocessors is cuda:1, so that grids, which are bounded by their number, are as
/// full.
void set_up_devices(const train::Config& full, const train::Config& small) {
  constexpr int processors_of_h100 = 132;
  const double share = bench::tokens_of(small) / bench::tokens_of(full);
  const int processors = std::max(static_cast<int>(std::lround(processors_of_h100 * share)), 1);
  setenv("KNOCK_CUDA_SIM_EAGER", "1", 1);
  setenv("KNOCK_CUDA_SIM_DEVICES", "2", 1);
  setenv("KNOCK_CUDA_SIM_PROCESSORS", text(processors_of_h100, ",", processors).c_str(), 1);
}

/// Two micro-batches, of which the second adds to gradients, and the update, after a step that makes what lasts.
Rows record(bench::ledger::Recorder& recorder, const train::Config& config, const char* device) {
  setenv("KNOCK_DEVICE", device, 1);
  recorder.begin("");
  bench::TrainingStep step(config);
  step();
  for (const char* phase : {"first", "later"}) {
    recorder.begin(phase);
    step.micro_batch();
  }
  recorder.begin("update");
  step.update();
  synchronize(step.device());
  return recorder.take();
}

// ---- the table

void add(Row& sum, const Row& row, double times) {
  sum.launches += static_cast<int64_t>(times) * row.launches;
  sum.bytes += times * row.bytes;
  sum.tensor_flop += times * row.tensor_flop;
  sum.f32_flop += times * row.f32_flop;
}

struct Line {
  Row row;
  double seconds[std::size(gpus)] = {}, by_mma_sync[std::size(gpus)] = {};

  void add(const Row& more, double times) {
    ::add(row, more, times);
    for (std::size_t i = 0; i < std::size(gpus); ++i) {
      seconds[i] += times * ::seconds(more, gpus[i]);
      by_mma_sync[i] += times * ::seconds(more, gpus[i], true);
    }
  }
};

struct Summary {
  std::vector<Line> lines;  ///< by entry and kernel, the longest on an H100 first
  Line all;
};

/// How often a step has a phase.
int times_of(std::string_view phase, int micro_batches) { return phase == "later" ? micro_batches - 1 : 1; }

Summary summed(const Rows& rows, int micro_batches) {
  std::map<std::pair<std::string, std::string>, Line> lines;
  Summary out;
  out.all.row.kernel = "(all)";
  for (const Row& row : rows) {
    const std::string kernel = bench::ledger::short_name(row.kernel);
    Line& line = lines[{row.entry, kernel}];
    line.row.entry = row.entry, line.row.kernel = kernel;
    const int times = times_of(row.phase, micro_batches);
    line.add(row, times);
    out.all.add(row, times);
  }
  for (auto& [name, line] : lines)
    if (line.row.launches > 0) out.lines.push_back(std::move(line));
  std::sort(out.lines.begin(), out.lines.end(),
            [](const Line& a, const Line& b) { return a.seconds[1] > b.seconds[1]; });
  return out;
}

void print_line(const Line& line) {
  const Row& r = line.row;
  std::printf("%-22s %-42.42s %9lld %10.3f %9.3f", r.entry.c_str(), r.kernel.c_str(),
              static_cast<long long>(r.launches), r.bytes * 1e-9, (r.tensor_flop + r.f32_flop) * 1e-12);
  for (const double s : line.seconds) std::printf(" %8.3f", 1e3 * s);
  std::printf("\n");
}

void print_text(const Summary& all, double model_flop, int most) {
  std::printf("%-22s %-42s %9s %10s %9s", "entry", "kernel", "launches", "GB", "TFLOP");
  for (const Gpu& gpu : gpus) std::printf(" %5s ms", gpu.name);
  std::printf("\n");
  Line rest;
  rest.row.kernel = "(smaller ones)";
  for (std::size_t i = 0; i < all.lines.size(); ++i) {
    if (static_cast<int>(i) < most) {
      print_line(all.lines[i]);
      continue;
    }
    add(rest.row, all.lines[i].row, 1);
    for (std::size_t g = 0; g < std::size(gpus); ++g) rest.seconds[g] += all.lines[i].seconds[g];
  }
  if (rest.row.launches > 0) print_line(rest);
  print_line(all.all);
  const auto print_mfu = [&](const char* what, const double(&times)[std::size(gpus)], bool by_mma_sync) {
    std::printf("%-97s", what);
    for (std::size_t g = 0; g < std::size(gpus); ++g)
      by_mma_sync&& gpus[g].mma_sync == 0 ? std::printf(" %8s", "-")
                                          : std::printf(" %7.1f%%", 100 * model_flop / (times[g] * gpus[g].bf16));
    std::printf("\n");
  };
  print_mfu("MFU, at most: of the model's FLOPs at the published peaks", all.all.seconds, false);
  print_mfu("MFU, at most, where our own products run at what mma.sync reaches (63% of the peak on Hopper)",
            all.all.by_mma_sync, true);
}

/// What PyTorch launches and moves for the same step: an estimate (peers/torch_ledger.py).
void print_peers(const std::string& wanted, const Row& ours, int micro_batches) {
  std::ifstream file(BENCH_FOLDER "/peers/torch_ledger.txt");
  std::map<std::string, Row> peers;  // by form of experts
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string config, experts, phase, name;
    double launches = 0, gigabytes = 0;
    words >> config >> experts >> phase >> name >> launches >> gigabytes;
    if (config != wanted || name != "(all)") continue;
    const int times = times_of(phase, micro_batches);
    peers[experts].launches += times * static_cast<int64_t>(launches);
    peers[experts].bytes += times * gigabytes * 1e9;
  }
  for (const auto& [experts, peer] : peers)
    std::printf("PyTorch eager, estimated, experts by %s: %lld launches (ours: %.2f of that), %.1f GB (%.2f)\n",
                experts.c_str(), static_cast<long long>(peer.launches),
                static_cast<double>(ours.launches) / static_cast<double>(peer.launches), peer.bytes * 1e-9,
                ours.bytes / peer.bytes);
}

void print(const bench::Options& options, const bench::StepArguments& arguments, const Summary& all, int micro_batches,
           const std::vector<std::string>& unknown) {
  const double model_flop = 1e9 * bench::gflop_of(arguments.trainer) * micro_batches;
  if (options.json) {
    for (const Line& line : all.lines) {
      const Row& r = line.row;
      std::printf(
          "{\"bench\":\"gpu_ledger\",\"config\":\"%s\",\"micro_batches\":%d,\"entry\":\"%s\",\"kernel\":\"%s\","
          "\"launches\":%lld,\"gb\":%.6g,\"tensor_tflop\":%.6g,\"f32_tflop\":%.6g",
          arguments.config.c_str(), micro_batches, r.entry.c_str(), r.kernel.c_str(),
          static_cast<long long>(r.launches), r.bytes * 1e-9, r.tensor_flop * 1e-12, r.f32_flop * 1e-12);
      for (std::size_t g = 0; g < std::size(gpus); ++g)
        std::printf(",\"%s_ms\":%.6g", gpus[g].name, 1e3 * line.seconds[g]);
      std::printf("}\n");
    }
    return;
  }
  std::printf("gpu_ledger: %s bf16, a step of %d x %lld tokens: %.3g TFLOP by the model's formulas\n\n",
              arguments.config.c_str(), micro_batches, static_cast<long long>(bench::tokens_of(arguments.trainer)),
              model_flop * 1e-12);
  print_text(all, model_flop, options.number("rows", 40));
  print_peers(arguments.config, all.all.row, micro_batches);
  for (const std::string& kernel : unknown)
    std::printf("not measured, charged what its call asks for: %s\n", kernel.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, {"config", "micro-batches", "rows", "model."}, [](const bench::Options& options) {
    const bench::StepArguments arguments = bench::parse_step(options, "moe-2b3-a0b44", "bf16");
    const int micro_batches = options.number("micro-batches", static_cast<int>(arguments.trainer.train.grad_accum));
    const train::Config small = reduced(arguments.trainer);
    set_up_devices(arguments.trainer, small);
    bench::ledger::Recorder recorder;
    const bench::ledger::Factors factors(record(recorder, small, "cuda:1"));
    cuda_sim::set_executing(false);
    Rows rows = record(recorder, arguments.trainer, "cuda:0");
    const std::vector<std::string> unknown = factors.apply(rows);
    print(options, arguments, summed(rows, micro_batches), micro_batches, unknown);
  });
}
#endif
