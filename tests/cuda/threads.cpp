// Threads that use one device at the same time: each gets the bits that it gets alone.

#include "cuda/device.hpp"
#include "cuda/stream.hpp"

#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>

#include <doctest/doctest.h>

#include <future>
#include <list>
#include <optional>
#include <vector>

#include <support/tiny_lm.hpp>

using namespace knock;

namespace {

/// A model and what it learns, made by one thread and trained by another.
struct Training {
  models::MoeLm model;
  Tensor inputs, targets;

  Training(nn::AttentionVariant kind, DType dtype, uint64_t seed) : model((manual_seed(seed), config(kind))) {
    const Tensor tokens = randint(0, config(kind).vocab_size, {2, 17}).to("cuda:0");
    inputs = tokens.narrow(1, 0, 16).contiguous(), targets = tokens.narrow(1, 1, 16).contiguous();
    model.to("cuda:0");
    model.set_compute_dtype(dtype);
  }
  static models::MoeLmConfig config(nn::AttentionVariant kind) {
    models::MoeLmConfig out = test::tiny_lm();
    out.attention = kind, out.knock = {.v = nn::Knock::linear};
    return out;
  }

  std::vector<double> losses() {
    optim::AdamW optimizer(model.parameters(), {.lr = 3e-3});
    std::vector<double> out;
    for (int step = 0; step < 3; ++step) {
      const Tensor loss = model.loss(inputs, targets);
      out.push_back(loss.to(DType::f64).item<double>());
      model.zero_grad();
      loss.backward();
      optim::clip_grad_norm_(model.parameters(), 1.0);
      optimizer.step();
    }
    return out;
  }
};

using Trainings = std::list<Training>;  // models stay where they are

Trainings trainings() {
  using enum nn::AttentionVariant;
  Trainings out;
  out.emplace_back(gqa, DType::f32, 1);
  out.emplace_back(gqa, DType::bf16, 2);
  out.emplace_back(mla, DType::f32, 3);
  out.emplace_back(gta, DType::bf16, 4);
  return out;
}

/// Every other thread has a stream of its own.
std::vector<std::vector<double>> side_by_side() {
  Trainings all = trainings();
  std::vector<std::future<std::vector<double>>> running;
  for (Training& training : all)
    running.push_back(std::async(std::launch::async, [&training, own = running.size() % 2 == 1] {
      cuda::use_device(0);
      std::optional<cuda::Stream> stream;
      std::optional<cuda::StreamGuard> guard;
      if (own) guard.emplace(stream.emplace());
      return training.losses();
    }));
  std::vector<std::vector<double>> out;
  for (auto& one : running) out.push_back(one.get());
  return out;
}

}  // namespace

TEST_CASE("threads: models train side by side on one device, each to the bits that it gets alone") {
  std::vector<std::vector<double>> alone;
  Trainings all = trainings();
  for (Training& one : all) alone.push_back(one.losses());
  for (int round = 0; round < 2; ++round) {
    CAPTURE(round);
    CHECK(side_by_side() == alone);
  }
}
