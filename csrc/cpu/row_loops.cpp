#include "row_loops.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../arithmetic.h"

namespace rdp::cpu {

namespace baseline {
#include "row_loops.inl"
}

// Clang spells the pragma differently, and compiles the baseline only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RDP_SEVERAL_TARGETS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "row_loops.inl"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")
namespace avx512 {
#include "row_loops.inl"
}
#pragma GCC pop_options

#endif

namespace {

enum class Target { baseline, avx2, avx512 };

Target target_of_this_machine() {
#ifdef RDP_SEVERAL_TARGETS
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const bool at_most_default = asked != nullptr && std::strcmp(asked, "default") == 0;
  const bool at_most_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !at_most_default && !at_most_avx2) return Target::avx512;
  if (has_avx2 && !at_most_default) return Target::avx2;
#endif
  return Target::baseline;
}

template <class Acc, class Float, class Double>
const RowLoops<Acc>& chosen(const Float& in_float, const Double& in_double) {
  if constexpr (std::is_same_v<Acc, float>) {
    return in_float;
  } else {
    return in_double;
  }
}

}  // namespace

template <class Acc>
const RowLoops<Acc>& best_row_loops() {
  static const Target target = target_of_this_machine();
#ifdef RDP_SEVERAL_TARGETS
  if (target == Target::avx512) return chosen<Acc>(avx512::in_float, avx512::in_double);
  if (target == Target::avx2) return chosen<Acc>(avx2::in_float, avx2::in_double);
#endif
  return chosen<Acc>(baseline::in_float, baseline::in_double);
}

template const RowLoops<float>& best_row_loops<float>();
template const RowLoops<double>& best_row_loops<double>();

}  // namespace rdp::cpu
