#include "lut_blob.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "LUT blobs are read on little-endian machines only"
#endif

namespace dkm {
namespace {

constexpr std::size_t kHeaderSize = 80;
constexpr std::array<char, 8> kMagic = {'D', 'K', 'M', '-', 'L', 'U', 'T', '\0'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 40;

template <typename Number>
Number read(const unsigned char* data) noexcept {
  Number number;
  std::memcpy(&number, data, sizeof(number));
  return number;
}

/// Whether the product fits; it is in `product` then.
bool multiply(std::uint64_t left, std::uint64_t right, std::uint64_t& product) noexcept {
  if (right != 0 && left > std::numeric_limits<std::uint64_t>::max() / right) return false;
  product = left * right;
  return true;
}

/// Whether `count` parts of `stride` elements fill `elements` evenly, any number of times.
bool divides(std::uint64_t count, std::uint64_t stride, std::uint64_t elements) noexcept {
  std::uint64_t period = 0;
  return multiply(count, stride, period) && elements % period == 0;
}

/// Whether some vector's elements need different LUTs.
bool splits_vector(const LutBlob& blob) noexcept {
  if (blob.groups == 1 || blob.dim == 1) return false;
  // All LUTs take turns within each row of `inner`, so that the elements below each other agree.
  if (blob.inner % (blob.groups * blob.group_stride) == 0) return false;
  // A LUT serves whole matrices of [size, inner].
  if (blob.group_stride % (blob.size * blob.inner) == 0) return false;
  // A LUT serves whole vectors, none of which is padded.
  return blob.group_stride % blob.inner != 0 || blob.size % blob.dim != 0 ||
         blob.group_stride / blob.inner % blob.dim != 0;
}

}  // namespace

const char* describe(LutError error) noexcept {
  switch (error) {
    case LutError::kOk:
      return "no error";
    case LutError::kTruncated:
      return "the buffer is shorter than the header";
    case LutError::kMagic:
      return "this is not a LUT blob";
    case LutError::kVersion:
      return "the version of the blob is unknown";
    case LutError::kBits:
      return "bits are not 1 to 8";
    case LutError::kDim:
      return "dim is not 1 to 64";
    case LutError::kElement:
      return "the kind of the elements is unknown";
    case LutError::kReserved:
      return "a reserved field is not 0";
    case LutError::kEmpty:
      return "an extent, a stride or the number of groups is 0";
    case LutError::kTooLarge:
      return "the dense weight is too large";
    case LutError::kGroups:
      return "the groups do not divide the weight evenly";
    case LutError::kSplitVector:
      return "a vector is in more than one group";
    case LutError::kScales:
      return "the scales do not divide the weight evenly";
    case LutError::kSize:
      return "the size of the buffer is not what its header says";
    case LutError::kOutputSize:
      return "the output has not the size of the dense weight";
    case LutError::kOutputUnaligned:
      return "the output is not aligned to 4 bytes";
    case LutError::kNoMemory:
      return "out of memory";
  }
  return "unknown error";
}

LutError parse(const void* data, std::size_t data_size, LutBlob& blob) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(data);
  if (bytes == nullptr || data_size < kHeaderSize) return LutError::kTruncated;
  if (std::memcmp(bytes, kMagic.data(), kMagic.size()) != 0) return LutError::kMagic;
  if (read<std::uint32_t>(bytes + 8) != kVersion) return LutError::kVersion;
  blob.bits = bytes[12];
  blob.dim = bytes[13];
  blob.outer = read<std::uint64_t>(bytes + 16);
  blob.size = read<std::uint64_t>(bytes + 24);
  blob.inner = read<std::uint64_t>(bytes + 32);
  blob.groups = read<std::uint64_t>(bytes + 40);
  blob.group_stride = read<std::uint64_t>(bytes + 48);
  blob.scales = read<std::uint64_t>(bytes + 56);
  blob.scale_stride = read<std::uint64_t>(bytes + 64);

  if (blob.bits < 1 || blob.bits > 8) return LutError::kBits;
  if (blob.dim < 1 || blob.dim > 64) return LutError::kDim;
  const auto element = read<std::uint16_t>(bytes + 14);
  if (element > 2) return LutError::kElement;
  blob.element = static_cast<Element>(element);
  if (read<std::uint64_t>(bytes + 72) != 0) return LutError::kReserved;
  if (blob.outer == 0 || blob.size == 0 || blob.inner == 0 || blob.groups == 0 ||
      blob.group_stride == 0 || blob.scale_stride == 0) {
    return LutError::kEmpty;
  }
  std::uint64_t elements = 0;
  // Less than an address space, so that who allocates can add to it.
  constexpr auto kMaxElements =
      std::min<std::uint64_t>(kMaxBytes, std::numeric_limits<std::ptrdiff_t>::max() / 2) /
      sizeof(float);
  if (!multiply(blob.outer, blob.size, elements) || !multiply(elements, blob.inner, elements) ||
      elements > kMaxElements) {
    return LutError::kTooLarge;
  }
  if (blob.groups != 1 && !divides(blob.groups, blob.group_stride, elements)) {
    return LutError::kGroups;
  }
  if (splits_vector(blob)) return LutError::kSplitVector;
  if (blob.scales != 0 && !divides(blob.scales, blob.scale_stride, elements)) {
    return LutError::kScales;
  }
  // There are at most 2**38 elements, and no more indices, groups or scales: nothing overflows.
  const std::uint64_t lut_bytes = blob.lut_values() * sizeof(std::uint16_t);
  const std::uint64_t scale_bytes = blob.scales * sizeof(float);
  if (kHeaderSize + lut_bytes + scale_bytes + blob.index_bytes() != data_size) {
    return LutError::kSize;
  }
  blob.lut = bytes + kHeaderSize;
  blob.scale = blob.lut + lut_bytes;
  blob.indices = blob.scale + scale_bytes;
  return LutError::kOk;
}

}  // namespace dkm

int dkm_lut_expanded_size(const void* data, std::size_t data_size, std::size_t* out_size) {
  dkm::LutBlob blob;
  const dkm::LutError error = dkm::parse(data, data_size, blob);
  if (error == dkm::LutError::kOk) *out_size = dkm::expanded_size(blob);
  return static_cast<int>(error);
}

int dkm_lut_expand(const void* data, std::size_t data_size, void* out, std::size_t out_size) {
  dkm::LutBlob blob;
  dkm::LutError error = dkm::parse(data, data_size, blob);
  if (error == dkm::LutError::kOk && out_size != dkm::expanded_size(blob)) {
    error = dkm::LutError::kOutputSize;
  }
  if (error == dkm::LutError::kOk && reinterpret_cast<std::uintptr_t>(out) % alignof(float) != 0) {
    error = dkm::LutError::kOutputUnaligned;
  }
  if (error == dkm::LutError::kOk) error = dkm::expand(blob, out);
  return static_cast<int>(error);
}

const char* dkm_lut_error(int error) { return dkm::describe(static_cast<dkm::LutError>(error)); }
