// The ops that torch registers, without autograd, which `rdp_kernels` adds. Names are those of the ops' arguments.
#include <exception>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/fused_add.h"

namespace rdp {
namespace {

using TwoTensors = std::tuple<MaybeTensor, MaybeTensor>;
using ThreeTensors = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>;
using FourTensors = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;
using MaybeType = std::optional<ScalarType>;

const Tensor* pointer(const MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; }

void run(const FusedAddForward& call, const SampleLayout& layout) {
#ifdef RDP_CUDA
  if (layout.is_cuda()) return cuda::fused_add_forward(call, layout.device());
#endif
  cpu::fused_add_forward(call);
}

void run(const FusedAddBackward& call, const SampleLayout& layout) {
#ifdef RDP_CUDA
  if (layout.is_cuda()) return cuda::fused_add_backward(call, layout.device());
#endif
  cpu::fused_add_backward(call);
}

// How the update is added; absent tensors are null.
struct Addend {
  const Tensor *gamma = nullptr, *row_scale = nullptr;
  RowTensors rows;
  double scale = 1.0;
  int64_t channel_dim = -1;
};

struct ForwardArguments {
  const Tensor *residual = nullptr, *branch = nullptr, *frozen = nullptr, *out = nullptr;
  Addend addend;
  Activation activation = Activation::none;
  bool gathers = false;
  RowTensors next_rows;
};

struct ForwardResults {
  MaybeTensor out, next, frozen_next;
  MaybeTensor inverse;  // of the rows, where it was made on a GPU
};

struct BackwardArguments {
  const Tensor *dout = nullptr, *dnext = nullptr, *dfrozen_next = nullptr;
  const Tensor *branch = nullptr, *out = nullptr, *dresidual = nullptr;
  Addend addend;
  Activation activation = Activation::none;
  RowTensors next_rows;
  int64_t batch_size = 0;
  bool in_float64 = false, wants_residual = false;
  MaybeType branch_dtype, frozen_dtype, gamma_dtype;  // dtypes of wanted gradients
};

struct BackwardResults {
  MaybeTensor dresidual, dbranch, dfrozen, dgamma;
};

ForwardResults forward(const ForwardArguments& given) {
  const Addend& addend = given.addend;
  STD_TORCH_CHECK(given.residual || given.branch, "residual or branch must be given");
  const SampleLayout layout(given.residual ? "residual" : "branch", given.residual ? *given.residual : *given.branch);
  STD_TORCH_CHECK(given.residual || !addend.rows.index, "residual must be given where rows are");
  const int64_t batch_size = layout.batch_size();

  FusedAddForward call;
  call.adds = given.branch != nullptr;
  call.activation = given.activation;
  STD_TORCH_CHECK(
      call.adds || !(given.frozen || addend.gamma || addend.rows.index || addend.row_scale || given.out),
      "branch must be given where frozen, gamma, rows, row_scale or out is");
  const CheckedRows rows("rows", layout, addend.rows, batch_size);
  call.rows = rows.rows();
  call.residual = layout.samples("residual", given.residual, batch_size);
  call.update = layout.samples("branch", given.branch, rows.num_learning());
  call.frozen_update = layout.samples("frozen", given.frozen, rows.num_frozen());
  STD_TORCH_CHECK(given.frozen || rows.num_frozen() == 0, "frozen must be given where rows are frozen");
  const Dtype dtype = given.residual ? call.residual.dtype : call.update.dtype;
  call.scale = scale_of(layout, addend.row_scale, addend.scale, rows.num_rows(), dtype);
  const int64_t channel_dim = channel_dim_of(layout, addend.gamma != nullptr, addend.channel_dim);
  call.geometry = layout.geometry(batch_size, channel_dim);
  call.gamma = layout.vector("gamma", addend.gamma, layout.size(channel_dim));
  for (const Dtype each : {call.residual.dtype, call.update.dtype, call.frozen_update.dtype, call.gamma.dtype}) {
    call.in_float64 |= each == Dtype::float64;
  }

  ForwardResults results;
  if (call.adds) {
    if (!given.out) results.out = layout.empty(batch_size, dtype);
    call.out = layout.samples("out", given.out ? *given.out : *results.out, batch_size);
    STD_TORCH_CHECK(call.out.dtype == dtype, "out must have the dtype of the residual");
  }
  const CheckedRows next_rows("next_rows", layout, given.next_rows, batch_size, false);
  if (given.gathers) {
    call.next_rows = next_rows.rows();
    results.next = layout.empty(next_rows.num_learning(), dtype);
    call.next = layout.samples("next", *results.next, next_rows.num_learning());
    if (next_rows.num_frozen() > 0) {
      results.frozen_next = layout.empty(next_rows.num_frozen(), dtype);
      call.frozen_next = layout.samples("frozen_next", *results.frozen_next, next_rows.num_frozen());
    }
  }
  run(call, layout);
  results.inverse = rows.on_device();
  return results;
}

BackwardResults backward(const BackwardArguments& given) {
  const Addend& addend = given.addend;
  STD_TORCH_CHECK(given.dout || given.dnext || given.dfrozen_next, "dout, dnext or dfrozen_next must be given");
  // A tensor without rows doesn't determine the order of dimensions.
  const bool from_next = given.dnext && (!given.dfrozen_next || (given.dnext->dim() > 0 && given.dnext->size(0) > 0));
  const Tensor& gradient = given.dout ? *given.dout : from_next ? *given.dnext : *given.dfrozen_next;
  const bool from_branch = given.branch && gradient.dim() > 0 && gradient.size(0) == 0;
  const char* given_name = given.dout ? "dout" : from_next ? "dnext" : "dfrozen_next";
  const SampleLayout layout(from_branch ? "branch" : given_name, from_branch ? *given.branch : gradient);
  const int64_t batch_size = given.batch_size;
  STD_TORCH_CHECK(batch_size >= 0, "batch_size must be at least 0, got ", batch_size);

  FusedAddBackward call;
  const CheckedRows rows("rows", layout, addend.rows, batch_size);
  const CheckedRows next_rows("next_rows", layout, given.next_rows, batch_size);
  call.rows = rows.rows();
  call.next_rows = next_rows.rows();
  call.dout = layout.samples("dout", given.dout, batch_size);
  call.dnext = layout.samples("dnext", given.dnext, next_rows.num_learning());
  call.dfrozen_next = layout.samples("dfrozen_next", given.dfrozen_next, next_rows.num_frozen());
  call.out = layout.samples("out", given.out, batch_size);
  call.update = layout.samples("branch", given.branch, rows.num_learning());
  STD_TORCH_CHECK(given.branch || !given.gamma_dtype, "branch must be given where the gradient of gamma is wanted");
  const Dtype dtype = given.dout ? call.dout.dtype : from_next ? call.dnext.dtype : call.dfrozen_next.dtype;
  call.scale = scale_of(layout, addend.row_scale, addend.scale, rows.num_rows(), dtype);
  const int64_t channel_dim = channel_dim_of(layout, addend.gamma || given.gamma_dtype, addend.channel_dim);
  call.geometry = layout.geometry(batch_size, channel_dim);
  call.gamma = layout.vector("gamma", addend.gamma, layout.size(channel_dim));
  call.in_float64 = given.in_float64;
  call.activation = given.activation;
  STD_TORCH_CHECK((call.activation != Activation::none) == (given.out != nullptr),
                  "out must be given where there is an activation, and only there");
  for (const Samples* samples : {&call.dnext, &call.dfrozen_next, &call.out}) {
    STD_TORCH_CHECK(!*samples || samples->dtype == dtype, "dnext, dfrozen_next and out must have the dtype of dout");
  }

  BackwardResults results;
  if (given.wants_residual) {
    if (!given.dresidual) results.dresidual = layout.empty(batch_size, dtype);
    call.dresidual = layout.samples("dresidual", given.dresidual ? *given.dresidual : *results.dresidual, batch_size);
    STD_TORCH_CHECK(call.dresidual.dtype == dtype, "dresidual must have the dtype of dout");
  }
  const auto make = [&](const char* name, MaybeTensor& made, int64_t num_rows, MaybeType wanted) {
    if (!wanted) return Samples();
    made = layout.empty(num_rows, dtype_of(name, *wanted));
    return layout.samples(name, *made, num_rows);
  };
  call.dupdate = make("dbranch", results.dbranch, rows.num_learning(), given.branch_dtype);
  call.dfrozen_update = make("dfrozen", results.dfrozen, rows.num_frozen(), given.frozen_dtype);
  if (given.gamma_dtype) {
    results.dgamma = layout.empty_vector(layout.size(channel_dim), dtype_of("gamma", *given.gamma_dtype));
    call.dgamma = layout.vector("dgamma", *results.dgamma, layout.size(channel_dim));
  }
  run(call, layout);
  return results;
}

ThreeTensors fused_add(const MaybeTensor& residual, const MaybeTensor& branch, const MaybeTensor& frozen,
                       const MaybeTensor& gamma, const MaybeTensor& rows, const MaybeTensor& inverse,
                       int64_t num_learning, const MaybeTensor& row_scale, double scale, int64_t channel_dim,
                       int64_t activation, bool gathers, const MaybeTensor& next_rows, const MaybeTensor& next_inverse,
                       int64_t num_next_learning, const MaybeTensor& out) {
  auto results = forward({
      .residual = pointer(residual),
      .branch = pointer(branch),
      .frozen = pointer(frozen),
      .out = pointer(out),
      .addend = {pointer(gamma), pointer(row_scale), {pointer(rows), pointer(inverse), num_learning}, scale,
                 channel_dim},
      .activation = activation_of(activation),
      .gathers = gathers,
      .next_rows = {pointer(next_rows), pointer(next_inverse), num_next_learning},
  });
  return {std::move(results.out), std::move(results.next), std::move(results.frozen_next)};
}

FourTensors fused_add_backward(const MaybeTensor& dout, const MaybeTensor& dnext, const MaybeTensor& dfrozen_next,
                               const MaybeTensor& branch, const MaybeTensor& gamma, const MaybeTensor& out,
                               const MaybeTensor& rows, const MaybeTensor& inverse, int64_t num_learning,
                               const MaybeTensor& row_scale, double scale, int64_t channel_dim, int64_t activation,
                               const MaybeTensor& next_rows, const MaybeTensor& next_inverse,
                               int64_t num_next_learning, int64_t batch_size, bool in_float64, bool wants_residual,
                               MaybeType branch_dtype, MaybeType frozen_dtype, MaybeType gamma_dtype,
                               const MaybeTensor& dresidual) {
  auto [made, dbranch, dfrozen, dgamma] = backward({
      .dout = pointer(dout),
      .dnext = pointer(dnext),
      .dfrozen_next = pointer(dfrozen_next),
      .branch = pointer(branch),
      .out = pointer(out),
      .dresidual = pointer(dresidual),
      .addend = {pointer(gamma), pointer(row_scale), {pointer(rows), pointer(inverse), num_learning}, scale,
                 channel_dim},
      .activation = activation_of(activation),
      .next_rows = {pointer(next_rows), pointer(next_inverse), num_next_learning},
      .batch_size = batch_size,
      .in_float64 = in_float64,
      .wants_residual = wants_residual,
      .branch_dtype = branch_dtype,
      .frozen_dtype = frozen_dtype,
      .gamma_dtype = gamma_dtype,
  });
  return {std::move(made), std::move(dbranch), std::move(dfrozen), std::move(dgamma)};
}

// Returns nulls if an argument doesn't fit. The caller then checks the arguments itself and raises the error.
template <class Call>
auto unless_refused(Call call) -> decltype(call()) {
  try {
    return call();
  } catch (const std::exception&) {
    return {};
  }
}

// Whether the kernels of the tensors' device have their dtypes. Asked first, as an exception costs more than a call.
bool are_served(const Tensor& residual, const Tensor* branch = nullptr, const Tensor* gamma = nullptr) {
#ifdef RDP_CUDA
  if (on_gpu(residual)) {
    const Dtype dtype = dtype_of("residual", residual.scalar_type());
    const Dtype update = branch ? dtype_of("branch", branch->scalar_type()) : dtype;
    return cuda::is_served(dtype, update, gamma ? dtype_of("gamma", gamma->scalar_type()) : dtype) &&
           cuda::has_kernels_for(residual.get_device_index());
  }
#endif
  return true;
}

ForwardResults unchecked_add(const Tensor& residual, const Tensor& branch, const MaybeTensor& gamma,
                             const MaybeTensor& row_scale, const RowTensors& rows, double scale, int64_t channel_dim,
                             int64_t activation) {
  return unless_refused([&]() -> ForwardResults {
    if (!are_served(residual, &branch, pointer(gamma))) return {};
    return forward({
        .residual = &residual,
        .branch = &branch,
        .addend = {pointer(gamma), pointer(row_scale), rows, scale, channel_dim},
        .activation = activation_of(activation),
    });
  });
}

MaybeTensor residual_add(const Tensor& residual, const Tensor& branch, const MaybeTensor& gamma,
                         const MaybeTensor& row_scale, const MaybeTensor& rows, double scale, int64_t channel_dim,
                         int64_t activation) {
  return unchecked_add(residual, branch, gamma, row_scale, {pointer(rows)}, scale, channel_dim, activation).out;
}

// Also returns the inverse of the rows for the backward, where it was given or made on a GPU, which took a launch.
TwoTensors residual_add_rows(const Tensor& residual, const Tensor& branch, const MaybeTensor& gamma,
                             const MaybeTensor& row_scale, const Tensor& rows, double scale, int64_t channel_dim,
                             int64_t activation, const MaybeTensor& inverse) {
  auto results =
      unchecked_add(residual, branch, gamma, row_scale, {&rows, pointer(inverse)}, scale, channel_dim, activation);
  return {std::move(results.out), inverse ? inverse : std::move(results.inverse)};
}

ThreeTensors residual_add_backward(const Tensor& dout, const MaybeTensor& branch, const MaybeTensor& gamma,
                                   const MaybeTensor& row_scale, bool wants_branch, const MaybeTensor& out,
                                   const MaybeTensor& rows, double scale, int64_t channel_dim,
                                   MaybeType branch_dtype, int64_t activation, const MaybeTensor& inverse) {
  STD_TORCH_CHECK(dout.dim() > 0, "dout must have its rows in dimension 0");
  STD_TORCH_CHECK(gamma || !branch, "gamma must be given where its gradient is wanted, that is, where branch is");
  const ScalarType dout_dtype = dout.scalar_type(), gamma_dtype = gamma ? gamma->scalar_type() : dout_dtype;
  if (!branch_dtype) branch_dtype = dout_dtype;
  constexpr ScalarType DOUBLE = ScalarType::Double;
  auto [dresidual, dbranch, dfrozen, dgamma] = backward({
      .dout = &dout,
      .branch = pointer(branch),
      .out = pointer(out),
      .addend = {pointer(gamma), pointer(row_scale), {pointer(rows), pointer(inverse)}, scale, channel_dim},
      .activation = activation_of(activation),
      .batch_size = dout.size(0),
      .in_float64 = dout_dtype == DOUBLE || gamma_dtype == DOUBLE || *branch_dtype == DOUBLE,
      .wants_residual = out.has_value(),
      .branch_dtype = wants_branch ? branch_dtype : std::nullopt,
      .gamma_dtype = branch ? MaybeType(gamma_dtype) : std::nullopt,
  });
  return {std::move(dresidual), std::move(dbranch), std::move(dgamma)};
}

MaybeTensor gather_rows(const Tensor& residual, const Tensor& rows) {
  return unless_refused([&]() -> MaybeTensor {
    if (!are_served(residual)) return {};
    return forward({.residual = &residual, .gathers = true, .next_rows = {&rows}}).next;
  });
}

bool has_cuda_kernels_for(int64_t device) {
#ifdef RDP_CUDA
  return cuda::has_kernels_for(int32_t(device));
#else
  return false;
#endif
}

Tensor gather_rows_backward(const Tensor& dout, const Tensor& rows, int64_t batch_size) {
  return *backward({
      .dnext = &dout,
      .next_rows = {&rows},
      .batch_size = batch_size,
      .in_float64 = dout.scalar_type() == ScalarType::Double,
      .wants_residual = true,
  }).dresidual;
}

}  // namespace
}  // namespace rdp

