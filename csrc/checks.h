// Makes the structs of `fused_add.h` from tensors. Every check that keeps a kernel inside its tensors is here. Each
// error names the argument, its value and the requirement.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include "allocate.h"
#include "fused_add.h"
#ifdef RDP_CUDA
#include "cuda/fused_add.h"
#endif

namespace rdp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t MAX_DIMS = 16;  // size of the arrays of sizes and strides; no model has so many dimensions

inline std::string shown(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) { return shown(tensor.sizes().data(), tensor.dim()); }

inline Dtype dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
  return Dtype::float32;
}

inline ScalarType scalar_type_of(Dtype dtype) {
  constexpr ScalarType types[NUM_DTYPES] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                            ScalarType::Half};
  return types[int(dtype)];
}

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < NUM_ACTIVATIONS, "activation must be from 0 to ", NUM_ACTIVATIONS - 1, ", got ",
                  code);
  return Activation(code);
}

inline bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }

// The shape of a sample and the order of its dimensions in memory, from the first tensor. All other tensors of a call
// must agree. A sample is contiguous; samples may be any distance apart.
class SampleLayout {
 public:
  SampleLayout(const char* name, const Tensor& like) : dim_(like.dim()), device_(like.get_device_index()) {
    is_cuda_ = on_gpu(like);
    STD_TORCH_CHECK(is_cuda_ || like.is_cpu(), name, " must be on a CPU or a CUDA device");
    STD_TORCH_CHECK(dim_ >= 1 && dim_ <= MAX_DIMS, name, " must have 1 to ", MAX_DIMS, " dimensions, got ", dim_);
    const int64_t *sizes = like.sizes().data(), *strides = like.strides().data();
    std::copy_n(sizes, dim_, sizes_.begin());
    for (int64_t d = 0; d < dim_; ++d) order_[d] = d;
    for (int64_t d = 2; d < dim_; ++d) {  // by falling stride; dimensions of equal stride stay in order
      const int64_t moved = order_[d];
      int64_t at = d;
      for (; at > 1 && strides[order_[at - 1]] < strides[moved]; --at) order_[at] = order_[at - 1];
      order_[at] = moved;
    }
    for (int64_t d = 1; d < dim_; ++d) sample_size_ *= sizes_[d];
    check_dense(name, like);
  }

