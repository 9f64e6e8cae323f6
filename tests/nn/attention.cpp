// Attention of every kind, with and without knocking heads: against PyTorch, at its start, folded, decoded with a
// cache, over packed documents, and the mistakes that the golden data must catch.
#include <nn/golden.hpp>

using namespace test;
using nn::AttentionOptions;
using nn::AttentionVariant;
using nn::Knock;

namespace {

template <class Enum, class Names>
Enum named(const Names& names, const std::string& name) {
  for (std::size_t i = 0; i < names.size(); ++i)
    if (names[i] == name) return static_cast<Enum>(i);
  FAIL("unknown name ", name);
  return {};
}

AttentionOptions options_of(const nlohmann::json& o) {
  const auto size = [&](const char* key) { return o.value(key, int64_t{0}); };
  const auto knock = [&](const char* on) { return named<Knock>(nn::knock_names, o["knock"][on]); };
  return {.hidden = size("hidden"),
          .q_heads = size("q_heads"),
          .kv_heads = size("kv_heads"),
          .head_dim = size("head_dim"),
          .variant = named<AttentionVariant>(nn::attention_variant_names, o["variant"]),
          .knock = {knock("q"), knock("k"), knock("v")},
          .qk_norm = o.value("qk_norm", false),
          .norm_eps = o["norm_eps"],
          .rope = o["rope"],
          .rope_dim = size("rope_dim"),
          .rope_theta = o["rope_theta"],
          .causal = o["causal"],
          .window = size("window"),
          .nope_dim = size("nope_dim"),
          .v_head_dim = size("v_head_dim"),
          .q_lora_rank = size("q_lora_rank"),
          .kv_lora_rank = size("kv_lora_rank"),
          .experts = size("experts"),
          .top_k = size("top_k")};
}

Tensor integers_of(const nlohmann::json& list) {
  const auto values = list.get<std::vector<int64_t>>();
  return from_data(values, {static_cast<int64_t>(values.size())});
}

nn::AttentionInputs inputs_of(const nlohmann::json& o) {
  nn::AttentionInputs out{.positions = integers_of(o["positions"])};
  if (o.contains("documents")) out.documents = integers_of(o["documents"]);
  return out;
}

/// A block in f64 with the parameters of a golden case.
std::shared_ptr<nn::Attention> golden_block(const std::string& name, const nlohmann::json& options) {
  auto block = nn::make_attention(options_of(options));
  block->to(DType::f64);
  block->load_state_dict(golden_group(name, "param"));
  return block;
}

/// A block whose parameters, knocks too, are far from their start.
std::shared_ptr<nn::Attention> random_block(const AttentionOptions& options, DType dtype = DType::f64) {
  auto block = nn::make_attention(options);
  block->to(dtype);
  const NoGradGuard no_grad;
  for (const auto& [name, parameter] : block->named_parameters()) Tensor(parameter).add_(0.3 * randn_like(parameter));
  return block;
}

AttentionOptions small(Knock q, Knock k, Knock v, AttentionVariant variant = AttentionVariant::gqa) {
  const bool grouped = variant == AttentionVariant::gqa || variant == AttentionVariant::gta;
  return {.hidden = 12,
          .q_heads = 4,
          .kv_heads = grouped ? 2 : 0,
          .head_dim = 6,
          .variant = variant,
          .knock = {q, k, v},
          .qk_norm = nn::is_grouped(variant),
          .q_lora_rank = variant == AttentionVariant::gla2 ? 5 : 0,
          .kv_lora_rank = 14};
}

/// Every kind with knocks of every kind that it has.
std::vector<AttentionOptions> all_kinds() {
  const Knock none = Knock::none, linear = Knock::linear, mlp = Knock::mlp, gate = Knock::gate;
  std::vector<AttentionOptions> out;
  for (std::size_t i = 0; i < nn::attention_variant_names.size(); ++i) {
    const auto variant = static_cast<AttentionVariant>(i);
    out.push_back(small(none, none, none, variant));
    if (variant == AttentionVariant::hydra) continue;
    const bool tied = variant == AttentionVariant::gta;
    out.push_back(small(linear, tied ? none : linear, linear, variant));
    if (nn::is_latent(variant)) continue;
    out.push_back(small(mlp, tied ? none : gate, mlp, variant));
    out.push_back(small(none, none, gate, variant));
  }
  return out;
}

/// A kind's name and knocks, for messages.
std::string title(const AttentionOptions& o) {
  return text(nn::to_text(o.variant), " q ", nn::to_text(o.knock.q), " k ", nn::to_text(o.knock.k), " v ",
              nn::to_text(o.knock.v));
}

AttentionOptions without_knocks(AttentionOptions o) {
  o.knock = {};
  return o;
}

}  // namespace

