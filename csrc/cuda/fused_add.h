// The CUDA kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../fused_add.h"

namespace rdp::cuda {

// Whether the kernels have these dtypes: no float64, and an update of the residual's dtype, or a narrower one with a
// float32 residual. Its learning and frozen rows share a dtype.
bool is_served(Dtype residual, Dtype update, Dtype gamma);

// Whether the library has machine code for this GPU, which its driver can run.
bool has_kernels_for(int32_t device);

// All tensors are on `device`; the kernels run on its current CUDA stream. Raises if the kernels don't support a call,
// or if a launch fails.
void fused_add_forward(const FusedAddForward& call, int32_t device);
void fused_add_backward(const FusedAddBackward& call, int32_t device);

// inverse [batch_size] of rows [num_rows], both int64. Rows out of range are skipped.
void invert_rows(int64_t* inverse, const int64_t* rows, int64_t num_rows, int64_t batch_size, int32_t device);

}  // namespace rdp::cuda
