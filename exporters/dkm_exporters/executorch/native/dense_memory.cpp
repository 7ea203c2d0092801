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
constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kBlockBytes = 16 * kHugePage;

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
#else
void* allocate(std::size_t bytes) noexcept {
  return ::operator new(bytes, std::align_val_t(kAlignment), std::nothrow);
}

void deallocate(void* memory, std::size_t /*bytes*/) noexcept {
  ::operator delete(memory, std::align_val_t(kAlignment));
}
#endif

}  // namespace

struct DenseMemory::Block {
  std::size_t bytes = 0;
  std::size_t taken = round_up(sizeof(Block), kAlignment);  // it lies in its own memory
  std::atomic<std::size_t> users{1};
};

DenseMemory::Piece DenseMemory::take(std::size_t bytes) noexcept {
  constexpr std::size_t kOverhead = kExtraBytes + kAlignment + sizeof(Block) + kBlockBytes;
  if (bytes > SIZE_MAX - kOverhead) return {};
  const std::size_t needed = round_up(bytes + kExtraBytes, kAlignment);
  if (block_ == nullptr || needed > block_->bytes - block_->taken) {
    const std::size_t whole = round_up(needed + round_up(sizeof(Block), kAlignment), kBlockBytes);
    void* memory = allocate(whole);
    if (memory == nullptr) return {};
    finish();
    block_ = new (memory) Block{whole};
  }
  auto* data = reinterpret_cast<unsigned char*>(block_) + block_->taken;
  block_->taken += needed;
  block_->users.fetch_add(1, std::memory_order_relaxed);
  return {data, block_};
}

void DenseMemory::finish() noexcept {
  if (block_ != nullptr) let_go(block_);
  block_ = nullptr;
}

void DenseMemory::release(void* context, void* /*data*/, std::size_t /*bytes*/) noexcept {
  let_go(static_cast<Block*>(context));
}

void DenseMemory::let_go(Block* block) noexcept {
  if (block->users.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    const std::size_t bytes = block->bytes;
    block->~Block();
    deallocate(block, bytes);
  }
}

}  // namespace dkm
