// log.jsonl and the page of curves.
#include <support/temporary_folder.hpp>

#include <knock/core/error.hpp>
#include <knock/io/file.hpp>
#include <knock/train/chart.hpp>
#include <knock/train/curves.hpp>
#include <knock/train/log.hpp>

#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

using namespace knock;

namespace {

std::string page_of(const std::string& log) {
  const test::TemporaryFolder folder;
  train::write_curves(folder.write("my <run>/log.jsonl", log), folder / "curves.html");
  return io::read_file(folder / "curves.html");
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

const std::string step_line =
    R"({"step":1,"loss":5.5,"lr":0.001,"grad_norm":1.5,"tokens_per_s":1000.0,"step_s":0.1,"load_entropy":[0.9,0.8],)"
    R"("max_violation":[0.3,0.4],"router_logit_max":[2.5,3.5],"dropped":[0.0,0.1]})"
    "\n";
const std::string second_line =
    R"({"step":2,"loss":5.0,"lr":0.002,"grad_norm":1.0,"tokens_per_s":1100.0,"step_s":0.1,"load_entropy":[0.95,0.85],)"
    R"("max_violation":[0.2,0.3],"router_logit_max":[2.6,3.6],"dropped":[0.0,0.05]})"
    "\n";

}  // namespace

TEST_CASE("log: lines_up_to keeps what belongs to the steps that are done") {
  const test::TemporaryFolder folder;
  const std::string evaluation = "{\"step\":2,\"val_loss\":4.0,\"val_bpb\":2.0}\n",
                    sample = "{\"step\":2,\"sample\":\"a\"}\n", third = "{\"step\":3,\"loss\":4.0}\n";
  const std::string path =
      folder.write("log.jsonl", step_line + second_line + evaluation + sample + third + "{\"step\":4");
  CHECK(train::lines_up_to(path, 2, true) == step_line + second_line + evaluation + sample);
  CHECK(train::lines_up_to(path, 2, false) == step_line + second_line);
  CHECK(train::lines_up_to(path, 3, false) == step_line + second_line + evaluation + sample + third);
  CHECK(train::lines_up_to(path, 0, false) == "");
  CHECK(train::lines_up_to(folder / "nowhere", 5, true) == "");
}

TEST_CASE("log: read_history gives losses and evaluations") {
  const test::TemporaryFolder folder;
  const std::string log = step_line + second_line + "{\"step\":2,\"val_loss\":4.5,\"val_bpb\":2.25}\n" +
                          "{\"step\":2,\"sample\":\"a\"}\nnot json\n{\"step\":3,\"lo";
  const train::RunHistory history = train::read_history(folder.write("log.jsonl", log));
  CHECK(history.loss == std::vector<double>{5.5, 5.0});
  CHECK(history.step_s == std::vector<double>{0.1, 0.1});
  REQUIRE(history.evaluations.size() == 1);
  CHECK(history.evaluations[0].step == 2);
  CHECK(history.evaluations[0].loss == 4.5);
  CHECK(history.evaluations[0].bits_per_byte == 2.25);
  CHECK_THROWS_AS(train::read_history(folder / "nowhere"), Error);
}

TEST_CASE("log: printable") {
  CHECK(train::printable("a\tb\nc\xc3\xa9") == "a\tb\nc\xc3\xa9");
  CHECK(train::printable("\x1b[31m\x7f") == "\xef\xbf\xbd[31m\xef\xbf\xbd");
}

TEST_CASE("curves: a page with a chart for all that the log holds") {
  const std::string page = page_of(step_line + second_line + "{\"step\":2,\"val_loss\":4.0,\"val_bpb\":2.0}\n" +
                                   R"({"step":2,"sample":"a <b> & \"c\" é"})" + "\n");
  CHECK(page.starts_with("<!doctype html>"));
  CHECK(page.ends_with("</html>\n"));
  CHECK(count(page, "<svg ") == 9);
  CHECK(count(page, "<figure>") == count(page, "</figure>"));
  CHECK(page.find("my &lt;run&gt;") != std::string::npos);
  CHECK(page.find("a &lt;b&gt; &amp; \"c\" é") != std::string::npos);
  CHECK(count(page, "layer 1</") + count(page, "layer 1 <b>") == 4);
  CHECK(page.find("http") == std::string::npos);  // nothing is fetched
  CHECK(page.find("nan") == std::string::npos);
  CHECK(page.find("inf") == std::string::npos);
}

