#include "fused_add.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../allocate.h"
#include "gather_rows.cuh"
#include "residual_add.cuh"

// Defined in torch's CUDA library. It is absent if a CPU-only torch loads a library that was built with CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace rdp::cuda {
namespace {

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel couldn't be launched: ", cudaGetErrorString(error));
}

// Memory that lives until everything in the CUDA stream so far has run.
torch::stable::Tensor scratch(int64_t bytes, int32_t device) {
  const int64_t stride = 1;
  return allocate(&bytes, &stride, 1, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device);
}

// For `num_samples` samples of `steps` steps each: a block for each THREADS · `ahead` steps, at most 1024, which fill a
// GPU. Threads loop over the remaining steps.
dim3 grid_of(int64_t num_samples, int64_t steps, int ahead) {
  const int64_t x = std::clamp<int64_t>(divided_up(steps, THREADS * ahead), 1, 1024);
  return dim3(x, std::min(num_samples, MAX_BLOCKS_Y));
}

// The first stage of dγ: the grid's x covers the channels and its y the chunks. A chunk is `size` rows, or packs of each
// channel where γ has a factor for each position.
struct Chunks {
  dim3 grid;
  int64_t size;
};

Chunks chunks_of(const Geometry& geometry, int pack) {
  const int64_t rows = geometry.batch_size * geometry.positions;
  const bool per_position = geometry.gamma_per_position;
  const int64_t steps = per_position ? rows / geometry.channels * (geometry.width / pack) : rows;
  const int64_t threads = per_position ? COLUMN_THREADS : ROW_THREADS;
  const int64_t blocks = divided_up(geometry.channels, per_position ? ROW_THREADS : COLUMN_THREADS * pack);
  const int64_t most = std::clamp<int64_t>(MAX_SUM_BLOCKS / blocks, 1, MAX_CHUNKS);
  const int64_t size = std::max(CHUNK_STEPS * threads, divided_up(steps, most));
  return {dim3(blocks, divided_up(steps, size)), size};
}

// Calls run(residual, update, pack) with two dtypes and the number of elements of a pack as types.
template <int N>
struct Size {
  static constexpr int value = N;
};
template <class T>
struct Type {
  using type = T;
};

// Returns false where there is no kernel of such dtypes.
template <class Run>
bool with_types(Dtype residual, Dtype update, bool packed, const Run& run) {
  const auto with = [&](auto s, auto u, auto n) {
    packed ? run(s, u, n) : run(s, u, Size<1>());
    return true;
  };
  using Float = Type<float>;
  using BFloat16 = Type<__nv_bfloat16>;
  using Half = Type<__half>;
  if (residual == Dtype::float32 && update == Dtype::float32) return with(Float(), Float(), Size<4>());
  if (residual == Dtype::float32 && update == Dtype::bfloat16) return with(Float(), BFloat16(), Size<8>());
  if (residual == Dtype::float32 && update == Dtype::float16) return with(Float(), Half(), Size<8>());
  if (residual == Dtype::bfloat16 && update == Dtype::bfloat16) return with(BFloat16(), BFloat16(), Size<8>());
  if (residual == Dtype::float16 && update == Dtype::float16) return with(Half(), Half(), Size<8>());
  return false;
}

int pack_size(Dtype residual, Dtype update) { return residual == Dtype::float32 && update == Dtype::float32 ? 4 : 8; }

template <class... Tensors>
bool fits_packs(const Geometry& geometry, int n, const Vector& gamma, const Tensors&... tensors) {
  return rows_are_whole_packs(geometry, n) && is_aligned(gamma) && (samples_are_aligned(tensors) && ...);
}

// Callers ask before; this keeps kernels from reading a tensor as of another dtype.
void check_served(Dtype residual, Dtype update, const Vector& gamma, const Scale& scale) {
  STD_TORCH_CHECK(is_served(residual, update, gamma.dtype) && scale.per_row.dtype == Dtype::float32,
                  "CUDA kernels take no float64, and a branch of the residual's dtype or a narrower one");
}

// The dtype of the update; its learning and frozen rows share it.
Dtype update_dtype(const Samples& learning, const Samples& frozen, Dtype otherwise) {
  STD_TORCH_CHECK(!learning || !frozen || learning.dtype == frozen.dtype, "frozen must have the dtype of branch");
  return learning ? learning.dtype : frozen ? frozen.dtype : otherwise;
}

void gather(const FusedAddForward& call, const Samples& x, cudaStream_t stream) {
  const int64_t bytes = call.geometry.sample_size() * size_of(x.dtype);
  const auto run = [&](auto word) {
    using Word = decltype(word);
    const int64_t words = bytes / sizeof(Word);
    const dim3 grid = grid_of(call.next_rows.num_rows, words, steps_ahead<Ahead<Word, 1>>());
    gather_rows_kernel<Word><<<grid, THREADS, 0, stream>>>(
        x, call.next, call.frozen_next, call.next_rows, call.geometry.batch_size, words);
    check_launch();
  };
  const bool wide = bytes % PACK_BYTES == 0 && samples_are_aligned(x) && samples_are_aligned(call.next) &&
                    samples_are_aligned(call.frozen_next);
  if (wide) return run(int4());
  x.dtype == Dtype::float32 ? run(int32_t()) : run(int16_t());
}

}  // namespace

bool is_served(Dtype residual, Dtype update, Dtype gamma) {
  return gamma != Dtype::float64 && with_types(residual, update, false, [](auto...) {});
}

