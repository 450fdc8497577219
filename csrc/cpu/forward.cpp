#include "stored.h"
#include "fused_add.h"

namespace rdp::cpu {
namespace {

template <class Acc>
void run(const FusedAddForward& call) {
  const Pieces<Acc>& pieces = best_pieces<Acc>();
  const bool gathers = bool(call.next) || bool(call.frozen_next);
  const Geometry geometry =
      gathers ? call.geometry : merged(call.geometry, call.rows, call.scale, {&call.residual, &call.branch, &call.out});
  const Grid grid(geometry, converts<Acc>({&call.residual, &call.branch, &call.frozen, &call.out}), false);
  const Gamma<Acc> gamma(pieces, call.gamma, geometry, grid);
  const Samples& stream = call.adds ? call.out : call.residual;

  const auto add = [&](const Piece& piece) {
    const int64_t sample = piece.sample;
    const Place place = call.rows[sample];
    const Samples& branch = place.learns ? call.branch : call.frozen;
    Acc scale = place.there() ? scale_of<Acc>(call.scale, place) : Acc(0);
    Buffer<Acc> x, y, factors, result;
    const Acc* residual = nullptr;
    if (scale == 0) {  // the branch is not read
      if (!call.residual) return fill_zero(call.out, sample, piece);
      if (call.activation == Activation::none) return copy(call.out, sample, call.residual, sample, piece);
      residual = x.read(pieces, call.residual, sample, piece);
      pieces.activate(result.target(call.out, sample, piece), residual, piece.n);
    } else {
      if (call.residual) residual = x.read(pieces, call.residual, sample, piece);
      const Acc* update = y.read(pieces, branch, place.row, piece);
      const Acc* factor = gamma.of(piece, scale, factors);
      const bool relus = call.activation == Activation::relu;
      pieces.add(result.target(call.out, sample, piece), residual, update, factor, scale, relus, piece.n);
    }
    result.store(pieces, call.out, sample, piece);
  };

  grid.for_each_item([&](int64_t row_block, int64_t column_block) {
    grid.for_each_piece(row_block, column_block, [&](const Piece& piece) {
      if (call.adds) add(piece);
      if (!gathers) return;
      const Place place = call.next_rows[piece.sample];
      const Samples& next = place.learns ? call.next : call.frozen_next;
      if (place.there() && next) copy(next, place.row, stream, piece.sample, piece);
    });
  });
}

}  // namespace

void fused_add_forward(const FusedAddForward& call) {
  if (call.geometry.batch_size == 0 || call.geometry.sample_size() == 0) return;
  call.in_float64 ? run<double>(call) : run<float>(call);
}

}  // namespace rdp::cpu
