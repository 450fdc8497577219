// The masked residual add, forward and backward, on raw pointers. A thread computes a pack of elements per step.
// Samples are blocks of the grid's y, so that a block checks only once whether a sample has an update.
#pragma once

#include "../arithmetic.h"
#include "pack.cuh"

namespace rdp::cuda {

constexpr int THREADS = 256;             // per block; several blocks fit a multiprocessor
constexpr int64_t MAX_BLOCKS_Y = 65535;  // CUDA's limit
// Sums for dγ: a block works on COLUMN_THREADS packs of columns and ROW_THREADS rows at a time,
// CHUNK_ROWS in total: few enough for many blocks, and enough that there are far fewer partial sums than rows.
constexpr int COLUMN_THREADS = 32;
constexpr int ROW_THREADS = 8;
constexpr int64_t CHUNK_ROWS = 128;

template <class T>
__device__ __forceinline__ T* at(const Samples& samples, int64_t row, int64_t offset) {
  return static_cast<T*>(samples.data) + row * samples.row_stride + offset;
}

__device__ __forceinline__ int64_t column_of(int64_t offset, int64_t width) {
  if (offset < width) return offset;
  return offset <= UINT32_MAX ? uint32_t(offset) % uint32_t(width) : offset % width;
}

// The scale of a sample's update. A dropped sample has 0, and its update is never read.
__device__ __forceinline__ float scale_of(const Scale& scale, const RowPosition& row) {
  if (!row.exists()) return 0.0f;
  return scale.per_row ? static_cast<const float*>(scale.per_row.data)[row.index] : float(scale.number);
}

template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS) residual_add_fwd_kernel(const FusedAddForward call) {
  const int64_t size = call.geometry.sample_size(), step = int64_t(gridDim.x) * THREADS * N;
  for (int64_t sample = blockIdx.y; sample < call.geometry.batch_size; sample += gridDim.y) {
    const RowPosition update_row = call.rows[sample];
    const float scale = scale_of(call.scale, update_row);
    const Samples& learning_or_frozen = update_row.learns ? call.update : call.frozen_update;
    const bool adds = scale != 0;
    for (int64_t offset = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * N; offset < size; offset += step) {
      float sum[N] = {};
      if (call.residual) load<S, N>(sum, at<const S>(call.residual, sample, offset));
      if (adds) {
        float update[N], gamma[N];
        load<U, N>(update, at<const U>(learning_or_frozen, update_row.part_index, offset));
        if (call.gamma) load_gamma(gamma, call.gamma, column_of(offset, call.geometry.width));
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] = added(sum[i], call.gamma ? scale * gamma[i] : scale, update[i]);
        }
      }
      with_activation(call.activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = activated<decltype(kind)::value>(sum[i]);
      });
      store<S, N>(at<S>(call.out, sample, offset), sum);
    }
  }
}

// The gradient of the sum before its activation. Returns false if there is none.
template <class S, int N>
__device__ __forceinline__ bool gradient(float (&d)[N], const FusedAddBackward& call, const RowPosition& next_row,
                                         int64_t sample, int64_t offset) {
  const Samples& from_next = next_row.learns ? call.dnext : call.dfrozen_next;
  const bool has_next = next_row.exists() && from_next;
  if (!call.dout && !has_next) return false;
  if (call.dout) load<S, N>(d, at<const S>(call.dout, sample, offset));
  if (has_next) {
    float dnext[N];
    load<S, N>(dnext, at<const S>(from_next, next_row.part_index, offset));
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = call.dout ? d[i] + dnext[i] : dnext[i];
  }
  if (call.out) {
    float out[N];
    load<S, N>(out, at<const S>(call.out, sample, offset));
    with_activation(call.activation, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] = activation_gradient<decltype(kind)::value>(d[i], out[i]);
    });
  }
  return true;
}