TEST_CASE("curves: odd lines are passed over") {
  const std::string odd =
      "\n\nnot json\n[1,2]\n3\nnull\n{}\n{\"loss\":1}\n{\"step\":\"x\",\"loss\":2}\n{\"step\":null,\"loss\":2}\n"
      "{\"step\":3,\"loss\":null}\n{\"step\":3,\"loss\":\"high\"}\n{\"step\":3,\"loss\":1e300}\n{\"step\":1e300,"
      "\"loss\":1}\n"
      "{\"step\":3,\"load_entropy\":7}\n{\"step\":3,\"load_entropy\":[null,\"x\"]}\n{\"step\":3,\"sample\":4}\n"
      "{\"step\":\"x\",\"sample\":\"lost\"}\n\xff\xfe\n{\"step\":4,\"lo";
  CHECK(page_of(odd + "\n" + step_line + second_line) == page_of(step_line + second_line));
}

TEST_CASE("chart: a legend of the curves that have names, an axis of its own, means of neighbours") {
  const std::vector<std::pair<double, double>> points = {{0, 1}, {1, 3}, {2, 5}, {3, 9}};
  CHECK(train::thinned(points, 2) == std::vector<std::pair<double, double>>{{0.5, 2}, {2.5, 7}});
  CHECK(train::thinned(points, 4) == points);
  const std::string svg = train::figure(
      {"A < B", "", {{"one", "red", points}, {"", "blue", points, false, true}, {"none", "x", {}}}, "seconds"});
  CHECK(count(svg, "<polyline") == 2);
  CHECK(count(svg, "class='faint'") == 1);
  CHECK(count(svg, "&#9632;") == 1);
  CHECK(count(svg, "one <b>9</b>") == 1);
  CHECK(count(svg, ">seconds</text>") == 1);
  CHECK(count(svg, "A &lt; B") == 2);
  CHECK(train::figure({"empty", "", {{"none", "x", {}}}}) == "");
  CHECK(train::page("a & b", "<p>body</p>").find("knock: a &amp; b</title>") != std::string::npos);
}

TEST_CASE("curves: empty, single, equal and huge values end in a page too") {
  CHECK(count(page_of(""), "<svg ") == 0);
  CHECK(count(page_of(step_line), "<svg ") == 8);
  for (const std::string values : {"0,0", "1e16,10000000000000002", "-1e29,1e29", "1e-300,2e-300", "5,5"}) {
    const std::size_t comma = values.find(',');
    const std::string page = page_of("{\"step\":1,\"loss\":" + values.substr(0, comma) +
                                     "}\n{\"step\":2,\"loss\":" + values.substr(comma + 1) + "}\n");
    CAPTURE(values);
    CHECK(count(page, "<svg ") == 1);
    CHECK(page.size() < 10000);
    CHECK(page.find("nan") == std::string::npos);
  }
}

TEST_CASE("chart: a line of zeros has an axis of ordinary numbers") {
  const std::string svg = train::figure({"dropped", "", {{"", "red", {{0, 0}, {1, 0}}}}});
  CHECK(count(svg, "text-anchor='end'>0</text>") == 1);
  CHECK(count(svg, "text-anchor='end'>0.5</text>") == 1);
  CHECK(svg.find("e-") == std::string::npos);
}

TEST_CASE("chart: an axis of steps has no half ones, one of seconds has") {
  const auto x_axis = [](double x, double more) {
    return train::figure({"loss", "", {{"", "red", {{x, 7}, {x + more, 8}}}}});
  };
  CHECK(count(x_axis(150, 0), "'middle'>150</text>") == 1);
  CHECK(count(x_axis(150, 0), "'middle'>149.5</text>") == 0);
  CHECK(count(x_axis(150, 2), "'middle'>") == 3);
  CHECK(count(x_axis(0.5, 1), "'middle'>0.6</text>") == 1);
}

TEST_CASE("curves: a long run is thinned") {
  std::string log;
  for (int step = 1; step <= 20000; ++step) log += text("{\"step\":", step, ",\"loss\":", step % 7, "}\n");
  CHECK(page_of(log).size() < 40000);
}
