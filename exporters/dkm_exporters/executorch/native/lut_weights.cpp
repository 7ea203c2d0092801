#include "lut_weights.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <system_error>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace dkm {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kHeaderSize = 32;
constexpr std::size_t kEntrySize = 88;
constexpr std::size_t kKeySize = 64;
constexpr std::array<char, 8> kMagic = {'D', 'K', 'M', '-', 'P', 'T', 'D', '\0'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kAlignment = 64;
// What a byte of a blob can stand for: eight indices of 64 float32.
constexpr std::uint64_t kMaxExpansion = std::uint64_t{8} * 64 * sizeof(float);
// Of a packed file, so that no sum of what it expands to overflows.
constexpr std::uint64_t kMaxPacked = std::uint64_t{1} << 48;
constexpr std::size_t kPiece = 65536;
constexpr int kNames = 16;

template <typename Number>
Number read_number(const unsigned char* data) noexcept {
  Number number;
  std::memcpy(&number, data, sizeof(number));
  return number;
}

struct Weight {
  std::uint64_t offset = 0;
  std::uint64_t dense_size = 0;
  std::uint64_t blob_size = 0;
};

struct Table {
  std::uint64_t head_size = 0;
  std::uint32_t count = 0;
  std::unique_ptr<Weight[]> weights;
};

std::uint64_t align(std::uint64_t size) noexcept {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

bool is_key(const unsigned char* key) noexcept {
  return std::all_of(key, key + kKeySize, [](unsigned char digit) {
    return (digit >= '0' && digit <= '9') || (digit >= 'a' && digit <= 'f');
  });
}

/// Reads everything before the head. `table` is valid only if this returns kOk; then the rest of
/// the source is as long as the head and the blobs.
WeightsError read_table(WeightsSource& packed, Table& table) noexcept {
  const std::uint64_t packed_size = packed.size();
  unsigned char header[kHeaderSize];
  if (packed_size < kHeaderSize || packed_size > kMaxPacked) return WeightsError::kSize;
  if (!packed.read(header, sizeof(header))) return WeightsError::kRead;
  if (std::memcmp(header, kMagic.data(), kMagic.size()) != 0) return WeightsError::kMagic;
  if (read_number<std::uint32_t>(header + 8) != kVersion) return WeightsError::kVersion;
  table.count = read_number<std::uint32_t>(header + 12);
  table.head_size = read_number<std::uint64_t>(header + 16);
  std::uint64_t left = packed_size - kHeaderSize;
  if (table.count > left / kEntrySize) return WeightsError::kSize;
  left -= table.count * kEntrySize;
  if (table.head_size > left) return WeightsError::kSize;
  left -= table.head_size;

  table.weights.reset(new (std::nothrow) Weight[table.count]);
  if (!table.weights) return WeightsError::kNoMemory;
  std::uint64_t end = table.head_size;
  for (std::uint32_t number = 0; number < table.count; ++number) {
    unsigned char entry[kEntrySize];
    if (!packed.read(entry, sizeof(entry))) return WeightsError::kRead;
    Weight& weight = table.weights[number];
    weight.offset = read_number<std::uint64_t>(entry + kKeySize);
    weight.dense_size = read_number<std::uint64_t>(entry + kKeySize + 8);
    weight.blob_size = read_number<std::uint64_t>(entry + kKeySize + 16);
    if (!is_key(entry)) return WeightsError::kKey;
    if (weight.blob_size > left) return WeightsError::kSize;
    left -= weight.blob_size;
    if (weight.offset != align(end)) return WeightsError::kPlace;
    if (weight.dense_size / kMaxExpansion > weight.blob_size) return WeightsError::kTooLarge;
    end = weight.offset + weight.dense_size;
  }
  if (left != 0) return WeightsError::kSize;
  return read_number<std::uint64_t>(header + 24) == end ? WeightsError::kOk : WeightsError::kPlace;
}

WeightsError copy(WeightsSource& packed, WeightsSink& ptd, std::uint64_t size) noexcept {
  const std::unique_ptr<unsigned char[]> piece(new (std::nothrow) unsigned char[kPiece]);
  if (!piece) return WeightsError::kNoMemory;
  while (size > 0) {
    const auto taken = static_cast<std::size_t>(std::min<std::uint64_t>(size, kPiece));
    if (!packed.read(piece.get(), taken)) return WeightsError::kRead;
    if (!ptd.write(piece.get(), taken)) return WeightsError::kWrite;
    size -= taken;
  }
  return WeightsError::kOk;
}

WeightsError expand_weight(WeightsSource& packed, WeightsSink& ptd, const Weight& weight) noexcept {
  const auto blob_size = static_cast<std::size_t>(weight.blob_size);
  if (blob_size != weight.blob_size) return WeightsError::kNoMemory;
  const std::unique_ptr<unsigned char[]> data(new (std::nothrow) unsigned char[blob_size]);
  if (!data) return WeightsError::kNoMemory;
  if (!packed.read(data.get(), blob_size)) return WeightsError::kRead;
  LutBlob blob;
  if (parse(data.get(), blob_size, blob) != LutError::kOk) return WeightsError::kWeight;
  const std::size_t dense_size = expanded_size(blob);
  if (dense_size != weight.dense_size) return WeightsError::kWeightSize;

  // `new` aligns bytes for all that they may hold.
  const std::unique_ptr<unsigned char[]> dense(new (std::nothrow) unsigned char[dense_size]);
  if (!dense || expand(blob, dense.get()) != LutError::kOk) return WeightsError::kNoMemory;
  return ptd.write(dense.get(), dense_size) ? WeightsError::kOk : WeightsError::kWrite;
}

class FileSource final : public WeightsSource {
 public:
  ~FileSource() override {
    if (file_ != nullptr) std::fclose(file_);
  }

  bool open(const fs::path& path) noexcept {
    std::error_code problem;
    // Only a regular file has a size.
    size_ = fs::file_size(path, problem);
    if (!problem) file_ = std::fopen(path.string().c_str(), "rb");
    return file_ != nullptr;
  }

  std::uint64_t size() const noexcept override { return size_; }

  bool read(void* to, std::size_t size) noexcept override {
    return std::fread(to, 1, size, file_) == size;
  }

 private:
  std::FILE* file_ = nullptr;
  std::uint64_t size_ = 0;
};

/// A file that replaces another one at the end, or is removed.
class FileSink final : public WeightsSink {
 public:
  ~FileSink() override {
    close();
    std::error_code ignored;
    if (!path_.empty()) fs::remove(path_, ignored);
  }

  bool create_beside(const fs::path& target) noexcept {
    auto number = std::chrono::steady_clock::now().time_since_epoch().count();
    for (int attempt = 0; attempt < kNames && file_ == nullptr; ++attempt, ++number) {
      fs::path name = target;
      name += "." + std::to_string(number) + ".tmp";
      // Never a file that is there already, as another process may be writing it.
      file_ = std::fopen(name.string().c_str(), "wbx");
      if (file_ != nullptr) path_ = name;
    }
    return file_ != nullptr;
  }

  bool write(const void* data, std::size_t size) noexcept override {
    return check(std::fwrite(data, 1, size, file_) == size);
  }

  /// With all that was written on the disk first: a name must not come to stand for less.
  bool rename_to(const fs::path& target) noexcept {
    bool done = check(std::fflush(file_) == 0);
#if !defined(_WIN32)
    done = done && check(fsync(fileno(file_)) == 0);
#endif
    if (!done || !check(close())) return false;
    std::error_code problem;
    fs::rename(path_, target, problem);
    if (!problem) path_.clear();
    return !problem;
  }

  bool disk_full() const noexcept { return disk_full_; }

 private:
  bool close() noexcept {
    std::FILE* const file = file_;
    file_ = nullptr;
    return file == nullptr || std::fclose(file) == 0;
  }

  bool check(bool done) noexcept {
    if (done) return true;
    disk_full_ = errno == ENOSPC;
#if defined(EDQUOT)
    disk_full_ = disk_full_ || errno == EDQUOT;
#endif
    return false;
  }

  std::FILE* file_ = nullptr;
  fs::path path_;
  bool disk_full_ = false;
};

bool may_replace(const fs::path& target, const fs::path& packed) noexcept {
  std::error_code ignored;
  const fs::file_type type = fs::symlink_status(target, ignored).type();
  if (type == fs::file_type::not_found) return true;
  return type == fs::file_type::regular && !fs::equivalent(target, packed, ignored);
}

}  // namespace

const char* describe(WeightsError error) noexcept {
  switch (error) {
    case WeightsError::kOk:
      return "ok";
    case WeightsError::kOpen:
      return "the packed weights are not a file that can be opened";
    case WeightsError::kRead:
      return "the packed weights cannot be read to their end";
    case WeightsError::kMagic:
      return "not a file of packed weights: the magic differs";
    case WeightsError::kVersion:
      return "packed weights of an unknown version";
    case WeightsError::kSize:
      return "the file is shorter or longer than the packed weights in it";
    case WeightsError::kKey:
      return "the key of a packed weight is not a SHA-256";
    case WeightsError::kPlace:
      return "the weights are not one after another in the output";
    case WeightsError::kTooLarge:
      return "a packed weight cannot be as large as the file says";
    case WeightsError::kWeight:
      return "a packed weight is malformed";
    case WeightsError::kWeightSize:
      return "a packed weight is of another size than the file says";
    case WeightsError::kNoMemory:
      return "there is no memory for a weight";
    case WeightsError::kOutput:
      return "the output is the input, a link or no regular file, and is not replaced";
    case WeightsError::kCreate:
      return "no file can be created in the folder of the output";
    case WeightsError::kWrite:
      return "the output cannot be written";
    case WeightsError::kDiskFull:
      return "the disk is full";
  }
  return "unknown error";
}

WeightsError expand_weights(WeightsSource& packed, WeightsSink& ptd) noexcept {
  Table table;
  WeightsError error = read_table(packed, table);
  if (error == WeightsError::kOk) error = copy(packed, ptd, table.head_size);
  std::uint64_t end = table.head_size;
  for (std::uint32_t number = 0; error == WeightsError::kOk && number < table.count; ++number) {
    constexpr std::array<unsigned char, kAlignment> kZeros = {};
    const Weight& weight = table.weights[number];
    if (!ptd.write(kZeros.data(), static_cast<std::size_t>(weight.offset - end))) {
      return WeightsError::kWrite;
    }
    error = expand_weight(packed, ptd, weight);
    end = weight.offset + weight.dense_size;
  }
  return error;
}

WeightsError expand_weights_file(const char* packed_path, const char* ptd_path) noexcept {
  const fs::path target(ptd_path);
  FileSource packed;
  if (!packed.open(packed_path)) return WeightsError::kOpen;
  if (!may_replace(target, packed_path)) return WeightsError::kOutput;
  FileSink ptd;
  if (!ptd.create_beside(target)) return WeightsError::kCreate;
  WeightsError error = expand_weights(packed, ptd);
  if (error == WeightsError::kOk && !ptd.rename_to(target)) error = WeightsError::kWrite;
  const bool disk_full = error == WeightsError::kWrite && ptd.disk_full();
  return disk_full ? WeightsError::kDiskFull : error;
}

}  // namespace dkm

int dkm_lut_expand_file(const char* packed_path, const char* ptd_path) {
  return static_cast<int>(dkm::expand_weights_file(packed_path, ptd_path));
}

const char* dkm_lut_expand_file_error(int error) {
  return dkm::describe(static_cast<dkm::WeightsError>(error));
}
