#include "stored.h"
#include "tail.h"

namespace rdp::cpu {
namespace {

template <class Acc>
void run(const TailForward& call) {
  const Pieces<Acc>& pieces = best_pieces<Acc>();
  const bool gathers = bool(call.next) || bool(call.frozen_next);
  const Geometry geometry =
      gathers ? call.geometry : merged(call.geometry, call.rows, call.scale, {&call.residual, &call.branch, &call.out});
  const Grid grid(geometry, converts<Acc>({&call.residual, &call.branch, &call.frozen, &call.out}), false);
  const Gamma<Acc> gamma(pieces, call.gamma, geometry, grid);
  const Samples& stream = call.adds ? call.out : call.residual;

  const auto add = [&](const Piece& piece) {
    const int64_t sample = piece.sample, place = call.rows.place_of(sample);
    const bool learns = place < call.rows.num_learning;
    const Samples& branch = learns ? call.branch : call.frozen;
    Acc scale = place < 0 || !branch ? Acc(0) : scale_of<Acc>(call.scale, place);
    Buffer<Acc> x, y, factors, result;
    const Acc* residual = nullptr;
    if (scale == 0) {  // the branch is not read
      if (!call.residual) return fill_zero(call.out, sample, piece);
      if (!call.relu) return copy(call.out, sample, call.residual, sample, piece);
      residual = x.read(pieces, call.residual, sample, piece);
      pieces.activate(result.target(call.out, sample, piece), residual, piece.n);
    } else {
      if (call.residual) residual = x.read(pieces, call.residual, sample, piece);
      const Acc* update = y.read(pieces, branch, learns ? place : place - call.rows.num_learning, piece);
      const Acc* factor = gamma.of(piece, scale, factors);
      pieces.add(result.target(call.out, sample, piece), residual, update, factor, scale, call.relu, piece.n);
    }
    result.store(pieces, call.out, sample, piece);
  };

  grid.for_each_item([&](int64_t row_block, int64_t column_block) {
    grid.for_each_piece(row_block, column_block, [&](const Piece& piece) {
      if (call.adds) add(piece);
      if (!gathers) return;
      const int64_t place = call.next_rows.place_of(piece.sample), learning = call.next_rows.num_learning;
      if (place >= 0 && place < learning) copy(call.next, place, stream, piece.sample, piece);
      if (place >= learning && call.frozen_next) copy(call.frozen_next, place - learning, stream, piece.sample, piece);
    });
  });
}

}  // namespace

void tail_forward(const TailForward& call) {
  if (call.geometry.batch_size == 0 || call.geometry.sample_size() == 0) return;
  call.in_float64 ? run<double>(call) : run<float>(call);
}

}  // namespace rdp::cpu