bool has_kernels_for(int32_t device) {
  enum : int8_t { unknown, yes, no };
  constexpr int32_t MAX_DEVICES = 128;
  static std::atomic<int8_t> known[MAX_DEVICES];
  const bool remembers = device >= 0 && device < MAX_DEVICES;
  if (remembers && known[device] != unknown) return known[device] == yes;
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, gather_rows_kernel<int4>) == cudaSuccess;
  if (!found) cudaGetLastError();  // or the next launch would report it
  if (remembers) known[device] = found ? yes : no;
  return found;
}

void fused_add_forward(const FusedAddForward& call, int32_t device) {
  if (call.geometry.batch_size == 0 || call.geometry.sample_size() == 0) return;
  const Dtype residual = call.adds ? call.out.dtype : call.residual.dtype;
  const Dtype update = update_dtype(call.update, call.frozen_update, residual);
  check_served(residual, update, call.gamma, call.scale);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (call.adds) {
    const int n = pack_size(residual, update);
    const bool packed =
        fits_packs(call.geometry, n, call.gamma, call.residual, call.update, call.frozen_update, call.out);
    with_types(residual, update, packed, [&](auto s, auto u, auto size) {
      constexpr int N = decltype(size)::value;
      using S = typename decltype(s)::type;
      using U = typename decltype(u)::type;
      const int64_t packs = call.geometry.sample_size() / N;
      const dim3 grid = grid_of(call.geometry.batch_size, packs, steps_ahead<ForwardStep<S, U, N>>());
      residual_add_fwd_kernel<S, U, N><<<grid, THREADS, 0, stream>>>(call);
      check_launch();
    });
  }
  if (call.next || call.frozen_next) gather(call, call.adds ? call.out : call.residual, stream);
}

void fused_add_backward(const FusedAddBackward& call, int32_t device) {
  const Geometry& geometry = call.geometry;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (geometry.batch_size == 0 || geometry.sample_size() == 0) {
    if (call.dgamma) {
      const int64_t bytes = geometry.channels * size_of(call.dgamma.dtype);
      STD_TORCH_CHECK(cudaMemsetAsync(call.dgamma.data, 0, bytes, stream) == cudaSuccess, "dgamma couldn't be zeroed");
    }
    return;
  }
  // The tensor that has the residual's dtype. Gradients without rows have no data, and other gradients may be absent.
  const Samples& source = call.dresidual ? call.dresidual
                          : call.dout    ? call.dout
                          : call.dnext   ? call.dnext
                                         : call.dfrozen_next;
  const Samples& learning = call.update ? call.update : call.dupdate;
  STD_TORCH_CHECK(!call.update || !call.dupdate || call.update.dtype == call.dupdate.dtype,
                  "dbranch must have the dtype of branch");
  STD_TORCH_CHECK(call.dgamma.dtype != Dtype::float64, "dgamma must not be float64");
  const Dtype update = update_dtype(learning, call.dfrozen_update, source.dtype);
  check_served(source.dtype, update, call.gamma, call.scale);
  const int n = pack_size(source.dtype, update);
  const bool packed = fits_packs(geometry, n, call.gamma, call.dout, call.dnext, call.dfrozen_next, call.out,
                                 call.update, call.dresidual, call.dupdate, call.dfrozen_update);
  with_types(source.dtype, update, packed, [&](auto s, auto u, auto size) {
    using S = typename decltype(s)::type;
    using U = typename decltype(u)::type;
    constexpr int N = decltype(size)::value;
    if (!call.dgamma) {
      const int64_t packs = geometry.sample_size() / N;
      const dim3 grid = grid_of(geometry.batch_size, packs, steps_ahead<BackwardStep<S, U, N>>());
      residual_add_bwd_kernel<S, U, N><<<grid, THREADS, 0, stream>>>(call);
      return check_launch();
    }
    const Chunks chunks = chunks_of(geometry, N);
    const torch::stable::Tensor memory = scratch(chunks.grid.y * geometry.channels * sizeof(float), device);
    float* partials = static_cast<float*>(memory.data_ptr());
    const dim3 block(COLUMN_THREADS, ROW_THREADS);
    if (geometry.gamma_per_position) {
      residual_add_bwd_row_sums_kernel<S, U, N><<<chunks.grid, block, 0, stream>>>(call, partials, chunks.size);
    } else {
      residual_add_bwd_sums_kernel<S, U, N><<<chunks.grid, block, 0, stream>>>(call, partials, chunks.size);
    }
    check_launch();
    const auto sum = [&](auto* dgamma) {
      const dim3 grid(divided_up(geometry.channels, COLUMN_THREADS)), block(COLUMN_THREADS, PARTIAL_ROW_THREADS);
      sum_partials_kernel<<<grid, block, 0, stream>>>(dgamma, partials, chunks.grid.y, geometry.channels);
      check_launch();
    };
    call.dgamma.dtype == Dtype::float32    ? sum(static_cast<float*>(call.dgamma.data))
    : call.dgamma.dtype == Dtype::bfloat16 ? sum(static_cast<__nv_bfloat16*>(call.dgamma.data))
                                           : sum(static_cast<__half*>(call.dgamma.data));
  });
}

void invert_rows(int64_t* inverse, const int64_t* rows, int64_t num_rows, int64_t batch_size, int32_t device) {
  if (batch_size == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  invert_rows_kernel<<<1, MAX_THREADS, 0, current_stream(device)>>>(inverse, rows, num_rows, batch_size);
  check_launch();
}

}  // namespace rdp::cuda
