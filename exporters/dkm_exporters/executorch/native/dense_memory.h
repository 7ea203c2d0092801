/// Memory for the dense weights of a delegate, which XNNPACK wants at once and only for a moment.

#pragma once

#include <cstddef>

namespace dkm {

/// Hands out pieces of one large block. Most of the cost of such memory is the system's, which
/// clears it page by page: so pages are large, and the delegate that is loaded next gets the block
/// of the one before. Not for several threads at once; several of these are.
class DenseMemory {
 public:
  /// `expected` are the bytes of all pieces, and kMostOverhead for each; if they need more, it only
  /// takes longer.
  explicit DenseMemory(std::size_t expected) noexcept;
  ~DenseMemory() { finish(); }
  DenseMemory(const DenseMemory&) = delete;
  DenseMemory& operator=(const DenseMemory&) = delete;

  /// Bytes that a piece takes besides its own.
  static constexpr std::size_t kMostOverhead = 192;

  struct Piece {
    void* data = nullptr;     // aligned to 64; null if there is no memory
    void* context = nullptr;  // for `release`
  };

  /// The piece may outlive this.
  Piece take(std::size_t bytes) noexcept;

  /// A FreeableBuffer's function, for pieces.
  static void release(void* context, void* data, std::size_t bytes) noexcept;

  /// There are no pieces to come. Those that are left keep the block; else it is for the next one.
  void finish() noexcept;

  /// Gives what is kept for the next one back to the system.
  static void forget() noexcept;

 private:
  struct Block;
  static Block* allocate_block(std::size_t bytes) noexcept;
  static void let_go(Block* block) noexcept;

  Block* block_ = nullptr;
};

}  // namespace dkm
