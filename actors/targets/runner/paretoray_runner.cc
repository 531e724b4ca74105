// Times networks beside a fixed reference network with ONNX Runtime: the program that runs on a device.
//
// Contract (one JSON line per model, then a sentinel): see README.md beside this file. Only what a phone's system and
// ONNX Runtime offer is used, so that one file and one library are all that has to be pushed.
#define ORT_API_MANUAL_INIT     // the library's version is checked before the first call
#include <onnxruntime_cxx_api.h>

#ifndef PARETORAY_THERMAL_DIR    // tests build with a folder of made-up zones
#define PARETORAY_THERMAL_DIR "/sys/class/thermal"
#endif

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

using Timings = std::vector<double>;    // milliseconds, in order
using Rounds = std::vector<Timings>;

constexpr char kUsage[] =
    "usage: paretoray_runner --ref REF.onnx --warmup W --rounds R --runs N --threads T [--batch B] MODEL...\n"
    "Times every MODEL beside REF: W runs of both to warm up, then R rounds of N runs of REF and N runs of MODEL.\n"
    "Prints one JSON line per MODEL and then {\"done\": number of models}. With T = 1 the clock is the CPU time of\n"
    "the thread, otherwise wall time. A free first dimension of an input becomes B, by default 1.\n";
constexpr int kMost = 1'000'000;                    // of every number on the command line
constexpr std::int64_t kMostElements = 1 << 30;     // of one input, 4 GiB

struct Options {
  std::string reference;
  std::vector<std::string> models;
  int warmup = -1, rounds = -1, runs = -1, threads = -1;    // negative: not given
  int batch = 1;
};

int Number(const std::string& flag, std::string_view text, int least) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > kMost) {
    throw std::invalid_argument(flag + " is \"" + std::string(text) + "\", it must be a whole number from " +
                     std::to_string(least) + " to " + std::to_string(kMost));
  }
  return value;
}

Options Parse(const std::vector<std::string>& arguments) {
  Options options;
  const std::map<std::string, std::pair<int*, int>> numbers = {    // flag: where it goes, least value
      {"--warmup", {&options.warmup, 0}}, {"--rounds", {&options.rounds, 1}}, {"--runs", {&options.runs, 1}},
      {"--threads", {&options.threads, 1}}, {"--batch", {&options.batch, 1}}};
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const auto number = numbers.find(argument);
    if (argument.empty() || argument[0] != '-') {
      options.models.push_back(argument);
      continue;
    }
    if (number == numbers.end() && argument != "--ref") {
      throw std::invalid_argument("the option \"" + argument + "\" is unknown, see --help");
    }
    if (i + 1 == arguments.size()) throw std::invalid_argument(argument + " needs a value, see --help");
    const std::string& value = arguments[++i];
    if (number == numbers.end()) options.reference = value;
    else *number->second.first = Number(argument, value, number->second.second);
  }
  if (options.reference.empty()) throw std::invalid_argument("--ref is missing, it must name the reference network");
  for (const auto& [flag, number] : numbers) {
    if (*number.first < 0) throw std::invalid_argument(flag + " is missing, see --help");
  }
  if (options.models.empty()) throw std::invalid_argument("no model is given, name at least one after the options");
  return options;
}

// ---- JSON ----

// Length of the UTF-8 sequence at the start of `text`, 0 where it is none (RFC 3629: no overlong forms, no surrogates).
std::size_t Utf8Length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(0);
  const std::size_t length = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3
                             : first < 0xF5 ? 4 : 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const bool wrong = (first == 0xE0 && byte(1) < 0xA0) || (first == 0xED && byte(1) > 0x9F) ||
                     (first == 0xF0 && byte(1) < 0x90) || (first == 0xF4 && byte(1) > 0x8F);
  return wrong ? 0 : length;
}

