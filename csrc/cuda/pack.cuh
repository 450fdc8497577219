// Packs of elements of 16 bytes or more, and the checks whether tensors allow them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../fused_add.h"

namespace rdp::cuda {

constexpr int64_t PACK_BYTES = 16;  // the widest load and store of a thread

// Conversions are named, because torch compiles extensions without implicit conversions of the narrow types.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// `N` elements, loaded and stored as words of 16 bytes, or as one of 8.
template <class T, int N>
union Pack {
  using Word = std::conditional_t<(N * sizeof(T) >= 16), int4, std::conditional_t<(N * sizeof(T) == 8), int2, T>>;
  static constexpr int WORDS = N * sizeof(T) / sizeof(Word);

  T elements[N];
  Word words[WORDS];

  __device__ Pack() {}
};

// Begins to load a pack. A thread waits for it when it unpacks it.
template <class T, int N>
__device__ __forceinline__ void load(Pack<T, N>& pack, const T* from) {
  using P = Pack<T, N>;
#pragma unroll
  for (int i = 0; i < P::WORDS; ++i) pack.words[i] = reinterpret_cast<const typename P::Word*>(from)[i];
}

template <class T, int N>
__device__ __forceinline__ void unpack(float (&values)[N], const Pack<T, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(pack.elements[i]);
}

// One store of 16 bytes. The compiler would split the store of an int4 into narrower ones.
__device__ __forceinline__ void store_word(int4* to, int4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
#else
  *to = x;
#endif
}
template <class T>
__device__ __forceinline__ void store_word(T* to, T x) {
  *to = x;
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  using P = Pack<T, N>;
  P pack;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(pack.elements[i], values[i]);
#pragma unroll
  for (int i = 0; i < P::WORDS; ++i) store_word(reinterpret_cast<typename P::Word*>(to) + i, pack.words[i]);
}

template <class T, int N>
__device__ __forceinline__ void load_floats(float (&values)[N], const void* from, int64_t offset) {
  Pack<T, N> pack;
  load(pack, static_cast<const T*>(from) + offset);
  unpack(values, pack);
}

// Columns of γ; it may have any dtype. All threads of a launch take the same case.
template <int N>
__device__ __forceinline__ void load_gamma(float (&values)[N], const Vector& gamma, int64_t column) {
  switch (gamma.dtype) {
    case Dtype::float32:
      return load_floats<float>(values, gamma.data, column);
    case Dtype::bfloat16:
      return load_floats<__nv_bfloat16>(values, gamma.data, column);
    default:
      return load_floats<__half>(values, gamma.data, column);
  }
}

// Whether each sample begins at an address where a pack may begin. If not, kernels work element by element.
inline bool samples_are_aligned(const Samples& samples) {
  return reinterpret_cast<uintptr_t>(samples.data) % PACK_BYTES == 0 &&
         samples.row_stride * size_of(samples.dtype) % PACK_BYTES == 0;
}

inline bool is_aligned(const Vector& vector) { return reinterpret_cast<uintptr_t>(vector.data) % PACK_BYTES == 0; }

// Whether no pack of `n` elements crosses from one row of γ into the next.
inline bool rows_are_whole_packs(const Geometry& geometry, int n) { return geometry.width % n == 0; }

}  // namespace rdp::cuda
