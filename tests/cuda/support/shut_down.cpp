// After the last test: gives back what the CUDA back-end keeps for the life of the process, so that what is left then
// is a leak.

#include "cuda/lifetime.hpp"

#include <doctest/doctest.h>

namespace {

struct ShutDown : doctest::IReporter {
  explicit ShutDown(const doctest::ContextOptions&) {}
  void test_run_end(const doctest::TestRunStats&) override { knock::cuda::shut_down(); }

  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_case_start(const doctest::TestCaseData&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_end(const doctest::CurrentTestCaseStats&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};

REGISTER_LISTENER("shut_down", 1, ShutDown);

}  // namespace
