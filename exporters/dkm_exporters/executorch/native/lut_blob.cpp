#include "lut_blob.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <new>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "LUT blobs are read on little-endian machines only"
#endif

namespace dkm {
namespace {

constexpr std::size_t kHeaderSize = 80;
constexpr std::array<char, 8> kMagic = {'D', 'K', 'M', '-', 'L', 'U', 'T', '\0'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 40;
// Codes are unpacked eight at a time, because eight of them fill whole bytes.
constexpr std::size_t kBlock = 8;
// A LUT for codes that is looked up in the L1 cache.
constexpr std::size_t kMaxJoinedBytes = 16384;
// What is expanded before it is scaled: 16 KiB, so that it is still in the L1 cache then.
constexpr std::size_t kChunkElements = 4096;

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

float float_of_half(std::uint16_t half) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16U;
  const std::uint32_t exponent = (half >> 10U) & 0x1FU;
  const std::uint32_t mantissa = half & 0x3FFU;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2**-24, which float32 has exactly
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  // Infinity and NaN keep an exponent of ones; the bias of the others goes from 15 to 127.
  const std::uint32_t wide = exponent == 0x1FU ? 0xFFU : exponent + (127U - 15U);
  const std::uint32_t pattern = sign | (wide << 23U) | (mantissa << 13U);
  float value = 0;
  std::memcpy(&value, &pattern, sizeof(value));
  return value;
}

/// Spreads eight fields of `kBits` each over the eight bytes of a word: halves move apart, then
/// their halves, then theirs. Bits above the eight fields are dropped.
template <unsigned kBits>
std::uint64_t spread(std::uint64_t word) noexcept {
  constexpr auto kHalf = (std::uint64_t{1} << (4 * kBits)) - 1;
  constexpr auto kQuarter = ((std::uint64_t{1} << (2 * kBits)) - 1) * 0x0000000100000001U;
  constexpr auto kField = ((std::uint64_t{1} << kBits) - 1) * 0x0001000100010001U;
  word = (word & kHalf) | ((word << (32 - 4 * kBits)) & (kHalf << 32U));
  word = (word & kQuarter) | ((word << (16 - 2 * kBits)) & (kQuarter << 16U));
  return (word & kField) | ((word << (8 - kBits)) & (kField << 8U));
}

/// Writes `count` fields, rounded up to eight, as one byte each; `from` has `left` bytes.
template <unsigned kBits>
void unpack_fixed(const unsigned char* from, std::uint64_t left, std::size_t count,
                  std::uint8_t* to) noexcept {
  std::uint8_t* const end = to + count;
  for (; to < end && left >= sizeof(std::uint64_t); to += kBlock, from += kBits, left -= kBits) {
    const std::uint64_t word = spread<kBits>(read<std::uint64_t>(from));
    std::memcpy(to, &word, sizeof(word));
  }
  while (to < end) {  // nothing is read behind the last byte
    const std::uint64_t bytes = std::min<std::uint64_t>(left, kBits);
    std::uint64_t word = 0;
    std::memcpy(&word, from, static_cast<std::size_t>(bytes));
    word = spread<kBits>(word);
    std::memcpy(to, &word, sizeof(word));
    to += kBlock;
    from += bytes;
    left -= bytes;
  }
}

void unpack(unsigned bits, const unsigned char* from, std::uint64_t left, std::size_t count,
            std::uint8_t* to) noexcept {
  switch (bits) {
    case 1:
      return unpack_fixed<1>(from, left, count, to);
    case 2:
      return unpack_fixed<2>(from, left, count, to);
    case 3:
      return unpack_fixed<3>(from, left, count, to);
    case 4:
      return unpack_fixed<4>(from, left, count, to);
    case 5:
      return unpack_fixed<5>(from, left, count, to);
    case 6:
      return unpack_fixed<6>(from, left, count, to);
    default:
      return unpack_fixed<7>(from, left, count, to);
  }
}

/// Which of `count` things each element belongs to, where they take turns every `stride` elements.
class Turns {
 public:
  Turns(std::uint64_t count, std::uint64_t stride, std::uint64_t element) noexcept
      : count_(count), stride_(stride) {
    if (count > 1) {
      current_ = element / stride % count;
      left_ = stride - element % stride;
    }
  }

  std::uint64_t current() const noexcept { return current_; }

  /// How many of the next `wanted` elements belong to the current one.
  std::size_t run(std::size_t wanted) const noexcept {
    return static_cast<std::size_t>(std::min<std::uint64_t>(wanted, left_));
  }

  /// Goes over a run.
  void advance(std::size_t elements) noexcept {
    left_ -= elements;
    if (left_ == 0) {
      left_ = stride_;
      current_ = current_ + 1 == count_ ? 0 : current_ + 1;
    }
  }

