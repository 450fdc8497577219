// The arithmetic of one element, which CPU and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define RDP_ELEMENT __host__ __device__ __forceinline__
#else
#define RDP_ELEMENT inline __attribute__((always_inline))
#endif

namespace rdp {

// residual + row_scale · γ · branch; `factor` is row_scale · γ.
template <class T>
RDP_ELEMENT T added(T residual, T factor, T branch) {
  return residual + factor * branch;
}

// NaN stays NaN, as in torch.
template <class T>
RDP_ELEMENT T relu(T x) {
  return x < T(0) ? T(0) : x;
}

// The gradient that passes a ReLU whose result was `out`; it passes NaN, as in torch.
template <class T>
RDP_ELEMENT T through_relu(T dout, T out) {
  return out <= T(0) ? T(0) : dout;
}

// What one element adds to dγ.
template <class T>
RDP_ELEMENT T of_dgamma(T dout, T row_scale, T branch) {
  return row_scale * dout * branch;
}

}  // namespace rdp