TEST_CASE("attention: equals PyTorch, output and every gradient") {
  int count = 0;
  std::set<std::string> variants;
  for (const auto& golden_case : golden_cases("attention/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    const auto block = golden_block(name, options);
    const Tensor x = golden().at(name + "/x").clone().requires_grad_();
    const Tensor y = block->forward(x, inputs_of(options));
    CHECK(distance(y, golden().at(name + "/y")) <= 1e-12);
    Tensor loss = sum(y * golden().at(name + "/dy"));
    if (const auto* moa = dynamic_cast<const nn::MoaAttention*>(block.get()))
      loss = loss + 0.3 * moa->balance_loss() + 0.2 * moa->z_loss();
    loss.backward();
    CHECK(distance(x.grad(), golden().at(name + "/dx")) <= 1e-12);
    check_gradients(*block, golden_group(name, "grad"), 1e-12);
    variants.insert(options["variant"].get<std::string>());
    ++count;
  }
  CHECK(count == 26 + 44);
  CHECK(variants.size() == nn::attention_variant_names.size());
}

TEST_CASE("attention: in f32 and bf16 within their precision of PyTorch") {
  for (const auto& golden_case : golden_cases("attention/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    const auto block = golden_block(name, options);
    block->to(DType::f32);
    const Tensor x = golden().at(name + "/x"), expected = golden().at(name + "/y");
    const auto inputs = inputs_of(options);
    CHECK(distance(block->forward(x.to(DType::f32), inputs), expected) <= 1e-5);
    // In bf16 a token may choose another expert where two are nearly equal.
    if (options["variant"] != "moa") CHECK(distance(block->forward(x.to(DType::bf16), inputs), expected) <= 6e-2);
  }
}

TEST_CASE("attention: at its start a knock changes no bit") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    for (const auto& o : all_kinds()) {
      INFO(title(o));
      const auto plain = nn::make_attention(without_knocks(o)), knocked = nn::make_attention(o);
      knocked->load_state_dict(plain->state_dict(), false);
      if (dtype == DType::f64) plain->to(dtype), knocked->to(dtype);
      const Tensor x = randn({2, 5, 12}).to(dtype);
      CHECK(same_bits(knocked->forward(x), plain->forward(x)));
    }
  }
  const auto talking = nn::make_attention(small(Knock::none, Knock::none, Knock::mlp, AttentionVariant::talking_heads));
  const auto mha = nn::make_attention({.hidden = 12, .q_heads = 4, .head_dim = 6, .variant = AttentionVariant::mha});
  mha->load_state_dict(talking->state_dict(), false);
  const Tensor x = randn({2, 5, 12});
  CHECK(distance(talking->forward(x), mha->forward(x)) <= 1e-6);
}

TEST_CASE("attention: between its products an mlp or gate knock is one kernel, and one in backward") {
  const auto kernels_of = [](auto&& body) {
    trace::start();
    body();
    std::string names;
    for (const trace::Event& event : trace::stop()) names += text(names.empty() ? "" : " ", event.kernel);
    return names;
  };
  const Tensor x = randn({2, 5, 3, 8}).requires_grad_(), dy = randn({2, 5, 3, 8});
  Tensor y;
  nn::KnockLayer mlp(Knock::mlp, 8), gate(Knock::gate, 8);
  CHECK(kernels_of([&] { y = mlp(x); }) == "gemm_many gated gemm");
  CHECK(kernels_of([&] { y.backward(dy); }) == "gemm gemm gated_backward gemm gemm gemm gemm");
  CHECK(kernels_of([&] { y = gate(x.detach()); }) == "gemm gated");
  CHECK(kernels_of([&] { y.backward(dy); }) == "gated_backward gemm");
}

