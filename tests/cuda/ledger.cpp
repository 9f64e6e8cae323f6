// The ledger of launches, bytes and operations (bench/ledger.hpp) beside what the simulator counts when it executes the
// same training step: `./run bench gpu-ledger` says for large models what is checked here for a small one.

#include <bench/ledger.hpp>

#include <knock/models/moe_lm.hpp>
#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>

#include <doctest/doctest.h>

#include <cstdlib>

using namespace knock;
using bench::ledger::Row;
using bench::ledger::Rows;

namespace {

/// Every entry of a step of the models that the ledger is made for: residual sums, knock, experts, head.
models::MoeLmConfig model(int64_t hidden, int64_t ffn, int64_t vocab) {
  models::MoeLmConfig c{.vocab_size = vocab,
                        .hidden = hidden,
                        .layers = 2,
                        .q_heads = 8,
                        .kv_heads = 2,
                        .head_dim = 64,
                        .experts = 4,
                        .top_k = 2,
                        .expert_ffn = ffn};
  return c;
}

/// The second of two steps: the first one makes what lasts.
Rows record(bench::ledger::Recorder& recorder, const models::MoeLmConfig& config, int64_t tokens) {
  recorder.begin("");
  manual_seed(5);
  models::MoeLm lm(config);
  const Tensor text = randint(0, config.vocab_size, {1, tokens + 1});
  const Tensor inputs = text.narrow(1, 0, tokens).contiguous().to("cuda:0"),
               targets = text.narrow(1, 1, tokens).contiguous().to("cuda:0");
  lm.to("cuda:0");
  lm.set_compute_dtype(DType::bf16);
  optim::AdamW optimizer(lm.parameters(), {.lr = 1e-3, .weight_decay = 0.1});
  for (const char* phase : {"", "step"}) {
    recorder.begin(phase);
    lm.loss(inputs, targets).backward();
    optimizer.step(optim::clip_factor(optim::grad_norm(lm.parameters()), 1.0));
    optimizer.zero_grad();
    nn::MoE::update_biases(lm.moe_layers());
  }
  synchronize("cuda:0");
  return recorder.take();
}

/// Where launches are seen in the calls that make them.
struct Eager {
  Eager() { setenv("KNOCK_CUDA_SIM_EAGER", "1", 1); }
  ~Eager() { unsetenv("KNOCK_CUDA_SIM_EAGER"); }
};

/// Where nothing is executed, and no memory is kept from outside or for it.
struct NotExecuted {
  NotExecuted() {
    memory::release_cached("cuda:0");
    cuda_sim::set_executing(false);
  }
  ~NotExecuted() {
    memory::release_cached("cuda:0");
    cuda_sim::set_executing(true);
  }
};

double sum(const Rows& rows, double Row::*what) {
  double all = 0;
  for (const Row& row : rows) all += row.*what;
  return all;
}

bool is_near(double found, double expected, double share) { return std::abs(found - expected) <= share * expected; }

}  // namespace

// CTest runs this with a device of four multiprocessors: grids are as full of work there as those of large models are
// on a large one.
TEST_CASE("ledger: a step that is not executed has the launches, bytes and operations of one that is" *
          doctest::skip(!std::getenv("KNOCK_CUDA_SIM_PROCESSORS"))) {
  const Eager eager;
  bench::ledger::Recorder recorder;
  const bench::ledger::Factors factors(record(recorder, model(128, 128, 512), 256));
  const models::MoeLmConfig config = model(192, 128, 768);
  const Rows expected = record(recorder, config, 384);
  Rows found;
  {
    const NotExecuted scope;
    found = record(recorder, config, 384);
  }
  for (const std::string& kernel : factors.apply(found)) FAIL_CHECK("not measured: " << kernel);

  REQUIRE(found.size() == expected.size());
  const double all_bytes = sum(expected, &Row::bytes);
  for (std::size_t i = 0; i < found.size(); ++i) {
    CAPTURE(expected[i].entry);
    CAPTURE(expected[i].kernel);
    CHECK(found[i].entry == expected[i].entry);
    CHECK(found[i].kernel == expected[i].kernel);
    CHECK(found[i].launches == expected[i].launches);
    if (expected[i].bytes < 0.02 * all_bytes) continue;
    CAPTURE(expected[i].bytes);
    CAPTURE(found[i].bytes);
    CHECK(is_near(found[i].bytes, expected[i].bytes, 0.1));
  }
  CHECK(is_near(sum(found, &Row::bytes), all_bytes, 0.02));
  // Experts get half a tile more than their share of rows: at 192 rows to an expert that is coarse.
  CHECK(is_near(sum(found, &Row::tensor_flop), sum(expected, &Row::tensor_flop), 0.05));
}
