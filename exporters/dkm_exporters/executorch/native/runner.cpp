/// Runs an ExecuTorch program on .npy files, for checks and measurements outside Python.
///
///   dkm_runner MODEL.pte [--data FILE.ptd] [--repeat N]
///
/// Each line of stdin is `IN_FOLDER<TAB>OUT_FOLDER`: `0.npy`, `1.npy`... are the inputs of
/// `forward`, whose outputs are written under such names. Each line of stdout is a JSON object,
/// first one of the program, then one for each line of stdin: what was measured, or {"error":
/// "..."}. A method `init` runs once, before all else.
///
/// Returns 0, 1 if some line failed, 2 for wrong arguments, 3 if the program does not load.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#ifndef __linux__
#include <sys/resource.h>
#endif

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "npy.h"

namespace dkm {
namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::extension::Module;

struct Arguments {
  std::string model;
  std::vector<std::string> data;
  int repeat = 1;
};

std::optional<Arguments> parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (std::size_t word = 0; word < words.size(); ++word) {
    const bool has_value = word + 1 < words.size();
    if (words[word] == "--data" && has_value) {
      arguments.data.push_back(words[++word]);
    } else if (words[word] == "--repeat" && has_value) {
      arguments.repeat = std::atoi(words[++word].c_str());  // NOLINT(cert-err34-c): 0 is refused
    } else if (arguments.model.empty() && words[word].rfind("--", 0) != 0) {
      arguments.model = words[word];
    } else {
      return std::nullopt;
    }
  }
  if (arguments.model.empty() || arguments.repeat < 1) return std::nullopt;
  return arguments;
}

std::string quote(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return quoted + '"';
}

void print(const std::string& json) { std::cout << json << std::endl; }

void print_error(const std::string& problem) { print("{\"error\": " + quote(problem) + "}"); }

void check(et::Error error, const std::string& what) {
  if (error != et::Error::Ok) throw std::runtime_error(what + ": " + et::to_string(error));
}

/// The most memory that this process ever had.
std::string peak_rss_kib() {
#ifdef __linux__
  // What getrusage says there is the peak of the process that started this one too.
  std::ifstream status("/proc/self/status");
  const std::string label = "VmHWM:";
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(label, 0) == 0) return std::to_string(std::stoul(line.substr(label.size())));
  }
  return "null";
#else
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::to_string(usage.ru_maxrss / 1024);
#endif
}

