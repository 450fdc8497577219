"""One step of a block, forward and backward, and its results. Both checks of a conversion compare steps."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..paths.freezing import tensors_of
from .calls import BlockCall, Refused, cloned
from .report import describe
from .snapshot import generator_states, seed_torch, set_seed

BlockRunner = Callable[[BlockCall], Any]
"""Runs a block on the arguments of a call and returns what the block returns."""
_OWN = {"_parameters", "_buffers", "_modules", "forward", "training"}
"""Attributes of a module that `state_of` leaves out or reads in another way."""


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    Args:
        words: the words for the setting in reasons.
        dtype: the dtype of the inputs and, where it is float64, of the block. None keeps their own.
        autocast: the device type of an autocast to bfloat16, or None.
        children_train: whether the block's children are in training mode, as the block itself is.
        random: whether random functions work as usual. If not, dropout is off and all rows get the same random numbers.
    """

    words: str = ""
    dtype: torch.dtype | None = None
    autocast: str | None = None
    children_train: bool = True
    random: bool = True

    def copy_of(self, block: nn.Module) -> nn.Module:
        copied = copy.deepcopy(block)
        copied = copied.double() if self.dtype == torch.float64 else copied
        copied.train(self.children_train).training = True
        for module in copied.modules():
            if isinstance(module, nn.SyncBatchNorm):  # it would wait for other ranks, and needs a GPU
                module.__class__ = _Local  # type: ignore[assignment]
        return copied

    def inputs(self, call: BlockCall) -> BlockCall:
        return call.map_tensors(lambda t: t.to(self.dtype) if self.dtype and t.is_floating_point() else t)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.autocast, torch.bfloat16)


class _Local(_BatchNorm):
    """Replaces a SyncBatchNorm, and computes the statistics of this rank alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@dataclass
class Step:
    """The results of a forward and a backward, and the contents of the modules afterwards."""

    output: Any
    gradients: dict[str, Tensor | None]
    inputs: Any
    state: dict[str, Any]
    generators: dict[str, Any]

    def numbers(self, buffers: bool = False) -> dict[str, Tensor]:
        """The outputs, the gradients that aren't None and, if asked for, the buffers, by their names in reasons."""
        found = {f"output {i}": t.detach() for i, t in enumerate(tensors_of(self.output))}
        found |= {name: t for name, t in self.gradients.items() if t is not None}
        if buffers:
            found |= {name: t for name, t in self.state.items() if name.startswith("the buffer") and t is not None}
        return found


def step_of(
    block: nn.Module, call: BlockCall, run: BlockRunner, setting: Setting, seed: int = 0, backward: bool = True
) -> Step:
    """Runs a block forward and, with fixed random gradients of its outputs, backward."""
    for parameter in block.parameters():
        parameter.grad = None
    given = setting.inputs(call).map_tensors(
        lambda t: cloned(t).requires_grad_() if t.is_floating_point() else cloned(t)
    )
    inputs = enumerate(given.flat()[0])
    leaves = {f"the gradient of input {i}": t for i, t in inputs if isinstance(t, Tensor) and t.requires_grad}
    passed = given.map_tensors(lambda t: t.clone() if t.requires_grad else t)  # a leaf can't be changed in place
    set_seed(seed)
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for mode in () if setting.random else (WithoutDropout(), _SameForAllRows()):
            stack.enter_context(mode)
        with setting.context():
            output = run(passed)
        learning = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [(torch.rand(t.shape, device="cpu", generator=generator) + 0.5).to(t) for t in learning]
        if learning and backward:
            torch.autograd.backward(learning, weights)
    leaves |= {f"the gradient of {name}": p for name, p in block.named_parameters() if p.requires_grad}
    gradients = {name: t.grad for name, t in leaves.items()}
    return Step(output, gradients, (passed.args, passed.kwargs), state_of(block), generator_states())


def step_of_converted(
    block: nn.Module, call: BlockCall, run: BlockRunner, setting: Setting, when: str, **options: Any
) -> Step:
    """A step of a converted block. Raises `Refused` if it fails or runs as before the conversion."""
    try:
        step = step_of(block, call, run, setting, **options)
    except Exception as error:
        raise Refused(f"{when} it raises {describe(error)}") from error
    for reason in block.__dict__.get("_rdp_warned", ()):
        raise Refused(f"{when} it runs as before its conversion: {reason}")
    return step


def called(block: nn.Module) -> BlockRunner:
    """Calls a block's forward with its hooks, but not a `__call__` that its class defines. Layers of transformers
    checkpoint in theirs, and the recomputation would ask for masks a second time."""
    return lambda call: nn.Module.__call__(block, *call.args, **call.kwargs)


def state_of(block: nn.Module) -> dict[str, Any]:
    """The contents of the modules, by their names in reasons."""
    state: dict[str, Any] = {}
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        state |= {f"the parameter {prefix + n!r}": p for n, p in module._parameters.items()}
        state |= {f"the buffer {prefix + n!r}": b for n, b in module._buffers.items()}
        for attribute, value in module.__dict__.items():
            if attribute.startswith("_rdp_") or attribute in _OWN:
                continue
            hooks = (attribute.endswith("hooks") or "_hooks_" in attribute) and hasattr(value, "__len__")
            state[f"the attribute {prefix + attribute!r}"] = len(value) if hooks else value
    return state


# The same random numbers for the original and the converted block


_DROPOUTS = {
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, nn.functional.dropout, nn.functional.dropout1d,
    nn.functional.dropout2d, nn.functional.dropout3d, nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout,
}  # fmt: skip


class WithoutDropout(TorchFunctionMode):
    """Makes dropout functions return their input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if len(args) <= 4 else {}
        return func(*args, **kwargs)


class _SameForAllRows(TorchDispatchMode):
    """Makes random functions return the same numbers for every row, for any number of rows and in every call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        seed_torch(0)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not isinstance(out, Tensor) or out.dim() == 0:
            return out
        many = out.new_empty((_MANY, *out.shape[1:]))
        seed_torch(0)
        if name in _FILL or (name == "bernoulli_" and not isinstance(args[1], Tensor)):
            func(many, *args[1:], **kwargs)
        elif name in ("rand_like", "randn_like", "randint_like"):
            many = func(many, *args[1:], **kwargs)
        elif name in ("rand", "randn", "randint"):
            many = func(*([_MANY, *a[1:]] if isinstance(a, list) else a for a in args), **kwargs)
        elif name == "bernoulli":
            return out.copy_(many.uniform_()[0] < args[0])
        else:
            return out
        return out.copy_(many[0].expand_as(out))


_FILL = {"uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"}
_MANY = 33
"""How many rows are drawn to take the first: torch fills the last sixteen numbers of a small tensor in another way."""
