"""The rest of a model, everything outside of the branches, and how a reuse iteration freezes it.

As with paths, freezing acts around calls: while a module of the rest runs, the rest's parameters don't require grad.
Outside of forwards every flag is the user's own, so that copies, checkpoints, optimizers and callbacks see no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .frozen import Place, check_freezable, freeze
from .paths import Path, modules_of


class Rest:
    """Freezes the rest of `model` during calls for which `frozen()` is true.

    Args:
        model: the model of a scheme.
        paths: its paths; what belongs to none of them is the rest.
        frozen: asked when a module of the rest is called in training mode.
        freeze_bn: frozen BatchNorms run in eval mode.
    """

    def __init__(self, model: nn.Module, paths: Sequence[Path], frozen: Callable[[], bool], freeze_bn: bool):
        self.model, self._is_frozen, self._freeze_bn = model, frozen, freeze_bn
        self._branches = {id(module) for path in paths for module in path.module.branch_modules()}
        self._in_branches = {id(module) for path in paths for module in modules_of(path.module)}
        self._owned = {(id(module), name) for path in paths for module, name in path.module.own_parameters()}
        self.in_graph = False
        """While a model that is compiled whole runs, in which no flag may change; gradients are thrown away instead."""
        self._outermost: nn.Module | None = None
        self._freeze: freeze | None = None
        self.refresh()
        self._handles = []
        hooked = {around for name in self._names for around in _around(name)}
        for name, module in self._walk():
            if name in hooked:
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter)))
                self._handles.append(module.register_forward_hook(_Hook(self._leave), always_call=True))

    def refresh(self) -> None:
        """Looks up what the rest consists of now; users add heads and swap layers."""
        self._places: list[Place] = []
        self._batch_norms: list[nn.Module] = []
        self._names: set[str] = set()
        for name, module in self._walk():
            named = module._parameters.items()
            own = [(module, key) for key, p in named if p is not None and (id(module), key) not in self._owned]
            batch_norm = isinstance(module, _BatchNorm) and id(module) not in self._in_branches
            self._places += own
            self._batch_norms += [module] * batch_norm
            if own or batch_norm:
                self._names.add(name)

    def parameters(self) -> list[nn.Parameter]:
        return [module._parameters[name] for module, name in self._places]  # type: ignore[misc]

    def check_entry(self, path: Path) -> None:
        """Raises where `path` runs in a frozen rest although no module around it was called.

        What then ran before it, a method of the model for example, may have used parameters that should be frozen.
        """
        if self._outermost is not None:
            return
        parts = path.name.split(".")
        for end in range(len(parts)):
            around = ".".join(parts[:end])
            own = self.model.get_submodule(around).parameters(recurse=False) if around in self._names else ()
            if any(p.requires_grad for p in own):
                raise RuntimeError(
                    f"path {path.name!r} runs in a reuse iteration without a call of {around or 'the model'!r}, whose "
                    "own parameters are frozen during its calls: call the module itself rather than one of its "
                    "methods, or let the rest learn with train_rest=True"
                )

    def release(self) -> None:
        """Puts flags back where a call was left by something that runs no hooks, such as KeyboardInterrupt."""
        if self._freeze is not None:
            self._freeze.__exit__()
        self._outermost = self._freeze = None

    def remove(self) -> None:
        self.release()
        for handle in self._handles:
            handle.remove()

    def _walk(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules outside of branches with their names, each once, parents first."""
        seen: set[int] = set()
        stack = [("", self.model)]
        while stack:
            name, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield name, module
            prefix = f"{name}." if name else ""
            children = [(prefix + n, child) for n, child in module.named_children() if id(child) not in self._branches]
            stack += reversed(children)

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if not self.in_graph and self._outermost is None and module.training and self._is_frozen():
            check_freezable(self._places)
            self._outermost = module
            self._freeze = freeze(self._places, self._batch_norms if self._freeze_bn else ())
            self._freeze.__enter__()

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if not self.in_graph and self._outermost is module:
            self.release()


def _around(name: str) -> Iterator[str]:
    """A module's name and those of the modules around it; that of the model is empty."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


class _Hook:
    """A forward hook that does nothing in a copy or pickle of its module."""

    def __init__(self, call: Callable[..., None] | None = None):
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __reduce__(self) -> tuple:
        return _Hook, ()
