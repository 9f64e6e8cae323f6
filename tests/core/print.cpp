// Printing. The elements' text was taken from PyTorch 2.15 (str of the same tensors).
#include <knock/core/print.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <sstream>

using namespace knock;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

Tensor counting(const Shape& shape, DType dtype) {
  return arange(0, shape.numel(), 1, {.dtype = dtype}).reshape(shape);
}

struct Case {
  Tensor x;
  std::string elements;
};

}  // namespace

TEST_CASE("print: elements as PyTorch prints them") {
  // clang-format off
  const Case cases[] = {
    {from_data({0.5, -1.25, not_a_number, infinity}, {2, 2}),
     R"([[ 0.5000, -1.2500],
        [    nan,     inf]])"},
    {from_data({1.0F, 2.0F, 3.0F}, {3}),
     R"([1., 2., 3.])"},
    {from_data({1.0F, 2000.0F, 3.5F}, {3}),
     R"([1.0000e+00, 2.0000e+03, 3.5000e+00])"},
    {from_data({1e-5F, 1.0F}, {2}),
     R"([1.0000e-05, 1.0000e+00])"},
    {from_data({1e9, 1.0}, {2}),
     R"([1.0000e+09, 1.0000e+00])"},
    {from_data({1000.5, -2.0, 1.25}, {3}),
     R"([1000.5000,   -2.0000,    1.2500])"},
    {from_data({1e10, not_a_number, 0.0, -infinity}, {4}),
     R"([1.0000e+10,        nan, 0.0000e+00,       -inf])"},
    {from_data({not_a_number, infinity, -infinity}, {3}),
     R"([nan, inf, -inf])"},
    {from_data({not_a_number, 1.0, 0.0, -0.0}, {4}),
     R"([nan, 1., 0., -0.])"},
    {from_data({0.03125, 0.99995, 2.00005}, {3}),
     R"([0.0312, 1.0000, 2.0000])"},
    {zeros({2, 1}),
     R"([[0.],
        [0.]])"},
    {from_data({bf16(0.1F), bf16(100.0F)}, {2}),
     R"([  0.1001, 100.0000])"},
    {from_data<uint8_t>({0, 1, 255}, {3}),
     R"([  0,   1, 255])"},
    {from_data<int64_t>({-5, 1234567890123}, {2}),
     R"([           -5, 1234567890123])"},
    {full({}, 3.14159),
     R"(3.1416)"},
    {full({}, 7, {.dtype = DType::i32}),
     R"(7)"},
    {counting({2, 3, 4}, DType::f32),
     R"([[[ 0.,  1.,  2.,  3.],
         [ 4.,  5.,  6.,  7.],
         [ 8.,  9., 10., 11.]],

        [[12., 13., 14., 15.],
         [16., 17., 18., 19.],
         [20., 21., 22., 23.]]])"},
    {counting({2, 2, 1, 2}, DType::i32),
     R"([[[[0, 1]],

         [[2, 3]]],


        [[[4, 5]],

         [[6, 7]]]])"},
    {counting({30}, DType::i64),
     R"([ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13, 14, 15, 16, 17,
        18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29])"},
    {counting({1, 1, 33}, DType::f32),
     R"([[[ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10., 11., 12., 13.,
          14., 15., 16., 17., 18., 19., 20., 21., 22., 23., 24., 25., 26., 27.,
          28., 29., 30., 31., 32.]]])"},
    {counting({1001}, DType::f32),
     R"([   0.,    1.,    2.,  ...,  998.,  999., 1000.])"},
    {counting({1000}, DType::u8).narrow(0, 0, 20),
     R"([ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13, 14, 15, 16, 17,
        18, 19])"},
    {counting({9, 200}, DType::i64),
     R"([[   0,    1,    2,  ...,  197,  198,  199],
        [ 200,  201,  202,  ...,  397,  398,  399],
        [ 400,  401,  402,  ...,  597,  598,  599],
        ...,
        [1200, 1201, 1202,  ..., 1397, 1398, 1399],
        [1400, 1401, 1402,  ..., 1597, 1598, 1599],
        [1600, 1601, 1602,  ..., 1797, 1798, 1799]])"},
    {counting({4, 3, 101}, DType::f64),
     R"([[[0.0000e+00, 1.0000e+00, 2.0000e+00,  ..., 9.8000e+01,
          9.9000e+01, 1.0000e+02],
         [1.0100e+02, 1.0200e+02, 1.0300e+02,  ..., 1.9900e+02,
          2.0000e+02, 2.0100e+02],
         [2.0200e+02, 2.0300e+02, 2.0400e+02,  ..., 3.0000e+02,
          3.0100e+02, 3.0200e+02]],

        [[3.0300e+02, 3.0400e+02, 3.0500e+02,  ..., 4.0100e+02,
          4.0200e+02, 4.0300e+02],
         [4.0400e+02, 4.0500e+02, 4.0600e+02,  ..., 5.0200e+02,
          5.0300e+02, 5.0400e+02],
         [5.0500e+02, 5.0600e+02, 5.0700e+02,  ..., 6.0300e+02,
          6.0400e+02, 6.0500e+02]],

        [[6.0600e+02, 6.0700e+02, 6.0800e+02,  ..., 7.0400e+02,
          7.0500e+02, 7.0600e+02],
         [7.0700e+02, 7.0800e+02, 7.0900e+02,  ..., 8.0500e+02,
          8.0600e+02, 8.0700e+02],
         [8.0800e+02, 8.0900e+02, 8.1000e+02,  ..., 9.0600e+02,
          9.0700e+02, 9.0800e+02]],

        [[9.0900e+02, 9.1000e+02, 9.1100e+02,  ..., 1.0070e+03,
          1.0080e+03, 1.0090e+03],
         [1.0100e+03, 1.0110e+03, 1.0120e+03,  ..., 1.1080e+03,
          1.1090e+03, 1.1100e+03],
         [1.1110e+03, 1.1120e+03, 1.1130e+03,  ..., 1.2090e+03,
          1.2100e+03, 1.2110e+03]]])"},
    {counting({12, 100}, DType::f32).transpose(0, 1),
     R"([[0.0000e+00, 1.0000e+02, 2.0000e+02,  ..., 9.0000e+02, 1.0000e+03,
         1.1000e+03],
        [1.0000e+00, 1.0100e+02, 2.0100e+02,  ..., 9.0100e+02, 1.0010e+03,
         1.1010e+03],
        [2.0000e+00, 1.0200e+02, 2.0200e+02,  ..., 9.0200e+02, 1.0020e+03,
         1.1020e+03],
        ...,
        [9.7000e+01, 1.9700e+02, 2.9700e+02,  ..., 9.9700e+02, 1.0970e+03,
         1.1970e+03],
        [9.8000e+01, 1.9800e+02, 2.9800e+02,  ..., 9.9800e+02, 1.0980e+03,
         1.1980e+03],
        [9.9000e+01, 1.9900e+02, 2.9900e+02,  ..., 9.9900e+02, 1.0990e+03,
         1.1990e+03]])"},
  };
  // clang-format on
  for (const Case& c : cases) {
    const std::string printed = to_string(c.x), start = "tensor(" + c.elements + ",";
    CHECK(printed.substr(0, start.size()) == start);
  }
}

