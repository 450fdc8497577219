"""Freezing: keeps a branch from learning, and skips the work that freezing makes needless.

Autograd already leaves out a frozen weight's gradient (wgrad). For matmuls it also leaves out saving the input, which
only the wgrad needs. This module does the rest:

| function | what it skips of a frozen branch |
|---|---|
| `Frozen` | the wgrad: parameters get no gradient, and running statistics don't move, during one call |
| `add_detached` | the whole backward and every saved activation (`freeze="branch"`) |
| `SaveLess` | inputs that autograd saves for convolution and eval-mode BatchNorm although no weight learns |

`refuse_second_derivatives` refuses the derivatives that freezing doesn't stop. `touch` is the reverse of freezing: it
gives gradients of zeros to weights that learn on other ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from .._utils.checks import is_transformed
from ..kernels.spec import ACTIVATIONS

ParameterRef = tuple[nn.Module, str]
"""A parameter, as its module and its name there. FSDP puts another object under that name while the module runs."""

FreezeBN = Literal[True, False, "running"]
"""As in `ResidualDropPath`."""


def check_freeze_bn(value: object) -> FreezeBN:
    """Returns `value`. Raises `ValueError` where it isn't a `FreezeBN`."""
    if not isinstance(value, (bool, str)) or value not in (True, False, "running"):
        raise ValueError(f'freeze_bn must be True, False or "running", got {value!r}')
    return value  # type: ignore[return-value]


class RequiresGrad:
    """Context: sets `requires_grad` of the parameters `refs` to `flag`. Parameters that have it already are left alone.

    The exit restores the flags, also after an exception: of the parameters that were changed, and of those that have
    taken their names since. A computed weight, as `torch.func.functional_call` puts in a parameter's place, has no flag
    to change. Where it must not require grad, the context replaces it by a detached one.
    """

    def __init__(self, refs: Iterable[ParameterRef], flag: bool):
        self._refs, self._flag = refs, flag
        self._changed: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._detached: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> RequiresGrad:
        flag = self._flag
        for module, name in self._refs:
            parameter = module._parameters.get(name)
            if parameter is None or parameter.requires_grad == flag:  # also where a tied parameter comes again
                continue
            if parameter.is_leaf:
                parameter.requires_grad_(flag)
                self._changed.append((module, name, parameter))
            elif not flag:
                module._parameters[name] = parameter.detach()  # type: ignore[assignment]
                self._detached.append((module, name, parameter))
        return self

    def __exit__(self, *exc: object) -> None:
        for module, name, parameter in self._detached:
            module._parameters[name] = parameter
        for module, name, parameter in self._changed:
            parameter.requires_grad_(not self._flag)
            current = module._parameters.get(name)
            if current is not None and current is not parameter:
                current.requires_grad_(not self._flag)


class Frozen(RequiresGrad):
    """Context: the parameters `refs` don't require grad, and no running statistics in `modules` move.

    With `freeze_bn=True` norms in training mode still normalise by the batch. With `"running"` they are in eval mode.
    With `False` they are left alone, and their statistics move. With `saves_less`, `SaveLess` is entered too, where it
    has any effect.
    """

    def __init__(
        self,
        refs: Iterable[ParameterRef],
        modules: Collection[nn.Module] = (),
        freeze_bn: FreezeBN = True,
        saves_less: bool = False,
    ):
        super().__init__(refs, False)
        self._switch = "training" if freeze_bn == "running" else "track_running_stats"
        norms = [m for m in modules if isinstance(m, _NormBase)] if freeze_bn else []
        self._norms = [(m, m._buffers) for m in norms if m.training and getattr(m, self._switch)]
        self._may_save_less = modules if saves_less else ()
        self._mode: SaveLess | None = None

    def __enter__(self) -> Frozen:
        super().__enter__()
        for norm, buffers in self._norms:
            setattr(norm, self._switch, False)
            if not norm.training or type(norm).forward in _READ_THE_SWITCH:
                continue
            if isinstance(norm, _InstanceNorm):  # it moves its statistics in spite of the switch
                norm._buffers = {**buffers, "running_mean": None, "running_var": None}
            else:  # other libraries' BatchNorms may do so as well: they move copies
                norm._buffers = {name: None if b is None else b.clone() for name, b in buffers.items()}
        if save_less_pays(self._may_save_less):  # norms have their modes now
            self._mode = SaveLess()
            self._mode.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
        super().__exit__()
        for norm, buffers in self._norms:
            setattr(norm, self._switch, True)
            if norm._buffers is not buffers:
                norm._buffers = buffers


_READ_THE_SWITCH = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm or an InstanceNorm with running statistics."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def check_freezable(refs: Iterable[ParameterRef]) -> None:
    """Raises `RuntimeError` where a derivative is taken that `requires_grad` doesn't stop."""
    if not is_transformed():
        return
    parameters = [module._parameters.get(name) for module, name in refs]
    unpack = torch.autograd.forward_ad.unpack_dual
    has_tangent = any(p is not None and unpack(p).tangent is not None for p in parameters)
    if torch._C._are_functorch_transforms_active() or has_tangent:
        raise RuntimeError(
            "weights are frozen by requires_grad, which torch.func and forward-mode AD ignore: differentiate a reuse "
            'iteration by backward() or torch.autograd.grad, or use freeze="none"'
        )


