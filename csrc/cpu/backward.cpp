#include <utility>

#include "stored.h"
#include "fused_add.h"

namespace rdp::cpu {
namespace {

// dγ in two stages: partial sums of each work item in `Acc`, then their sum in float64.
template <class Acc>
class GammaSums {
 public:
  GammaSums(const FusedAddBackward& call, const Geometry& geometry, const Grid& grid, const RowLoops<Acc>& loops)
      : call_(call), grid_(grid), loops_(loops), geometry_(geometry) {
    if (call.dgamma) partials_.reset(new Acc[num_partials() * per_partial()]);
  }

  // The partial sums of one work item.
  class ItemSums {
   public:
    ItemSums(GammaSums& all, int64_t row_block, int64_t column_block)
        : all_(all), row_block_(row_block), column_block_(column_block) {
      if (!all.call_.dgamma) return;
      const Grid& grid = all.grid_;
      if (all.geometry_.gamma_per_position) {
        for (int64_t row = grid.first_row(row_block); row < grid.end_row(row_block); ++row) *of_row(row) = 0;
      } else if (repeated()) {
        std::fill_n(repeats_.elements, grid.rows_of_piece() * all.geometry_.width, Acc(0));
      } else {
        std::fill(columns() + grid.first_column(column_block), columns() + grid.end_column(column_block), Acc(0));
      }
    }

    // The sums to which a piece is added, column by column.
    Acc* sums_of(const Piece& piece) { return repeated() ? repeats_.elements : columns() + piece.column; }

    void add(const Piece& piece, const Acc* d, const Acc* update, Acc scale) {
      const int64_t width = all_.geometry_.width;
      if (all_.geometry_.gamma_per_position) {
        for (int64_t start = 0, row = piece.row; start < piece.n; start += width, ++row) {
          *of_row(row) += all_.loops_.total(d + start, update + start, scale, std::min(width, piece.n - start));
        }
      } else {
        all_.loops_.accumulate(sums_of(piece), d, update, scale, piece.n);
      }
    }

    void finish() {
      if (!all_.call_.dgamma || all_.geometry_.gamma_per_position || !repeated()) return;
      const int64_t width = all_.geometry_.width;
      for (int64_t column = 0; column < width; ++column) {
        Acc sum = 0;
        for (int64_t i = 0; i < all_.grid_.rows_of_piece(); ++i) sum += repeats_.elements[i * width + column];
        columns()[column] = sum;
      }
    }

   private:
    bool repeated() const { return all_.grid_.rows_of_piece() > 1; }
    Acc* columns() { return all_.partials_.get() + row_block_ * all_.geometry_.width; }
    Acc* of_row(int64_t row) { return all_.partials_.get() + row * all_.grid_.column_blocks() + column_block_; }

    GammaSums& all_;
    int64_t row_block_, column_block_;
    Buffer<Acc> repeats_;
  };

  void write() const {
    if (!call_.dgamma) return;
    const int64_t channels = geometry_.channels;
    const int64_t blocks = (channels + PIECE - 1) / PIECE;
    Grid::in_parallel(blocks, num_partials() * per_partial(), [&](int64_t block) {
      const int64_t from = block * PIECE, n = std::min(PIECE, channels - from);
      double sums[PIECE] = {};
      if (geometry_.gamma_per_position) {
        const int64_t per_row = grid_.column_blocks();
        for (int64_t first = from; first < grid_.num_rows(); first += channels) {
          for (int64_t i = 0; i < n * per_row; ++i) sums[i / per_row] += double(partials_[first * per_row + i]);
        }
      } else {
        for (int64_t i = 0; i < num_partials(); ++i) {
          loops_.add_partials(sums, partials_.get() + i * channels + from, n);
        }
      }
      best_row_loops<double>().store[int(call_.dgamma.dtype)](
          sums, static_cast<char*>(call_.dgamma.data) + from * size_of(call_.dgamma.dtype), n);
    });
  }

 private:
  int64_t num_partials() const { return geometry_.gamma_per_position ? grid_.num_rows() : grid_.row_blocks(); }
  int64_t per_partial() const { return geometry_.gamma_per_position ? grid_.column_blocks() : geometry_.width; }

  const FusedAddBackward& call_;
  const Grid& grid_;
  const RowLoops<Acc>& loops_;
  const Geometry& geometry_;
  std::unique_ptr<Acc[]> partials_;
};

// The gradients of the pieces of one work item.
template <class Acc>
class ItemBackward {
 public:
  ItemBackward(const FusedAddBackward& call, const Gamma<Acc>& gamma, bool gamma_per_position, GammaSums<Acc>& sums,
               int64_t row_block, int64_t column_block)
      : call_(call), gamma_(gamma), gamma_per_position_(gamma_per_position), sums_(sums, row_block, column_block) {}

