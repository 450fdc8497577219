// What the CUDA kernels serve: γ along the columns; float32, bfloat16 and float16, the branch in the stream's dtype or
// narrower than a float32 stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../fused_add.h"

namespace rdp::cuda {

// All on the device and current stream of `device`. Raise where a call isn't served, or a launch fails.
void fused_add_forward(const FusedAddForward& call, int32_t device);
void fused_add_backward(const FusedAddBackward& call, int32_t device);

// inverse [batch_size] of rows [num_rows], both int64. Rows out of range are left out.
void invert_rows(int64_t* inverse, const int64_t* rows, int64_t num_rows, int64_t batch_size, int32_t device);

}  // namespace rdp::cuda
