/// Fuzzes the decoder of LUT blobs: what it accepts, it expands as a slow reference does.
///
///   cmake -S exporters/dkm_exporters/executorch/native -B build/fuzz -DDKM_ONLY_FORMAT=ON
///       -DDKM_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo
///   cmake --build build/fuzz
///   build/fuzz/fuzz/lut_blob_fuzzer -max_len=65536 build/corpus runtime_tests/fuzz/corpus

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "lut_blob.h"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

constexpr std::size_t kHeaderSize = 80;
constexpr std::size_t kMaxExpanded = std::size_t{16} << 20;

/// A header's numbers, at the places where the format has them.
class Header {
 public:
  explicit Header(std::uint8_t* data) : data_(data) {}

  std::uint8_t& bits() { return data_[12]; }
  std::uint8_t& dim() { return data_[13]; }
  std::uint8_t& element() { return data_[14]; }

  enum Extent { kOuter, kSize, kInner, kGroups, kGroupStride, kScales, kScaleStride, kExtents };

  std::uint64_t get(Extent extent) const {
    std::uint64_t value = 0;
    std::memcpy(&value, data_ + offset(extent), sizeof(value));
    return value;
  }

  void set(Extent extent, std::uint64_t value) {
    std::memcpy(data_ + offset(extent), &value, sizeof(value));
  }

 private:
  static std::size_t offset(Extent extent) { return 16 + 8 * static_cast<std::size_t>(extent); }

  std::uint8_t* data_;
};

double half(const unsigned char* data) {
  std::uint16_t pattern = 0;
  std::memcpy(&pattern, data, sizeof(pattern));
  const int exponent = pattern >> 10 & 0x1F;
  const double mantissa = pattern & 0x3FF;
  double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 0x1F) {
    magnitude = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  }
  return (pattern & 0x8000) != 0 ? -magnitude : magnitude;
}

bool same(double left, double right) {
  return std::isnan(left) ? std::isnan(right)
                          : left == right && std::signbit(left) == std::signbit(right);
}

/// The nearest float16; of two, the even one.
double rounded(double value) {
  if (std::isnan(value) || std::isinf(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), -14);
  const double unit = std::ldexp(1, exponent - 10);
  const double nearest = std::copysign(std::nearbyint(std::abs(value) / unit) * unit, value);
  return std::abs(nearest) < 65536 ? nearest : std::copysign(HUGE_VAL, value);
}

