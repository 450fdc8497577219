// The ops, as torch sees them: raw, without autograd, which `rdp_kernels` puts over them.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/tail.h"

namespace rdp {
namespace {

using ThreeTensors = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>;
using FourTensors = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;
const MaybeTensor NONE;
constexpr int64_t ALL = -1;

void run(const TailForward& call, const SampleLayout& layout) {
#ifdef RDP_CUDA
  if (layout.is_cuda()) return cuda::tail_forward(call, layout.device());
#endif
  cpu::tail_forward(call);
}

void run(const TailBackward& call, const SampleLayout& layout) {
#ifdef RDP_CUDA
  if (layout.is_cuda()) return cuda::tail_backward(call, layout.device());
#endif
  cpu::tail_backward(call);
}

ThreeTensors tail(const MaybeTensor& residual, const MaybeTensor& branch, const MaybeTensor& frozen,
                  const MaybeTensor& gamma, const MaybeTensor& rows, int64_t num_learning,
                  const MaybeTensor& row_scale, double scale, int64_t channel_dim, bool relu, bool gathers,
                  const MaybeTensor& next_rows, int64_t num_next_learning, const MaybeTensor& out) {
  STD_TORCH_CHECK(residual || branch, "residual or branch must be given");
  const SampleLayout layout(residual ? "residual" : "branch", residual ? *residual : *branch);
  STD_TORCH_CHECK(residual || !rows, "residual must be given where rows are");
  const int64_t batch_size = layout.batch_size();

  TailForward call;
  call.adds = branch.has_value();
  call.relu = relu;
  STD_TORCH_CHECK(branch || !(frozen || gamma || rows || row_scale || out),
                  "branch must be given where frozen, gamma, rows, row_scale or out is");
  const InvertedRows inverted("rows", layout, rows, num_learning, batch_size);
  call.rows = inverted.rows();
  call.residual = layout.samples("residual", residual, batch_size);
  call.branch = layout.samples("branch", branch, inverted.num_learning());
  call.frozen = layout.samples("frozen", frozen, inverted.num_frozen());
  const Dtype dtype = residual ? call.residual.dtype : call.branch.dtype;
  call.scale = scale_of(layout, row_scale, scale, inverted.num_rows(), dtype);
  channel_dim = channel_dim_of(layout, gamma.has_value(), channel_dim);
  call.geometry = layout.geometry(batch_size, channel_dim);
  if (gamma) call.gamma = layout.vector("gamma", *gamma, layout.size(channel_dim));
  call.in_float64 = any_float64(call.residual, call.branch, call.frozen, call.gamma);

  MaybeTensor made, next, frozen_next;
  if (branch && !out) made = layout.empty(batch_size, dtype);
  if (branch) call.out = layout.samples("out", out ? out : made, batch_size);
  STD_TORCH_CHECK(!branch || call.out.dtype == dtype, "out must have the dtype of the residual");
  const InvertedRows next_inverted("next_rows", layout, next_rows, num_next_learning, batch_size);
  if (gathers) {
    call.next_rows = next_inverted.rows();
    next = layout.empty(next_inverted.num_learning(), dtype);
    call.next = layout.samples("next", next, next_inverted.num_learning());
    if (next_inverted.num_frozen() > 0) {
      frozen_next = layout.empty(next_inverted.num_frozen(), dtype);
      call.frozen_next = layout.samples("frozen_next", frozen_next, next_inverted.num_frozen());
    }
  }
  run(call, layout);
  return {made, next, frozen_next};
}

FourTensors tail_backward(const MaybeTensor& dout, const MaybeTensor& dnext, const MaybeTensor& dfrozen_next,
                          const MaybeTensor& branch, const MaybeTensor& gamma, const MaybeTensor& out,
                          const MaybeTensor& rows, int64_t num_learning, const MaybeTensor& row_scale, double scale,
                          int64_t channel_dim, const MaybeTensor& next_rows, int64_t num_next_learning,
                          int64_t batch_size, bool in_float64, bool wants_residual,
                          std::optional<ScalarType> branch_dtype, std::optional<ScalarType> frozen_dtype,
                          std::optional<ScalarType> gamma_dtype, const MaybeTensor& dresidual) {
  STD_TORCH_CHECK(dout || dnext || dfrozen_next, "dout, dnext or dfrozen_next must be given");
  const bool from_next = dnext && (!dfrozen_next || dnext->size(0) > 0);  // one without rows has no order
  const SampleLayout layout(dout ? "dout" : from_next ? "dnext" : "dfrozen_next",
                            dout ? *dout : from_next ? *dnext : *dfrozen_next);
  STD_TORCH_CHECK(batch_size >= 0, "batch_size must be at least 0, got ", batch_size);
  TailBackward call;
  const InvertedRows inverted("rows", layout, rows, num_learning, batch_size);
  const InvertedRows next_inverted("next_rows", layout, next_rows, num_next_learning, batch_size);
  call.rows = inverted.rows();
  call.next_rows = next_inverted.rows();
  call.dout = layout.samples("dout", dout, batch_size);
  call.dnext = layout.samples("dnext", dnext, next_inverted.num_learning());
  call.dfrozen_next = layout.samples("dfrozen_next", dfrozen_next, next_inverted.num_frozen());
  call.out = layout.samples("out", out, batch_size);
  call.branch = layout.samples("branch", branch, inverted.num_learning());
  STD_TORCH_CHECK(branch || !gamma_dtype, "branch must be given where the gradient of gamma is wanted");
  const Dtype dtype = dout ? call.dout.dtype : from_next ? call.dnext.dtype : call.dfrozen_next.dtype;
  call.scale = scale_of(layout, row_scale, scale, inverted.num_rows(), dtype);
  channel_dim = channel_dim_of(layout, gamma || gamma_dtype, channel_dim);
  call.geometry = layout.geometry(batch_size, channel_dim);
  if (gamma) call.gamma = layout.vector("gamma", *gamma, layout.size(channel_dim));
  for (const Samples* samples : {&call.dnext, &call.dfrozen_next, &call.out}) {
    STD_TORCH_CHECK(!*samples || samples->dtype == dtype, "dnext, dfrozen_next and out must have the dtype of dout");
  }

  MaybeTensor made, dbranch, dfrozen, dgamma;
  const auto make = [&](const char* name, MaybeTensor& made, Samples& samples, int64_t num_rows,
                        std::optional<ScalarType> dtype) {
    if (!dtype) return;
    made = layout.empty(num_rows, dtype_of(name, *dtype));
    samples = layout.samples(name, made, num_rows);
  };
  if (wants_residual && !dresidual) made = layout.empty(batch_size, dtype);
  if (wants_residual) call.dresidual = layout.samples("dresidual", dresidual ? dresidual : made, batch_size);
  STD_TORCH_CHECK(!wants_residual || call.dresidual.dtype == dtype, "dresidual must have the dtype of dout");
  make("dbranch", dbranch, call.dbranch, inverted.num_learning(), branch_dtype);
  make("dfrozen", dfrozen, call.dfrozen, inverted.num_frozen(), frozen_dtype);
  if (gamma_dtype) {
    dgamma = layout.empty_vector(layout.size(channel_dim), dtype_of("gamma", *gamma_dtype));
    call.dgamma = layout.vector("dgamma", *dgamma, layout.size(channel_dim));
  }
  call.in_float64 = in_float64;
  run(call, layout);
  return {made, dbranch, dfrozen, dgamma};
}

Tensor residual_add(const Tensor& residual, const Tensor& branch, const MaybeTensor& gamma,
                    const MaybeTensor& row_scale, const MaybeTensor& rows, double scale, int64_t channel_dim,
                    bool relu) {
  return *std::get<0>(
      tail(residual, branch, NONE, gamma, rows, ALL, row_scale, scale, channel_dim, relu, false, NONE, ALL, NONE));
}

ThreeTensors residual_add_backward(const Tensor& dout, const MaybeTensor& branch, const MaybeTensor& gamma,
                                   const MaybeTensor& row_scale, bool wants_branch, const MaybeTensor& out,
                                   const MaybeTensor& rows, double scale, int64_t channel_dim,
                                   std::optional<ScalarType> branch_dtype) {
  std::optional<ScalarType> gamma_dtype;
  STD_TORCH_CHECK(dout.dim() > 0, "dout must have its rows in dimension 0");
  STD_TORCH_CHECK(gamma || !branch, "gamma must be given where its gradient is wanted, that is, where branch is");
  if (branch) gamma_dtype = gamma->scalar_type();
  if (!branch_dtype) branch_dtype = branch ? branch->scalar_type() : dout.scalar_type();
  const auto is_double = [](const MaybeTensor& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; };
  const bool in_float64 = is_double(dout) || is_double(gamma) || *branch_dtype == ScalarType::Double;
  auto [dresidual, dbranch, dfrozen, dgamma] = tail_backward(
      dout, NONE, NONE, branch, gamma, out, rows, ALL, row_scale, scale, channel_dim, NONE, ALL, dout.size(0),
      in_float64, out.has_value(), wants_branch ? branch_dtype : std::nullopt, std::nullopt, gamma_dtype, NONE);
  return {dresidual, dbranch, dgamma};
}

Tensor gather_rows(const Tensor& residual, const Tensor& rows) {
  return *std::get<1>(
      tail(residual, NONE, NONE, NONE, NONE, ALL, NONE, 1.0, -1, false, true, rows, ALL, NONE));
}

Tensor gather_rows_backward(const Tensor& dout, const Tensor& rows, int64_t batch_size) {
  return *std::get<0>(tail_backward(NONE, dout, NONE, NONE, NONE, NONE, NONE, ALL, NONE, 1.0, -1, rows, ALL, batch_size,
                                    dout.scalar_type() == ScalarType::Double, true, std::nullopt, std::nullopt,
                                    std::nullopt, NONE));
}

}  // namespace
}  // namespace rdp

