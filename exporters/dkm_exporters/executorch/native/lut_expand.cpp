#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "lut_blob.h"

namespace dkm {
namespace {

// Codes are unpacked eight at a time, because eight of them fill whole bytes.
constexpr std::size_t kBlock = 8;
// A LUT for codes that is looked up in the L1 cache.
constexpr std::size_t kMaxJoinedBytes = 16384;
// What is expanded before it is scaled: 16 KiB at most, so that it is still in the L1 cache then.
constexpr std::size_t kChunkValues = 4096;

template <typename Number>
Number read(const unsigned char* data) noexcept {
  Number number;
  std::memcpy(&number, data, sizeof(number));
  return number;
}

/// A float16, of which C++17 has none.
enum class Half : std::uint16_t {};

float float_of_half(Half number) noexcept {
  const auto half = static_cast<std::uint16_t>(number);
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

/// Rounds to nearest, and to even where two are as near.
Half half_of_float(float value) noexcept {
  std::uint32_t pattern = 0;
  std::memcpy(&pattern, &value, sizeof(pattern));
  const std::uint32_t sign = pattern >> 16U & 0x8000U;
  std::uint32_t magnitude = pattern & 0x7FFFFFFFU;
  std::uint32_t half = 0;
  if (magnitude > 0x7F800000U) {  // NaN stays one, whatever is cut off
    half = 0x7E00U | (magnitude >> 13U & 0x3FFU);
  } else if (magnitude >= 0x477FF000U) {  // from halfway between 65504 and 2**16 on
    half = 0x7C00U;
  } else if (magnitude < 0x38800000U) {  // below 2**-14: a multiple of 2**-24
    // Floats from a half on are such multiples, so that the addition rounds.
    std::memcpy(&value, &magnitude, sizeof(value));
    value += 0.5F;
    std::memcpy(&half, &value, sizeof(half));
    half -= 0x3F000000U;
  } else {  // the bias of the exponent goes from 127 to 15
    magnitude += 0xFFFU + (magnitude >> 13U & 1U) - ((127U - 15U) << 23U);
    half = magnitude >> 13U;
  }
  return static_cast<Half>(sign | half);
}

/// A float32 that a float16 equals.
struct Rounded {
  float value;
};

void convert(Half half, float& value) noexcept { value = float_of_half(half); }
void convert(Half half, Half& value) noexcept { value = half; }
void convert(Half half, Rounded& rounded) noexcept { rounded.value = float_of_half(half); }

void scale(float& value, float factor) noexcept { value *= factor; }
void scale(Half& value, float factor) noexcept {
  value = half_of_float(float_of_half(value) * factor);
}
void scale(Rounded& rounded, float factor) noexcept {
  rounded.value = float_of_half(half_of_float(rounded.value * factor));
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
template <std::size_t kWidth, typename Value>
void look_up_fixed(const Value* lut, std::size_t any_width, const std::uint8_t* codes,
                   std::size_t elements, Value* out) noexcept {
  const std::size_t width = kWidth != 0 ? kWidth : any_width;
  const std::size_t whole = elements / width;
  for (std::size_t k = 0; k < whole; ++k, out += width) {
    const Value* entry = lut + codes[k] * width;
    if constexpr (kWidth != 0) {
      std::memcpy(out, entry, kWidth * sizeof(Value));
    } else {
      for (std::size_t d = 0; d < width; ++d) out[d] = entry[d];
    }
  }
  const std::size_t rest = elements % width;
  if (rest != 0) std::copy_n(lut + codes[whole] * width, rest, out);
}

template <typename Value>
void look_up(const Value* lut, std::size_t width, const std::uint8_t* codes, std::size_t elements,
             Value* out) noexcept {
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

/// Expands a blob to elements that are float, Half or Rounded.
///
/// Where bits are few, it looks several neighbouring indices up at once: two indices of 4 bits are
/// one of 8 bits into a LUT of all pairs. A code is such a joined index.
template <typename Value>
class LutExpander {
 public:
  /// `blob` outlives this.
  explicit LutExpander(const LutBlob& blob) noexcept;

  /// kNoMemory if there is none for LUTs of elements, which are smaller than the dense weight or
  /// at most twice the size of the blob.
  LutError expand(Value* out) noexcept;

 private:
  bool can_join(unsigned indices) const noexcept;
  void convert_luts() noexcept;
  void expand_vectors(const std::uint8_t* codes, std::uint64_t first, std::size_t count,
                      Value* out) const noexcept;
  void expand_rows(const std::uint8_t* codes, std::uint64_t first, std::size_t count,
                   Value* out) const noexcept;
  void scale_run(Value* values, std::uint64_t element, std::size_t count) const noexcept;

  const LutBlob& blob_;
  // The weight is [outer, size] where `inner` is 1: `rows_` tells whether it is. There the extents
  // may differ from the blob's, as elements that follow each other need no structure.
  bool rows_;
  std::uint64_t outer_;
  std::uint64_t size_;
  std::uint64_t along_ = 0;       // codes or rows of codes along `size`
  std::uint64_t row_codes_ = 0;   // codes along `inner`
  unsigned joined_;               // indices in a code
  std::size_t entries_ = 0;       // of a LUT for codes
  std::size_t width_ = 0;         // elements that a code writes side by side
  std::unique_ptr<Value[]> lut_;  // [groups, entries, width], or [groups, dim, entries, width]
  std::unique_ptr<float[]> scale_;
};

template <typename Value>
LutExpander<Value>::LutExpander(const LutBlob& blob) noexcept
    : blob_(blob),
      rows_(blob.dim > 1 && blob.inner > 1),
      outer_(blob.outer),
      size_(blob.size),
      joined_(8 / blob.bits) {
  if (blob.dim == 1) {
    size_ = blob.element_count();
    outer_ = 1;
  } else if (!rows_ && size_ % blob.dim == 0) {
    size_ *= outer_;
    outer_ = 1;
  }
  while (!can_join(joined_)) --joined_;
  entries_ = std::size_t{1} << (blob.bits * joined_);
  width_ = joined_ * (rows_ ? 1 : blob.dim);
  const std::uint64_t step = rows_ ? blob.dim : width_;
  along_ = size_ / step + (size_ % step != 0 ? 1 : 0);
  row_codes_ = rows_ ? blob.inner / joined_ : 1;
}

/// Whether codes of so many indices are possible, and worth their LUTs.
template <typename Value>
bool LutExpander<Value>::can_join(unsigned indices) const noexcept {
  if (indices == 1) return true;
  const std::size_t entries = std::size_t{1} << (blob_.bits * indices);
  const std::size_t width = indices * (rows_ ? 1 : blob_.dim);
  if (entries * width * sizeof(Value) > kMaxJoinedBytes) return false;
  if (blob_.groups * entries * blob_.dim * indices > blob_.element_count() / kBlock) return false;
  // Codes start anew where rows or LUTs do.
  if (rows_ && blob_.inner % indices != 0) return false;
  if (!rows_ && outer_ != 1) return false;
  return blob_.groups == 1 || blob_.group_stride % width == 0;
}

/// A vector's elements are side by side where `inner` is 1. Elsewhere each is in another row, and
/// row d of the vectors looks up in a LUT of the elements d.
template <typename Value>
void LutExpander<Value>::convert_luts() noexcept {
  const std::size_t dim = blob_.dim;
  const std::size_t mask = (std::size_t{1} << blob_.bits) - 1;
  const unsigned char* halves = blob_.lut;
  Value* lut = lut_.get();
  for (std::uint64_t group = 0; group < blob_.groups; ++group) {
    for (std::size_t code = 0; code < entries_; ++code) {
      for (std::size_t place = 0; place < joined_; ++place) {
        const std::size_t index = code >> (place * blob_.bits) & mask;
        for (std::size_t d = 0; d < dim; ++d) {
          const unsigned char* half = halves + (index * dim + d) * sizeof(std::uint16_t);
          const std::size_t to =
              rows_ ? (d * entries_ + code) * width_ + place : code * width_ + place * dim + d;
          convert(read<Half>(half), lut[to]);
        }
      }
    }
    halves += (mask + 1) * dim * sizeof(std::uint16_t);
    lut += entries_ * dim * joined_;
  }
}

template <typename Value>
LutError LutExpander<Value>::expand(Value* out) noexcept {
  const auto luts = static_cast<std::size_t>(blob_.groups) * entries_ * blob_.dim * joined_;
  lut_.reset(new (std::nothrow) Value[luts]);
  scale_.reset(new (std::nothrow) float[static_cast<std::size_t>(blob_.scales)]);
  if (lut_ == nullptr || scale_ == nullptr) return LutError::kNoMemory;
  convert_luts();
  if (blob_.scales != 0) {
    std::memcpy(scale_.get(), blob_.scale, static_cast<std::size_t>(blob_.scales) * sizeof(float));
  }

  std::array<std::uint8_t, kChunkValues> buffer;  // NOLINT(*-member-init): filled below
  const unsigned bits = blob_.bits * joined_;
  const std::uint64_t all = outer_ * along_ * row_codes_;
  const std::size_t chunk =
      std::max(kChunkValues / (blob_.dim * joined_) / kBlock * kBlock, kBlock);
  for (std::uint64_t first = 0; first < all; first += chunk) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(chunk, all - first));
    const std::uint64_t offset = first / kBlock * bits;
    const std::uint8_t* codes = blob_.indices + offset;
    if (bits != 8) {
      unpack(bits, codes, blob_.index_bytes() - offset, count, buffer.data());
      codes = buffer.data();
    }
    if (rows_) {
      expand_rows(codes, first, count, out);
    } else {
      expand_vectors(codes, first, count, out);
    }
  }
  return LutError::kOk;
}

/// Where `inner` is 1: one vector behind the other.
template <typename Value>
void LutExpander<Value>::expand_vectors(const std::uint8_t* codes, std::uint64_t first,
                                        std::size_t count, Value* out) const noexcept {
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
      const Value* lut = lut_.get() + group.current() * entries_ * width_;
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
template <typename Value>
void LutExpander<Value>::expand_rows(const std::uint8_t* codes, std::uint64_t first,
                                     std::size_t count, Value* out) const noexcept {
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
      const Value* lut = lut_.get() + group.current() * blob_.dim * entries_ * width_;
      Value* to = out + begin + done;
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
template <typename Value>
void LutExpander<Value>::scale_run(Value* values, std::uint64_t element,
                                   std::size_t count) const noexcept {
  if (blob_.scales == 0) return;
  if (blob_.scale_stride == 1 && blob_.scales > 1) {
    auto channel = static_cast<std::size_t>(element % blob_.scales);
    while (count > 0) {
      const std::size_t run = std::min(count, static_cast<std::size_t>(blob_.scales) - channel);
      const float* factors = scale_.get() + channel;
      for (std::size_t k = 0; k < run; ++k) scale(values[k], factors[k]);
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
    for (std::size_t k = 0; k < run; ++k) scale(values[k], factor);
    channel.advance(run);
    values += run;
    count -= run;
  }
}

template <typename Value>
LutError expand_as(const LutBlob& blob, void* out) noexcept {
  return LutExpander<Value>(blob).expand(static_cast<Value*>(out));
}

}  // namespace

LutError expand(const LutBlob& blob, void* out) noexcept {
  switch (blob.element) {
    case Element::kFloat16:
      return expand_as<Half>(blob, out);
    case Element::kRounded:
      return expand_as<Rounded>(blob, out);
    default:
      return expand_as<float>(blob, out);
  }
}

}  // namespace dkm
