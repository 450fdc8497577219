// The masked residual add, forward and backward, on raw pointers. A thread computes a pack of elements per step.
#pragma once

#include "../arithmetic.h"
#include "pack.cuh"
#include "steps.cuh"

namespace rdp::cuda {

// Sums for dγ: a block works on COLUMN_THREADS packs of a row and on ROW_THREADS rows at a time.
constexpr int COLUMN_THREADS = 32;
constexpr int ROW_THREADS = 8;
static_assert(COLUMN_THREADS * ROW_THREADS == THREADS);
// What is summed is cut into chunks, and each chunk gives a row of partial sums. A thread takes CHUNK_STEPS steps in a
// chunk or more, so that partial sums are few beside what is summed. There are at most MAX_CHUNKS chunks, whose sums the
// second stage reads in two rounds, and at most MAX_SUM_BLOCKS blocks, unless one chunk has more: a few times as many as
// a GPU runs at once.
constexpr int64_t CHUNK_STEPS = 8;
constexpr int64_t MAX_CHUNKS = 512;
constexpr int64_t MAX_SUM_BLOCKS = 2048;
// Sums of partial sums: a block of columns and rows, and the loads that a thread has in flight.
constexpr int PARTIAL_ROW_THREADS = 32;
constexpr int LOADS_IN_FLIGHT = 8;

template <class T>
__device__ __forceinline__ T* at(const Samples& samples, int64_t row, int64_t offset) {
  return static_cast<T*>(samples.data) + row * samples.row_stride + offset;
}

// The factors of the pack from `offset` of a sample on: one for each column, or the same for all of them; 1 without γ.
template <int N>
__device__ __forceinline__ void load_factors(float (&factors)[N], const Vector& gamma, const Geometry& geometry,
                                             int64_t offset) {
  if (gamma && !geometry.gamma_per_position) return load_gamma(factors, gamma, modulo(offset, geometry.width));
  float factor[1] = {1.0f};
  if (gamma) load_gamma(factor, gamma, modulo(quotient(offset, geometry.width), geometry.channels));
#pragma unroll
  for (int i = 0; i < N; ++i) factors[i] = factor[0];
}

// The scale of a sample's update. A dropped sample has 0, and its update is never read.
__device__ __forceinline__ float scale_of(const Scale& scale, const RowPosition& row) {
  if (!row.exists()) return 0.0f;
  return scale.per_row ? static_cast<const float*>(scale.per_row.data)[row.index] : float(scale.number);
}

template <class S, class U, int N>
struct ForwardStep {
  Ahead<S, N> residual;
  Ahead<U, N> update;
  static constexpr int WORDS = Ahead<S, N>::WORDS + Ahead<U, N>::WORDS;

  __device__ __forceinline__ void place(int4*& next) {
    residual.place(next);
    update.place(next);
  }
};

// Samples are blocks of the grid's y, so that a block checks only once whether a sample has an update.
template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) residual_add_fwd_kernel(const FusedAddForward call) {
  using Step = ForwardStep<S, U, N>;
  __shared__ int4 words[block_words<Step>()];
  Step steps[steps_ahead<Step>()];
  place_steps(steps, words);
  const int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x, stride = int64_t(gridDim.x) * THREADS;
  const int32_t count = num_steps(call.geometry.sample_size() / N - first, stride);
  for (int64_t sample = blockIdx.y; sample < call.geometry.batch_size; sample += gridDim.y) {
    const RowPosition update_row = call.rows[sample];
    const float scale = scale_of(call.scale, update_row);
    const Samples& learning_or_frozen = update_row.learns ? call.update : call.frozen_update;
    const bool adds = scale != 0;
    const auto load_step = [&](Step& step, int64_t offset) {
      if (call.residual) step.residual.load(at<const S>(call.residual, sample, offset));
      if (adds) step.update.load(at<const U>(learning_or_frozen, update_row.part_index, offset));
    };
    const auto finish_step = [&](const Step& step, int64_t offset) {
      float sum[N] = {}, factors[N], update[N];
      if (adds) load_factors(factors, call.gamma, call.geometry, offset);
      if (call.residual) unpack(sum, step.residual.pack());
      if (adds) {
        unpack(update, step.update.pack());
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = added(sum[i], scale * factors[i], update[i]);
      }
      with_activation(call.activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = activated<decltype(kind)::value>(sum[i]);
      });
      store<S, N>(at<S>(call.out, sample, offset), sum);
    };
    for_steps(steps, first * N, count, stride * N, load_step, finish_step);
  }
}

// One sample of all tensors of a backward. A pointer is null where nothing is to be loaded or stored.
template <class S, class U>
struct BackwardSample {
  const S *dout = nullptr, *dnext = nullptr, *out = nullptr;
  const U* update = nullptr;
  S* dresidual = nullptr;
  U* dupdate = nullptr;
  float scale;