TEST_CASE("attention: absorbed knocks give the same output and vanish where they can") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    const bool tied = o.variant == AttentionVariant::gta;
    for (const auto& [dtype, tolerance] : {std::pair{DType::f64, 1e-13}, {DType::f32, 1e-5}, {DType::bf16, 6e-2}}) {
      const auto block = random_block(o, dtype == DType::f64 ? dtype : DType::f32);
      const Tensor x = randn({2, 5, 12}).to(dtype);
      const NoGradGuard no_grad;
      const Tensor before = block->forward(x);
      block->absorb_knocks();
      const Tensor after = block->forward(x);
      if (o.variant != AttentionVariant::moa || dtype != DType::bf16) CHECK(distance(after, before) <= tolerance);
      for (const auto& entry : block->named_parameters()) {
        const bool may_stay = entry.first.starts_with("knock_q.") || entry.first.starts_with("knock_k.") ||
                              (tied && entry.first.starts_with("knock_v."));
        const bool is_linear = entry.first.ends_with("knock_q.weight") || entry.first.ends_with("knock_k.weight") ||
                               entry.first.ends_with("knock_v.weight");
        CHECK_MESSAGE((entry.first.find("knock") == std::string::npos || (may_stay && !is_linear)), entry.first);
      }
      block->absorb_knocks();  // a second time changes nothing
      CHECK(same_bits(block->forward(x), after));
    }
  }
}

TEST_CASE("attention: decoding with a cache equals one full forward, in chunks of any size") {
  const NoGradGuard no_grad;
  const Tensor documents = from_data(std::vector<int64_t>{3, 3, 3, 3, 1, 1, 1, 1, 1, 4, 4}, {11});
  for (AttentionOptions o : all_kinds()) {
    for (const int64_t window : {0, 4}) {
      if (window > 0 && o.variant == AttentionVariant::hydra) continue;
      o.window = window;
      const auto block = random_block(o);
      const Tensor x = randn({2, 11, 12}, {.dtype = DType::f64});
      for (const bool packed : {false, true}) {
        const auto ids = [&](int64_t at, int64_t n) { return packed ? documents.narrow(0, at, n) : Tensor(); };
        const Tensor whole = block->forward(x, {.documents = ids(0, 11)});
        for (const int64_t chunk : {1, 3, 4, 11}) {
          INFO(title(o), ", window ", window, ", packed ", packed, ", chunk ", chunk);
          nn::KvCache cache;
          Tensors parts;
          for (int64_t at = 0; at < 11; at += chunk) {
            const int64_t n = std::min(chunk, 11 - at);
            parts.push_back(block->forward(x.narrow(1, at, n), {.cache = &cache, .documents = ids(at, n)}));
          }
          CHECK(cache.length() == 11);
          CHECK(cache.numbers_per_token() == nn::cost(o, 11).cache_numbers);
          CHECK(distance(cat(parts, 1), whole) <= 1e-13);
        }
      }
    }
  }
  nn::KvCache cache;  // past its first capacity
  const auto block = random_block(small(Knock::none, Knock::none, Knock::none));
  const Tensor x = randn({1, 200, 12}, {.dtype = DType::f64});
  const Tensor first = block->forward(x.narrow(1, 0, 50), {.cache = &cache});
  const Tensor second = block->forward(x.narrow(1, 50, 150), {.cache = &cache});
  CHECK(distance(cat({first, second}, 1), block->forward(x)) <= 1e-13);
}

TEST_CASE("attention: with a window a cache drops what no later token sees") {
  const NoGradGuard no_grad;
  for (AttentionOptions o : all_kinds()) {
    if (o.variant == AttentionVariant::hydra) continue;
    for (const int64_t window : {1, 4, 80}) {
      o.window = window;
      const auto block = random_block(o);
      const Tensor x = randn({2, 300, 12}, {.dtype = DType::f64});
      const Tensor ids = floor_divide(arange(0, 300), 7);
      for (const bool packed : {false, true}) {
        const auto documents = [&](int64_t at, int64_t n) { return packed ? ids.narrow(0, at, n) : Tensor(); };
        const Tensor whole = block->forward(x, {.documents = documents(0, 300)});
        for (const int64_t chunk : {1, 7, 90}) {
          INFO(title(o), ", window ", window, ", packed ", packed, ", chunk ", chunk);
          nn::KvCache cache;
          Tensors parts;
          int64_t most = 0;
          for (int64_t at = 0; at < 300; at += chunk) {
            const int64_t n = std::min(chunk, 300 - at);
            parts.push_back(block->forward(x.narrow(1, at, n), {.cache = &cache, .documents = documents(at, n)}));
            most = std::max(most, cache.kept());
          }
          CHECK(cache.length() == 300);
          CHECK(most >= std::min<int64_t>(window, 300));
          CHECK(most <= window + chunk + std::max<int64_t>(window, 64));
          CHECK(distance(cat(parts, 1), whole) <= 1e-13);
        }
      }
    }
  }
}