// The most used arguments come first, because omitted arguments cost less.
STABLE_TORCH_LIBRARY_FRAGMENT(rdp, ops) {
  ops.def(
      "native_residual_add(Tensor residual, Tensor branch, Tensor? gamma=None, Tensor? row_scale=None, "
      "Tensor? rows=None, float scale=1.0, int channel_dim=-1, int activation=0) -> Tensor?");
  ops.def(
      "native_residual_add_rows(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, Tensor rows, "
      "float scale, int channel_dim, int activation, Tensor? inverse=None) -> (Tensor?, Tensor?)");
  ops.def(
      "native_residual_add_backward(Tensor dout, Tensor? branch=None, Tensor? gamma=None, Tensor? row_scale=None, "
      "bool wants_branch=True, Tensor? out=None, Tensor? rows=None, float scale=1.0, int channel_dim=-1, "
      "ScalarType? branch_dtype=None, int activation=0, Tensor? inverse=None) -> (Tensor?, Tensor?, Tensor?)");
  ops.def("native_gather_rows(Tensor residual, Tensor rows) -> Tensor?");
  ops.def("native_gather_rows_backward(Tensor dout, Tensor rows, int batch_size) -> Tensor");
  ops.def("native_has_cuda_kernels_for(int device) -> bool");
  ops.def(
      "native_fused_add(Tensor? residual, Tensor? branch, Tensor? frozen, Tensor? gamma, Tensor? rows, "
      "Tensor? inverse, int num_learning, Tensor? row_scale, float scale, int channel_dim, int activation, "
      "bool gathers, Tensor? next_rows, Tensor? next_inverse, int num_next_learning, Tensor(a!)? out) "
      "-> (Tensor?, Tensor?, Tensor?)");
  ops.def(
      "native_fused_add_backward(Tensor? dout, Tensor? dnext, Tensor? dfrozen_next, Tensor? branch, Tensor? gamma, "
      "Tensor? out, Tensor? rows, Tensor? inverse, int num_learning, Tensor? row_scale, float scale, "
      "int channel_dim, int activation, Tensor? next_rows, Tensor? next_inverse, int num_next_learning, "
      "int batch_size, bool in_float64, bool wants_residual, "
      "ScalarType? branch_dtype, ScalarType? frozen_dtype, ScalarType? gamma_dtype, Tensor(a!)? dresidual) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
}

namespace {
template <class Library>
void implement(Library& ops) {
  ops.impl("native_residual_add_backward", TORCH_BOX(&rdp::residual_add_backward));
  ops.impl("native_gather_rows_backward", TORCH_BOX(&rdp::gather_rows_backward));
  ops.impl("native_fused_add", TORCH_BOX(&rdp::fused_add));
  ops.impl("native_fused_add_backward", TORCH_BOX(&rdp::fused_add_backward));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rdp, CPU, ops) { implement(ops); }
// The first three return null for tensors on other devices, for which the dispatcher would raise.
STABLE_TORCH_LIBRARY_IMPL(rdp, CompositeExplicitAutograd, ops) {
  ops.impl("native_residual_add", TORCH_BOX(&rdp::residual_add));
  ops.impl("native_residual_add_rows", TORCH_BOX(&rdp::residual_add_rows));
  ops.impl("native_gather_rows", TORCH_BOX(&rdp::gather_rows));
  ops.impl("native_has_cuda_kernels_for", TORCH_BOX(&rdp::has_cuda_kernels_for));
}
#ifdef RDP_CUDA
STABLE_TORCH_LIBRARY_IMPL(rdp, CUDA, ops) { implement(ops); }
#endif