  int64_t batch_size() const { return sizes_[0]; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  bool is_cuda() const { return is_cuda_; }
  int32_t device() const { return device_; }

  // `channel_dim` is the dimension of γ. Without γ it is 0, and a sample is one long row.
  Geometry geometry(int64_t batch_size, int64_t channel_dim) const {
    Geometry geometry;
    geometry.batch_size = batch_size;
    if (channel_dim == 0) {
      geometry.width = sample_size_;
      return geometry;
    }
    int64_t outer = 1, inner = 1, d = 1;
    for (; order_[d] != channel_dim; ++d) outer *= sizes_[order_[d]];
    for (++d; d < dim_; ++d) inner *= sizes_[order_[d]];
    geometry.channels = sizes_[channel_dim];
    if (sample_size_ == 0) {
      geometry.width = 0;
      return geometry;
    }
    geometry.gamma_per_position = inner > 1;
    geometry.positions = inner > 1 ? outer * geometry.channels : outer;
    geometry.width = inner > 1 ? inner : geometry.channels;
    return geometry;
  }

  Samples samples(const char* name, const Tensor& tensor, int64_t num_rows) const {
    check_device(name, tensor);
    bool fits = tensor.dim() == dim_ && tensor.size(0) == num_rows;
    const int64_t* sizes = tensor.sizes().data();
    for (int64_t d = 1; fits && d < dim_; ++d) fits = sizes[d] == sizes_[d];
    if (!fits) {
      std::array<int64_t, MAX_DIMS> wanted = sizes_;
      wanted[0] = num_rows;
      STD_TORCH_CHECK(false, name, " must have shape ", shown(wanted.data(), dim_), ", got ", shape_of(tensor));
    }
    check_dense(name, tensor);
    return {tensor.data_ptr(), tensor.stride(0), dtype_of(name, tensor.scalar_type())};
  }

  Samples samples(const char* name, const Tensor* tensor, int64_t num_rows) const {
    return tensor ? samples(name, *tensor, num_rows) : Samples();
  }

  Vector vector(const char* name, const Tensor* tensor, int64_t size) const {
    return tensor ? vector(name, *tensor, size) : Vector();
  }

  Vector vector(const char* name, const Tensor& tensor, int64_t size) const {
    check_device(name, tensor);
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ",
                    shape_of(tensor));
    STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, name, " must be contiguous, got stride ", tensor.stride(0));
    return {tensor.data_ptr(), dtype_of(name, tensor.scalar_type())};
  }

  // A new tensor of `num_rows` samples in this order.
  Tensor empty(int64_t num_rows, Dtype dtype) const {
    std::array<int64_t, MAX_DIMS> sizes = sizes_, strides;
    sizes[0] = num_rows;
    int64_t stride = 1;
    for (int64_t at = dim_ - 1; at >= 0; --at) {
      strides[order_[at]] = stride;
      stride *= std::max<int64_t>(sizes[order_[at]], 1);
    }
    return empty_strided(sizes.data(), strides.data(), dim_, scalar_type_of(dtype));
  }

  Tensor empty_vector(int64_t size, Dtype dtype) const {
    const int64_t stride = 1;
    return empty_strided(&size, &stride, 1, scalar_type_of(dtype));
  }

  Tensor empty_indices(int64_t size) const {
    const int64_t stride = 1;
    return empty_strided(&size, &stride, 1, ScalarType::Long);
  }

  void check_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(on_gpu(tensor) == is_cuda_ && (is_cuda_ || tensor.is_cpu()) &&
                        tensor.get_device_index() == device_,
                    name, " must be on the device of the other tensors");
  }

 private:
  Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) const {
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    const int32_t device_type = is_cuda_ ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
    return allocate(sizes, strides, dim, type, device_type, device_);
  }

  void check_dense(const char* name, const Tensor& tensor) const {
    const int64_t *sizes = tensor.sizes().data(), *strides = tensor.strides().data();
    int64_t stride = 1;
    if (sample_size_ == 0 || tensor.size(0) == 0) return;
    for (int64_t at = dim_ - 1; at >= 1; --at) {
      const int64_t d = order_[at];
      STD_TORCH_CHECK(sizes[d] == 1 || strides[d] == stride, name,
                      " must be contiguous, or each of its samples in the order of the first tensor's: got shape ",
                      shape_of(tensor), " with strides ", shown(strides, dim_));
      stride *= sizes[d];
    }
  }

  int64_t dim_, sample_size_ = 1;
  int32_t device_;
  bool is_cuda_;
  std::array<int64_t, MAX_DIMS> sizes_, order_;
};

// A list of rows as tensors; absent ones are null. A negative `num_learning` stands for all rows.
struct RowTensors {
  const Tensor* index = nullptr;
  const Tensor* inverse = nullptr;
  int64_t num_learning = -1;
};

// Checks `rows`, int64 [K], unique, in [0, batch_size), and inverts them where that is needed and no inverse is given:
// int64 [batch_size], values out of [0, K) for samples without a row. An inverse isn't checked: `RowSet` skips what is
// out of range. Values of rows are checked on the CPU only. On a GPU the host doesn't wait, and kernels skip them.
class CheckedRows {
 public:
  CheckedRows(const char* name, const SampleLayout& layout, const RowTensors& given, int64_t batch_size,
              bool needs_inverse = true) {
    if (!given.index) {
      STD_TORCH_CHECK(!given.inverse, name, " must be given where their inverse is");
      rows_.num_rows = rows_.num_learning = batch_size;
      return;
    }
    const int64_t num_rows = rows_.num_rows = checked(name, "", layout, *given.index);
    rows_.num_learning = given.num_learning < 0 ? num_rows : given.num_learning;
    STD_TORCH_CHECK(rows_.num_learning <= num_rows, "the number of learning ", name, " must be at most ", num_rows,
                    ", got ", rows_.num_learning);
    rows_.index = static_cast<const int64_t*>(given.index->const_data_ptr());
    if (given.inverse) {
      const int64_t size = checked(name, "the inverse of ", layout, *given.inverse);
      STD_TORCH_CHECK(size == batch_size, "the inverse of ", name, " must have ", batch_size, " elements, got ", size);
      rows_.inverse = static_cast<const int64_t*>(given.inverse->const_data_ptr());
    } else if (layout.is_cuda()) {
      if (needs_inverse) invert_on_device(layout, batch_size);
    } else {
      invert(name, batch_size);
    }
  }
  CheckedRows(const CheckedRows&) = delete;

