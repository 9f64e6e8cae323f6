// Takes a model of Hugging Face transformers in, to be fine-tuned:  import FOLDER DIR
#include <knock/train.hpp>

#include <cstdio>
#include <string>
#include <vector>

using namespace knock;

namespace {

const char* const usage =
    R"(usage: ./run import FOLDER DIR [--knock.q=KIND] [--knock.k=KIND] [--knock.v=KIND] [--section.key=value ...]
                    [--assume-nfc]

Reads a qwen3, qwen3_moe, glm4_moe or deepseek_v3 model (config.json, safetensors, tokenizer.json) from FOLDER and writes it as a
checkpoint of step 0 into DIR. --knock.v=mlp (linear, mlp, gate) adds knocks that change nothing until they are trained.
Other keys (data.path, train.*, optim.*) are those of the training to come; see ./run train --help. --assume-nfc takes
a tokenizer that normalises texts to NFC first: texts are then taken as they are.

Then: ./run train --resume DIR --data.path=FOLDER_OF_TXT_FILES      ./run generate DIR --prompt "text"

)";

/// Wrong usage, as opposed to wrong values.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::vector<std::string> folders, overrides;
  bool assume_nfc = false, help = false;
};

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments out;
  for (const std::string& word : words) {
    if (word == "--help" || word == "-h") {
      out.help = true;
    } else if (word == "--assume-nfc") {
      out.assume_nfc = true;
    } else if (word.starts_with("--") && word.find('.') != std::string::npos && word.find('=') != std::string::npos) {
      out.overrides.push_back((word.starts_with("--knock.") ? "model." : "") + word.substr(2));
    } else if (word.starts_with("-")) {
      throw UsageError("unknown option " + word);
    } else {
      out.folders.push_back(word);
    }
  }
  if (!out.help && out.folders.size() != 2) throw UsageError("FOLDER and DIR are required");
  return out;
}

/// The configuration of the training to come. Of its model only the knocks may be chosen.
train::Config configure(const Arguments& arguments) {
  train::Config config;
  config.model.knock = {};
  for (const std::string& assignment : arguments.overrides) {
    check(!assignment.starts_with("model.") || assignment.starts_with("model.knock."), "import",
          assignment.substr(0, assignment.find('=')), " is the folder's; only knocks can be added");
    train::apply_override(config, assignment);
  }
  return config;
}

void run(const Arguments& arguments) {
  const train::Config config = configure(arguments);
  const std::string &folder = arguments.folders[0], &dir = arguments.folders[1];
  const io::ImportedModel imported =
      io::import_hf(folder, dir, config, {.knock = config.model.knock, .assume_nfc = arguments.assume_nfc});
  for (const std::string& what : imported.left_out) std::printf("left out: %s\n", what.c_str());
  std::printf("%s: %lld parameters, %lld tokens; go on with ./run train --resume %s --data.path=FOLDER_OF_TXT_FILES\n",
              dir.c_str(), static_cast<long long>(imported.model->parameter_count()),
              static_cast<long long>(imported.tokenizer.vocab_size()), dir.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parse_arguments({argv + 1, argv + argc});
    if (arguments.help) {
      std::printf("%s", usage);
      return 0;
    }
    run(arguments);
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "import: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "import: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}
