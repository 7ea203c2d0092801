#pragma once

/// Palettized weights as one file, and the file of dense weights that an app makes of it once.
///
/// ExecuTorch takes weights from a `.ptd` file. A `.lut` file holds the same weights as blobs, see
/// lut_blob.h, and what precedes them in the `.ptd`. All numbers are little-endian. A header of 32
/// bytes
///
///    0  char[8]  magic "DKM-PTD\0"
///    8  u32      version, 1
///   12  u32      count: the number of weights
///   16  u64      head_size
///   24  u64      ptd_size: of the whole `.ptd`
///
/// is followed without padding, and up to the last byte of the file, by a table with one entry of
/// 88 bytes for each weight, by the head and by the blobs in the order of the table:
///
///    0  char[64] key: the SHA-256 of the dense weight in lower-case hex
///   64  u64      offset of the dense weight in the `.ptd`
///   72  u64      dense_size
///   80  u64      blob_size
///
///   u8  head[head_size]
///   u8  blob[blob_size] of each weight
///
/// The `.ptd` is the head and then the weights, each at the next multiple of 64 after the end of
/// what precedes it, with zeros between; it ends where its last weight ends.
///
/// Nothing of a file is trusted: what it expands to is at most 2048 times as large as the file, as
/// an index of one bit stands for 64 float32 at most.

#include <cstddef>
#include <cstdint>

#include "lut_blob.h"

namespace dkm {

enum class WeightsError : int {
  kOk = 0,
  kOpen,
  kRead,
  kMagic,
  kVersion,
  kSize,
  kKey,
  kPlace,
  kTooLarge,
  kWeight,
  kWeightSize,
  kNoMemory,
  kOutput,
  kCreate,
  kWrite,
  kDiskFull,
};

/// One line for people.
const char* describe(WeightsError error) noexcept;

/// Where a `.lut` comes from: a file, an asset of an app, memory.
class WeightsSource {
 public:
  WeightsSource() = default;
  WeightsSource(const WeightsSource&) = delete;
  WeightsSource& operator=(const WeightsSource&) = delete;
  virtual ~WeightsSource() = default;

  /// Of all of it in bytes.
  virtual std::uint64_t size() const noexcept = 0;
  /// Puts the next `size` bytes to `to`; false if it cannot.
  virtual bool read(void* to, std::size_t size) noexcept = 0;
};

/// Where a `.ptd` goes.
class WeightsSink {
 public:
  WeightsSink() = default;
  WeightsSink(const WeightsSink&) = delete;
  WeightsSink& operator=(const WeightsSink&) = delete;
  virtual ~WeightsSink() = default;

  /// Appends; false if it cannot.
  virtual bool write(const void* data, std::size_t size) noexcept = 0;
};

/// Expands all weights, one after another: it has one in memory at a time, as a blob and dense.
/// The header and the table are checked before anything is written, each blob before its weight is.
WeightsError expand_weights(WeightsSource& packed, WeightsSink& ptd) noexcept;

/// The same from file to file. It writes `PTD_PATH.<number>.tmp` and renames that at the end, so
/// that `ptd_path` has all of the weights or is as it was before. Only a process that is killed
/// leaves a `.tmp` behind. An earlier file is replaced; a link, a folder or a device is not, nor
/// is the packed file itself.
WeightsError expand_weights_file(const char* packed_path, const char* ptd_path) noexcept;

}  // namespace dkm

/// The same for other languages.
extern "C" {
/// Expands the file at `packed_path` to one at `ptd_path`. Returns 0, or a number for
/// `dkm_lut_expand_file_error`:
///
///    1  the packed file cannot be opened       9  a weight is malformed
///    2  it cannot be read to its end          10  a weight is of another size than the table says
///    3  it is no such file                    11  no memory for a weight
///    4  its version is unknown                12  `ptd_path` is a link, a folder or the input
///    5  its size is not that of its parts     13  no file can be made beside `ptd_path`
///    6  a key is not a SHA-256                14  the output cannot be written or renamed
///    7  a weight is at another place          15  the disk is full
///    8  a weight is larger than any such blob
DKM_EXPORT int dkm_lut_expand_file(const char* packed_path, const char* ptd_path);
/// One line for people, never null.
DKM_EXPORT const char* dkm_lut_expand_file_error(int error);
}
