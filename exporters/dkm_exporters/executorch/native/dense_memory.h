/// Memory for the dense weights of a delegate, which XNNPACK wants at once and only for a moment.

#pragma once

#include <cstddef>

namespace dkm {

/// Hands out memory from large blocks, as most of the cost of such memory is the system's, page by
/// page: few large blocks can have large pages. A block goes back to the system with the last piece
/// of it that was handed out. Not for several threads at once.
class DenseMemory {
 public:
  DenseMemory() = default;
  ~DenseMemory() { finish(); }
  DenseMemory(const DenseMemory&) = delete;
  DenseMemory& operator=(const DenseMemory&) = delete;

  struct Piece {
    void* data = nullptr;     // aligned to 64; null if there is no memory
    void* context = nullptr;  // for `release`
  };

  /// The piece may outlive this.
  Piece take(std::size_t bytes) noexcept;

  /// Keeps nothing for pieces to come.
  void finish() noexcept;

  /// A FreeableBuffer's function, for pieces.
  static void release(void* context, void* data, std::size_t bytes) noexcept;

 private:
  struct Block;
  static void let_go(Block* block) noexcept;

  Block* block_ = nullptr;
};

}  // namespace dkm
