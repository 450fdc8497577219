// One fused add in raw pointers: an update added to the residual, and the rows of the next branch gathered.
// It doesn't use torch: `checks.h` makes these structs from tensors, `cpu/` and `cuda/` compute them.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace rdp {

enum class Dtype : int8_t { float32, float64, bfloat16, float16 };
constexpr int NUM_DTYPES = 4;

RDP_ELEMENT int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A tensor [B, ...] with contiguous samples, `row_stride` elements apart. `data` is null if it is absent.
struct Samples {
  void* data = nullptr;
  int64_t row_stride = 0;
  Dtype dtype = Dtype::float32;

  RDP_ELEMENT explicit operator bool() const { return data != nullptr; }
};

struct Vector {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;

  RDP_ELEMENT explicit operator bool() const { return data != nullptr; }
};

// The layout of a sample: `positions` rows of `width` elements. γ has a factor for each column, or for each position;
// position p has channel p mod `channels`.
struct Geometry {
  int64_t batch_size = 0;
  int64_t positions = 1;
  int64_t width = 1;
  int64_t channels = 1;
  bool gamma_per_position = false;

  RDP_ELEMENT int64_t sample_size() const { return positions * width; }
};

// The position of a sample's row in a list of rows.
struct RowPosition {
  int64_t index = -1;       // among all rows; -1: the sample has none
  int64_t part_index = -1;  // among the rows that learn, or among those that are frozen
  bool learns = false;

  RDP_ELEMENT bool exists() const { return index >= 0; }
};

// The samples that have a row in an update or in the next input: those that learn, then those that are frozen.
struct RowSet {
  const int64_t* index = nullptr;    // the sample of each row; null: row b is sample b
  const int64_t* inverse = nullptr;  // the row of each sample, none where it is out of range; null: sample b is row b
  int64_t num_rows = 0, num_learning = 0;

  RDP_ELEMENT RowPosition operator[](int64_t sample) const {
    RowPosition row;
    row.index = inverse == nullptr ? sample : inverse[sample];
    if (row.index < 0 || row.index >= num_rows) row.index = -1;
    row.learns = row.exists() && row.index < num_learning;
    row.part_index = row.learns ? row.index : row.index - num_learning;
    return row;
  }
};

struct Scale {
  Vector per_row;  // by `RowPosition::index`
  double number = 1.0;
};

// out = act(residual + scale · γ · update), next = out[next rows]. Unless it `adds`, the residual is only read.
// Arithmetic is in float32, or in float64.
struct FusedAddForward {
  Geometry geometry;
  bool in_float64 = false, adds = false;
  Activation activation = Activation::none;
  RowSet rows, next_rows;
  Scale scale;
  Samples residual, update, frozen_update, out, next, frozen_next;
  Vector gamma;
};

// The gradients of the fused add. `dresidual` may be `dout`. A gradient that isn't wanted has no data.
struct FusedAddBackward {
  Geometry geometry;
  bool in_float64 = false;
  Activation activation = Activation::none;  // if there is one, `out` is given
  RowSet rows, next_rows;
  Scale scale;
  Samples dout, dnext, dfrozen_next, out, update;
  Samples dresidual, dupdate, dfrozen_update;
  Vector gamma, dgamma;
};

}  // namespace rdp