TEST_CASE("attention: what a cache keeps of a token is what the kind promises") {
  const auto numbers = [](AttentionOptions o) { return nn::cost(o, 1).cache_numbers; };
  const AttentionOptions o{.hidden = 64, .q_heads = 8, .kv_heads = 2, .head_dim = 8, .rope_dim = 4};
  const auto of = [&](AttentionVariant variant, int64_t kv_heads) {
    AttentionOptions changed = o;
    changed.variant = variant, changed.kv_heads = kv_heads, changed.kv_lora_rank = 24, changed.top_k = 3;
    return numbers(changed);
  };
  CHECK(of(AttentionVariant::mha, 0) == 2 * 8 * 8);
  CHECK(of(AttentionVariant::mqa, 0) == 2 * 8);
  CHECK(of(AttentionVariant::gqa, 2) == 2 * 2 * 8);
  CHECK(of(AttentionVariant::gta, 2) == 2 * 8 + 4);
  CHECK(of(AttentionVariant::mla, 0) == 24 + 4);
  CHECK(of(AttentionVariant::gla2, 0) == 24 + 4);
  CHECK(of(AttentionVariant::moa, 0) == 2 * 8);
  CHECK(of(AttentionVariant::talking_heads, 0) == 2 * 8 * 8);
  CHECK(of(AttentionVariant::hydra, 0) == 0);
}

TEST_CASE("attention: a later token changes no earlier output") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    const auto block = random_block(o);
    const Tensor x = randn({1, 8, 12}, {.dtype = DType::f64});
    const Tensor changed = x.clone();
    changed.narrow(1, 5, 1).fill_(3);
    const Tensor a = block->forward(x), b = block->forward(changed);
    const Tensor earlier = a.narrow(1, 0, 5).contiguous(), again = b.narrow(1, 0, 5).contiguous();
    // An expert of moa multiplies the rows of all tokens that chose it, and the order of a sum depends on how many.
    const bool rows_vary = o.variant == AttentionVariant::moa;
    CHECK((rows_vary ? distance(earlier, again) <= 1e-14 : same_bits(earlier, again)));
    CHECK(distance(a.narrow(1, 5, 3), b.narrow(1, 5, 3)) > 1e-3);
  }
}

TEST_CASE("attention: packed documents are as if alone, wherever their tokens stand, and padding is nothing") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    const auto block = random_block(o);
    const Tensor x = randn({2, 9, 12}, {.dtype = DType::f64});
    const auto alone = [&](const std::vector<int64_t>& at, int64_t row) {
      const auto index = from_data(at, {static_cast<int64_t>(at.size())});
      return block->forward(index_select(x.narrow(0, row, 1), 1, index), {.positions = index});
    };
    const auto same = [&](const Tensor& out, const std::vector<int64_t>& at, int64_t row) {
      const auto index = from_data(at, {static_cast<int64_t>(at.size())});
      CHECK(distance(index_select(out.narrow(0, row, 1), 1, index), alone(at, row)) <= 1e-13);
    };
    const Tensor packed =
        block->forward(x, {.documents = from_data(std::vector<int64_t>{0, 0, 0, 0, 9, 9, 9, 9, 9}, {9})});
    same(packed, {0, 1, 2, 3}, 0);
    same(packed, {4, 5, 6, 7, 8}, 1);
    const Tensor mixed =
        block->forward(x, {.documents = from_data(std::vector<int64_t>{1, 2, 1, 1, 2, 2, 1, 2, 2}, {9})});
    same(mixed, {0, 2, 3, 6}, 1);
    same(mixed, {1, 4, 5, 7, 8}, 0);
    // Left padding: each row of a batch its own.
    const std::vector<int64_t> padding = {-1, -1, -1, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    const Tensor padded = block->forward(x, {.documents = from_data(padding, {2, 9})});
    same(padded, {3, 4, 5, 6, 7, 8}, 0);
    same(padded, {1, 2, 3, 4, 5, 6, 7, 8}, 1);
  }
}