// A byte that is not UTF-8 becomes \udcXX, which Python's os.fsencode turns back into the byte: paths survive.
std::string Json(std::string_view text) {
  std::string json = "\"";
  char escape[8];
  while (!text.empty()) {
    const std::size_t length = Utf8Length(text);
    const auto byte = static_cast<unsigned char>(text[0]);
    if (length == 0 || byte < 0x20) {
      std::snprintf(escape, sizeof escape, "\\u%s%02x", length == 0 ? "dc" : "00", byte);
      json += escape;
    } else {
      if (byte == '"' || byte == '\\') json += '\\';
      json += text.substr(0, length);
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return json + "\"";
}

std::string Json(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6f", value);
  return text;
}

std::string Json(int value) { return std::to_string(value); }

template <typename Item>
std::string Json(const std::vector<Item>& items) {
  std::string json;
  for (const Item& item : items) json += (json.empty() ? "" : ", ") + Json(item);
  return "[" + json + "]";
}

std::string Json(const std::map<std::string, double>& items) {
  std::string json;
  for (const auto& [name, value] : items) json += (json.empty() ? "" : ", ") + Json(name) + ": " + Json(value);
  return "{" + json + "}";
}

void PrintLine(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string Runtime() { return "onnxruntime " + std::string(OrtGetApiBase()->GetVersionString()); }

// ---- what the kernel says about the device ----

std::vector<int> Affinity() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// Zones that this process may not read are left out; of zones with one name all but the first get their number.
std::map<std::string, double> Temperatures() {
  namespace fs = std::filesystem;
  std::map<std::string, double> celsius;
  std::error_code unreadable;    // then there are no zones
  const std::set<fs::path> zones(fs::directory_iterator(PARETORAY_THERMAL_DIR, unreadable), fs::directory_iterator());
  for (const fs::path& zone : zones) {
    std::string name;
    double value = 0.0;
    if (!std::getline(std::ifstream(zone / "type"), name) || !(std::ifstream(zone / "temp") >> value)) continue;
    if (celsius.count(name) != 0) name += " " + zone.filename().string();
    // The kernel's unit is 0.001 C, but some vendors' drivers give whole degrees.
    celsius[name] = value > -200.0 && value < 200.0 ? value : value / 1000.0;
  }
  return celsius;
}

double NowMs(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
}

// ---- networks ----

class Network {
 public:
  // Throws std::exception where the runtime cannot load the file or its inputs cannot be made up.
  Network(const Ort::Env& env, const std::string& path, const Options& options) {
    Ort::SessionOptions session;
    session.SetIntraOpNumThreads(options.threads);
    session.SetInterOpNumThreads(1);
    session.SetExecutionMode(ORT_SEQUENTIAL);
    session.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
    session_ = Ort::Session(env, path.c_str(), session);
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      input_names_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
      AddInput(session_.GetInputTypeInfo(i), options.batch);
    }
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      output_names_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    }
    for (const std::string& name : input_names_) inputs_.push_back(name.c_str());
    for (const std::string& name : output_names_) outputs_.push_back(name.c_str());
  }

  Network(const Network&) = delete;    // tensors and names point into this object

  // What a run returns is freed after its clock has stopped.
  Timings Time(int runs, clockid_t clock) {
    Timings timings;
    for (int run = 0; run < runs; ++run) {
      const double start = NowMs(clock);
      const auto results = session_.Run(Ort::RunOptions{nullptr}, inputs_.data(), tensors_.data(), tensors_.size(),
                                        outputs_.data(), outputs_.size());
      timings.push_back(NowMs(clock) - start);
    }
    return timings;
  }

 private:
  void AddInput(const Ort::TypeInfo& type, int batch) {
    const std::string& name = input_names_.back();
    const auto kind = type.GetONNXType() == ONNX_TYPE_TENSOR ? type.GetTensorTypeAndShapeInfo().GetElementType()
                                                             : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (kind != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && kind != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
      throw std::runtime_error("input " + name + " is no float or uint8 tensor, only those can be made up");
    }
    std::vector<std::int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();
    if (!shape.empty() && shape[0] < 0) shape[0] = batch;
    std::int64_t elements = 1;
    for (const std::int64_t size : shape) {
      if (size < 1) throw std::runtime_error("input " + name + " has a free or empty dimension after the first one");
      if (size > kMostElements / elements) throw std::runtime_error("input " + name + " is larger than 4 GiB");
      elements *= size;
    }
    const auto size = static_cast<std::size_t>(elements);
    if (kind == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
      AddTensor(floats_.emplace_back(size), shape, [&] { return uniform(random_); });
    } else {
      std::uniform_int_distribution<int> uniform(0, 255);
      AddTensor(bytes_.emplace_back(size), shape, [&] { return static_cast<std::uint8_t>(uniform(random_)); });
    }
  }

  template <typename Item, typename Draw>
  void AddTensor(std::vector<Item>& data, const std::vector<std::int64_t>& shape, Draw draw) {
    for (Item& item : data) item = draw();
    tensors_.push_back(Ort::Value::CreateTensor<Item>(
        Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault), data.data(), data.size(), shape.data(),
        shape.size()));
  }

  std::mt19937 random_{0};
  Ort::Session session_{nullptr};
  std::vector<std::string> input_names_, output_names_;
  std::vector<const char*> inputs_, outputs_;
  std::vector<std::vector<float>> floats_;    // moving one keeps its data where the tensor points
  std::vector<std::vector<std::uint8_t>> bytes_;
  std::vector<Ort::Value> tensors_;
};

