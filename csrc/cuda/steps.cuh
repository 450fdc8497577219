// The steps of a thread, and the packs that it loads ahead of them.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cstdint>

#include "pack.cuh"

namespace rdp::cuda {

constexpr int THREADS = 256;             // per block
constexpr int BLOCKS = 4;                // fit a multiprocessor, with at most 64 registers a thread
constexpr int64_t MAX_BLOCKS_Y = 65535;  // CUDA's limit

RDP_ELEMENT int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// By 32-bit arithmetic where that suffices, which is several times faster. `b` fits 32 bits where `a` does and b <= a.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (a < b) return 0;
  return a <= UINT32_MAX ? uint32_t(a) / uint32_t(b) : a / b;
}

__device__ __forceinline__ int64_t modulo(int64_t a, int64_t b) { return a - quotient(a, b) * b; }

// The steps of one of `threads` threads that take turns, where `left` steps are left from its first one on.
__device__ __forceinline__ int32_t num_steps(int64_t left, int64_t threads) {
  return left <= 0 ? 0 : int32_t(1 + quotient(left - 1, threads));
}

// A pack that a thread loads ahead. Meanwhile it takes shared memory instead of registers: word w of a thread is
// `words[w * THREADS]`.
template <class T, int N, bool IN_SHARED = (N * sizeof(T) >= PACK_BYTES)>
struct Ahead {
  static constexpr int WORDS = Pack<T, N>::WORDS;
  int4* words;

  __device__ __forceinline__ void place(int4*& next) {
    words = next;
    next += WORDS * THREADS;
  }
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      __pipeline_memcpy_async(words + w * THREADS, reinterpret_cast<const int4*>(from) + w, sizeof(int4));
    }
  }
  __device__ __forceinline__ Pack<T, N> pack() const {
    Pack<T, N> pack;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) pack.words[w] = words[w * THREADS];
    return pack;
  }
};

// Single elements are too small for that.
template <class T>
struct Ahead<T, 1, false> {
  static constexpr int WORDS = 0;
  Pack<T, 1> loaded;

  __device__ __forceinline__ void place(int4*&) {}
  __device__ __forceinline__ void load(const T* from) { cuda::load(loaded, from); }
  __device__ __forceinline__ Pack<T, 1> pack() const { return loaded; }
};

// How many steps a thread has loaded or begun to load when it finishes the first of them: as many as 32 KB of a block's
// shared memory hold, so that BLOCKS blocks fit.
template <class Step>
constexpr int steps_ahead() {
  return Step::WORDS > 4 ? 1 : 2;
}

// The words of all threads of a block.
template <class Step>
constexpr int block_words() {
  return std::max(1, steps_ahead<Step>() * Step::WORDS * THREADS);
}

template <class Step, int AHEAD>
__device__ __forceinline__ void place_steps(Step (&steps)[AHEAD], int4* words) {
  words += threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < AHEAD; ++k) steps[k].place(words);
}

// Calls load(step, offset) and then finish(step, offset) for `count` offsets, `stride` apart.
template <class Step, int AHEAD, class Load, class Finish>
__device__ __forceinline__ void for_steps(Step (&steps)[AHEAD], int64_t offset, int32_t count, int64_t stride,
                                          const Load& load, const Finish& finish) {
  offset -= AHEAD * stride;
#pragma unroll 1  // or registers would spill
  for (int32_t first = -AHEAD; first < count; first += AHEAD) {
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (first >= 0) {
        __pipeline_wait_prior(AHEAD - 1);
        if (first + k < count) finish(steps[k], offset);
      }
      if (first + k + AHEAD < count) load(steps[k], offset + AHEAD * stride);
      __pipeline_commit();
      offset += stride;
    }
  }
}

}  // namespace rdp::cuda