TEST_CASE("attention: positions that are given reach queries and keys") {
  const Tensor gaps = from_data(std::vector<int64_t>{0, 2, 3, 7, 20}, {5});
  for (const auto& o : all_kinds()) {
    if (o.variant == AttentionVariant::hydra) continue;
    INFO(title(o));
    const auto block = random_block(o);
    const Tensor x = randn({2, 5, 12}, {.dtype = DType::f64});
    const Tensor y = block->forward(x, {.positions = gaps});
    CHECK(distance(y, block->forward(x)) > 1e-3);
    CHECK(distance(y, block->forward(x, {.positions = gaps + 1000})) <= 1e-10);  // RoPE is relative
    CHECK(distance(y, block->forward(x, {.positions = stack({gaps, gaps + 3}, 0)})) <= 1e-12);
  }
}

TEST_CASE("attention: gradcheck of every kind") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    AttentionOptions tiny = o;
    tiny.hidden = 6, tiny.head_dim = 4, tiny.q_heads = 2, tiny.kv_heads = o.kv_heads > 0 ? 1 : 0, tiny.kv_lora_rank = 6;
    tiny.top_k = 2, tiny.experts = 3;
    const auto block = random_block(tiny);
    Tensors inputs = {randn({1, 4, 6}, {.dtype = DType::f64}).requires_grad_()};
    for (const Tensor& parameter : block->parameters()) inputs.push_back(parameter);
    const auto result =
        autograd::gradcheck([&](const Tensors& in) -> Tensors { return {block->forward(in[0])}; }, inputs);
    CHECK_MESSAGE(result.ok, result.report);
  }
}

TEST_CASE("attention: the same bits for any number of threads") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    AttentionOptions wide = o;
    wide.hidden = 64, wide.head_dim = 16;
    const auto large = random_block(wide, DType::f32);
    const Tensor x = randn({3, 70, 64});
    std::vector<std::vector<float>> runs;
    for (const int threads : {1, 2, 3}) {
      set_num_threads(threads);
      large->zero_grad();
      const Tensor y = large->forward(x);
      sum(square(y)).backward();
      runs.push_back(y.to_vector<float>());
      for (const Tensor& parameter : large->parameters()) {
        const auto gradient = parameter.grad().to_vector<float>();
        runs.back().insert(runs.back().end(), gradient.begin(), gradient.end());
      }
    }
    set_num_threads(2);
    CHECK(runs[0] == runs[1]);
    CHECK(runs[0] == runs[2]);
  }
}

TEST_CASE("attention: permuting heads, or MoA's experts, with all that belongs to them changes nothing") {
  const auto rows = [](const Tensor& weight, int64_t dim) { return weight.view({-1, dim, weight.size(1)}); };
  const Tensor swap = from_data(std::vector<int64_t>{2, 0, 3, 1}, {4});
  const Tensor x = randn({2, 5, 12}, {.dtype = DType::f64});
  const auto mha = random_block(small(Knock::mlp, Knock::linear, Knock::mlp, AttentionVariant::mha));
  const Tensor before = mha->forward(x);
  StateDict state = mha->state_dict();
  for (const char* name : {"q_proj.weight", "k_proj.weight", "v_proj.weight"})
    state[name] = index_select(rows(state.at(name), 6), 0, swap).reshape(state.at(name).shape());
  state["o_proj.weight"] =
      index_select(state.at("o_proj.weight").view({12, 4, 6}), 1, swap).reshape({12, 24}).contiguous();
  mha->load_state_dict(state);
  CHECK(distance(mha->forward(x), before) <= 1e-13);

  const auto moa = random_block(small(Knock::none, Knock::none, Knock::mlp, AttentionVariant::moa));  // 8 experts
  const Tensor mixed = moa->forward(x);
  StateDict experts = moa->state_dict(), permuted;
  for (const auto& [name, tensor] : experts) permuted.insert(name, tensor.clone());
  for (int64_t e = 0; e < 8; ++e) {
    const int64_t from = (e * 3 + 1) % 8;
    Tensor(permuted.at("gate.weight")).select(0, e).copy_(experts.at("gate.weight").select(0, from));
    for (const char* part : {"q_proj", "o_proj"})
      Tensor(permuted.at(text("experts.", e, ".", part, ".weight")))
          .copy_(experts.at(text("experts.", from, ".", part, ".weight")));
  }
  moa->load_state_dict(permuted);
  CHECK(distance(moa->forward(x), mixed) <= 1e-13);
}