std::unique_ptr<Network> Load(const Ort::Env& env, const std::string& path, const Options& options,
                              const std::string& what) {
  try {
    return std::make_unique<Network>(env, path, options);
  } catch (const std::exception& error) {
    throw std::runtime_error(what + " cannot be loaded: " + error.what());
  }
}

std::string Measure(Network& reference, const Ort::Env& env, const std::string& model, const Options& options) {
  const std::unique_ptr<Network> candidate = Load(env, model, options, "the network");
  const clockid_t clock = options.threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  Rounds reference_ms, candidate_ms;
  try {
    reference.Time(options.warmup, clock);
    candidate->Time(options.warmup, clock);
    for (int round = 0; round < options.rounds; ++round) {
      reference_ms.push_back(reference.Time(options.runs, clock));
      candidate_ms.push_back(candidate->Time(options.runs, clock));
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("the network cannot be run: ") + error.what());
  }
  return "\"candidate_ms\": " + Json(candidate_ms) + ", \"reference_ms\": " + Json(reference_ms) + ", \"clock\": " +
         (options.threads == 1 ? "\"thread_cpu\"" : "\"wall\"") + ", \"affinity\": " + Json(Affinity()) +
         ", \"temperature_c\": " + Json(Temperatures()) + ", \"runtime\": " + Json(Runtime());
}

// What goes wrong with the library or the reference becomes the answer for every model.
void MeasureAll(const Options& options) {
  std::unique_ptr<Ort::Env> env;    // none without the library's functions: even releasing an empty one calls them
  std::unique_ptr<Network> reference;
  std::string broken;
  try {
    const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
      throw std::runtime_error(Runtime() + " is older than the headers this program was built with, those of 1." +
                               std::to_string(ORT_API_VERSION) + ", build it with those of its library");
    }
    Ort::InitApi(api);
    env = std::make_unique<Ort::Env>(ORT_LOGGING_LEVEL_FATAL, "paretoray");
    reference = Load(*env, options.reference, options, "the reference network");
  } catch (const std::exception& error) {
    broken = error.what();
  }
  for (const std::string& model : options.models) {
    std::string result;
    try {
      if (!broken.empty()) throw std::runtime_error(broken);
      result = Measure(*reference, *env, model, options);
    } catch (const std::exception& error) {
      result = "\"error\": " + Json(FirstLine(error.what()));
    }
    PrintLine("{\"model\": " + Json(model) + ", " + result + "}");
  }
  PrintLine("{\"done\": " + std::to_string(options.models.size()) + "}");
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> arguments(values + 1, values + count);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    MeasureAll(Parse(arguments));
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "paretoray_runner: %s\n", error.what());
    return 2;
  }
  return 0;
}
