#include "npy.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <limits>
#include <regex>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace dkm {
namespace {

// "\x93NUMPY", version 1.0, and two bytes for the length of the text that follows.
constexpr std::array<char, 8> kMagic = {'\x93', 'N', 'U', 'M', 'P', 'Y', '\x01', '\x00'};
constexpr std::size_t kPrefix = kMagic.size() + 2;
// Data starts at a multiple of this.
constexpr std::size_t kAlignment = 64;

struct Dtype {
  const char* code;
  const char* name;
  std::size_t size;
};
constexpr Dtype kDtypes[] = {{"<f4", "float32", 4}, {"<f2", "float16", 2}, {"<i4", "int32", 4},
                             {"<i8", "int64", 8},   {"|b1", "bool", 1},    {"|u1", "uint8", 1}};

const Dtype* find(const std::string& code) {
  for (const Dtype& dtype : kDtypes) {
    if (code == dtype.code) return &dtype;
  }
  return nullptr;
}

std::runtime_error error(const std::string& path, const std::string& problem) {
  return std::runtime_error(path + ": " + problem);
}

/// The numbers of "(2, 3, )", and the product of them and `size`.
std::pair<std::vector<std::int64_t>, std::uint64_t> parse_shape(const std::string& path,
                                                                const std::string& text,
                                                                std::uint64_t size) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();  // what a runtime takes
  std::vector<std::int64_t> shape;
  const std::regex number("[0-9]+");
  for (std::sregex_iterator match(text.begin(), text.end(), number), end; match != end; ++match) {
    const std::string digits = match->str();
    const std::int64_t extent = digits.size() > 10 ? kMax + 1 : std::stoll(digits);
    if (extent > kMax) throw error(path, "a dimension is too large");
    shape.push_back(extent);
    if (extent != 0 &&
        size > std::numeric_limits<std::uint64_t>::max() / static_cast<std::uint64_t>(extent)) {
      throw error(path, "the shape is too large");
    }
    size *= static_cast<std::uint64_t>(extent);
  }
  return {std::move(shape), size};
}

}  // namespace

std::size_t item_size(const std::string& dtype) {
  const Dtype* known = find(dtype);
  return known == nullptr ? 0 : known->size;
}

std::string describe(const std::string& dtype, const std::vector<std::int64_t>& shape) {
  const Dtype* known = find(dtype);
  std::string text = known == nullptr ? dtype : known->name;
  const char* separator = "[";
  for (const std::int64_t extent : shape) {
    text += separator + std::to_string(extent);
    separator = ", ";
  }
  return text + (shape.empty() ? "[]" : "]");
}

Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw error(path, "cannot be read");
  std::vector<unsigned char> content{std::istreambuf_iterator<char>(file), {}};
  if (content.size() < kPrefix || !std::equal(kMagic.begin(), kMagic.end(), content.begin(),
                                              [](char left, unsigned char right) {
                                                return static_cast<unsigned char>(left) == right;
                                              })) {
    throw error(path, "is not an .npy file of version 1.0");
  }
  const std::size_t start = kPrefix + content[8] + std::size_t{256} * content[9];
  if (content.size() < start) throw error(path, "is truncated");
  const std::string header(content.begin() + static_cast<std::ptrdiff_t>(kPrefix),
                           content.begin() + static_cast<std::ptrdiff_t>(start));

  // NumPy writes these keys in this order, and documents that readers may not rely on more.
  static const std::regex pattern(R"(\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),)"
                                  R"(\s*'shape':\s*\(([0-9, ]{0,300})\),?\s*\}\s*)");
  std::smatch match;
  if (!std::regex_match(header, match, pattern)) throw error(path, "has an unknown header");
  Array array;
  array.dtype = match[1];
  if (item_size(array.dtype) == 0) throw error(path, "has dtype " + array.dtype);
  std::uint64_t size = 0;
  std::tie(array.shape, size) = parse_shape(path, match[3], item_size(array.dtype));
  if (match[2] == "True" && array.shape.size() > 1) throw error(path, "is in Fortran order");
  if (content.size() - start != size) throw error(path, "has not the size that its header says");
  array.bytes.assign(content.begin() + static_cast<std::ptrdiff_t>(start), content.end());
  return array;
}

void write_npy(const std::string& path, const std::string& dtype,
               const std::vector<std::int64_t>& shape, const void* data, std::size_t size) {
  std::string header = "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': (";
  for (const std::int64_t extent : shape) header += std::to_string(extent) + ", ";
  header += "), }";
  header.append(kAlignment - (kPrefix + header.size() + 1) % kAlignment, ' ');
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic.data(), kMagic.size());
  file.put(static_cast<char>(header.size() % 256));
  file.put(static_cast<char>(header.size() / 256));
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file) throw error(path, "cannot be written");
}

}  // namespace dkm
