// A user's program: fits a line. Together with second.cpp it also shows that two units that include knock.hpp link.
#include <cstdio>
#include <knock/knock.hpp>

#if defined(KNOCK_EXPECT_PORTABLE) && defined(__AVX__)
#error "-march=native leaked from knock's build into its user's"
#endif

knock::Tensor noisy_line(const knock::Tensor& x);  // second.cpp

int main() {
  using namespace knock;
  manual_seed(1);
  Tensor x = randn({64, 3});                  // (N, D)
  Tensor y = noisy_line(x);                   // (N, 1)
  Tensor w = zeros({3, 1}).requires_grad_();  // (D, 1)
  optim::AdamW opt({w}, {.lr = 0.1, .weight_decay = 0.0});
  double first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    opt.zero_grad();
    Tensor loss = mean(square(matmul(x, w) - y));
    loss.backward();
    opt.step();
    last = loss.item<float>();
    if (step == 0) first = last;
  }
  std::printf("loss %.4f -> %.6f\n", first, last);
  return last < 1e-3 * first ? 0 : 1;
}
