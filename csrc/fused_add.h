// One fused add in raw pointers: an update added to the residual, and the rows of the next branch gathered.
// No torch: `checks.h` makes these from tensors, `cpu/` computes them.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace rdp {

enum class Dtype : int8_t { float32, float64, bfloat16, float16 };
constexpr int NUM_DTYPES = 4;

RDP_ELEMENT int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The codes of `ACTIVATIONS` in rdp_kernels/kernels/spec.py.
enum class Activation : int8_t { none, relu };
constexpr int NUM_ACTIVATIONS = 2;

// Samples that each lie in one piece, `row_stride` elements apart. `data` is null where there is no such tensor.
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

// How a sample lies in memory: `positions` rows of `width` elements. γ has a factor for each column, or for each
// position: position p has channel p mod `channels`.
struct Geometry {
  int64_t batch_size = 0;
  int64_t positions = 1;
  int64_t width = 1;
  int64_t channels = 1;
  bool gamma_per_position = false;

  RDP_ELEMENT int64_t sample_size() const { return positions * width; }
};

// Where a sample stands among a branch's rows.
struct Place {
  int64_t index = -1;  // among all of them
  int64_t row = -1;    // among those that learn, or among those that are frozen
  bool learns = false;

  RDP_ELEMENT bool there() const { return index >= 0; }
};

// The samples that a branch has rows for: those that learn, then those that are frozen.
struct Rows {
  const int64_t* inverse = nullptr;  // where sample b stands among the rows, or -1; null: sample b is row b
  int64_t num_learning = 0;

  RDP_ELEMENT Place operator[](int64_t sample) const {
    Place place;
    place.index = inverse == nullptr ? sample : inverse[sample];
    place.learns = place.there() && place.index < num_learning;
    place.row = place.learns ? place.index : place.index - num_learning;
    return place;
  }
};

struct Scale {
  Vector per_row;  // by the place's index
  double number = 1.0;
};

// out = act(residual + scale · γ · branch), next = out[next rows]. Unless it `adds`, the stream is only read.
// Arithmetic is in float32, or in float64.
struct FusedAddForward {
  Geometry geometry;
  bool in_float64 = false, adds = false;
  Activation activation = Activation::none;
  Rows rows, next_rows;
  Scale scale;
  Samples residual, branch, frozen, out, next, frozen_next;
  Vector gamma;
};

// The gradients of the above. `dresidual` may be `dout`. What isn't wanted has no data.
struct FusedAddBackward {
  Geometry geometry;
  bool in_float64 = false;
  Rows rows, next_rows;
  Scale scale;
  Samples dout, dnext, dfrozen_next, out, branch;
  Samples dresidual, dbranch, dfrozen;
  Vector gamma, dgamma;
};

}  // namespace rdp