/// Element `e`, as the format defines it.
double reference(const dkm::LutBlob& blob, std::uint64_t e) {
  const std::uint64_t j = e % blob.inner;
  const std::uint64_t row = e / blob.inner % blob.size;
  const std::uint64_t o = e / blob.inner / blob.size;
  const std::uint64_t along = (blob.size + blob.dim - 1) / blob.dim;
  const std::uint64_t n = (o * along + row / blob.dim) * blob.inner + j;
  std::uint64_t index = 0;
  for (unsigned bit = 0; bit < blob.bits; ++bit) {
    const std::uint64_t place = n * blob.bits + bit;
    index |= static_cast<std::uint64_t>(blob.indices[place / 8] >> place % 8 & 1) << bit;
  }
  const std::uint64_t group = e / blob.group_stride % blob.groups;
  const std::uint64_t entry = ((group << blob.bits) + index) * blob.dim + row % blob.dim;
  auto value = static_cast<float>(half(blob.lut + 2 * entry));
  if (blob.scales != 0) {
    float scale = 0;
    std::memcpy(&scale, blob.scale + 4 * (e / blob.scale_stride % blob.scales), sizeof(scale));
    value *= scale;
  }
  return blob.element == dkm::Element::kFloat32 ? value : rounded(value);
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

std::uint64_t product(std::uint64_t left, std::uint64_t right) {
  const bool fits = right == 0 || left <= std::numeric_limits<std::uint64_t>::max() / right;
  return fits ? left * right : std::numeric_limits<std::uint64_t>::max();
}

/// The size that a header asks for, or a huge one.
std::uint64_t wanted_size(const Header& header, unsigned bits, std::uint64_t dim) {
  const std::uint64_t along = header.get(Header::kSize) / dim + 1;
  const std::uint64_t rows = product(header.get(Header::kOuter), along);
  const std::uint64_t limit = std::numeric_limits<std::uint32_t>::max();
  const std::uint64_t indices = product(rows, header.get(Header::kInner));
  const std::uint64_t lut = product(header.get(Header::kGroups), dim << bits);
  if (indices > limit || lut > limit || header.get(Header::kScales) > limit) return limit;
  const std::uint64_t exact = header.get(Header::kOuter) *
                              ((header.get(Header::kSize) + dim - 1) / dim) *
                              header.get(Header::kInner);
  return kHeaderSize + 2 * lut + 4 * header.get(Header::kScales) + (exact * bits + 7) / 8;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // Of exactly this size, and at an odd address, so that the sanitizers see what is read.
  const auto copy = std::make_unique<std::uint8_t[]>(size + 1);
  std::copy_n(data, size, copy.get() + 1);
  dkm::LutBlob blob;
  const dkm::LutError error = dkm::parse(copy.get() + 1, size, blob);
  require(dkm::describe(error) != nullptr, "an error without a text");
  if (error != dkm::LutError::kOk || dkm::expanded_size(blob) > kMaxExpanded) return 0;

  std::vector<float> dense(blob.element_count(), 0.5F);
  require(dkm::expand(blob, dense.data()) == dkm::LutError::kOk, "no memory for a small blob");
  const auto* bytes = reinterpret_cast<const unsigned char*>(dense.data());
  // The reference is slow: of a large weight, only some elements, at either end and between.
  const std::uint64_t step = blob.element_count() / 20000 + 1;
  for (std::uint64_t e = 0; e < blob.element_count(); ++e) {
    if (e >= 2000 && e + 2000 < blob.element_count() && e % step != 0) continue;
    const bool halves = blob.element == dkm::Element::kFloat16;
    const double found = halves ? half(bytes + 2 * e) : double{dense[e]};
    require(same(found, reference(blob, e)), "an element is not the reference's");
  }
  return 0;
}

/// Changes the header as often as the bytes, mostly to what could be a weight, and then mostly
/// gives the blob the size that its header asks for: a parser that refuses everything is no test.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  const auto below = [&random](std::uint64_t limit) { return random() % limit; };
  if (size < kHeaderSize || max_size < kHeaderSize || below(8) == 0) {
    return LLVMFuzzerMutate(data, size, max_size);
  }
  Header header(data);
  switch (below(9)) {
    case 0:
      header.bits() = static_cast<std::uint8_t>(1 + below(8));
      break;
    case 1:
      header.dim() = static_cast<std::uint8_t>(1 + (below(2) == 0 ? below(8) : below(64)));
      break;
    case 2: {  // any extent, small or with many divisors
      constexpr std::uint64_t kExtents[] = {1, 2, 3, 4, 8, 12, 24, 60, 64, 120, 240, 4096, 5040};
      const auto extent = static_cast<Header::Extent>(below(Header::kExtents));
      header.set(extent, below(2) == 0 ? 1 + below(16) : kExtents[below(std::size(kExtents))]);
      break;
    }
    case 3: {  // groups that divide the weight
      const std::uint64_t elements =
          product(product(header.get(Header::kOuter), header.get(Header::kSize)),
                  header.get(Header::kInner));
      const std::uint64_t groups = 1 + below(8);
      const std::uint64_t turns = 1 + below(4);
      header.set(Header::kGroups, groups);
      header.set(Header::kGroupStride, std::max<std::uint64_t>(1, elements / groups / turns));
      break;
    }
    case 4: {  // scales of rows, of columns, or none
      const std::uint64_t inner = header.get(Header::kInner);
      const std::uint64_t rows = header.get(Header::kSize);
      const bool columns = below(2) == 0;
      header.set(Header::kScales, below(4) == 0 ? 0 : columns ? inner : rows);
      header.set(Header::kScaleStride, columns ? 1 : std::max<std::uint64_t>(1, inner));
      break;
    }
    case 5:
      header.element() = static_cast<std::uint8_t>(below(3));
      break;
    case 6:
      LLVMFuzzerMutate(data + 12, kHeaderSize - 12, kHeaderSize - 12);
      break;
    default: {
      const std::size_t body =
          LLVMFuzzerMutate(data + kHeaderSize, size - kHeaderSize, max_size - kHeaderSize);
      size = kHeaderSize + body;
      break;
    }
  }
  if (below(16) == 0) return size;
  const unsigned bits = std::clamp<unsigned>(header.bits(), 1, 8);
  const std::uint64_t dim = std::clamp<std::uint64_t>(header.dim(), 1, 64);
  const std::uint64_t wanted = wanted_size(header, bits, dim);
  if (wanted > max_size) return size;
  for (std::size_t byte = size; byte < wanted; ++byte) {
    data[byte] = static_cast<std::uint8_t>(random());
  }
  return static_cast<std::size_t>(wanted);
}
