// Kernels that gather rows and that invert a list of rows, on raw pointers. The gather's backward is an add, in
// `residual_add.cuh`.
#pragma once

#include "residual_add.cuh"

namespace rdp::cuda {

// Moves words of 16 bytes, or single elements, without looking at their values. Rows out of range are skipped.
template <class Word>
__global__ void __launch_bounds__(THREADS)
    gather_rows_kernel(const Samples x, const Samples next, const Samples frozen_next, const RowSet rows,
                       int64_t batch_size, int64_t words) {
  const int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x, stride = int64_t(gridDim.x) * THREADS;
  const int32_t count = num_steps(words - first, stride);
  using Step = Ahead<Word, 1>;
  __shared__ int4 landing[block_words<Step>()];
  Step steps[steps_ahead<Step>()];
  place_steps(steps, landing);
  const int64_t element = size_of(x.dtype);
  for (int64_t row = blockIdx.y; row < rows.num_rows; row += gridDim.y) {
    const int64_t sample = rows.index == nullptr ? row : rows.index[row];
    if (sample < 0 || sample >= batch_size) continue;
    const bool learns = row < rows.num_learning;
    const int64_t place = learns ? row * next.row_stride : (row - rows.num_learning) * frozen_next.row_stride;
    const char* from = static_cast<const char*>(x.data) + sample * x.row_stride * element;
    const Word* source = reinterpret_cast<const Word*>(from);
    void* const to = learns ? next.data : frozen_next.data;
    Word* target = reinterpret_cast<Word*>(static_cast<char*>(to) + place * element);
    const auto load_step = [&](Step& step, int64_t i) { step.load(source + i); };
    const auto finish_step = [&](const Step& step, int64_t i) { target[i] = step.pack().elements[0]; };
    for_steps(steps, first, count, stride, load_step, finish_step);
  }
}

constexpr int MAX_THREADS = 1024;  // per block: CUDA's limit

// inverse[rows[i]] = i, and -1 elsewhere. Indices out of range are skipped, so that nothing is written out of bounds.
__global__ void __launch_bounds__(MAX_THREADS)
    invert_rows_kernel(int64_t* inverse, const int64_t* rows, int64_t num_rows, int64_t batch_size) {
  for (int64_t sample = threadIdx.x; sample < batch_size; sample += blockDim.x) inverse[sample] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < num_rows; i += blockDim.x) {
    const int64_t row = rows[i];
    if (row >= 0 && row < batch_size) inverse[row] = i;
  }
}

}  // namespace rdp::cuda
