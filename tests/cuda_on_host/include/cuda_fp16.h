#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