TEST_CASE("print: shape and dtype follow on the last line, or on one of their own") {
  CHECK(to_string(zeros({2})) == "tensor([0., 0.], shape=(2,), dtype=f32)");
  CHECK(to_string(full({}, 2.5, {.dtype = DType::f64})) == "tensor(2.5000, shape=(), dtype=f64)");
  CHECK(to_string(zeros({0, 3}, {.dtype = DType::u8})) == "tensor([], shape=(0, 3), dtype=u8)");
  CHECK(to_string(counting({2, 2}, DType::i64)) == "tensor([[0, 1],\n        [2, 3]], shape=(2, 2), dtype=i64)");
  CHECK(
      to_string(counting({14}, DType::f32)) ==
      "tensor([ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10., 11., 12., 13.],\n       shape=(14,), dtype=f32)");
  CHECK(to_string(Tensor()) == "tensor(undefined)");
}

TEST_CASE("print: streams") {
  std::ostringstream out;
  out << zeros({1}) << "!";
  CHECK(out.str() == "tensor([0.], shape=(1,), dtype=f32)!");
}

TEST_CASE("print: a large tensor is summarised without being copied") {
  const Tensor x = zeros({1}).expand({1000000000, 1000, 1000});
  const std::string printed = to_string(x);
  CHECK(printed.size() < 2000);
  CHECK(printed.substr(0, 40) == "tensor([[[0., 0., 0.,  ..., 0., 0., 0.],");
}
