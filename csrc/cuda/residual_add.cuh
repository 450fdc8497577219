// The masked residual add, forward and backward, on raw pointers. A thread computes a pack of elements per step.
// Samples are blocks of the grid's y, so that a block checks only once whether a sample has an update.
#pragma once

#include "../arithmetic.h"
#include "pack.cuh"

namespace rdp::cuda {

constexpr int THREADS = 256;             // per block; several blocks fit a multiprocessor
constexpr int64_t MAX_BLOCKS_Y = 65535;  // CUDA's limit
// Sums for dγ: a block works on COLUMN_THREADS packs of columns and ROW_THREADS rows at a time, a chunk of rows in
// total. A chunk has at least CHUNK_ROWS rows, so that there are far fewer partial sums than rows. There are at most
// MAX_CHUNKS chunks, as many as blocks fit a GPU.
constexpr int COLUMN_THREADS = 32;
constexpr int ROW_THREADS = 8;
constexpr int64_t CHUNK_ROWS = 128;
constexpr int64_t MAX_CHUNKS = 1024;
// Sums of partial sums: a block of columns and rows, and the loads that a thread has in flight.
constexpr int PARTIAL_ROW_THREADS = 32;
constexpr int LOADS_IN_FLIGHT = 8;

template <class T>
__device__ __forceinline__ T* at(const Samples& samples, int64_t row, int64_t offset) {
  return static_cast<T*>(samples.data) + row * samples.row_stride + offset;
}

// By 32-bit arithmetic where that suffices, which is several times faster. `b` fits 32 bits where `a` does and b <= a.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (a < b) return 0;
  return a <= UINT32_MAX ? uint32_t(a) / uint32_t(b) : a / b;
}

__device__ __forceinline__ int64_t modulo(int64_t a, int64_t b) { return a - quotient(a, b) * b; }

// The first element of γ that a pack from `offset` of a sample on is multiplied by.
__device__ __forceinline__ int64_t gamma_index(const Geometry& geometry, int64_t offset) {
  if (!geometry.gamma_per_position) return modulo(offset, geometry.width);
  return modulo(quotient(offset, geometry.width), geometry.channels);
}

// The factors of a pack: one for each column, or the same for all of them.
template <int N>
__device__ __forceinline__ void gamma_of(float (&values)[N], const Vector& gamma, bool per_position, int64_t index) {
  if (!per_position) return load_gamma(values, gamma, index);
  float factor[1];
  load_gamma(factor, gamma, index);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = factor[0];
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
        if (call.gamma) {
          gamma_of(gamma, call.gamma, call.geometry.gamma_per_position, gamma_index(call.geometry, offset));
        }
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
                                              int64_t gamma_index, float (&sums)[N]) {
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
  if (call.gamma && kept) gamma_of(gamma, call.gamma, call.geometry.gamma_per_position, gamma_index);
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
      backward_pack<S, U, N>(call, update_row, scale, next_row, sample, offset, gamma_index(call.geometry, offset),
                             nothing);
    }
  }
}

// Adds the rows of a block's sums into the first one, in an order that depends on ROWS alone. All threads call it, each
// for one row and every `step`th column.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void sum_rows(float (&sums)[ROWS][COLUMNS], int row, int first_column, int step) {
  for (int half = ROWS / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int column = first_column; row < half && column < COLUMNS; column += step) {
      sums[row][column] += sums[row + half][column];
    }
  }
}

// The same with the first stage of dγ, where γ has a factor for each column: partials [chunks of rows, C].
template <class S, class U, int N>
__global__ void __launch_bounds__(COLUMN_THREADS* ROW_THREADS)
    residual_add_bwd_sums_kernel(const FusedAddBackward call, float* partials, int64_t chunk_rows) {
  __shared__ float shared[ROW_THREADS][COLUMN_THREADS * N];
  const int64_t width = call.geometry.width, positions = call.geometry.positions;
  const int64_t column = (int64_t(blockIdx.x) * COLUMN_THREADS + threadIdx.x) * N;
  const int64_t first = blockIdx.y * chunk_rows;
  const int64_t end = min(first + chunk_rows, call.geometry.batch_size * positions);
  float sums[N] = {};
  for (int64_t row = first + threadIdx.y; row < end && column < width; row += ROW_THREADS) {
    const int64_t sample = quotient(row, positions);
    const RowPosition update_row = call.rows[sample], next_row = call.next_rows[sample];
    const float scale = scale_of(call.scale, update_row);
    backward_pack<S, U, N>(call, update_row, scale, next_row, sample, (row - sample * positions) * width + column,
                           column, sums);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y][threadIdx.x + i * COLUMN_THREADS] = sums[i];
  sum_rows(shared, threadIdx.y, threadIdx.x, COLUMN_THREADS);
  if (threadIdx.y != 0 || column >= width) return;
#pragma unroll
  for (int i = 0; i < N; ++i) partials[blockIdx.y * width + column + i] = shared[0][threadIdx.x + i * COLUMN_THREADS];
}

// The same where γ has a factor for each position: partials [rows], which are [outer dimensions, C]. A row of threads
// sums one of them.
template <class S, class U, int N>
__global__ void __launch_bounds__(COLUMN_THREADS* ROW_THREADS)
    residual_add_bwd_row_sums_kernel(const FusedAddBackward call, float* partials) {
  __shared__ float shared[COLUMN_THREADS][ROW_THREADS];
  const Geometry& geometry = call.geometry;
  const int64_t row = int64_t(blockIdx.x) * ROW_THREADS + threadIdx.y;
  float sums[N] = {};
  if (row < geometry.batch_size * geometry.positions) {
    const int64_t sample = quotient(row, geometry.positions), position = row - sample * geometry.positions;
    const int64_t channel = modulo(position, geometry.channels);
    const RowPosition update_row = call.rows[sample], next_row = call.next_rows[sample];
    const float scale = scale_of(call.scale, update_row);
#pragma unroll 1  // unrolled it would spill
    for (int64_t column = threadIdx.x * N; column < geometry.width; column += COLUMN_THREADS * N) {
      backward_pack<S, U, N>(call, update_row, scale, next_row, sample, position * geometry.width + column, channel,
                             sums);
    }
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += sums[i];
  shared[threadIdx.x][threadIdx.y] = sum;
  sum_rows(shared, threadIdx.x, threadIdx.y, ROW_THREADS);
  if (threadIdx.x == 0 && row < geometry.batch_size * geometry.positions) partials[row] = shared[0][threadIdx.y];
}

// The second stage: partials [num_partials, C].
template <class G>
__global__ void __launch_bounds__(COLUMN_THREADS* PARTIAL_ROW_THREADS)
    sum_partials_kernel(G* dgamma, const float* partials, int64_t num_partials, int64_t channels) {
  __shared__ float shared[PARTIAL_ROW_THREADS][COLUMN_THREADS];
  const int64_t column = int64_t(blockIdx.x) * COLUMN_THREADS + threadIdx.x;
  constexpr int STEP = PARTIAL_ROW_THREADS * LOADS_IN_FLIGHT;
  float sum = 0;
  for (int64_t first = threadIdx.y; first < num_partials && column < channels; first += STEP) {
    float loaded[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      const int64_t row = first + i * PARTIAL_ROW_THREADS;
      loaded[i] = row < num_partials ? partials[row * channels + column] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) sum += loaded[i];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  sum_rows(shared, threadIdx.y, threadIdx.x, COLUMN_THREADS);
  if (threadIdx.y == 0 && column < channels) round_to(dgamma[column], shared[0][threadIdx.x]);
}

}  // namespace rdp::cuda
