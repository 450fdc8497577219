#include "stored.h"
#include "fused_add.h"

namespace rdp::cpu {
namespace {

template <class Acc>
void run(const FusedAddForward& call) {
  const RowLoops<Acc>& loops = best_row_loops<Acc>();
  const bool gathers = bool(call.next) || bool(call.frozen_next);
  const Geometry geometry =
      gathers ? call.geometry : merged(call.geometry, call.rows, call.scale, {&call.residual, &call.update, &call.out});
  const Grid grid(geometry, converts<Acc>({&call.residual, &call.update, &call.frozen_update, &call.out}), false);
  const Gamma<Acc> gamma(loops, call.gamma, geometry, grid);
  const Samples& sum = call.adds ? call.out : call.residual;

  const auto add = [&](const Piece& piece) {
    const int64_t sample = piece.sample;
    const RowPosition update_row = call.rows[sample];
    const Samples& learning_or_frozen = update_row.learns ? call.update : call.frozen_update;
    Acc scale = update_row.exists() ? scale_of<Acc>(call.scale, update_row) : Acc(0);
    Buffer<Acc> residual_buffer, update_buffer, factors, result;
    const Acc* residual = nullptr;
    if (scale == 0) {  // the update is not read
      if (!call.residual) return fill_zero(call.out, sample, piece);
      if (call.activation == Activation::none) return copy(call.out, sample, call.residual, sample, piece);
      residual = residual_buffer.read(loops, call.residual, sample, piece);
      loops.activate(result.target(call.out, sample, piece), residual, call.activation, piece.n);
    } else {
      if (call.residual) residual = residual_buffer.read(loops, call.residual, sample, piece);
      const Acc* update = update_buffer.read(loops, learning_or_frozen, update_row.part_index, piece);
      const Acc* factor = gamma.of(piece, scale, factors);
      loops.add(result.target(call.out, sample, piece), residual, update, factor, scale, call.activation, piece.n);
    }
    result.store(loops, call.out, sample, piece);
  };

  grid.for_each_item([&](int64_t row_block, int64_t column_block) {
    grid.for_each_piece(row_block, column_block, [&](const Piece& piece) {
      if (call.adds) add(piece);
      if (!gathers) return;
      const RowPosition next_row = call.next_rows[piece.sample];
      const Samples& next = next_row.learns ? call.next : call.frozen_next;
      if (next_row.exists() && next) copy(next, next_row.part_index, sum, piece.sample, piece);
    });
  });
}

}  // namespace

void fused_add_forward(const FusedAddForward& call) {
  if (call.geometry.batch_size == 0 || call.geometry.sample_size() == 0) return;
  call.in_float64 ? run<double>(call) : run<float>(call);
}

}  // namespace rdp::cpu