def refuse_second_derivatives(out: Tensor) -> Tensor:
    """Returns `out`, the output of a frozen call. A backward with `create_graph=True` through it raises `RuntimeError`.

    Autograd saves the weight itself, not the flag that it had. In the backward the weight requires grad again, so that
    a graph of the gradient would include it. Grad is enabled in a backward only where it makes such a graph.
    """
    if out.requires_grad and not torch.compiler.is_compiling():
        node = out.grad_fn
        if node is not None:  # the call didn't compute a leaf
            node.register_prehook(_refuse)  # half the cost of a tensor's hook, and no part of pickles of `out`
    return out


def _refuse(_: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a backward with create_graph=True reached what a reuse iteration has frozen. Freezing stops first "
            "derivatives only, so that second derivatives would give gradients to frozen weights: compute gradient "
            'penalties in the drop iteration or outside of iterations, or use freeze="none"'
        )


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in a module's output, which may be a dataclass or any container that pytrees know."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from tensors_of([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def add_detached(residual: Tensor, compute: Callable[[], Tensor], activation: str | None = None) -> Tensor:
    """`compute()`, a path's whole output, with the branch detached: the gradient is that of `act(residual + constant)`.
    `compute` runs without recording anything."""
    if not is_transformed():
        return _AddDetached.apply(residual, compute, activation)
    with torch.no_grad():
        out = compute().detach()
    passed = residual if activation is None else residual * ACTIVATIONS[activation].derivative(out)
    return out + (passed - passed.detach())  # has the values of `out`


class _AddDetached(torch.autograd.Function):
    """A path whose branch is detached: d residual = d out · act'(out).

    It saves nothing, or with an activation its output. The branch's graph never exists, because an autograd function's
    `forward` runs without grad. Double backward works, as the gradient is linear in d out.
    """

    @staticmethod
    def forward(ctx, residual, compute, activation):
        out = compute()
        ctx.activation = activation
        if activation is not None:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, dout):
        for out in ctx.saved_tensors:
            dout = dout * ACTIVATIONS[ctx.activation].derivative(out)
        return dout, None, None


def touch(out: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Returns `out`, whose backward also gives zeros to `others` and all that they were computed from. Reads no value
    of `others`."""
    return _Touch.apply(out, *others)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, *others):
        ctx.like = [(t.shape, t.new_empty(())) for t in others]
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout, *(like.new_zeros(shape) for shape, like in ctx.like)

    @staticmethod
    def jvp(ctx, dout, *_):
        return dout.clone()


class SaveLess(TorchFunctionMode):
    """Context: convolutions and eval-mode BatchNorms with frozen weights don't save their inputs.

    Autograd has one formula for the gradients of such a layer's input, weight and bias. It saves the input for it, even
    where only the input's gradient is wanted, which doesn't need it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SAVING_LESS and not is_transformed():
            out = _SAVING_LESS[func](*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def save_less_pays(modules: Iterable[nn.Module]) -> bool:
    """Whether `SaveLess` has any effect. It costs a microsecond for every torch call within."""
    return any(isinstance(m, _ConvNd) or (isinstance(m, _BatchNorm) and not m.training) for m in modules)


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weight and bias are frozen.

    It saves the weight, and of the input only the shape, which is all that the dgrad needs. Double backward works.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight.detach())  # the weight itself would require grad again in the backward
        ctx.config = (stride, padding, dilation, groups)
        ctx.shape = x.shape
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx, dout):
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.config
        shape_only = dout.new_empty(1).expand(ctx.shape)
        options = (stride, padding, dilation, False, [0] * len(stride), groups)
        dx, *_ = torch.ops.aten.convolution_backward(dout, shape_only, weight, None, *options, [True, False, False])
        return dx, None, None, None, None, None, None


class _FrozenBatchNorm(torch.autograd.Function):
    """Eval-mode BatchNorm whose affine weights are frozen: y = x · scale[c] + shift[c], dx = dy · scale[c].

    It saves the scale, `[C]`, and not the input. The forward is torch's own, to the bit. Double backward works.
    """

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(scale if weight is None else scale * weight)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx, dout):
        (scale,) = ctx.saved_tensors
        return (dout * scale.view([-1 if d == 1 else 1 for d in range(dout.dim())])).to(dout.dtype), *[None] * 5


def _conv_saving_less(num_dims: int):
    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if learns or not input.requires_grad or isinstance(padding, str) or input.dim() != num_dims + 2:
            return None
        if torch.is_autocast_enabled(input.device.type) or input.dtype != weight.dtype:
            return None  # autocast's casts happen in the dispatcher, below this function
        stride, padding, dilation = (_per_dim(v, num_dims) for v in (stride, padding, dilation))
        return _FrozenConv.apply(input, weight, bias, stride, padding, dilation, groups)

    return conv


def _batch_norm_saving_less(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    learns = any(p is not None and p.requires_grad for p in (weight, bias))
    if training or running_mean is None or learns or not input.requires_grad:
        return None
    return _FrozenBatchNorm.apply(input, running_mean, running_var, weight, bias, eps)


def _per_dim(value: int | tuple[int, ...], num_dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * num_dims if len(values) == 1 else values


_SAVING_LESS: dict[Callable, Callable] = {
    torch.conv1d: _conv_saving_less(1),
    torch.conv2d: _conv_saving_less(2),
    torch.conv3d: _conv_saving_less(3),
    torch.nn.functional.batch_norm: _batch_norm_saving_less,
}
