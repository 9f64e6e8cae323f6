// training and using a byte-level BPE vocabulary on a corpus
//
//   ./run bench tokenizer --corpus PATH [--threads N] [--json]     PATH: a .txt file or a folder of them
#include <knock/data/corpus.hpp>

#include "measure.hpp"

using namespace knock;

namespace {

void run(const bench::Options& options) {
  const std::string path = options.text("corpus", "");
  if (path.empty()) options.refuse("--corpus must name a .txt file or a folder of them");
  const data::Documents documents = data::read_corpus(path).train;
  const double megabytes = static_cast<double>(documents.bytes()) / 1e6;
  bench::Table table(options, "tokenizer", text(megabytes, " MB of text; training, then encoding it"));
  for (const int64_t vocab : {2048, 8192}) {
    const data::Tokenizer tokenizer = data::Tokenizer::train(documents.texts, vocab);
    const bench::Spread train = bench::time([&] { data::Tokenizer::train(documents.texts, vocab); }, 0, 3);
    int64_t tokens = 0;
    const bench::Spread encode =
        bench::time([&] { tokens = static_cast<int64_t>(data::tokenize(documents, tokenizer).size()); }, 0, 5);
    table.row({{"vocab", vocab},
               {"tokens", tokens},
               {"train_s", bench::Measured{train}},
               {"encode_s", bench::Measured{encode}},
               {"encode_mb_per_s", bench::Measured{encode.rate(megabytes)}}});
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv, {"corpus"}, run); }
