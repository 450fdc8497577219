#include <utility>

#include "stored.h"
#include "fused_add.h"

namespace rdp::cpu {
namespace {

// dγ in two stages: partial sums of each work item, in `Acc`, then their sum in float64.
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

    // The sums that a piece is added to, column by column.
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
    typename GammaSums<Acc>::ItemSums item(sums, row_block, column_block);
    Buffer<Acc> dout_buffer, dnext_buffer, buffer, combined, result, factors;
    grid.for_each_piece(row_block, column_block, [&](const Piece& piece) {
      const int64_t sample = piece.sample;
      const RowPosition update_row = call.rows[sample];
      const Samples& dupdate = update_row.learns ? call.dupdate : call.dfrozen_update;
      Acc scale = update_row.exists() ? scale_of<Acc>(call.scale, update_row) : Acc(0);
      const bool wants_dupdate = update_row.exists() && dupdate;
      const bool wants_dgamma = update_row.learns && call.dgamma && scale != 0;
      if (wants_dupdate && scale == 0) fill_zero(dupdate, update_row.part_index, piece);
      const bool needs_gradient = scale != 0 && (wants_dupdate || wants_dgamma);
      if (!call.dresidual && !needs_gradient) return;

      const RowPosition next_row = call.next_rows[sample];
      const Samples& from_next = next_row.learns ? call.dnext : call.dfrozen_next;
      const bool has_next = next_row.exists() && from_next;
      if (!call.dout && !has_next) {
        if (call.dresidual) fill_zero(call.dresidual, sample, piece);
        if (needs_gradient && wants_dupdate) fill_zero(dupdate, update_row.part_index, piece);
        return;
      }
      const bool changes = call.out || (call.dout && has_next);
      if (call.dresidual && !changes) {
        call.dout ? copy(call.dresidual, sample, call.dout, sample, piece)
                  : copy(call.dresidual, sample, from_next, next_row.part_index, piece);
        if (!needs_gradient) return;
      }
      const Acc* d = call.dout ? dout_buffer.read(loops, call.dout, sample, piece) : nullptr;
      const Acc* dnext = has_next ? dnext_buffer.read(loops, from_next, next_row.part_index, piece) : nullptr;
      if (d == nullptr) d = std::exchange(dnext, nullptr);
      if (changes) {
        const Acc* out = call.out ? buffer.read(loops, call.out, sample, piece) : nullptr;
        Acc* to = call.dresidual ? combined.target(call.dresidual, sample, piece) : combined.elements;
        loops.combine(to, d, dnext, out, piece.n);
        if (call.dresidual) combined.store(loops, call.dresidual, sample, piece);
        d = to;
      }
      if (!needs_gradient) return;
      const Acc* update = wants_dgamma ? buffer.read(loops, call.update, update_row.part_index, piece) : nullptr;
      if (!wants_dupdate) return item.add(piece, d, update, scale);
      Acc* to = result.target(dupdate, update_row.part_index, piece);
      if (wants_dgamma && call.gamma && !geometry.gamma_per_position) {
        const Acc* factor = gamma.of(piece, scale, factors);
        loops.scaled_and_accumulated(to, item.sums_of(piece), d, update, factor, scale, piece.n);
      } else {
        if (wants_dgamma) item.add(piece, d, update, scale);
        const Acc* factor = gamma.of(piece, scale, factors);
        loops.scaled(to, d, factor, scale, piece.n);
      }
      result.store(loops, dupdate, update_row.part_index, piece);
    });
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
