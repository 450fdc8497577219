// Loops over a piece of a row, short enough for the L1 cache. The file is included once for each instruction set, inside
// its own namespace and `#pragma GCC target`. It has plain loops that the compiler vectorises, and includes no header:
// no function of the standard library may be compiled for an instruction set that a machine lacks.

#define RDP_VECTORISED _Pragma("GCC ivdep")  // a sum in place only reads and writes the same element

inline __attribute__((always_inline)) uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline __attribute__((always_inline)) float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// bfloat16 is the upper half of a float32. Rounds to the nearest, ties to even.
struct BFloat16 {
  uint16_t bits;
  inline __attribute__((always_inline)) float value() const { return float_of(uint32_t(bits) << 16); }
  static inline __attribute__((always_inline)) BFloat16 of(float x) {
    const uint32_t all = bits_of(x);
    const uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    return {uint16_t(x != x ? 0x7fc0u : rounded)};
  }
};

#if defined(__FLT16_MAX__) && (defined(__F16C__) || defined(__aarch64__))
struct Half {
  _Float16 number;
  inline __attribute__((always_inline)) float value() const { return float(number); }
  static inline __attribute__((always_inline)) Half of(float x) { return {_Float16(x)}; }
};
#else
// Uses integers and float32, without conditional jumps. The bits of a float16, shifted into position, are a float32
// that is 2^112 times too small. Subnormals are right as well, because the multiplication is exact.
struct Half {
  uint16_t bits;
  inline __attribute__((always_inline)) float value() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = uint32_t(bits & 0x7fffu) << 13;
    const float finite = float_of(rest) * 0x1p112f;
    const float special = float_of(rest | 0x7f800000u);
    return float_of(bits_of(rest >= 0x0f800000u ? special : finite) | sign);
  }
  static inline __attribute__((always_inline)) Half of(float x) {
    const uint32_t all = bits_of(x), sign = (all >> 16) & 0x8000u, rest = all & 0x7fffffffu;
    // Normal: round to even with the exponent rebased. Subnormal: an addition leaves the wanted bits at the end.
    const uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    uint32_t half = rest < 0x38800000u ? subnormal : normal;
    half = rest >= 0x477ff000u ? 0x7c00u : half;
    half = rest > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(half | sign)};
  }
};
#endif

template <class Acc, class Stored>
inline __attribute__((always_inline)) Acc value_of(Stored x) {
  return Acc(x.value());
}
template <>
inline __attribute__((always_inline)) float value_of<float, float>(float x) {
  return x;
}
template <>
inline __attribute__((always_inline)) double value_of<double, float>(float x) {
  return x;
}
template <>
inline __attribute__((always_inline)) double value_of<double, double>(double x) {
  return x;
}
template <>
inline __attribute__((always_inline)) float value_of<float, double>(double x) {
  return float(x);
}

template <class Stored, class Acc>
struct Rounded {
  static inline __attribute__((always_inline)) Stored of(Acc x) { return Stored::of(float(x)); }
};
template <class Acc>
struct Rounded<float, Acc> {
  static inline __attribute__((always_inline)) float of(Acc x) { return float(x); }
};
template <class Acc>
struct Rounded<double, Acc> {
  static inline __attribute__((always_inline)) double of(Acc x) { return double(x); }
};

template <class Acc, class Stored>
void load(const void* from, Acc* to, int64_t n) {
  const Stored* stored = static_cast<const Stored*>(from);
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) to[i] = value_of<Acc>(stored[i]);
}

template <class Acc, class Stored>
void store(const Acc* from, void* to, int64_t n) {
  Stored* stored = static_cast<Stored*>(to);
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) stored[i] = Rounded<Stored, Acc>::of(from[i]);
}

