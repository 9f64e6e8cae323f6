#pragma once
// The trainer side: everything that reads configs, checkpoints and tokenizers. Needs toml++, PCRE2 and nlohmann-json,
// and the target knock::train.

#include <knock/knock.hpp>

#include <knock/data/corpus.hpp>
#include <knock/data/loader.hpp>
#include <knock/data/tokenizer.hpp>
#include <knock/interop/architecture.hpp>
#include <knock/interop/gguf.hpp>
#include <knock/interop/hf.hpp>
#include <knock/interop/hf_config.hpp>
#include <knock/io/file.hpp>
#include <knock/io/folder.hpp>
#include <knock/train/chart.hpp>
#include <knock/train/checkpoint.hpp>
#include <knock/train/config.hpp>
#include <knock/train/curves.hpp>
#include <knock/train/log.hpp>
#include <knock/train/sampler.hpp>
#include <knock/train/spikes.hpp>
#include <knock/train/trainer.hpp>
