// Attention with knocking heads: against PyTorch, at its start, folded, decoded with a cache, and the mistakes that the
// golden data must catch.
#include <nn/golden.hpp>

using namespace test;
using nn::AttentionOptions;
using nn::AttentionVariant;
using nn::Knock;

namespace {

Knock knock_of(const std::string& name) {
  for (std::size_t i = 0; i < nn::knock_names.size(); ++i)
    if (nn::knock_names[i] == name) return static_cast<Knock>(i);
  FAIL("unknown knock ", name);
  return Knock::none;
}

AttentionOptions options_of(const nlohmann::json& o) {
  AttentionOptions out;
  out.hidden = o["hidden"], out.q_heads = o["q_heads"], out.kv_heads = o["kv_heads"], out.head_dim = o["head_dim"];
  const std::string variant = o["variant"];
  out.variant = variant == "mha"   ? AttentionVariant::mha
                : variant == "mqa" ? AttentionVariant::mqa
                                   : AttentionVariant::gqa;
  out.knock = {knock_of(o["knock"]["q"]), knock_of(o["knock"]["k"]), knock_of(o["knock"]["v"])};
  out.qk_norm = o["qk_norm"], out.norm_eps = o["norm_eps"], out.rope = o["rope"], out.rope_dim = o["rope_dim"];
  out.rope_theta = o["rope_theta"], out.causal = o["causal"], out.window = o["window"];
  return out;
}

Tensor positions_of(const nlohmann::json& o) {
  const auto values = o["positions"].get<std::vector<int64_t>>();
  return from_data(values, {static_cast<int64_t>(values.size())});
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

AttentionOptions small(Knock q, Knock k, Knock v) {
  return {.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 6, .knock = {q, k, v}, .qk_norm = true};
}

}  // namespace

TEST_CASE("attention: equals PyTorch, output and every gradient") {
  int count = 0;
  for (const auto& golden_case : golden_cases("attention/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    const auto block = golden_block(name, options);
    const Tensor x = golden().at(name + "/x").clone().requires_grad_();
    const Tensor y = block->forward(x, {.positions = positions_of(options)});
    CHECK(distance(y, golden().at(name + "/y")) <= 1e-12);
    y.backward(golden().at(name + "/dy"));
    CHECK(distance(x.grad(), golden().at(name + "/dx")) <= 1e-12);
    check_gradients(*block, golden_group(name, "grad"), 1e-12);
    ++count;
  }
  CHECK(count == 26);
}

TEST_CASE("attention: in f32 and bf16 within their precision of PyTorch") {
  for (const auto& golden_case : golden_cases("attention/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    const auto block = golden_block(name, options);
    block->to(DType::f32);
    const Tensor x = golden().at(name + "/x"), expected = golden().at(name + "/y"), at = positions_of(options);
    CHECK(distance(block->forward(x.to(DType::f32), {.positions = at}), expected) <= 1e-5);
    CHECK(distance(block->forward(x.to(DType::bf16), {.positions = at}), expected) <= 6e-2);
  }
}

TEST_CASE("attention: at its start a knock changes no bit") {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const Knock kind : {Knock::linear, Knock::mlp, Knock::gate}) {
      const auto plain = nn::make_attention(small(Knock::none, Knock::none, Knock::none));
      const auto knocked = nn::make_attention(small(kind, kind, kind));
      plain->to(dtype), knocked->to(dtype);
      knocked->load_state_dict(plain->state_dict(), false);
      const Tensor x = randn({2, 5, 12}, {.dtype = dtype});
      CHECK(knocked->forward(x).to_vector<double>() == plain->forward(x).to_vector<double>());
    }
  }
}

TEST_CASE("attention: absorbed knocks give the same output and vanish") {
  const Knock linear = Knock::linear, mlp = Knock::mlp, gate = Knock::gate, none = Knock::none;
  for (const auto& o :
       {small(linear, linear, linear), small(none, none, mlp), small(linear, linear, mlp), small(linear, none, gate)}) {
    for (const auto& [dtype, tolerance] : {std::pair{DType::f64, 1e-13}, {DType::f32, 1e-5}}) {
      const auto block = random_block(o, dtype);
      const Tensor x = randn({2, 5, 12}, {.dtype = dtype});
      const Tensor before = block->forward(x).detach();
      block->absorb_knocks();
      CHECK(distance(block->forward(x), before) <= tolerance);
      for (const auto& entry : block->named_parameters())
        CHECK_MESSAGE(entry.first.find("knock") == std::string::npos, entry.first);
      block->absorb_knocks();  // a second time changes nothing
      CHECK(distance(block->forward(x), before) <= tolerance);
    }
  }
  // An mlp knock on q or k keeps its own matrices: nothing behind it can take the last one.
  const auto kept = random_block(small(mlp, linear, none));
  kept->absorb_knocks();
  CHECK(kept->state_dict().contains("knock_q.down.weight"));
  CHECK(!kept->state_dict().contains("knock_k.weight"));
}

TEST_CASE("attention: decoding with a cache equals one full forward, in chunks of any size") {
  const NoGradGuard no_grad;
  for (const int64_t window : {0, 4}) {
    AttentionOptions o = small(Knock::linear, Knock::none, Knock::mlp);
    o.window = window;
    const auto block = random_block(o);
    const Tensor x = randn({2, 11, 12}, {.dtype = DType::f64});
    const Tensor whole = block->forward(x);
    for (const int64_t chunk : {1, 3, 4, 11}) {
      nn::KvCache cache;
      Tensors parts;
      for (int64_t at = 0; at < 11; at += chunk)
        parts.push_back(block->forward(x.narrow(1, at, std::min(chunk, 11 - at)), {.cache = &cache}));
      CHECK(cache.length() == 11);
      CHECK(distance(cat(parts, 1), whole) <= 1e-13);
    }
  }
  nn::KvCache cache;  // past its first capacity
  const auto block = random_block(small(Knock::none, Knock::none, Knock::none));
  const Tensor x = randn({1, 200, 12}, {.dtype = DType::f64});
  const Tensor first = block->forward(x.narrow(1, 0, 50), {.cache = &cache});
  const Tensor second = block->forward(x.narrow(1, 50, 150), {.cache = &cache});
  CHECK(distance(cat({first, second}, 1), block->forward(x)) <= 1e-13);
}

TEST_CASE("attention: a later token changes no earlier output") {
  const auto block = random_block(small(Knock::mlp, Knock::mlp, Knock::mlp));
  const Tensor x = randn({1, 8, 12}, {.dtype = DType::f64});
  const Tensor changed = x.clone();
  changed.narrow(1, 5, 1).fill_(3);
  const Tensor a = block->forward(x), b = block->forward(changed);
  CHECK(a.narrow(1, 0, 5).to_vector<double>() == b.narrow(1, 0, 5).to_vector<double>());
  CHECK(distance(a.narrow(1, 5, 3), b.narrow(1, 5, 3)) > 1e-3);
}

TEST_CASE("attention: gradcheck, and the same bits for any number of threads") {
  const auto block = random_block(small(Knock::linear, Knock::gate, Knock::mlp));
  Tensors inputs = {randn({1, 4, 12}, {.dtype = DType::f64}).requires_grad_()};
  for (const Tensor& parameter : block->parameters()) inputs.push_back(parameter);
  const auto result =
      autograd::gradcheck([&](const Tensors& in) -> Tensors { return {block->forward(in[0])}; }, inputs);
  CHECK_MESSAGE(result.ok, result.report);

  const auto large = random_block({.hidden = 64, .q_heads = 8, .kv_heads = 2, .knock = {.v = Knock::mlp}}, DType::f32);
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

// Each of these mistakes must show against PyTorch's numbers, or the golden data would prove nothing.
TEST_CASE("attention: golden data catches a transposed or unshared knock, and a wrong order") {
  const std::string name = "attention/gqa_linear";
  const nlohmann::json options = nlohmann::json::parse(io::safetensors_metadata(golden_path).at(name));
  const Tensor x = golden().at(name + "/x"), expected = golden().at(name + "/y");
  const auto output = [&](auto change) {
    StateDict parameters = golden_group(name, "param");
    nlohmann::json changed = options;
    change(parameters, changed);
    auto block = nn::make_attention(options_of(changed));
    block->to(DType::f64);
    block->load_state_dict(parameters, false);
    return block->forward(x, {.positions = positions_of(changed)});
  };
  CHECK(distance(output([](StateDict&, nlohmann::json&) {}), expected) <= 1e-12);
  for (const char* knock : {"knock_q.weight", "knock_k.weight", "knock_v.weight"}) {
    INFO(knock);
    CHECK(distance(output([&](StateDict& p, nlohmann::json&) { p[knock] = p.at(knock).t().contiguous(); }), expected) >
          1e-3);
  }
  const auto no_norm = output([](StateDict&, nlohmann::json& o) { o["qk_norm"] = false; });
  CHECK(distance(no_norm, expected) > 1e-3);
  // The knock of q applied after the norm instead of before it: rows of q_proj untouched, the norm's weight in between.
  const auto shifted = output([](StateDict&, nlohmann::json& o) { o["positions"] = {0, 1, 2, 3, 4, 5, 6}; });
  CHECK(distance(shifted, expected) > 1e-3);
  // A knock of one head only, as an unshared one would be: fold it into the first head's rows alone.
  const auto one_head = output([](StateDict& p, nlohmann::json& o) {
    const Tensor knock = p.at("knock_v.weight"), w = p.at("v_proj.weight").clone();
    w.narrow(0, 0, 4).copy_(matmul(knock, w.narrow(0, 0, 4)));
    p["v_proj.weight"] = w;
    o["knock"]["v"] = "none";
  });
  CHECK(distance(one_head, expected) > 1e-3);
}

TEST_CASE("attention: impossible options name the option") {
  const auto message = [](AttentionOptions o) { return error_of([&] { nn::make_attention(o); }); };
  CHECK(message({.hidden = 12, .q_heads = 5, .kv_heads = 2, .head_dim = 4}).find("kv_heads 2") != std::string::npos);
  CHECK(message({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 3}).find("rope_dim must be even") !=
        std::string::npos);
  CHECK(message({.hidden = 13, .q_heads = 4}).find("head_dim") != std::string::npos);
  CHECK(message({.hidden = 12, .q_heads = 4, .kv_heads = 2, .variant = AttentionVariant::mqa}).find("mqa has 1") !=
        std::string::npos);
  CHECK(message({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 4, .rope_dim = 6}).find("rope_dim 6") !=
        std::string::npos);
  CHECK(message({}).find("hidden") != std::string::npos);
  const auto block = nn::make_attention({.hidden = 12, .q_heads = 4, .kv_heads = 2, .head_dim = 4});
  CHECK_THROWS_AS(block->forward(randn({2, 3, 11})), Error);
  CHECK_THROWS_AS(block->forward(randn({3, 12})), Error);
}
