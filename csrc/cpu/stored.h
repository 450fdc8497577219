// Reads and writes tensors of any dtype in pieces of `Acc`: directly if `Acc` is their dtype, else through a buffer.
#pragma once

#include <cstring>
#include <memory>

#include "grid.h"
#include "row_loops.h"

namespace rdp::cpu {

template <class Acc>
constexpr Dtype DTYPE_OF = sizeof(Acc) == 8 ? Dtype::float64 : Dtype::float32;

// Whether any tensor of a call must be converted.
template <class Acc>
bool converts(std::initializer_list<const Samples*> tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Samples* samples) { return *samples && samples->dtype != DTYPE_OF<Acc>; });
}

inline char* address(const Samples& samples, int64_t row, const Piece& piece) {
  return static_cast<char*>(samples.data) + (row * samples.row_stride + piece.offset) * size_of(samples.dtype);
}

inline void fill_zero(const Samples& samples, int64_t row, const Piece& piece) {
  std::memset(address(samples, row, piece), 0, piece.n * size_of(samples.dtype));
}

// Both tensors have the same dtype.
inline void copy(const Samples& to, int64_t to_row, const Samples& from, int64_t from_row, const Piece& piece) {
  char *target = address(to, to_row, piece), *source = address(from, from_row, piece);
  if (target != source) std::memcpy(target, source, piece.n * size_of(to.dtype));
}

template <class Acc>
struct Buffer {
  alignas(64) Acc elements[PIECE];

  const Acc* read(const RowLoops<Acc>& loops, const Samples& samples, int64_t row, const Piece& piece) {
    const char* from = address(samples, row, piece);
    if (samples.dtype == DTYPE_OF<Acc>) return reinterpret_cast<const Acc*>(from);
    loops.load[int(samples.dtype)](from, elements, piece.n);
    return elements;
  }

  // Returns where to write a piece. `store` then moves it to its tensor.
  Acc* target(const Samples& samples, int64_t row, const Piece& piece) {
    return samples.dtype == DTYPE_OF<Acc> ? reinterpret_cast<Acc*>(address(samples, row, piece)) : elements;
  }

  void store(const RowLoops<Acc>& loops, const Samples& samples, int64_t row, const Piece& piece) {
    if (samples.dtype == DTYPE_OF<Acc>) return;
    loops.store[int(samples.dtype)](elements, address(samples, row, piece), piece.n);
  }
};

template <class Acc>
Acc scale_of(const Scale& scale, const RowPosition& row) {
  if (!scale.per_row) return Acc(scale.number);
  return scale.per_row.dtype == Dtype::float64 ? Acc(static_cast<const double*>(scale.per_row.data)[row.index])
                                               : Acc(static_cast<const float*>(scale.per_row.data)[row.index]);
}

// γ as `Acc`, repeated for each of the whole rows that fit a piece.
template <class Acc>
class Gamma {
 public:
  Gamma(const RowLoops<Acc>& loops, const Vector& gamma, const Geometry& geometry, const Grid& grid)
      : geometry_(geometry), given_(bool(gamma)) {
    if (!given_) return;
    const int64_t channels = geometry.channels;
    const int64_t repeats = geometry.gamma_per_position ? 1 : grid.rows_of_piece();
    if (gamma.dtype == DTYPE_OF<Acc> && repeats == 1) {
      factors_ = static_cast<const Acc*>(gamma.data);
      return;
    }
    Acc* factors = few_;
    if (channels * repeats > FEW) {
      many_.reset(new Acc[channels * repeats]);
      factors = many_.get();
    }
    loops.load[int(gamma.dtype)](gamma.data, factors, channels);
    for (int64_t i = channels; i < channels * repeats; ++i) factors[i] = factors[i - channels];
    factors_ = factors;
  }

  // Returns a factor for each element of a piece. If all have one factor, multiplies `scale` by it and returns null.
  const Acc* of(const Piece& piece, Acc& scale, Buffer<Acc>& buffer) const {
    if (!given_) return nullptr;
    if (!geometry_.gamma_per_position) return factors_ + piece.column;
    if (piece.n <= geometry_.width) {
      scale *= factors_[channel_of(piece.row)];
      return nullptr;
    }
    for (int64_t start = 0, row = piece.row; start < piece.n; start += geometry_.width, ++row) {
      std::fill_n(buffer.elements + start, geometry_.width, factors_[channel_of(row)]);
    }
    return buffer.elements;
  }

 private:
  int64_t channel_of(int64_t row) const { return row % geometry_.positions % geometry_.channels; }

  static constexpr int64_t FEW = 64;  // γ of up to this size needs no allocation
  Geometry geometry_;
  bool given_;
  const Acc* factors_ = nullptr;
  Acc few_[FEW];
  std::unique_ptr<Acc[]> many_;
};

}  // namespace rdp::cpu