// Each mistake that one could make with a knock must show against PyTorch's numbers, or the golden data would prove
// nothing. The block is written out here, so that each can be planted.
TEST_CASE("attention: golden data catches a knock that is transposed, unshared, head by head, or in the wrong place") {
  enum class Mistake { none, transposed, one_head, across_heads, after_norm, after_rope };
  const std::string name = "attention/gqa_linear";
  const nlohmann::json options = golden_options(name);
  const StateDict p = golden_group(name, "param");
  const Tensor x = golden().at(name + "/x"), expected = golden().at(name + "/y"),
               at = integers_of(options["positions"]);
  const int64_t dim = options["head_dim"];
  const double eps = options["norm_eps"], theta = options["rope_theta"];
  const auto knock = [&](Tensor heads, const std::string& on, Mistake mistake) {  // (B, T, H, D)
    const Tensor matrix = p.at("knock_" + on + ".weight");                        // (D, D)
    if (mistake == Mistake::transposed) return matmul(heads, matrix);
    if (mistake == Mistake::one_head)
      return cat({linear(heads.narrow(2, 0, 1), matrix), heads.narrow(2, 1, heads.size(2) - 1)}, 2);
    if (mistake != Mistake::across_heads) return linear(heads, matrix);
    const Tensor mixing = matrix.narrow(0, 0, std::min(dim, heads.size(2)));  // an H x H matrix over the head axis
    const Tensor square_part = mixing.narrow(1, 0, mixing.size(0)), rest = heads.narrow(2, 0, mixing.size(0));
    const Tensor mixed = linear(rest.transpose(2, 3), square_part).transpose(2, 3);
    return cat({mixed, heads.narrow(2, mixing.size(0), heads.size(2) - mixing.size(0))}, 2);
  };
  const auto output = [&](Mistake mistake, const std::string& on) {
    const auto heads = [&](const std::string& which) {
      const Mistake own = which == on ? mistake : Mistake::none;
      const bool late = own == Mistake::after_norm || own == Mistake::after_rope;
      Tensor h = nn::split_heads(linear(x, p.at(which + "_proj.weight")), dim);
      if (!late) h = knock(h, which, own);
      if (which == "v") return (late ? knock(h, which, own) : h).transpose(1, 2);
      h = rms_norm(h, p.at(which + "_norm.weight"), eps);
      if (own == Mistake::after_norm) h = knock(h, which, own);
      h = rope(h.transpose(1, 2), at, {.theta = theta});
      return own == Mistake::after_rope ? knock(h.transpose(1, 2), which, own).transpose(1, 2) : h;
    };
    const Tensor mixed = scaled_dot_product_attention(heads("q"), heads("k"), heads("v"), {.causal = Causal::top_left});
    return linear(mixed.transpose(1, 2).reshape({2, 7, -1}), p.at("o_proj.weight"));
  };
  CHECK(distance(output(Mistake::none, "v"), expected) <= 1e-12);
  for (const std::string on : {"q", "k", "v"})
    for (const Mistake mistake :
         {Mistake::transposed, Mistake::one_head, Mistake::across_heads, Mistake::after_norm, Mistake::after_rope}) {
      if (on == "v" && mistake >= Mistake::after_norm) continue;  // neither norm nor RoPE
      INFO(on, " mistake ", static_cast<int>(mistake));
      CHECK(distance(output(mistake, on), expected) > 1e-3);
    }
}