class Stopwatch {
 public:
  double milliseconds() const {
    return std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

constexpr std::pair<const char*, ScalarType> kDtypes[] = {
    {"<f4", ScalarType::Float}, {"<f2", ScalarType::Half}, {"<i4", ScalarType::Int},
    {"<i8", ScalarType::Long},  {"|b1", ScalarType::Bool}, {"|u1", ScalarType::Byte}};

std::string code_of(ScalarType type) {
  for (const auto& [code, scalar_type] : kDtypes) {
    if (scalar_type == type) return code;
  }
  throw std::runtime_error("a tensor of scalar type " + std::to_string(static_cast<int>(type)) +
                           " has no .npy file here");
}

std::string file_in(const std::string& folder, std::size_t number) {
  return folder + "/" + std::to_string(number) + ".npy";
}

/// Fits `forward`: its dtype, its rank, and sizes up to the ones that its memory is planned for.
void check_input(const Array& array, const et::TensorInfo& info, std::size_t number) {
  const std::vector<std::int64_t> planned(info.sizes().begin(), info.sizes().end());
  bool fits = array.dtype == code_of(info.scalar_type()) && array.shape.size() == planned.size();
  for (std::size_t axis = 0; fits && axis < planned.size(); ++axis) {
    fits = array.shape[axis] <= planned[axis];
  }
  if (!fits) {
    throw std::runtime_error("input " + std::to_string(number) + " is " +
                             describe(array.dtype, array.shape) + ", not " +
                             describe(code_of(info.scalar_type()), planned));
  }
}

class Runner {
 public:
  explicit Runner(const Arguments& arguments)
      : repeat_(arguments.repeat),
        // With a memory that all methods share, `init` can leave something for `forward`.
        module_(arguments.model, arguments.data, Module::LoadMode::Mmap, nullptr, nullptr, nullptr,
                /*share_memory_arenas=*/true) {}

  void load() {
    const Stopwatch watch;
    check(module_.load(), "the program");
    const auto names = module_.method_names();
    check(names.error(), "the program's methods");
    if (names->count("init") != 0) {
      check(module_.load_method("init"), "loading init");
      check(module_.execute("init").error(), "init");
    }
    check(module_.load_forward(), "loading forward");
    const double loaded = watch.milliseconds();

    const auto meta = module_.method_meta("forward");
    check(meta.error(), "forward");
    for (std::size_t number = 0; number < meta->num_inputs(); ++number) {
      auto info = meta->input_tensor_meta(number);
      if (!info.ok()) {
        throw std::runtime_error("input " + std::to_string(number) + " is not a tensor");
      }
      inputs_.push_back(*info);
    }
    std::ostringstream json;
    json << "{\"load_ms\": " << loaded << ", \"inputs\": " << inputs_.size() << ", \"backends\": [";
    for (std::size_t number = 0; number < et::get_num_registered_backends(); ++number) {
      json << (number == 0 ? "" : ", ") << quote(*et::get_backend_name(number));
    }
    json << "], \"peak_rss_kib\": " << peak_rss_kib() << "}";
    print(json.str());
  }

  void run(const std::string& in_folder, const std::string& out_folder) {
    std::vector<Array> arrays;
    std::vector<executorch::extension::TensorPtr> tensors;
    std::vector<et::EValue> values;
    for (std::size_t number = 0; number < inputs_.size(); ++number) {
      Array& array = arrays.emplace_back(read_npy(file_in(in_folder, number)));
      check_input(array, inputs_[number], number);
      tensors.push_back(executorch::extension::make_tensor_ptr(
          {array.shape.begin(), array.shape.end()}, array.bytes.data(), {}, {},
          inputs_[number].scalar_type()));
      values.emplace_back(*tensors.back());
    }

    std::ostringstream times;
    std::vector<et::EValue> outputs;
    for (int turn = 0; turn < repeat_; ++turn) {
      const Stopwatch watch;
      auto result = module_.forward(values);
      times << (turn == 0 ? "" : ", ") << watch.milliseconds();
      check(result.error(), "forward");
      outputs = std::move(*result);
    }
    for (std::size_t number = 0; number < outputs.size(); ++number) {
      if (!outputs[number].isTensor()) {
        throw std::runtime_error("output " + std::to_string(number) + " is not a tensor");
      }
      const auto& tensor = outputs[number].toTensor();
      write_npy(file_in(out_folder, number), code_of(tensor.scalar_type()),
                {tensor.sizes().begin(), tensor.sizes().end()}, tensor.const_data_ptr(),
                tensor.nbytes());
    }
    print("{\"ms\": " + (repeat_ == 1 ? times.str() : "[" + times.str() + "]") + ", \"outputs\": " +
          std::to_string(outputs.size()) + ", \"peak_rss_kib\": " + peak_rss_kib() + "}");
  }

 private:
  int repeat_;
  Module module_;
  std::vector<et::TensorInfo> inputs_;
};

int main(const std::vector<std::string>& words) {
  const auto arguments = parse_arguments(words);
  if (!arguments) {
    std::cerr << "usage: dkm_runner MODEL.pte [--data FILE.ptd] [--repeat N]\n";
    return 2;
  }
  Runner runner(*arguments);
  try {
    runner.load();
  } catch (const std::exception& problem) {
    print_error(problem.what());
    return 3;
  }
  int status = 0;
  for (std::string line; std::getline(std::cin, line);) {
    try {
      const std::size_t tab = line.find('\t');
      if (tab == std::string::npos) throw std::runtime_error("a line without a tab");
      runner.run(line.substr(0, tab), line.substr(tab + 1));
    } catch (const std::exception& problem) {
      print_error(problem.what());
      status = 1;
    }
  }
  return status;
}

}  // namespace
}  // namespace dkm

int main(int count, char** words) { return dkm::main({words + 1, words + count}); }
