// The arithmetic of one element, which CPU and CUDA kernels share.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define RDP_ELEMENT __host__ __device__ __forceinline__
#else
#define RDP_ELEMENT inline __attribute__((always_inline))
#endif

namespace rdp {

// residual + row_scale · γ · update; `factor` is row_scale · γ.
template <class T>
RDP_ELEMENT T added(T residual, T factor, T update) {
  return residual + factor * update;
}

// The codes of `ACTIVATIONS` in rdp_kernels/kernels/spec.py.
enum class Activation : int8_t { none, relu };
constexpr int NUM_ACTIVATIONS = 2;

// NaN stays NaN, as in torch.
template <Activation KIND, class T>
RDP_ELEMENT T activated(T x) {
  return KIND == Activation::relu && x < T(0) ? T(0) : x;
}

// The gradient of an activation's argument; `out` is the activation's result. NaN passes, as in torch.
template <Activation KIND, class T>
RDP_ELEMENT T activation_gradient(T dout, T out) {
  return KIND == Activation::relu && out <= T(0) ? T(0) : dout;
}

// Calls `body` with the activation as a constant: `decltype(kind)::value` within it.
template <class Body>
RDP_ELEMENT void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::none:
      return body(std::integral_constant<Activation, Activation::none>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
  }
}

// The term of one element in the sum for dγ.
template <class T>
RDP_ELEMENT T dgamma_term(T dout, T row_scale, T update) {
  return row_scale * dout * update;
}

}  // namespace rdp
