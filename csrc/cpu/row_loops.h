// The loops of `row_loops.inl`, compiled for several instruction sets, as tables of functions.
#pragma once

#include "../fused_add.h"

namespace rdp::cpu {

// `Acc` is the type of the arithmetic, float or double. `load` and `store` convert, by dtype.
template <class Acc>
struct RowLoops {
  void (*load[NUM_DTYPES])(const void* from, Acc* to, int64_t n);
  void (*store[NUM_DTYPES])(const Acc* from, void* to, int64_t n);
  void (*add)(Acc* out, const Acc* residual, const Acc* update, const Acc* gamma, Acc scale, Activation activation,
              int64_t n);
  void (*activate)(Acc* out, const Acc* x, Activation activation, int64_t n);
  void (*combine)(Acc* to, const Acc* dout, const Acc* dnext, const Acc* out, Activation activation, int64_t n);
  void (*scaled)(Acc* to, const Acc* d, const Acc* gamma, Acc scale, int64_t n);
  void (*accumulate)(Acc* sums, const Acc* d, const Acc* update, Acc scale, int64_t n);
  void (*scaled_and_accumulated)(Acc* to, Acc* sums, const Acc* d, const Acc* update, const Acc* gamma, Acc scale,
                                 int64_t n);
  Acc (*total)(const Acc* d, const Acc* update, Acc scale, int64_t n);
  void (*add_partials)(double* sums, const Acc* partials, int64_t n);
};

// Returns the loops for this machine. As for torch's own kernels, the environment variable ATEN_CPU_CAPABILITY can
// lower the instruction set: "default", "avx2" or "avx512".
template <class Acc>
const RowLoops<Acc>& best_row_loops();

}  // namespace rdp::cpu
