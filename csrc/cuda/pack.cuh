// Elements in packs of 16 bytes or more, and when tensors allow them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../tail.h"

namespace rdp::cuda {

constexpr int64_t PACK_BYTES = 16;

// By name: torch compiles extensions without the narrow types' own conversions.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// `N` elements that are loaded and stored in as few pieces as there can be, of 16 bytes at most.
template <class T, int N>
struct alignas(N * sizeof(T) < PACK_BYTES ? N * sizeof(T) : PACK_BYTES) Pack {
  T elements[N];
};

template <class T, int N>
__device__ __forceinline__ void load(float (&values)[N], const T* from) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(pack.elements[i]);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(pack.elements[i], values[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// γ may have any dtype; all threads of a launch take the same way.
template <int N>
__device__ __forceinline__ void load_gamma(float (&values)[N], const Vector& gamma, int64_t column) {
  switch (gamma.dtype) {
    case Dtype::float32:
      return load<float, N>(values, static_cast<const float*>(gamma.data) + column);
    case Dtype::bfloat16:
      return load<__nv_bfloat16, N>(values, static_cast<const __nv_bfloat16*>(gamma.data) + column);
    default:
      return load<__half, N>(values, static_cast<const __half*>(gamma.data) + column);
  }
}

// Whether each sample begins where a pack may: the alternative is one element at a time.
inline bool samples_are_aligned(const Samples& samples) {
  return reinterpret_cast<uintptr_t>(samples.data) % PACK_BYTES == 0 &&
         samples.row_stride * size_of(samples.dtype) % PACK_BYTES == 0;
}

inline bool is_aligned(const Vector& vector) { return reinterpret_cast<uintptr_t>(vector.data) % PACK_BYTES == 0; }

// Whether no pack of `n` elements crosses from one row of γ into the next.
inline bool rows_are_whole_packs(const Geometry& geometry, int n) { return geometry.width % n == 0; }

}  // namespace rdp::cuda
