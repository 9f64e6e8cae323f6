// After the last test: no launch has asked for more dynamic shared memory than machine_code.txt says, from which follow
// the warps that a multiprocessor holds.

#include <cuda/support/machine_code_limits.hpp>
#include <modules.hpp>
#include <report.hpp>

#include <doctest/doctest.h>

namespace {

struct SharedMemory : doctest::IReporter {
  explicit SharedMemory(const doctest::ContextOptions&) {}
  void test_run_end(const doctest::TestRunStats&) override {
    const auto limits = machine_code::read_limits();
    for (const auto& [kernel, bytes] : cuda_sim::dynamic_shared_bytes()) {
      const auto limit = limits.find(machine_code::limit_of(machine_code::without_namespaces(kernel), limits));
      if (limit != limits.end() && bytes <= static_cast<std::size_t>(limit->second.dynamic_bytes)) continue;
      cuda_sim::report(kernel + " asks for " + std::to_string(bytes) +
                       " bytes of dynamic shared memory, more than machine_code.txt says");
    }
  }

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

REGISTER_LISTENER("shared_memory", 1, SharedMemory);

}  // namespace