// Writes one pack of every gradient but dγ, and adds to the sums for dγ.
template <class S, class U, int N>
__device__ __forceinline__ void backward_pack(const FusedAddBackward& call, const RowPosition& update_row, float scale,
                                              const RowPosition& next_row, int64_t sample, int64_t offset,
                                              int64_t column, float (&sums)[N]) {
  const Samples& dupdate = update_row.learns ? call.dupdate : call.dfrozen_update;
  const bool wants_dupdate = update_row.exists() && dupdate, kept = scale != 0;
  const bool wants_dgamma = update_row.learns && kept && call.dgamma;
  float d[N] = {};
  const bool needs_gradient = call.dresidual || (kept && (wants_dupdate || wants_dgamma));
  const bool has_gradient = needs_gradient && gradient<S, N>(d, call, next_row, sample, offset);
  if (call.dresidual) store<S, N>(at<S>(call.dresidual, sample, offset), d);
  if (wants_dgamma && has_gradient) {
    float update[N];
    load<U, N>(update, at<const U>(call.update, update_row.part_index, offset));
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += dgamma_term(d[i], scale, update[i]);
  }
  if (!wants_dupdate) return;
  float gamma[N];
  if (call.gamma && kept) load_gamma(gamma, call.gamma, column);
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = kept ? (call.gamma ? scale * gamma[i] : scale) * d[i] : 0.0f;
  store<U, N>(at<U>(dupdate, update_row.part_index, offset), d);
}

template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS) residual_add_bwd_kernel(const FusedAddBackward call) {
  const int64_t size = call.geometry.sample_size(), step = int64_t(gridDim.x) * THREADS * N;
  for (int64_t sample = blockIdx.y; sample < call.geometry.batch_size; sample += gridDim.y) {
    const RowPosition update_row = call.rows[sample], next_row = call.next_rows[sample];
    const float scale = scale_of(call.scale, update_row);
    for (int64_t offset = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * N; offset < size; offset += step) {
      float nothing[N];
      backward_pack<S, U, N>(call, update_row, scale, next_row, sample, offset,
                             column_of(offset, call.geometry.width), nothing);
    }
  }
}

// The same with the first stage of dγ: partials [chunks of rows, C]; each is summed in a fixed order.
template <class S, class U, int N>
__global__ void __launch_bounds__(COLUMN_THREADS* ROW_THREADS)
    residual_add_bwd_sums_kernel(const FusedAddBackward call, float* partials) {
  __shared__ float shared[ROW_THREADS][COLUMN_THREADS * N];
  const int64_t width = call.geometry.width, positions = call.geometry.positions;
  const int64_t num_rows = call.geometry.batch_size * positions;
  const int64_t column = (int64_t(blockIdx.x) * COLUMN_THREADS + threadIdx.x) * N;
  for (int64_t chunk = blockIdx.y; chunk * CHUNK_ROWS < num_rows; chunk += gridDim.y) {
    float sums[N] = {};
    const int64_t end = min((chunk + 1) * CHUNK_ROWS, num_rows);
    for (int64_t row = chunk * CHUNK_ROWS + threadIdx.y; row < end && column < width; row += ROW_THREADS) {
      const int64_t sample = row / positions;
      const RowPosition update_row = call.rows[sample], next_row = call.next_rows[sample];
      const float scale = scale_of(call.scale, update_row);
      backward_pack<S, U, N>(call, update_row, scale, next_row, sample,
                             (row - sample * positions) * width + column, column, sums);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) shared[threadIdx.y][threadIdx.x + i * COLUMN_THREADS] = sums[i];
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float sum = 0;
        for (int y = 0; y < ROW_THREADS; ++y) sum += shared[y][threadIdx.x + i * COLUMN_THREADS];
        partials[chunk * width + column + i] = sum;
      }
    }
    __syncthreads();
  }
}

// The second stage: one thread for each column.
template <class G>
__global__ void __launch_bounds__(THREADS)
    sum_partials_kernel(G* dgamma, const float* partials, int64_t num_chunks, int64_t width) {
  const int64_t column = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += partials[chunk * width + column];
  round_to(dgamma[column], sum);
}

}  // namespace rdp::cuda
