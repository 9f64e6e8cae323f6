#pragma once
// Runs a program in a process of its own: it may end by a signal, leaks are found at its exit, and nothing of it stays.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

struct Outcome {
  int exit_code = -1;    ///< -1: ended by a signal
  std::string findings;  ///< what it wrote to stderr
};

template <class Program>
Outcome run_in_child(Program program) {
  int ends[2];
  if (pipe(ends) != 0) return {};
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    if (std::freopen("/dev/null", "w", stdout) == nullptr) std::abort();
    program();
    std::exit(0);
  }
  close(ends[1]);
  Outcome outcome;
  char piece[4096];
  for (ssize_t count = 0; (count = read(ends[0], piece, sizeof piece)) > 0;) {
    outcome.findings.append(piece, static_cast<std::size_t>(count));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  return outcome;
}
