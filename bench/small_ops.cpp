// what small operations cost: an addition of 4 elements, and a step of a small network
//
// The network is 64-64-64-10 with relu on 32 rows; its step is forward, backward and AdamW.
#include <knock/knock.hpp>

#include "measure.hpp"

using namespace knock;

int main(int argc, char** argv) {
  const bench::Options options(argc, argv);
  bench::Table table(options, "small_ops", "microseconds a call");
  const auto row = [&](const char* what, auto&& body) {
    table.row({{"case", std::string(what)}, {"call_us", bench::Measured{bench::time(body, 0.02, 15) * 1e6}}});
  };

  Tensor a = randn({4}).requires_grad_(), b = randn({4}).requires_grad_();
  const Tensor dy = ones({4});
  row("add 4", [&] { a + b; });
  row("add 4 + backward", [&] {
    (a + b).backward(dy);
    a.set_grad({});
    b.set_grad({});
  });

  manual_seed(1);
  nn::Linear in(64, 64), middle(64, 64), out(64, 10);
  Tensors parameters;
  for (const nn::Module* layer : {&in, &middle, &out})
    for (const Tensor& parameter : layer->parameters()) parameters.push_back(parameter);
  optim::AdamW optimizer(parameters, {.lr = 1e-3});
  const Tensor x = randn({32, 64}), y = randint(0, 10, {32});
  row("mlp step", [&] {
    cross_entropy(out(relu(middle(relu(in(x))))), y).backward();
    optimizer.step();
    optimizer.zero_grad();
  });
}
