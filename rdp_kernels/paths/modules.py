"""The modules that users build networks from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from .. import ops
from .._utils.checks import check_bool, check_choice, check_probability
from ..kernels.spec import ACTIVATIONS, NORMS, ActivationName, NormModule
from ..plan import MODES
from .arguments import Args, Kwargs, Takes, taken_by
from .binding import PathBinding
from .call import run_path
from .freezing import ParameterRef
from .norms import has_hooks
from .sequence import run_sequence


class DropPath(nn.Module):
    """Sets random samples of a branch's output to zero in training, like timm's `DropPath`.

    The meaning and the repr are those of timm's. The forward is `drop_path`. The branch before it is computed for every
    sample. A `ResidualBranch` skips the dropped ones instead.

    Args:
        drop_prob: P(drop), in [0, 1].
        scale_by_keep: whether kept samples are scaled by 1 / (1 − drop_prob).

    Raises:
        TypeError: if an argument has the wrong type. The error names the argument.
        ValueError: if `drop_prob` isn't in [0, 1].

    Example:
        >>> drop = rdp.DropPath(0.5)
        >>> drop
        DropPath(drop_prob=0.500)
        >>> drop(torch.ones(4, 1)).flatten()
        tensor([0., 2., 0., 0.])
        >>> drop.eval()(torch.ones(4, 1)).flatten()
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = check_probability("drop_prob", drop_prob)
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `drop_path(x, drop_prob, training, scale_by_keep)`."""
        return ops.drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


class ResidualBranch(nn.Module):
    """Adds the output of a module to its input, and in training skips the samples that are dropped.

    It is one path, a residual branch with its add: `act(shortcut(x) + row_scale · γ · fn(norm(x), *args, **kwargs))`.
    Without a scheme it is stochastic depth that computes the kept samples only (Huang et al., arXiv 1603.09382); masks
    come from torch's global CPU generator. In eval mode it is the plain residual. Under a `ResidualDropPath` scheme it
    follows the scheme's plan.

    The output has the dtype of the residual, `shortcut(x)` or x, whatever the branch's dtype is, under autocast too. A
    bfloat16 residual loses updates that are small beside it, for example behind a γ of 1e-6: cast it to float32.

    `fn` isn't run on dropped samples, so that its forward hooks see the kept rows only. A path that is dropped for the
    whole batch returns x itself, without a copy: don't change the output in place.

    `fn`, `norm` and `shortcut` are submodules, and `gamma` is a parameter.

    Args:
        fn: the branch, a module that treats the samples (rows of dimension 0) independently, except for BatchNorm.
        drop_prob: P(drop), in [0, 1].
        mode: `"sample"` draws for each sample, `"block"` once for the batch. `"block"` holds under a scheme in sample
            mode too: it is for branches whose rows are not the samples (windows, patches).
        scale_by_keep: whether kept rows are scaled by 1 / (1 − drop_prob) in training.
        norm: a LayerNorm or RMSNorm before `fn`. As an argument of its own it can be fused with the gather of rows.
        gamma: the LayerScale vector, `[C]`, or None. A tensor is copied, a Parameter is kept.
        shortcut: a module for the residual, for example a strided convolution; None for the identity.
        activation: None or `"relu"`, after the sum.
        channel_dim: the dimension of the channels, for γ: −1 for `[..., C]`, 1 for NCHW.
        per_sample: names of keyword arguments, or positions among the arguments after `x`, that have a row for each
            sample. The branch gets only the rows of these that belong to its samples. Other arguments are passed on as
            they are.

    Raises:
        TypeError: if an argument has the wrong type. The error names the argument.
        ValueError: if `drop_prob` isn't in [0, 1], `channel_dim` is 0, `mode` or `activation` is unknown, or
            `per_sample` names something that `fn` doesn't take.

    Example:
        >>> block = rdp.ResidualBranch(nn.Linear(8, 8), norm=nn.LayerNorm(8), drop_prob=0.5)
        >>> _ = block.fn.register_forward_hook(lambda fn, args, out: print("rows computed:", len(out)))
        >>> block(torch.randn(8, 8)).shape
        rows computed: 6
        torch.Size([8, 8])
        >>> block.eval()(torch.randn(8, 8)).shape
        rows computed: 8
        torch.Size([8, 8])
    """

    promotion = None

    def __init__(
        self,
        fn: nn.Module,
        *,
        drop_prob: float = 0.0,
        mode: Literal["sample", "block"] = "sample",
        scale_by_keep: bool = True,
        norm: NormModule | None = None,
        gamma: Tensor | None = None,
        shortcut: nn.Module | None = None,
        activation: ActivationName | None = None,
        channel_dim: int = -1,
        per_sample: Collection[str | int] = (),
    ):
        super().__init__()
        _check_module("fn", fn, nn.Module, "a torch.nn.Module, so that its parameters are known")
        _check_has_forward("fn", fn)
        norms = [kind.module for kind in NORMS.values()]
        names = ", ".join(kind.__name__ for kind in norms)
        _check_module("norm", norm, (*norms, type(None)), f"{names} or None; put others in fn")
        _check_module("shortcut", shortcut, (nn.Module, type(None)), "a torch.nn.Module or None")
        _check_has_forward("shortcut", shortcut)
        check_choice("mode", mode, MODES)
        check_choice("activation", activation, (None, *ACTIVATIONS))
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an integer, got {channel_dim!r}")
        if channel_dim == 0:
            raise ValueError("channel_dim must name a dimension other than 0, which is that of the rows, got 0")
        self.fn, self.norm, self.shortcut = fn, norm, shortcut
        self.gamma = _as_gamma(gamma)
        self.drop_prob = check_probability("drop_prob", drop_prob)
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)
        self.mode: Literal["sample", "block"] = mode
        self.activation: ActivationName | None = activation
        self.channel_dim = channel_dim
        self.per_sample = _check_per_sample(per_sample, fn)
        self.binding = PathBinding()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the path on `x`, `[B, ...]`. The further arguments go to `fn`."""
        return run_path(self, x, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise _cant_be_scripted(self)

    def is_plain(self) -> bool:
        """Whether `ResidualSequence` may run the parts of a call itself.

        Returns:
            True if the call is `run_path`, has no shortcut and no activation, and is seen by nothing else, such as
            hooks.
        """
        return (
            type(self).forward is ResidualBranch.forward
            and type(self).run_branch is ResidualBranch.run_branch
            and self._compiled_call_impl is None
            and self.binding.call_override is None
            and not has_hooks(self)
            and self.shortcut is None
            and self.activation is None
        )

    def branch_modules(self) -> list[nn.Module]:
        """The modules of the branch.

        Returns:
            `norm`, if there is one, and `fn`.
        """
        modules = self._modules  # a third of the time of self.fn
        fn, norm = modules["fn"], modules.get("norm")
        return [fn] if norm is None else [norm, fn]  # type: ignore[list-item]

    def own_parameters(self) -> list[ParameterRef]:
        """The path's parameters outside of `branch_modules`.

        Returns:
            This module and the name of its `gamma`, if it has one.
        """
        return [] if self.gamma is None else [(self, "gamma")]

    def map_rows(
        self, function: Callable[[Tensor], Tensor], batch_size: int | None, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Applies a function to the further arguments that have a row for each sample.

        Args:
            function: a function of a tensor, such as the choice of some of its rows.
            batch_size: the number of rows that these arguments must have; None skips the check.
            args: the positional arguments after `x`.
            kwargs: the keyword arguments.

        Returns:
            The positional and the keyword arguments, with `function` applied to those that `per_sample` names.

        Raises:
            TypeError: if an argument that `per_sample` names isn't a tensor.
            ValueError: if it doesn't have a row for each sample.
        """

        def apply(name: str | int, value: Any) -> Any:
            if name not in self.per_sample or value is None:
                return value
            if not isinstance(value, Tensor):
                raise TypeError(f"per_sample argument {name!r} must be a tensor, got {type(value).__name__}")
            if value.dim() == 0 or batch_size not in (None, value.shape[0]):
                raise ValueError(
                    f"per_sample argument {name!r} must have a row for each of the {batch_size} samples, "
                    f"got shape {list(value.shape)}"
                )
            return function(value)

        return tuple(apply(i, v) for i, v in enumerate(args)), {name: apply(name, v) for name, v in kwargs.items()}

    def takes(self) -> Takes:
        """The arguments that a call takes besides `x`.

        Returns:
            Their names, those that go by position and those that go by name, and whether there may be any others.
        """
        if type(self).forward is not ResidualBranch.forward:
            own = taken_by(self)
            if not (own.any_positional or own.any_by_name):
                return own
        return taken_by(self.fn)

    def run_branch(self, x: Tensor, args: Args, kwargs: Kwargs, normed: bool = False) -> Tensor:
        """Runs the branch alone, without γ and the residual add.

        Args:
            x: the rows to run on, `[K, ...]`.
            args: the positional arguments after `x`.
            kwargs: the keyword arguments.
            normed: whether `x` is the output of `norm` already.

        Returns:
            The update, `[K, ...]`.
        """
        if not normed and self.norm is not None:
            x = self.norm(x)
        out: Tensor = self.fn(x, *args, **kwargs)
        return out

    def extra_repr(self) -> str:
        parts = [f"drop_prob={round(self.drop_prob, 3):0.3f}", f"mode={self.mode}"]
        if self.gamma is not None:
            parts.append(f"gamma={list(self.gamma.shape)}")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        return ", ".join(parts)


class ResidualSequence(nn.Sequential):
    """Runs `ResidualBranch` modules in a row, with fused kernels between them.

    It is a `torch.nn.Sequential` that passes further arguments on to its branches.

    `forward(x, *args, **kwargs)` equals `for branch in branches: x = branch(x, *args, **kwargs)`, except that a branch
    gets only those keyword arguments that its `fn.forward` takes by name, or all if that takes `**kwargs`. An attention
    branch with a `mask` and an MLP without one can therefore stand in one sequence. The forward raises `TypeError` for
    a keyword argument that no branch takes, and for positional arguments that a branch doesn't take.

    Where kernels serve it, one kernel adds a branch's update, normalises the sum and gathers the next branch's rows.
    The residual between branches, which nothing else sees, is then updated in place, unless the backward of a norm
    reads it. A branch with hooks, a shortcut or an activation is called as a module.

    Args:
        *branches: modules of type `ResidualBranch`, or one `OrderedDict` of them, as `torch.nn.Sequential` takes it.

    Raises:
        TypeError: if a module isn't a `ResidualBranch`.

    Example:
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8), norm=nn.LayerNorm(8)) for _ in range(3)]
        >>> net, x = rdp.ResidualSequence(*branches), torch.randn(4, 8)
        >>> torch.allclose(net(x), branches[2](branches[1](branches[0](x))), atol=1e-6)
        True
    """

    def __init__(self, *branches: Any):
        super().__init__(*branches)  # slicing a Sequential passes an OrderedDict
        for name, branch in self.named_children():
            _check_module(f"branches[{name}]", branch, ResidualBranch, "a ResidualBranch")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Runs the paths on `x`, `[B, ...]`, one after the other."""
        return run_sequence(self, x, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise _cant_be_scripted(self)


def _cant_be_scripted(module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"torch.jit.script can't compile {type(module).__name__}, which decides in Python what runs: use "
        "torch.export.export, or torch.jit.trace, on the model in eval mode"
    )


def _check_module(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def _check_has_forward(name: str, module: nn.Module | None) -> None:
    forward = getattr(type(module), "forward", None)
    if forward is nn.Module.forward and "forward" not in vars(module):
        raise TypeError(f"{name} must be a module with a forward, but {type(module).__name__} has none")


def _as_gamma(gamma: Tensor | None) -> nn.Parameter | None:
    if gamma is None:
        return None
    if not isinstance(gamma, Tensor) or gamma.dim() != 1 or not gamma.is_floating_point():
        came = f"{gamma.dtype} of shape {list(gamma.shape)}" if isinstance(gamma, Tensor) else repr(gamma)
        raise TypeError(f"gamma must be a floating-point tensor of shape [C] or None, got {came}")
    return gamma if isinstance(gamma, nn.Parameter) else nn.Parameter(gamma.detach().clone())


def _check_per_sample(per_sample: Collection[str | int], fn: nn.Module) -> frozenset[str | int]:
    """`per_sample` with each argument under its name and its position, where it has both: callers may use either."""
    if isinstance(per_sample, str) or not isinstance(per_sample, Collection):
        raise TypeError(f"per_sample must be a collection of names and positions, got {per_sample!r}")
    takes = taken_by(fn)
    positional, open_ended = takes.positional, takes.any_positional or takes.any_by_name
    named = list(dict.fromkeys([*positional, *takes.by_name]))
    found: set[str | int] = set()
    for entry in per_sample:
        if isinstance(entry, bool) or not isinstance(entry, (str, int)):
            raise TypeError(f"per_sample must hold names and positions, got {entry!r}")
        known = entry in named if isinstance(entry, str) else 0 <= entry < len(positional)
        if not known and not open_ended:
            raise ValueError(f"per_sample names {entry!r}, but besides its input fn takes {named}")
        found.add(entry)
        if isinstance(entry, str) and entry in positional:
            found.add(positional.index(entry))
        elif isinstance(entry, int) and 0 <= entry < len(positional):
            found.add(positional[entry])
    return frozenset(found)
