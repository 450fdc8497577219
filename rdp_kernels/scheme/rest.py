"""The rest of a model, everything outside of the branches, and how a reuse iteration freezes it.

The rest is frozen during calls, as paths are: while one of its modules runs, its parameters don't require grad. Outside
of forwards every flag is as the user set it, so that copies, checkpoints, optimizers and callbacks see no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..paths import freezing
from ..paths.binding import PathModule
from ..paths.freezing import FreezeBN, Frozen, ParameterRef
from ..paths.parts import BranchParts, Tree, walk
from ..paths.path import Path, parts_of, path_modules_among


class Rest:
    """Freezes the rest of `model` during calls for which `frozen()` is true.

    Args:
        model: the model of a scheme.
        paths: the model's paths. Everything that belongs to none of them is the rest.
        frozen: whether the rest is frozen now. It is called when a module of the rest is called in training mode.
        freeze_bn: as in `ResidualDropPath`.
    """

    def __init__(self, model: nn.Module, paths: Sequence[Path], frozen: Callable[[], bool], freeze_bn: FreezeBN):
        self.model, self.paths, self._is_frozen, self._freeze_bn = model, paths, frozen, freeze_bn
        self.in_graph = False
        """True while a model that is compiled whole runs. Flags may not change then: gradients are discarded."""
        self.runs_frozen = False
        """Whether a module of the rest is running and is frozen."""
        self.parts: list[BranchParts] = []
        """The modules of each path's branch."""
        self.shared: list[list[ParameterRef]] = []
        """The parameters of each path that the rest shares. The list is empty if the rest shares none."""
        self.names: set[str] = set()
        """Names of the modules that own parameters or running statistics of the rest."""
        self.handles: dict[int, list[RemovableHandle]] = {}
        """The handles of the hooks, by the module's id."""
        self._hooked: dict[int, nn.Module] = {}
        self._walked: list[nn.Module] = []
        """The modules outside of branches."""
        self._tree: Tree | None = None
        self._seen: list[Any] = []
        """What `_look` saw when these modules were last looked up."""
        self._outermost: nn.Module | None = None
        self._freeze: Frozen | None = None
        self.refresh()

    def refresh(self) -> None:
        """Looks up what the rest is now, as users add heads, swap layers and replace branches."""
        parts = [parts_of(path.module) for path in self.paths]
        if parts != self.parts or not self._is_current():
            self._look_up(parts)
        self._find_shared()

    def _look_up(self, parts: list[BranchParts]) -> None:
        self._tree, self.parts = None, parts
        self._refs: list[ParameterRef] = []
        self._batch_norms: list[nn.Module] = []
        self._holders: dict[int, str] = {}
        self._path_modules: list[PathModule] = []
        self.names = set()
        self._branches = {id(module) for branch in parts for module in branch.tops}
        in_branches = [module for branch in parts for module in branch.modules]
        inside = set(map(id, in_branches))
        self.nested = bool(path_modules_among(in_branches))
        """Whether a path lies inside another."""
        self._own_refs = [path.module.own_parameters() for path in self.paths]
        owned = {(id(module), name) for refs in self._own_refs for module, name in refs}
        walked = list(self._walk())
        for name, module in walked:
            named = module._parameters.items()
            own = [(module, key) for key, p in named if p is not None and (id(module), key) not in owned]
            batch_norm = freezing.keeps_statistics(module) and id(module) not in inside
            self._refs += own
            self._batch_norms += [module] * batch_norm
            if own or batch_norm:
                self.names.add(name)
            for path_module in path_modules_among([module]):
                self._holders[id(path_module)] = name
                self._path_modules.append(path_module)
        self._hook(walked)
        self._walked = [module for _, module in walked]
        self._seen, self._tree = self._look(), Tree(self._walked)

    def _look(self) -> list[Any]:
        """What `_look_up` depends on besides the tree of modules: which parameters and running statistics there are.
        (A block that is converted gets another class.)"""
        seen: list[Any] = []
        for module in self._walked:
            if module._parameters:
                seen.append((module, [(name, p is None) for name, p in module._parameters.items()]))
            if module._buffers:
                seen.append((module, freezing.keeps_statistics(module)))
        return seen

    def _is_current(self) -> bool:
        """Whether the modules outside of branches, and their parameters, are those that were looked up."""
        return self._tree is not None and self._tree.is_unchanged() and self._look() == self._seen

    def _find_shared(self) -> None:
        """Looks up the parameters that the rest shares with branches, which change when a weight is tied."""
        in_rest, self.shared = set(map(id, self.parameters())), []
        holders = [module for branch in self.parts for module in branch.modules if module._parameters]
        in_branches = [p for module in holders for p in module._parameters.values()]
        own = [module._parameters.get(name) for module, name in chain.from_iterable(self._own_refs)]
        if in_rest.isdisjoint(map(id, chain(in_branches, own))):
            return
        for branch, own_refs in zip(self.parts, self._own_refs, strict=True):
            refs = branch.parameter_refs() + own_refs
            self.shared.append([(m, name) for m, name in refs if id(m._parameters.get(name)) in in_rest])

    def _hook(self, walked: list[tuple[str, nn.Module]]) -> None:
        """Registers hooks on the modules in `names` and those around them, and removes them from others."""
        around = {name for own in self.names for name in _around(own)}
        wanted = {id(module): module for name, module in walked if name in around}
        for key in self._hooked.keys() - wanted.keys():
            for handle in self.handles.pop(key):
                handle.remove()
        for key, module in wanted.items():
            if key not in self._hooked:
                self.handles[key] = [
                    module.register_forward_pre_hook(_Hook(self._enter)),
                    module.register_forward_hook(_Hook(self._leave), always_call=True),
                ]
        self._hooked = wanted

    def path_modules(self) -> list[PathModule]:
        """The paths that the model has now, outside of the branches that `refresh` found."""
        if self._is_current():
            return self._path_modules
        return path_modules_among(walk(self.model, self._branches))

    def parameters(self) -> list[nn.Parameter]:
        return [module._parameters[name] for module, name in self._refs]  # type: ignore[misc]

    def check_entry(self, path: Path) -> None:
        """Raises `RuntimeError` if `path` runs in a frozen rest although no module around it was called.

        Something else then ran before it, such as a method of the model, and may have used parameters that should have
        been frozen.
        """
        if self.runs_frozen:
            return
        for around in reversed([*_around(self._holders.get(id(path.module), ""))]):
            own = self.model.get_submodule(around).parameters(recurse=False) if around in self.names else ()
            if any(p.requires_grad for p in own):
                raise RuntimeError(
                    f"path {path.name!r} runs in a reuse iteration without a call of {around or 'the model'!r}, whose "
                    "own parameters are frozen during its calls: call the module itself rather than one of its "
                    "methods, or let the rest learn with train_rest=True"
                )

    def release(self) -> None:
        """Restores the flags, also after a call that ended without its hooks, by a KeyboardInterrupt for example."""
        if self._freeze is not None:
            self._freeze.__exit__()
        self._outermost = self._freeze = None
        self.runs_frozen = False

    def _walk(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules outside of branches with their names, each once, parents first."""
        seen: set[int] = set()
        stack = [("", self.model)]
        while stack:
            name, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield name, module
            prefix = f"{name}." if name else ""
            for child_name, child in reversed(module._modules.items()):
                if child is not None and id(child) not in self._branches:
                    stack.append((prefix + child_name, child))

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if self.in_graph or self.runs_frozen:
            return
        # If paths are in training mode they follow the plan, and the rest follows it too, even in eval mode.
        training = module.training or any(path.module.training for path in self.paths)
        if training and self._is_frozen():
            freezing.check_freezable(self._refs)
            self._outermost, self.runs_frozen = module, True
            self._freeze = Frozen(self._refs, self._batch_norms, self._freeze_bn)
            self._freeze.__enter__()

    def _leave(self, module: nn.Module, _: Any, out: Any) -> None:
        if not self.in_graph and self._outermost is module:
            self.release()
            for tensor in freezing.tensors_of(out):
                freezing.refuse_second_derivatives(tensor)


def _around(name: str) -> Iterator[str]:
    """The names of a module and of the modules around it. The model's own name is empty."""
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