  __device__ __forceinline__ BackwardSample(const FusedAddBackward& call, int64_t sample) {
    const RowPosition row = call.rows[sample], next_row = call.next_rows[sample];
    const Samples& gradient = row.learns ? call.dupdate : call.dfrozen_update;
    const Samples& from_next = next_row.learns ? call.dnext : call.dfrozen_next;
    scale = scale_of(call.scale, row);
    if (call.dresidual) dresidual = at<S>(call.dresidual, sample, 0);
    if (row.exists() && gradient) dupdate = at<U>(gradient, row.part_index, 0);
    const bool wants_dgamma = call.dgamma && row.learns && scale != 0;
    if (dresidual == nullptr && (dupdate == nullptr || scale == 0) && !wants_dgamma) return;
    if (call.dout) dout = at<const S>(call.dout, sample, 0);
    if (next_row.exists() && from_next) dnext = at<const S>(from_next, next_row.part_index, 0);
    if (dout == nullptr && dnext == nullptr) return;
    if (call.out) out = at<const S>(call.out, sample, 0);
    if (wants_dgamma) update = at<const U>(call.update, row.part_index, 0);
  }
};

// One pack of every gradient but dγ, and of the sums for dγ. Its operands are loaded ahead.
template <class S, class U, int N>
struct BackwardStep {
  using Sample = BackwardSample<S, U>;
  Ahead<S, N> dout, dnext, out;
  Ahead<U, N> update;
  static constexpr int WORDS = 3 * Ahead<S, N>::WORDS + Ahead<U, N>::WORDS;

  __device__ __forceinline__ void place(int4*& next) {
    dout.place(next);
    dnext.place(next);
    out.place(next);
    update.place(next);
  }

  __device__ __forceinline__ void load(const Sample& sample, int64_t offset) {
    if (sample.dout != nullptr) dout.load(sample.dout + offset);
    if (sample.dnext != nullptr) dnext.load(sample.dnext + offset);
    if (sample.out != nullptr) out.load(sample.out + offset);
    if (sample.update != nullptr) update.load(sample.update + offset);
  }

  template <class Factor>
  __device__ __forceinline__ void finish(Activation activation, const Sample& sample, int64_t offset,
                                         const Factor& factor, float (&sums)[N]) const {
    float d[N] = {}, values[N];
    if (sample.dout != nullptr) unpack(d, dout.pack());
    if (sample.dnext != nullptr) {
      unpack(values, dnext.pack());
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] = sample.dout != nullptr ? d[i] + values[i] : values[i];
    }
    if (sample.out != nullptr) {
      unpack(values, out.pack());
      with_activation(activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = activation_gradient<decltype(kind)::value>(d[i], values[i]);
      });
    }
    if (sample.dresidual != nullptr) store<S, N>(sample.dresidual + offset, d);
    if (sample.update != nullptr) {
      unpack(values, update.pack());
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += dgamma_term(d[i], sample.scale, values[i]);
    }
    if (sample.dupdate == nullptr) return;
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = sample.scale != 0 ? sample.scale * factor(i) * d[i] : 0.0f;
    store<U, N>(sample.dupdate + offset, d);
  }
};

