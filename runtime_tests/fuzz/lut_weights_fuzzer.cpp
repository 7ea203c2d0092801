/// Fuzzes the expander of files of weights: what it accepts, it expands to what the format says.
///
/// Built as lut_blob_fuzzer.cpp is, and run as
///
///   build/fuzz/fuzz/lut_weights_fuzzer -max_len=16384 build/corpus
///   runtime_tests/fuzz/weights_corpus

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "lut_blob.h"
#include "lut_weights.h"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

constexpr std::size_t kHeaderSize = 32;
constexpr std::size_t kEntrySize = 88;
constexpr std::size_t kMaxWritten = std::size_t{8} << 20;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

std::uint64_t get(const std::uint8_t* data) {
  std::uint64_t value = 0;
  std::memcpy(&value, data, sizeof(value));
  return value;
}

void set(std::uint8_t* data, std::uint64_t value) { std::memcpy(data, &value, sizeof(value)); }

std::uint64_t align(std::uint64_t size) { return (size + 63) / 64 * 64; }

/// Ends after `readable` of the bytes that it claims to have.
class MemorySource final : public dkm::WeightsSource {
 public:
  MemorySource(const std::uint8_t* data, std::size_t size, std::size_t readable)
      : data_(data), size_(size), readable_(readable) {}

  std::uint64_t size() const noexcept override { return size_; }

  bool read(void* to, std::size_t size) noexcept override {
    if (size > readable_ - place_) return false;
    std::copy_n(data_ + place_, size, static_cast<std::uint8_t*>(to));
    place_ += size;
    return true;
  }

  std::size_t place() const { return place_; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t readable_;
  std::size_t place_ = 0;
};

/// A disk that is full soon.
class MemorySink final : public dkm::WeightsSink {
 public:
  explicit MemorySink(std::size_t room) : room_(room) {}

  bool write(const void* data, std::size_t size) noexcept override {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    if (size > room_ - written_.size()) return false;
    written_.insert(written_.end(), bytes, bytes + size);
    return true;
  }

  const std::vector<std::uint8_t>& written() const { return written_; }

 private:
  std::size_t room_;
  std::vector<std::uint8_t> written_;
};

/// What an accepted file expands to, as the format defines it.
std::vector<std::uint8_t> reference(const std::uint8_t* data) {
  const std::uint64_t count = get(data + 8) >> 32U;
  const std::uint64_t head_size = get(data + 16);
  std::vector<std::uint8_t> ptd(get(data + 24), 0);
  const std::uint8_t* from = data + kHeaderSize + count * kEntrySize;
  std::copy_n(from, head_size, ptd.begin());
  from += head_size;
  for (std::uint64_t number = 0; number < count; ++number) {
    const std::uint8_t* entry = data + kHeaderSize + number * kEntrySize;
    const std::uint64_t size = get(entry + 72);
    require(get(entry + 64) + size <= ptd.size(), "a weight is not in the output");
    std::vector<float> dense(size / sizeof(float));
    require(dkm_lut_expand(from, get(entry + 80), dense.data(), size) == 0, "a blob is malformed");
    std::memcpy(ptd.data() + get(entry + 64), dense.data(), size);
    from += get(entry + 80);
  }
  return ptd;
}

/// Makes sizes and places agree, so that most files are accepted up to their blobs.
void repair(std::uint8_t* data, std::size_t size) {
  std::uint64_t left = size - kHeaderSize;
  const std::uint64_t count = std::min<std::uint64_t>(get(data + 8) >> 32U, left / kEntrySize);
  left -= count * kEntrySize;
  const std::uint64_t head_size = std::min(get(data + 16), count == 0 ? left : left / 2);
  left -= head_size;
  std::memcpy(data, "DKM-PTD", 8);
  set(data + 8, count << 32U | 1);
  set(data + 16, count == 0 ? head_size + left : head_size);
  std::uint64_t end = get(data + 16);
  const std::uint8_t* blob = data + size - left;
  for (std::uint64_t number = 0; number < count; ++number) {
    std::uint8_t* entry = data + kHeaderSize + number * kEntrySize;
    const std::uint64_t blob_size =
        number + 1 == count ? left : std::min(get(entry + 80), left / (count - number));
    std::size_t dense_size = 0;
    if (dkm_lut_expanded_size(blob, blob_size, &dense_size) != 0) dense_size = get(entry + 72);
    std::memset(entry, 'a', 64);
    set(entry + 64, align(end));
    set(entry + 72, dense_size);
    set(entry + 80, blob_size);
    end = align(end) + dense_size;
    left -= blob_size;
    blob += blob_size;
  }
  set(data + 24, end);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  MemorySource source(data, size, size);
  MemorySink sink(kMaxWritten);
  const dkm::WeightsError error = dkm::expand_weights(source, sink);
  require(*dkm::describe(error) != '\0', "an error without a text");
  require(sink.written().size() <= 2048 * size, "it writes more than blobs can stand for");
  if (error != dkm::WeightsError::kOk) return 0;
  require(source.place() == size, "it leaves something unread");
  require(sink.written() == reference(data), "the output is not the reference's");

  // A source that ends too early, and a disk that is full.
  const std::size_t readable = size * 2654435761U % size;
  MemorySource cut(data, size, readable);
  MemorySink whole(kMaxWritten);
  require(dkm::expand_weights(cut, whole) == dkm::WeightsError::kRead, "reads what is not there");
  if (!sink.written().empty()) {
    MemorySource again(data, size, size);
    MemorySink small(size * 2654435761U % sink.written().size());
    require(dkm::expand_weights(again, small) == dkm::WeightsError::kWrite, "a full disk is fine");
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  size = LLVMFuzzerMutate(data, size, max_size);
  if (size >= kHeaderSize && random() % 8 != 0) {
    repair(data, size);
    // One number that does not fit the others.
    if (random() % 4 == 0) {
      const std::size_t table = std::min<std::size_t>(size, kHeaderSize + 4 * kEntrySize);
      data[random() % table] = static_cast<std::uint8_t>(random());
    }
  }
  return size;
}