// The most usual arguments stand first: those that are left out cost less.
STABLE_TORCH_LIBRARY_FRAGMENT(rdp, ops) {
  ops.def(
      "native_residual_add(Tensor residual, Tensor branch, Tensor? gamma=None, Tensor? row_scale=None, "
      "Tensor? rows=None, float scale=1.0, int channel_dim=-1, bool relu=False) -> Tensor");
  ops.def(
      "native_residual_add_backward(Tensor dout, Tensor? branch=None, Tensor? gamma=None, Tensor? row_scale=None, "
      "bool wants_branch=True, Tensor? out=None, Tensor? rows=None, float scale=1.0, int channel_dim=-1, "
      "ScalarType? branch_dtype=None) -> (Tensor?, Tensor?, Tensor?)");
  ops.def("native_gather_rows(Tensor residual, Tensor rows) -> Tensor");
  ops.def("native_gather_rows_backward(Tensor dout, Tensor rows, int batch_size) -> Tensor");
  ops.def(
      "native_tail(Tensor? residual, Tensor? branch, Tensor? frozen, Tensor? gamma, Tensor? rows, int num_learning, "
      "Tensor? row_scale, float scale, int channel_dim, bool relu, bool gathers, Tensor? next_rows, "
      "int num_next_learning, Tensor(a!)? out) -> (Tensor?, Tensor?, Tensor?)");
  ops.def(
      "native_tail_backward(Tensor? dout, Tensor? dnext, Tensor? dfrozen_next, Tensor? branch, Tensor? gamma, "
      "Tensor? out, Tensor? rows, int num_learning, Tensor? row_scale, float scale, int channel_dim, "
      "Tensor? next_rows, int num_next_learning, int batch_size, bool in_float64, bool wants_residual, "
      "ScalarType? branch_dtype, ScalarType? frozen_dtype, ScalarType? gamma_dtype, Tensor(a!)? dresidual) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
}

namespace {
template <class Library>
void implement(Library& ops) {
  ops.impl("native_residual_add", TORCH_BOX(&rdp::residual_add));
  ops.impl("native_residual_add_backward", TORCH_BOX(&rdp::residual_add_backward));
  ops.impl("native_gather_rows", TORCH_BOX(&rdp::gather_rows));
  ops.impl("native_gather_rows_backward", TORCH_BOX(&rdp::gather_rows_backward));
  ops.impl("native_tail", TORCH_BOX(&rdp::tail));
  ops.impl("native_tail_backward", TORCH_BOX(&rdp::tail_backward));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rdp, CPU, ops) { implement(ops); }
#ifdef RDP_CUDA
STABLE_TORCH_LIBRARY_IMPL(rdp, CUDA, ops) { implement(ops); }
#endif
