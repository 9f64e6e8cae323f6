#pragma once
// What the programs that train have in common.

#include <knock/train.hpp>

#include <csignal>
#include <cstdio>
#include <stdexcept>
#include <string>

/// Wrong usage, as opposed to wrong values.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Fetches the six novels unless they are there, and gives their folder. KNOCK_SOURCE_DIR is where the project was
/// built.
inline std::string default_corpus() {
  const std::string folder = "build/data/novels";
  std::string words;  // what the script says: sizes and sums, or at last why not
  std::FILE* script =
      ::popen(("'" KNOCK_SOURCE_DIR "/examples/train_lm/fetch_novels.sh' " + folder + " 2>&1").c_str(), "r");
  knock::check(script != nullptr, "data", "cannot run fetch_novels.sh");
  for (int c = std::fgetc(script); c != EOF; c = std::fgetc(script)) words.push_back(static_cast<char>(c));
  const bool fetched = ::pclose(script) == 0;
  while (words.ends_with('\n')) words.pop_back();
  if (!fetched)
    knock::fail("data", words.substr(words.rfind('\n') + 1), "; or give your own text with --data.path=FOLDER");
  std::printf("%s\n", words.c_str());
  return folder;
}

/// Ctrl-C and its kin save and end a training. A terminal or a reader of the output that goes away does too; under
/// nohup it goes on.
inline void stop_on_signals() {
  const auto request_stop = [](int) { knock::train::stop_requested = true; };
  for (const int signal : {SIGINT, SIGTERM, SIGPIPE, SIGHUP})
    if (std::signal(signal, request_stop) == SIG_IGN && signal == SIGHUP) std::signal(signal, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error like a full disk
}
