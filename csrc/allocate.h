// A new tensor. `checks.h` makes results with it, `cuda/` its scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace rdp {

// `dtype` and `device_type` are codes of torch's C interface, which doesn't pass on the reason of a failure. On a GPU
// the error has the words of torch's own, for which tools look that then try a smaller batch.
inline torch::stable::Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype,
                                      int32_t device_type, int32_t device) {
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device, &made) != AOTI_TORCH_SUCCESS) {
    const bool on_gpu = device_type == aoti_torch_device_type_cuda();
    STD_TORCH_CHECK(false, on_gpu ? "CUDA out of memory. " : "", "A tensor couldn't be allocated");
  }
  return torch::stable::Tensor(made);
}

}  // namespace rdp