template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) residual_add_bwd_kernel(const FusedAddBackward call) {
  using Step = BackwardStep<S, U, N>;
  __shared__ int4 words[block_words<Step>()];
  Step steps[steps_ahead<Step>()];
  place_steps(steps, words);
  const int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x, stride = int64_t(gridDim.x) * THREADS;
  const int32_t count = num_steps(call.geometry.sample_size() / N - first, stride);
  for (int64_t index = blockIdx.y; index < call.geometry.batch_size; index += gridDim.y) {
    const BackwardSample<S, U> sample(call, index);
    const auto load_step = [&](Step& step, int64_t offset) { step.load(sample, offset); };
    const auto finish_step = [&](const Step& step, int64_t offset) {
      float factors[N], nothing[N] = {};
      if (sample.dupdate != nullptr) load_factors(factors, call.gamma, call.geometry, offset);
      step.finish(call.activation, sample, offset, [&](int i) { return factors[i]; }, nothing);
    };
    for_steps(steps, first * N, count, stride * N, load_step, finish_step);
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

// The same with the first stage of dγ, where γ has a factor for each column: partials [chunks, C]. A chunk is some of
// the rows of all samples.
template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    residual_add_bwd_sums_kernel(const FusedAddBackward call, float* partials, int64_t chunk) {
  __shared__ float shared[ROW_THREADS][COLUMN_THREADS * N];
  const int64_t width = call.geometry.width, positions = call.geometry.positions;
  const int64_t column = (int64_t(blockIdx.x) * COLUMN_THREADS + threadIdx.x) * N;
  const int64_t first = blockIdx.y * chunk;
  const int64_t end = min(first + chunk, call.geometry.batch_size * positions);
  float sums[N] = {}, factors[N];
  if (column < width) load_factors(factors, call.gamma, call.geometry, column);
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y][threadIdx.x + i * COLUMN_THREADS] = factors[i];
  // Factors are read again where they are used, for want of registers.
  const auto factor = [&](int i) { return shared[threadIdx.y][threadIdx.x + i * COLUMN_THREADS]; };
  using Step = BackwardStep<S, U, N>;
  __shared__ int4 words[block_words<Step>()];
  Step steps[steps_ahead<Step>()];
  place_steps(steps, words);
  int64_t row = first + threadIdx.y;
  int32_t left = column < width ? num_steps(end - row, ROW_THREADS) : 0;
  while (left > 0) {
    const int64_t index = quotient(row, positions), first_row = index * positions;
    const int32_t count = min(left, num_steps(first_row + positions - row, ROW_THREADS));
    const BackwardSample<S, U> sample(call, index);
    const auto load_step = [&](Step& step, int64_t offset) { step.load(sample, offset); };
    const auto finish_step = [&](const Step& step, int64_t offset) {
      step.finish(call.activation, sample, offset, factor, sums);
    };
    for_steps(steps, (row - first_row) * width + column, count, ROW_THREADS * width, load_step, finish_step);
    row += int64_t(count) * ROW_THREADS;
    left -= count;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y][threadIdx.x + i * COLUMN_THREADS] = sums[i];
  sum_rows(shared, threadIdx.y, threadIdx.x, COLUMN_THREADS);
  if (threadIdx.y != 0 || column >= width) return;
#pragma unroll
  for (int i = 0; i < N; ++i) partials[blockIdx.y * width + column + i] = shared[0][threadIdx.x + i * COLUMN_THREADS];
}

// The same where γ has a factor for each position: partials [chunks, C]. A row of threads sums a channel; a chunk is
// some of the packs that all samples have of it.
template <class S, class U, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    residual_add_bwd_row_sums_kernel(const FusedAddBackward call, float* partials, int64_t chunk) {
  __shared__ float shared[COLUMN_THREADS][ROW_THREADS];
  const Geometry& geometry = call.geometry;
  const int64_t channel = int64_t(blockIdx.x) * ROW_THREADS + threadIdx.y;
  const int64_t row_packs = geometry.width / N, outer = quotient(geometry.positions, geometry.channels);
  const int64_t first = blockIdx.y * chunk;
  const int64_t end = min(first + chunk, geometry.batch_size * outer * row_packs);
  float sums[N] = {}, factor[1] = {1.0f};
  if (channel < geometry.channels && call.gamma) load_gamma(factor, call.gamma, channel);
  using Step = BackwardStep<S, U, N>;
  __shared__ int4 words[block_words<Step>()];
  Step steps[steps_ahead<Step>()];
  place_steps(steps, words);
  int64_t pack = first + threadIdx.x;
  int32_t left = channel < geometry.channels ? num_steps(end - pack, COLUMN_THREADS) : 0;
  while (left > 0) {
    const int64_t row = quotient(pack, row_packs), first_pack = row * row_packs, index = quotient(row, outer);
    const int32_t count = min(left, num_steps(first_pack + row_packs - pack, COLUMN_THREADS));
    const int64_t position = (row - index * outer) * geometry.channels + channel;
    const int64_t offset = position * geometry.width + (pack - first_pack) * N;
    const BackwardSample<S, U> sample(call, index);
    const auto load_step = [&](Step& step, int64_t offset) { step.load(sample, offset); };
    const auto finish_step = [&](const Step& step, int64_t offset) {
      step.finish(call.activation, sample, offset, [&](int) { return factor[0]; }, sums);
    };
    for_steps(steps, offset, count, COLUMN_THREADS * N, load_step, finish_step);
    pack += int64_t(count) * COLUMN_THREADS;
    left -= count;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += sums[i];
  shared[threadIdx.x][threadIdx.y] = sum;
  sum_rows(shared, threadIdx.x, threadIdx.y, ROW_THREADS);
  if (threadIdx.x == 0 && channel < geometry.channels) {
    partials[blockIdx.y * geometry.channels + channel] = shared[0][threadIdx.y];
  }
}

// The second stage: partials [num_partials, C]. No second block need fit a multiprocessor, or there would be too few
// registers for all loads.
template <class G>
__global__ void __launch_bounds__(COLUMN_THREADS* PARTIAL_ROW_THREADS, 1)
    sum_partials_kernel(G* dgamma, const float* partials, int32_t num_partials, int64_t channels) {
  __shared__ float shared[PARTIAL_ROW_THREADS][COLUMN_THREADS];
  const int64_t column = int64_t(blockIdx.x) * COLUMN_THREADS + threadIdx.x;
  float sum = 0;
  const float* from = partials + threadIdx.y * channels + column;
  for (int32_t row = threadIdx.y; row < num_partials && column < channels;) {
    float loaded[LOADS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
      loaded[i] = row < num_partials ? *from : 0.0f;
      row += PARTIAL_ROW_THREADS;
      from += PARTIAL_ROW_THREADS * channels;
    }
#pragma unroll
    for (int i = 0; i < LOADS_IN_FLIGHT; ++i) sum += loaded[i];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  sum_rows(shared, threadIdx.y, threadIdx.x, COLUMN_THREADS);
  if (threadIdx.y == 0 && column < channels) round_to(dgamma[column], shared[0][threadIdx.x]);
}

}  // namespace rdp::cuda
