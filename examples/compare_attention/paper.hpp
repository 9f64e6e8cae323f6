#pragma once
// What "Knocking-Heads Attention" (arXiv 2510.23052) measured: training loss of models with 64 experts, 4 a token, far
// larger than what runs here in minutes. Only the direction and the rough size of a change can be compared.

#include <knock/nn/attention/options.hpp>

#include <string>
#include <vector>

namespace compare {

/// A row of the paper's tables: loss without and with knocks.
struct PaperFigure {
  knock::nn::AttentionVariant kind;
  knock::nn::KnockOptions knock;
  double plain, knocked;
};

inline const std::vector<PaperFigure>& paper_figures() {
  using enum knock::nn::AttentionVariant;
  using enum knock::nn::Knock;
  static const std::vector<PaperFigure> figures = {
      {mqa, {linear, linear, linear}, 1.864, 1.857}, {mqa, {none, none, mlp}, 1.864, 1.846},
      {gqa, {linear, linear, linear}, 1.856, 1.838}, {gqa, {none, none, mlp}, 1.856, 1.832},
      {mha, {linear, linear, linear}, 1.846, 1.834}, {mha, {none, none, mlp}, 1.846, 1.830},
      {gqa, {linear, none, none}, 1.856, 1.849},     {gqa, {none, linear, none}, 1.856, 1.848},
      {gqa, {none, none, linear}, 1.856, 1.839},     {gqa, {mlp, none, none}, 1.856, 1.848},
      {gqa, {none, mlp, none}, 1.856, 1.848},        {gqa, {mlp, mlp, mlp}, 1.856, 1.832},
      {gqa, {none, none, gate}, 1.856, 1.919},       {mla, {linear, linear, linear}, 1.812, 1.801},
      {gta, {none, none, mlp}, 1.819, 1.802},
  };
  return figures;
}

/// The paper's change of the loss by these knocks in this kind; null where it has none.
inline const PaperFigure* paper_figure(knock::nn::AttentionVariant kind, const knock::nn::KnockOptions& knock) {
  for (const PaperFigure& figure : paper_figures())
    if (figure.kind == kind && figure.knock.q == knock.q && figure.knock.k == knock.k && figure.knock.v == knock.v)
      return &figure;
  return nullptr;
}

/// Its tables, as they stand there.
inline constexpr const char* paper_tables = R"(<h2>The paper's figures</h2>
<p>arXiv 2510.23052: training loss (nats per token) of mixture-of-experts models, 64 experts, 4 of them a token.</p>
<div class="wide"><table><caption>By number of KV heads: 32 query heads, 75B tokens</caption>
<tr><th>KV heads</th><th>1</th><th>2</th><th>4</th><th>8</th><th>16</th><th>32</th></tr>
<tr><th>plain</th><td>1.864</td><td>1.855</td><td>1.856</td><td>1.851</td><td>1.849</td><td>1.846</td></tr>
<tr><th>linear</th><td>1.857</td><td>1.845</td><td>1.838</td><td>1.841</td><td>1.832</td><td>1.834</td></tr>
<tr><th>mlp</th><td>1.846</td><td>1.835</td><td>1.832</td><td>1.832</td><td>1.833</td><td>1.830</td></tr>
</table></div>
<div class="wide"><table><caption>Where to knock: 4 KV heads, 75B tokens, plain 1.856</caption>
<tr><th>on</th><th>q</th><th>k</th><th>v</th><th>q, k and v</th></tr>
<tr><th>linear</th><td>1.849</td><td>1.848</td><td>1.839</td><td>1.838</td></tr>
<tr><th>mlp</th><td>1.848</td><td>1.848</td><td>1.832</td><td>1.832</td></tr>
<tr><th>gate</th><td></td><td></td><td>1.919</td><td></td></tr>
</table></div>
<div class="wide"><table><caption>By kind: head dim 128, 100B tokens, knock mlp on v (MLA: linear)</caption>
<tr><th>kind</th><th>KV heads</th><th>query heads</th><th>plain</th><th>knocked</th></tr>
<tr><th>MLA, cache 512 + 64</th><td>4</td><td>8</td><td>1.812</td><td>1.801</td></tr>
<tr><th>GTA, cache 512 + 64</th><td>4</td><td>32</td><td>1.819</td><td>1.802</td></tr>
<tr><th>MQA</th><td>1</td><td>32</td><td>1.814</td><td>1.801</td></tr>
<tr><th>GQA</th><td>8</td><td>16</td><td>1.801</td><td>1.791</td></tr>
<tr><th>GQA</th><td>4</td><td>32</td><td>1.807</td><td>1.787</td></tr>
<tr><th>MHA</th><td>16</td><td>16</td><td>1.795</td><td>1.785</td></tr>
</table></div>
<p>Its loss spikes are shown as curves only: many in the first half of the training without knocks, fewer with.</p>
)";

}  // namespace compare
