#include "dense_memory.h"

#include <atomic>
#include <cstdint>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define DKM_HAS_MMAP
#endif

namespace dkm {
namespace {

constexpr std::size_t kAlignment = 64;
// XNNPACK may read a little beyond the end of an array (XNN_EXTRA_BYTES, 128 at most).
constexpr std::size_t kExtraBytes = 128;
static_assert(kExtraBytes + kAlignment <= DenseMemory::kMostOverhead);
constexpr std::size_t kHugePage = std::size_t{1} << 21;
// A number from a file asks for no more at a time; larger pieces have blocks of their own.
constexpr std::size_t kMostExpected = std::size_t{1} << 30;

constexpr std::size_t round_up(std::size_t bytes, std::size_t to) noexcept {
  return (bytes + to - 1) / to * to;
}

#ifdef DKM_HAS_MMAP
// From the system itself: a C library keeps freed memory, and large pages would stay resident.
void* allocate(std::size_t bytes) noexcept {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
#ifdef __linux__
  (void)madvise(memory, bytes, MADV_HUGEPAGE);  // only faster
#endif
  return memory;
}

void deallocate(void* memory, std::size_t bytes) noexcept { (void)munmap(memory, bytes); }

/// Lets the system have the pages, which stay usable.
void discard(void* memory, std::size_t bytes) noexcept {
  (void)madvise(memory, bytes, MADV_DONTNEED);
}
#else
void* allocate(std::size_t bytes) noexcept {
  return ::operator new(bytes, std::align_val_t(kAlignment), std::nothrow);
}

void deallocate(void* memory, std::size_t /*bytes*/) noexcept {
  ::operator delete(memory, std::align_val_t(kAlignment));
}

void discard(void* /*memory*/, std::size_t /*bytes*/) noexcept {}
#endif

}  // namespace

struct DenseMemory::Block {
  std::size_t bytes = 0;
  std::size_t taken = first();
  std::atomic<std::size_t> users{1};

  /// It lies in its own memory.
  static constexpr std::size_t first() noexcept { return round_up(sizeof(Block), kAlignment); }
};

namespace {

/// The block for the next delegate, or null.
std::atomic<void*>& spare() noexcept {
  static std::atomic<void*> block{nullptr};
  return block;
}

}  // namespace

DenseMemory::DenseMemory(std::size_t expected) noexcept {
  if (expected == 0 || expected > kMostExpected) return;
  const std::size_t bytes = round_up(Block::first() + expected, kHugePage);
  auto* kept = static_cast<Block*>(spare().exchange(nullptr));
  if (kept != nullptr && kept->bytes >= bytes) {
    discard(reinterpret_cast<unsigned char*>(kept) + bytes, kept->bytes - bytes);
    block_ = kept;
    return;
  }
  if (kept != nullptr) let_go(kept);
  block_ = allocate_block(bytes);
}

DenseMemory::Piece DenseMemory::take(std::size_t bytes) noexcept {
  if (bytes > SIZE_MAX - kExtraBytes - kAlignment - kHugePage - Block::first()) return {};
  const std::size_t needed = round_up(bytes + kExtraBytes, kAlignment);
  Block* block = block_;
  if (block == nullptr || needed > block->bytes - block->taken) {
    block = allocate_block(round_up(Block::first() + needed, kAlignment));
    if (block == nullptr) return {};
    block->users.store(0, std::memory_order_relaxed);  // the piece is all that keeps it
  }
  auto* data = reinterpret_cast<unsigned char*>(block) + block->taken;
  block->taken += needed;
  block->users.fetch_add(1, std::memory_order_relaxed);
  return {data, block};
}

void DenseMemory::release(void* context, void* /*data*/, std::size_t /*bytes*/) noexcept {
  let_go(static_cast<Block*>(context));
}

void DenseMemory::finish() noexcept {
  Block* block = block_;
  block_ = nullptr;
  if (block == nullptr) return;
  if (block->users.load(std::memory_order_acquire) > 1) return let_go(block);
  block->taken = Block::first();
  auto* other = static_cast<Block*>(spare().exchange(block));
  if (other != nullptr) let_go(other);
}

void DenseMemory::forget() noexcept {
  if (spare().load(std::memory_order_relaxed) == nullptr) return;
  auto* block = static_cast<Block*>(spare().exchange(nullptr));
  if (block != nullptr) let_go(block);
}

DenseMemory::Block* DenseMemory::allocate_block(std::size_t bytes) noexcept {
  void* memory = allocate(bytes);
  return memory == nullptr ? nullptr : new (memory) Block{bytes};
}

void DenseMemory::let_go(Block* block) noexcept {
  if (block->users.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    const std::size_t bytes = block->bytes;
    block->~Block();
    deallocate(block, bytes);
  }
}

}  // namespace dkm
