#pragma once

/// A palettized weight as one block of bytes: LUTs, indices and an optional scale per channel.
///
/// All numbers are little-endian. A header of 80 bytes
///
///    0  char[8]  magic "DKM-LUT\0"
///    8  u32      version, 1
///   12  u8       bits, 1 to 8
///   13  u8       dim, 1 to 64: neighbours along `size` that share an index
///   14  u16      element: 0 for float32, 1 for float16, 2 for float32 rounded to float16
///   16  u64      outer   |
///   24  u64      size    | the dense weight is [outer, size, inner] in C order
///   32  u64      inner   |
///   40  u64      groups, 1 or more: the number of LUTs
///   48  u64      group_stride, 1 or more
///   56  u64      scales, 0 for none
///   64  u64      scale_stride, 1 or more
///   72  u64      reserved, 0
///
/// is followed without padding, and up to the last byte of the buffer, by
///
///   f16  lut[groups][2**bits][dim]
///   f32  scale[scales]
///   u8   indices[ceil(outer * along * inner * bits / 8)]    with along = ceil(size / dim)
///
/// Indices are one stream of bits in C order of [outer, along, inner]: index n has the bits from
/// n * bits on, the least significant one first. Element e = (o * size + i * dim + d) * inner + j
/// of the dense weight is
///
///   float32(lut[e / group_stride % groups][index[o, i, j]][d]) * scale[e / scale_stride % scales]
///
/// where i * dim + d < size; the rest of a last vector is padding. Without scales nothing is
/// multiplied. Rounding is to the nearest float16, and to even between two. A valid blob has
/// LUTs and scales that divide the weight evenly, and no vector whose elements need different LUTs.

#include <cstddef>
#include <cstdint>

namespace dkm {

enum class LutError : int {
  kOk = 0,
  kTruncated,
  kMagic,
  kVersion,
  kBits,
  kDim,
  kElement,
  kReserved,
  kEmpty,
  kTooLarge,
  kGroups,
  kSplitVector,
  kScales,
  kSize,
  kOutputSize,
  kOutputUnaligned,
  kNoMemory,
};

/// What a dense weight consists of.
enum class Element : std::uint16_t { kFloat32 = 0, kFloat16 = 1, kRounded = 2 };

/// One line for people.
const char* describe(LutError error) noexcept;

/// A validated blob. It points into the buffer that was parsed, which must outlive it.
struct LutBlob {
  unsigned bits = 0;
  std::size_t dim = 0;
  Element element = Element::kFloat32;
  std::uint64_t outer = 0;
  std::uint64_t size = 0;
  std::uint64_t inner = 0;
  std::uint64_t groups = 0;
  std::uint64_t group_stride = 0;
  std::uint64_t scales = 0;
  std::uint64_t scale_stride = 0;
  // The three parts of the body; none is aligned.
  const unsigned char* lut = nullptr;
  const unsigned char* scale = nullptr;
  const unsigned char* indices = nullptr;

  /// Vectors along `size`.
  std::uint64_t along() const noexcept { return size / dim + (size % dim != 0 ? 1 : 0); }
  std::uint64_t index_count() const noexcept { return outer * along() * inner; }
  /// Bytes of the packed indices.
  std::uint64_t index_bytes() const noexcept { return (index_count() * bits + 7) / 8; }
  std::uint64_t element_count() const noexcept { return outer * size * inner; }
  /// Values in all LUTs.
  std::uint64_t lut_values() const noexcept { return (groups << bits) * dim; }
};

/// Checks every number of the header against the others and against the size of the buffer.
/// `blob` is valid only if this returns kOk; nothing about the values of LUTs or scales is checked.
LutError parse(const void* data, std::size_t data_size, LutBlob& blob) noexcept;

/// Bytes of the dense weight.
inline std::size_t expanded_size(const LutBlob& blob) noexcept {
  const std::size_t size = blob.element == Element::kFloat16 ? 2 : sizeof(float);
  return static_cast<std::size_t>(blob.element_count()) * size;
}

/// Writes the dense weight to `out`, which is aligned to 4 and has room for all of it. It may fail
/// with kNoMemory.
LutError expand(const LutBlob& blob, void* out) noexcept;

}  // namespace dkm

#if defined(_WIN32)
#define DKM_EXPORT __declspec(dllexport)
#else
#define DKM_EXPORT __attribute__((visibility("default")))
#endif

/// The same for other languages. These return 0, or a number for `dkm_lut_error`.
extern "C" {
/// The bytes that `dkm_lut_expand` needs.
DKM_EXPORT int dkm_lut_expanded_size(const void* data, std::size_t data_size,
                                     std::size_t* out_size);
/// `out` holds exactly `out_size` bytes and is aligned to 4.
DKM_EXPORT int dkm_lut_expand(const void* data, std::size_t data_size, void* out,
                              std::size_t out_size);
DKM_EXPORT const char* dkm_lut_error(int error);
}
