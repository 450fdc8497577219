// Cuts a fused add into work items, and these into pieces. Both follow from shapes alone, so that sums over items have
// the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../fused_add.h"

namespace rdp::cpu {

constexpr int64_t PIECE = 2048;            // elements per step: a few pieces fit the L1 cache
constexpr int64_t CONVERTED_PIECE = 1024;  // the same if dtypes are converted, which adds a copy of each piece
constexpr int64_t ITEM = 65536;            // elements of a work item: tens of microseconds, so that threads can share
constexpr int64_t COLUMNS_OF_SUMS = 4096;  // largest width of items of column sums: tall items have few partial sums
constexpr int64_t SERIAL = 32768;          // elements below which a second thread doesn't pay, as in torch

// `n` elements of a sample from `offset` on. They are part of row `row` = sample · positions + position from `column`
// on, or they are that row and whole rows after it.
struct Piece {
  int64_t sample, offset, row, column, n;
};

// If a call treats all samples alike and they are contiguous in memory, they are merged into one sample. Then pieces
// needn't end where a short sample ends.
inline Geometry merged(Geometry geometry, const RowSet& rows, const Scale& scale,
                       std::initializer_list<const Samples*> tensors) {
  bool merges = rows.inverse == nullptr && !scale.per_row;
  for (const Samples* samples : tensors) {
    merges = merges && (!*samples || samples->row_stride == geometry.sample_size());
  }
  if (merges) geometry.positions *= std::exchange(geometry.batch_size, 1);
  return geometry;
}

class Grid {
 public:
  Grid(const Geometry& geometry, bool converts, bool sums_columns)
      : geometry_(geometry),
        piece_(converts ? CONVERTED_PIECE : PIECE),
        num_rows_(geometry.batch_size * geometry.positions),
        item_columns_(std::min(geometry.width, sums_columns ? COLUMNS_OF_SUMS : ITEM)),
        item_rows_(std::max<int64_t>(1, ITEM / item_columns_)) {}

  int64_t num_rows() const { return num_rows_; }
  int64_t column_blocks() const { return divided(geometry_.width, item_columns_); }
  int64_t row_blocks() const { return divided(num_rows_, item_rows_); }
  int64_t first_row(int64_t row_block) const { return row_block * item_rows_; }
  int64_t end_row(int64_t row_block) const { return std::min(num_rows_, (row_block + 1) * item_rows_); }
  int64_t first_column(int64_t column_block) const { return column_block * item_columns_; }
  int64_t end_column(int64_t column_block) const {
    return std::min(geometry_.width, (column_block + 1) * item_columns_);
  }
  // The number of whole rows in a piece.
  int64_t rows_of_piece() const { return std::clamp<int64_t>(piece_ / geometry_.width, 1, geometry_.positions); }

  // Calls work(row_block, column_block) for each item.
  template <class Work>
  void for_each_item(const Work& work) const {
    const int64_t blocks = column_blocks();
    in_parallel(row_blocks() * blocks, num_rows_ * geometry_.width, [&](int64_t item) {
      work(item / blocks, item % blocks);
    });
  }

  // Calls work(piece) for each piece of an item, row by row.
  template <class Work>
  void for_each_piece(int64_t row_block, int64_t column_block, const Work& work) const {
    const int64_t positions = geometry_.positions, width = geometry_.width, at_once = rows_of_piece();
    const int64_t end = end_row(row_block), from = first_column(column_block), to = end_column(column_block);
    for (int64_t row = first_row(row_block); row < end;) {
      const int64_t sample = row / positions, position = row % positions;
      if (at_once > 1) {
        const int64_t count = std::min({at_once, end - row, positions - position});
        work(Piece{sample, position * width, row, 0, count * width});
        row += count;
        continue;
      }
      for (int64_t column = from; column < to; column += piece_) {
        work(Piece{sample, position * width + column, row, column, std::min(piece_, to - column)});
      }
      ++row;
    }
  }

  // Calls work(i) for i < count, in a number of threads that depends on `elements`. Each thread begins with its own
  // share, the same in every call. It then takes items that other threads haven't begun, as dropped rows are no work.
  template <class Work>
  static void in_parallel(int64_t count, int64_t elements, const Work& work) {
    const int64_t threads = elements < SERIAL ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), count);
    if (threads <= 1) {
      for (int64_t i = 0; i < count; ++i) work(i);
      return;
    }
    struct alignas(64) Share {
      std::atomic<int64_t> next;
      int64_t end;
    };
    std::vector<Share> shares(threads);
    for (int64_t t = 0; t < threads; ++t) {
      shares[t].next = count * t / threads;
      shares[t].end = count * (t + 1) / threads;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        for (int64_t turn = 0; turn < threads; ++turn) {
          Share& share = shares[(thread + turn) % threads];
          for (int64_t i; (i = share.next.fetch_add(1)) < share.end;) work(i);
        }
      }
    });
  }

 private:
  static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

  Geometry geometry_;
  int64_t piece_, num_rows_, item_columns_, item_rows_;
};

}  // namespace rdp::cpu