  const RowSet& rows() const { return rows_; }
  int64_t num_learning() const { return rows_.num_learning; }
  int64_t num_frozen() const { return rows_.num_rows - rows_.num_learning; }
  int64_t num_rows() const { return rows_.num_rows; }
  // The inverse that was made on a GPU, if there is one.
  const MaybeTensor& on_device() const { return on_device_; }

 private:
  static int64_t checked(const char* name, const char* prefix, const SampleLayout& layout, const Tensor& rows) {
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, prefix, name,
                    " must be an int64 tensor of shape [K], got ", torch::headeronly::toString(rows.scalar_type()),
                    " of shape ", shape_of(rows));
    STD_TORCH_CHECK(rows.size(0) <= 1 || rows.stride(0) == 1, prefix, name, " must be contiguous");
    layout.check_device(name, rows);
    return rows.size(0);
  }

  void invert_on_device(const SampleLayout& layout, int64_t batch_size) {
#ifdef RDP_CUDA
    on_device_ = layout.empty_indices(batch_size);
    int64_t* inverse = static_cast<int64_t*>(on_device_->data_ptr());
    cuda::invert_rows(inverse, rows_.index, rows_.num_rows, batch_size, layout.device());
    rows_.inverse = inverse;
#endif
  }

  void invert(const char* name, int64_t batch_size) {
    int64_t* inverse = few_;
    if (batch_size > FEW) {
      many_.resize(batch_size);
      inverse = many_.data();
    }
    std::fill_n(inverse, batch_size, -1);
    for (int64_t i = 0; i < rows_.num_rows; ++i) {
      const int64_t row = rows_.index[i];
      STD_TORCH_CHECK(row >= 0 && row < batch_size, name, " must be in [0, ", batch_size, "), got ", row);
      STD_TORCH_CHECK(inverse[row] < 0, name, " must not repeat a row, got ", row, " twice");
      inverse[row] = i;
    }
    rows_.inverse = inverse;
  }

  static constexpr int64_t FEW = 64;  // batches up to here need no allocation
  RowSet rows_;
  int64_t few_[FEW];
  std::vector<int64_t> many_;
  MaybeTensor on_device_;
};

inline Scale scale_of(const SampleLayout& layout, const Tensor* row_scale, double number, int64_t num_rows,
                      Dtype residual) {
  Scale scale;
  scale.number = number;
  if (row_scale) {
    scale.per_row = layout.vector("row_scale", *row_scale, num_rows);
    STD_TORCH_CHECK(scale.per_row.dtype == Dtype::float32 ||
                        (scale.per_row.dtype == Dtype::float64 && residual == Dtype::float64),
                    "row_scale must be float32, or float64 where the residual is");
  }
  return scale;
}

// The dimension of γ as a positive number; 0 without γ.
inline int64_t channel_dim_of(const SampleLayout& layout, bool has_gamma, int64_t channel_dim) {
  if (!has_gamma) return 0;
  const int64_t positive = channel_dim < 0 ? channel_dim + layout.dim() : channel_dim;
  STD_TORCH_CHECK(positive >= 1 && positive < layout.dim(),
                  "channel_dim must name a dimension of the residual behind its rows, got ", channel_dim, " for ",
                  layout.dim(), " dimensions");
  return positive;
}

}  // namespace rdp