// A null `residual` stands for zeros, a null `gamma` for ones.
template <class Acc, Activation KIND>
void add_to(Acc* out, const Acc* residual, const Acc* update, const Acc* gamma, Acc scale, int64_t n) {
  if (residual == nullptr) {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) out[i] = activated<KIND>(scale * update[i]);
  } else if (gamma == nullptr) {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) out[i] = activated<KIND>(added(residual[i], scale, update[i]));
  } else {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) out[i] = activated<KIND>(added(residual[i], scale * gamma[i], update[i]));
  }
}

template <class Acc>
void add(Acc* out, const Acc* residual, const Acc* update, const Acc* gamma, Acc scale, Activation activation,
         int64_t n) {
  with_activation(activation, [=](auto kind) {
    add_to<Acc, decltype(kind)::value>(out, residual, update, gamma, scale, n);
  });
}

template <class Acc>
void activate(Acc* out, const Acc* x, Activation activation, int64_t n) {
  with_activation(activation, [=](auto kind) {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) out[i] = activated<decltype(kind)::value>(x[i]);
  });
}

template <class Acc, Activation KIND>
void apply_gradient(Acc* to, const Acc* dout, const Acc* out, int64_t n) {
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) to[i] = activation_gradient<KIND>(dout[i], out[i]);
}

// The gradient of the sum before its activation. A null `dnext` stands for zeros. Without an activation `out` is null.
template <class Acc>
void combine(Acc* to, const Acc* dout, const Acc* dnext, const Acc* out, Activation activation, int64_t n) {
  if (dnext != nullptr) {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) to[i] = dout[i] + dnext[i];
    dout = to;
  }
  if (out == nullptr) return;
  with_activation(activation, [=](auto kind) { apply_gradient<Acc, decltype(kind)::value>(to, dout, out, n); });
}

template <class Acc>
void scaled(Acc* to, const Acc* d, const Acc* gamma, Acc scale, int64_t n) {
  if (gamma == nullptr) {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) to[i] = scale * d[i];
  } else {
    RDP_VECTORISED
    for (int64_t i = 0; i < n; ++i) to[i] = scale * gamma[i] * d[i];
  }
}

// Adds to one sum for each column.
template <class Acc>
void accumulate(Acc* sums, const Acc* d, const Acc* update, Acc scale, int64_t n) {
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) sums[i] += dgamma_term(d[i], scale, update[i]);
}

// `scaled` and `accumulate` in one loop, which reads `d` once.
template <class Acc>
void scaled_and_accumulated(Acc* to, Acc* sums, const Acc* d, const Acc* update, const Acc* gamma, Acc scale,
                            int64_t n) {
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += dgamma_term(d[i], scale, update[i]);
    to[i] = scale * gamma[i] * d[i];
  }
}

// Sums over the whole piece, in as many lanes as the widest instruction set has: all then add in the same order.
template <class Acc>
Acc total(const Acc* d, const Acc* update, Acc scale, int64_t n) {
  constexpr int LANES = 16;  // float32 elements of an AVX-512 register
  Acc lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    RDP_VECTORISED
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += dgamma_term(d[i + lane], scale, update[i + lane]);
  }
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += dgamma_term(d[i], scale, update[i]);
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The second stage of sums, in float64.
template <class Acc>
void add_partials(double* sums, const Acc* partials, int64_t n) {
  RDP_VECTORISED
  for (int64_t i = 0; i < n; ++i) sums[i] += double(partials[i]);
}

template <class Acc>
constexpr RowLoops<Acc> row_loops() {
  return {
      {load<Acc, float>, load<Acc, double>, load<Acc, BFloat16>, load<Acc, Half>},
      {store<Acc, float>, store<Acc, double>, store<Acc, BFloat16>, store<Acc, Half>},
      add<Acc>, activate<Acc>, combine<Acc>, scaled<Acc>, accumulate<Acc>, scaled_and_accumulated<Acc>, total<Acc>,
      add_partials<Acc>,
  };
}

const RowLoops<float> in_float = row_loops<float>();
const RowLoops<double> in_double = row_loops<double>();

#undef RDP_VECTORISED
