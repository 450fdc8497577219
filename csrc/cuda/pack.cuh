// Elements in packs of 16 bytes or more, and when tensors allow them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../fused_add.h"

namespace rdp::cuda {

constexpr int64_t PACK_BYTES = 16;

// By name: torch compiles extensions without the narrow types' own conversions.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// `N` elements, loaded and stored in pieces of 16 bytes, or in one of 8.
template <class T, int N>
union Pack {
  using Piece = std::conditional_t<(N * sizeof(T) >= 16), int4, std::conditional_t<(N * sizeof(T) == 8), int2, T>>;
  static constexpr int PIECES = N * sizeof(T) / sizeof(Piece);

  T elements[N];
  Piece pieces[PIECES];

  __device__ Pack() {}
};

template <class T, int N>
__device__ __forceinline__ void load(float (&values)[N], const T* from) {
  using P = Pack<T, N>;
  P pack;
#pragma unroll
  for (int i = 0; i < P::PIECES; ++i) pack.pieces[i] = reinterpret_cast<const typename P::Piece*>(from)[i];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(pack.elements[i]);
}

// An ordinary store that stays whole: left to itself the compiler takes that of an int4 apart.
__device__ __forceinline__ void store_piece(int4* to, int4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
#else
  *to = x;
#endif
}
template <class T>
__device__ __forceinline__ void store_piece(T* to, T x) {
  *to = x;
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  using P = Pack<T, N>;
  P pack;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(pack.elements[i], values[i]);
#pragma unroll
  for (int i = 0; i < P::PIECES; ++i) store_piece(reinterpret_cast<typename P::Piece*>(to) + i, pack.pieces[i]);
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