  void process(const Piece& piece) {
    const RowPosition update_row = call_.rows[piece.sample];
    const Samples& dupdate = update_row.learns ? call_.dupdate : call_.dfrozen_update;
    const Acc scale = update_row.exists() ? scale_of<Acc>(call_.scale, update_row) : Acc(0);
    const bool wants_dupdate = update_row.exists() && dupdate;
    const bool wants_dgamma = update_row.learns && call_.dgamma && scale != 0;
    const bool needs_gradient = scale != 0 && (wants_dupdate || wants_dgamma);
    const Acc* d = call_.dresidual || needs_gradient ? gradient_of_sum(piece, needs_gradient) : nullptr;
    if (d == nullptr || !needs_gradient) {
      if (wants_dupdate) fill_zero(dupdate, update_row.part_index, piece);
      return;
    }
    const Acc* update = wants_dgamma ? buffer_.read(loops_, call_.update, update_row.part_index, piece) : nullptr;
    if (!wants_dupdate) return sums_.add(piece, d, update, scale);
    Acc* to = result_.target(dupdate, update_row.part_index, piece);
    Acc scaled = scale;
    const Acc* factor = gamma_.of(piece, scaled, factors_);
    if (wants_dgamma && call_.gamma && !gamma_per_position_) {
      loops_.scaled_and_accumulated(to, sums_.sums_of(piece), d, update, factor, scale, piece.n);
    } else {
      if (wants_dgamma) sums_.add(piece, d, update, scale);
      loops_.scaled(to, d, factor, scaled, piece.n);
    }
    result_.store(loops_, dupdate, update_row.part_index, piece);
  }

  void finish() { sums_.finish(); }

 private:
  // Computes the gradient of the sum before its activation, and stores it in `dresidual` if that is wanted. Returns
  // null if the gradient is zero, or if it was copied and nothing else needs it.
  const Acc* gradient_of_sum(const Piece& piece, bool needed) {
    const int64_t sample = piece.sample;
    const RowPosition next_row = call_.next_rows[sample];
    const Samples& from_next = next_row.learns ? call_.dnext : call_.dfrozen_next;
    const bool has_next = next_row.exists() && from_next;
    if (!call_.dout && !has_next) {
      if (call_.dresidual) fill_zero(call_.dresidual, sample, piece);
      return nullptr;
    }
    const bool changes = call_.out || (call_.dout && has_next);
    if (call_.dresidual && !changes) {
      call_.dout ? copy(call_.dresidual, sample, call_.dout, sample, piece)
                 : copy(call_.dresidual, sample, from_next, next_row.part_index, piece);
      if (!needed) return nullptr;
    }
    const Acc* d = call_.dout ? dout_.read(loops_, call_.dout, sample, piece) : nullptr;
    const Acc* dnext = has_next ? dnext_.read(loops_, from_next, next_row.part_index, piece) : nullptr;
    if (d == nullptr) d = std::exchange(dnext, nullptr);
    if (!changes) return d;
    const Acc* out = call_.out ? buffer_.read(loops_, call_.out, sample, piece) : nullptr;
    Acc* to = call_.dresidual ? combined_.target(call_.dresidual, sample, piece) : combined_.elements;
    loops_.combine(to, d, dnext, out, call_.activation, piece.n);
    if (call_.dresidual) combined_.store(loops_, call_.dresidual, sample, piece);
    return to;
  }

  const FusedAddBackward& call_;
  const RowLoops<Acc>& loops_ = best_row_loops<Acc>();
  const Gamma<Acc>& gamma_;
  bool gamma_per_position_;
  typename GammaSums<Acc>::ItemSums sums_;
  Buffer<Acc> dout_, dnext_, buffer_, combined_, result_, factors_;
};

template <class Acc>
void run(const FusedAddBackward& call) {
  const RowLoops<Acc>& loops = best_row_loops<Acc>();
  const bool gathered = call.dnext || call.dfrozen_next;
  const Geometry geometry =
      gathered ? call.geometry
               : merged(call.geometry, call.rows, call.scale,
                        {&call.dout, &call.out, &call.update, &call.dresidual, &call.dupdate});
  const Grid grid(geometry, converts<Acc>({&call.dout, &call.dnext, &call.update, &call.dupdate, &call.dfrozen_update}),
                  bool(call.dgamma) && !geometry.gamma_per_position);
  const Gamma<Acc> gamma(loops, call.gamma, geometry, grid);
  GammaSums<Acc> sums(call, geometry, grid, loops);
  grid.for_each_item([&](int64_t row_block, int64_t column_block) {
    ItemBackward<Acc> item(call, gamma, geometry.gamma_per_position, sums, row_block, column_block);
    grid.for_each_piece(row_block, column_block, [&](const Piece& piece) { item.process(piece); });
    item.finish();
  });
  sums.write();
}

}  // namespace

void fused_add_backward(const FusedAddBackward& call) {
  if (call.geometry.batch_size == 0 || call.geometry.sample_size() == 0) {
    if (call.dgamma) {
      const int64_t channels = call.geometry.channels;
      std::memset(call.dgamma.data, 0, channels * size_of(call.dgamma.dtype));
    }
    return;
  }
  call.in_float64 ? run<double>(call) : run<float>(call);
}

}  // namespace rdp::cpu