TEST_CASE("attention: cost is what the block has and does") {
  for (const auto& o : all_kinds()) {
    INFO(title(o));
    const nn::AttentionCost cost = nn::cost(o, 100), plain = nn::cost(without_knocks(o), 100);
    CHECK(cost.parameters == nn::make_attention(o)->parameter_count());
    CHECK(cost.parameters - cost.knock_parameters == plain.parameters);
    CHECK(cost.flops() - cost.knock_flops() == doctest::Approx(plain.flops()));
    CHECK(nn::describe(o, 100).find("cache bytes a token") != std::string::npos);
  }
  // Section 2.2 of the paper: L = 2048, d = 1024, n = 32, linear knocks on q, k and v; feed-forward width 3 d.
  const nn::AttentionCost paper = nn::cost({.hidden = 1024,
                                            .q_heads = 32,
                                            .variant = AttentionVariant::mha,
                                            .knock = {Knock::linear, Knock::linear, Knock::linear},
                                            .causal = false},
                                           2048);
  const double attention = paper.flops() - paper.knock_flops(), layer = attention + 2 * 3 * 1024.0 * 3 * 1024;
  CHECK(attention == 8 * 1024.0 * 1024 + 4 * 2048.0 * 1024);
  CHECK(paper.knock_flops() == 6 * 1024.0 * 1024 / 32);
  CHECK(100 * paper.knock_flops() / attention == doctest::Approx(1.17).epsilon(0.005));
  CHECK(100 * paper.knock_flops() / layer == doctest::Approx(0.55).epsilon(0.005));
}

TEST_CASE("attention: impossible options name the option") {
  const auto message = [](AttentionOptions o) { return error_of([&] { nn::make_attention(o); }); };
  const auto fails = [&](AttentionOptions o, const char* part) {
    INFO(message(o));
    CHECK(message(o).find(part) != std::string::npos);
  };
  fails({.hidden = 12, .q_heads = 5, .kv_heads = 2, .head_dim = 4}, "kv_heads 2");
  fails({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 3}, "rope_dim must be even");
  fails({.hidden = 13, .q_heads = 4}, "head_dim");
  fails({.hidden = 12, .q_heads = 4, .kv_heads = 2, .variant = AttentionVariant::mqa}, "mqa has 1");
  fails({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 4, .rope_dim = 6}, "rope_dim 6");
  fails({}, "hidden");
  const auto of = [](AttentionVariant variant, nn::KnockOptions knock = {}) {
    return AttentionOptions{.hidden = 12, .q_heads = 4, .head_dim = 6, .variant = variant, .knock = knock};
  };
  fails(of(AttentionVariant::mla, {.v = Knock::mlp}), "only a linear knock");
  fails(of(AttentionVariant::gla2, {.q = Knock::gate}), "only a linear knock");
  fails(of(AttentionVariant::gta, {.k = Knock::linear}), "a knock on k has no meaning in gta");
  fails(of(AttentionVariant::hydra, {.v = Knock::linear}), "nothing to knock");
  AttentionOptions o = of(AttentionVariant::gla2);
  o.kv_lora_rank = 7;
  fails(o, "kv_lora_rank must be even");
  o = of(AttentionVariant::gla2), o.q_heads = 3;
  fails(o, "q_heads must be even");
  o = of(AttentionVariant::gta), o.rope_dim = 6;
  fails(o, "rope_dim 6 leaves none");
  o = of(AttentionVariant::mla), o.rope_dim = 3;
  fails(o, "rope_dim must be even");
  o = of(AttentionVariant::mla), o.qk_norm = true;
  fails(o, "qk_norm belongs to mha, mqa and gqa");
  o = of(AttentionVariant::moa), o.top_k = 3, o.experts = 2;
  fails(o, "top_k 3 is outside 1 to experts 2");
  o = of(AttentionVariant::hydra), o.window = 3;
  fails(o, "window must be 0");
  const auto block = nn::make_attention({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 4});
  CHECK_THROWS_AS(block->forward(randn({2, 3, 11})), Error);
  CHECK_THROWS_AS(block->forward(randn({3, 12})), Error);
  CHECK_THROWS_AS(block->forward(randn({2, 3, 12}), {.documents = arange(0, 4, 1, {.dtype = DType::i64})}), Error);
  CHECK_THROWS_AS(block->forward(randn({2, 3, 12}), {.documents = zeros({3})}), Error);

  const NoGradGuard no_grad;
  nn::KvCache cache;
  block->forward(randn({2, 3, 12}), {.cache = &cache});
  CHECK_THROWS_AS(block->forward(randn({1, 3, 12}), {.cache = &cache}), Error);  // another batch
  CHECK_THROWS_AS(block->forward(randn({2, 1, 12}), {.cache = &cache, .documents = zeros({1}, {.dtype = DType::i64})}),
                  Error);  // documents from the second call on
  o = small(Knock::none, Knock::none, Knock::none), o.causal = false;
  nn::KvCache other;
  CHECK_THROWS_AS(nn::make_attention(o)->forward(randn({2, 3, 12}), {.cache = &other}), Error);
}