 private:
  std::uint64_t count_;
  std::uint64_t stride_;
  std::uint64_t current_ = 0;
  std::uint64_t left_ = std::numeric_limits<std::uint64_t>::max();
};

/// Entries of a LUT one after another; the last one may be cut. `kWidth` 0 is any width.
template <std::size_t kWidth>
void look_up_fixed(const float* lut, std::size_t any_width, const std::uint8_t* codes,
                   std::size_t elements, float* out) noexcept {
  const std::size_t width = kWidth != 0 ? kWidth : any_width;
  const std::size_t whole = elements / width;
  for (std::size_t k = 0; k < whole; ++k, out += width) {
    const float* entry = lut + codes[k] * width;
    if constexpr (kWidth != 0) {
      std::memcpy(out, entry, kWidth * sizeof(float));
    } else {
      for (std::size_t d = 0; d < width; ++d) out[d] = entry[d];
    }
  }
  const std::size_t rest = elements % width;
  if (rest != 0) std::copy_n(lut + codes[whole] * width, rest, out);
}

void look_up(const float* lut, std::size_t width, const std::uint8_t* codes, std::size_t elements,
             float* out) noexcept {
  switch (width) {
    case 1:
      return look_up_fixed<1>(lut, width, codes, elements, out);
    case 2:
      return look_up_fixed<2>(lut, width, codes, elements, out);
    case 4:
      return look_up_fixed<4>(lut, width, codes, elements, out);
    case 6:
      return look_up_fixed<6>(lut, width, codes, elements, out);
    case 8:
      return look_up_fixed<8>(lut, width, codes, elements, out);
    case 16:
      return look_up_fixed<16>(lut, width, codes, elements, out);
    default:
      return look_up_fixed<0>(lut, width, codes, elements, out);
  }
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
  if (read<std::uint16_t>(bytes + 14) != 0 || read<std::uint64_t>(bytes + 72) != 0) {
    return LutError::kReserved;
  }
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

LutError LutExpander::init(const LutBlob& blob) noexcept {
  blob_ = blob;
  rows_ = blob.dim > 1 && blob.inner > 1;
  outer_ = blob.outer;
  size_ = blob.size;
  if (blob.dim == 1) {
    size_ = blob.element_count();
    outer_ = 1;
  } else if (!rows_ && size_ % blob.dim == 0) {
    size_ *= outer_;
    outer_ = 1;
  }
  for (joined_ = 8 / blob.bits; !can_join(joined_);) --joined_;
  entries_ = std::size_t{1} << (blob.bits * joined_);
  width_ = joined_ * (rows_ ? 1 : blob.dim);
  const std::uint64_t step = rows_ ? blob.dim : width_;
  along_ = size_ / step + (size_ % step != 0 ? 1 : 0);
  row_codes_ = rows_ ? blob.inner / joined_ : 1;

  lut_.reset(new (
      std::nothrow) float[static_cast<std::size_t>(blob.groups) * entries_ * blob.dim * joined_]);
  scale_.reset(new (std::nothrow) float[static_cast<std::size_t>(blob.scales)]);
  if (lut_ == nullptr || scale_ == nullptr) return LutError::kNoMemory;
  convert_luts();
  if (blob.scales != 0) {
    std::memcpy(scale_.get(), blob.scale, static_cast<std::size_t>(blob.scales) * sizeof(float));
  }
  return LutError::kOk;
}

/// Whether codes of so many indices are possible, and worth their LUTs.
bool LutExpander::can_join(unsigned indices) const noexcept {
  if (indices == 1) return true;
  const std::size_t entries = std::size_t{1} << (blob_.bits * indices);
  const std::size_t width = indices * (rows_ ? 1 : blob_.dim);
  if (entries * width * sizeof(float) > kMaxJoinedBytes) return false;
  if (blob_.groups * entries * blob_.dim * indices > blob_.element_count() / kBlock) return false;
  // Codes start anew where rows or LUTs do.
  if (rows_ && blob_.inner % indices != 0) return false;
  if (!rows_ && outer_ != 1) return false;
  return blob_.groups == 1 || blob_.group_stride % width == 0;
}

/// A vector's elements are side by side where `inner` is 1. Elsewhere each is in another row, and
/// row d of the vectors looks up in a LUT of the elements d.
void LutExpander::convert_luts() noexcept {
  const std::size_t dim = blob_.dim;
  const std::size_t mask = (std::size_t{1} << blob_.bits) - 1;
  const unsigned char* halves = blob_.lut;
  float* lut = lut_.get();
  for (std::uint64_t group = 0; group < blob_.groups; ++group) {
    for (std::size_t code = 0; code < entries_; ++code) {
      for (std::size_t place = 0; place < joined_; ++place) {
        const std::size_t index = code >> (place * blob_.bits) & mask;
        for (std::size_t d = 0; d < dim; ++d) {
          const unsigned char* half = halves + (index * dim + d) * sizeof(std::uint16_t);
          const std::size_t to =
              rows_ ? (d * entries_ + code) * width_ + place : code * width_ + place * dim + d;
          lut[to] = float_of_half(read<std::uint16_t>(half));
        }
      }
    }
    halves += (mask + 1) * dim * sizeof(std::uint16_t);
    lut += entries_ * dim * joined_;
  }
}

void LutExpander::expand(float* out, std::uint64_t begin, std::uint64_t end) const noexcept {
  std::array<std::uint8_t, kChunkElements> buffer;  // NOLINT(*-member-init): filled below
  const unsigned bits = blob_.bits * joined_;
  const std::uint64_t bytes = blob_.index_bytes();
  const std::size_t chunk =
      std::max(kChunkElements / (blob_.dim * joined_) / kBlock * kBlock, kBlock);
  while (begin < end) {
    const auto skipped = static_cast<std::size_t>(begin % kBlock);
    const auto count =
        static_cast<std::size_t>(std::min<std::uint64_t>(chunk - skipped, end - begin));
    const std::uint64_t offset = begin / kBlock * bits;
    const std::uint8_t* codes = blob_.indices + offset;
    if (bits != 8) {
      unpack(bits, codes, bytes - offset, skipped + count, buffer.data());
      codes = buffer.data();
    }
    if (rows_) {
      expand_rows(codes + skipped, begin, count, out);
    } else {
      expand_vectors(codes + skipped, begin, count, out);
    }
    begin += count;
  }
}

/// Where `inner` is 1: one vector behind the other.
void LutExpander::expand_vectors(const std::uint8_t* codes, std::uint64_t first, std::size_t count,
                                 float* out) const noexcept {
  while (count > 0) {
    const std::uint64_t o = first / along_;
    const std::uint64_t i = first % along_;
    const auto vectors = static_cast<std::size_t>(std::min<std::uint64_t>(count, along_ - i));
    const auto elements =
        static_cast<std::size_t>(std::min<std::uint64_t>(vectors * width_, size_ - i * width_));
    const std::uint64_t begin = o * size_ + i * width_;
    Turns group(blob_.groups, blob_.group_stride, begin);
    for (std::size_t done = 0; done < elements;) {
      const std::size_t run = group.run(elements - done);
      const float* lut = lut_.get() + group.current() * entries_ * width_;
      look_up(lut, width_, codes + done / width_, run, out + begin + done);
      group.advance(run);
      done += run;
    }
    scale_run(out + begin, begin, elements);
    codes += vectors;
    first += vectors;
    count -= vectors;
  }
}

/// Where `inner` is larger: the elements of neighbouring vectors are in `dim` parallel rows.
void LutExpander::expand_rows(const std::uint8_t* codes, std::uint64_t first, std::size_t count,
                              float* out) const noexcept {
  while (count > 0) {
    const std::uint64_t row = first / row_codes_;
    const std::uint64_t column = first % row_codes_;
    const auto taken =
        static_cast<std::size_t>(std::min<std::uint64_t>(count, row_codes_ - column));
    const std::size_t elements = taken * width_;
    const std::uint64_t top = row % along_ * blob_.dim;
    const std::uint64_t height = std::min<std::uint64_t>(blob_.dim, size_ - top);
    const std::uint64_t begin = (row / along_ * size_ + top) * blob_.inner + column * width_;
    Turns group(blob_.groups, blob_.group_stride, begin);
    for (std::size_t done = 0; done < elements;) {
      const std::size_t run = group.run(elements - done);
      const float* lut = lut_.get() + group.current() * blob_.dim * entries_ * width_;
      float* to = out + begin + done;
      for (std::uint64_t d = 0; d < height; ++d) {
        look_up(lut, width_, codes + done / width_, run, to);
        lut += entries_ * width_;
        to += blob_.inner;
      }
      group.advance(run);
      done += run;
    }
    for (std::uint64_t d = 0; d < height; ++d) {
      const std::uint64_t start = begin + d * blob_.inner;
      scale_run(out + start, start, elements);
    }
    codes += taken;
    first += taken;
    count -= taken;
  }
}

/// Multiplies neighbours, the first of which is `element` of the weight.
void LutExpander::scale_run(float* values, std::uint64_t element,
                            std::size_t count) const noexcept {
  if (blob_.scales == 0) return;
  if (blob_.scale_stride == 1 && blob_.scales > 1) {
    auto channel = static_cast<std::size_t>(element % blob_.scales);
    while (count > 0) {
      const std::size_t run = std::min(count, static_cast<std::size_t>(blob_.scales) - channel);
      const float* factors = scale_.get() + channel;
      for (std::size_t k = 0; k < run; ++k) values[k] *= factors[k];
      values += run;
      count -= run;
      channel = 0;
    }
    return;
  }
  Turns channel(blob_.scales, blob_.scale_stride, element);
  while (count > 0) {
    const std::size_t run = channel.run(count);
    const float factor = scale_.get()[channel.current()];
    for (std::size_t k = 0; k < run; ++k) values[k] *= factor;
    channel.advance(run);
    values += run;
    count -= run;
  }
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
  if (error == dkm::LutError::kOk) {
    dkm::LutExpander expander;
    error = expander.init(blob);
    if (error == dkm::LutError::kOk) {
      expander.expand(static_cast<float*>(out), 0, expander.code_count());
    }
  }
  return static_cast<int>(error);
}

const char* dkm_lut_error(int error) { return dkm::describe(static_cast<dkm::LutError>(error)); }
