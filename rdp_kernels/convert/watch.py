"""Watches what a traced forward does that its graph doesn't show: the values it reads, the values it sets, its calls.

Accesses to attributes are hooked, and a profile function sees the calls that the forward's own code makes. The code
itself is read to find globals and closures. A value that may be another later becomes a guard. A value that can't be
compared again, or an action that a converted forward wouldn't repeat, becomes a refusal.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .called import TORCH, ambient, context_name, is_context, library_of, of_user, why_not_built_in, why_not_library
from .calls import Refused
from .guards import MISSING, Findings, can_be_pickled, is_constant
from .libraries import MODULE_CONTAINERS
from .python_code import CodeReader, RanCode, class_of_user, global_containers, names_in
from .snapshot import CONTAINERS, fill, generator_states, items_of, moved_generators, set_generator_states

_LISTINGS = [n + kind for kind in ("parameters", "buffers", "children", "modules") for n in ("", "named_")]
"""Methods of `nn.Module` that list what a module holds."""
_SCALARS = (int, float, bool, str, type(None))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps `gc.callbacks` of other libraries from running, whose calls would pass for calls of the forward."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Watch:
    """Watches one trace of a block's forward.

    Args:
        block: the block that is traced.
        tensor: makes the stand-in for a tensor that the block's code reads from a module, from the tensor's name.
        several_inputs: whether the forward is called with more than one tensor.
    """

    def __init__(self, block: nn.Module, tensor: Callable[[str], Any], several_inputs: bool):
        self._block, self._tensor, self._several_inputs = block, tensor, several_inputs
        self._paths = {id(module): name for name, module in block.named_modules()}
        self._thread = threading.get_ident()
        self._swapped: dict[int, tuple[Any, type]] = {}
        self._ran, self.findings = RanCode(), Findings()
        self.sets: dict[str, Any] = {}
        """Attributes that the forward sets on the block to the same constant in each call."""
        self._unset: dict[str, Any] = {}
        """The values that these attributes had before; MISSING for an attribute that didn't exist."""
        self._containers = {id(value): (name, value, value.copy()) for name, value in global_containers(type(block))}
        classes = {cls for module in block.modules() for cls in type(module).__mro__}
        self._classes = [(cls, dict(vars(cls))) for cls in classes if class_of_user(cls)]
        self.paused = False
        """True while children run to compute values."""

    def refuse(self, reason: str) -> Refused:
        """Notes a reason and returns the error to raise. The reason counts even if the forward catches the error."""
        self.findings.refuse(reason)
        return Refused(reason)

    def guard(self, path: tuple[str, ...], value: Any, num_modules: int = 0, kind: str = "value") -> None:
        """Adds a guard on an attribute of the block."""
        self.findings.guard("block", path, value, num_modules, kind)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Watches a trace. Raises `Refused` at the end if it saw something that a converted forward can't do."""
        before, profile, around = generator_states(), sys.getprofile(), ambient()
        try:
            with _lock, self._hooked(), _no_garbage_collection():
                sys.setprofile(self._profile)
                try:
                    yield
                finally:
                    sys.setprofile(profile)
        except Refused:
            raise
        except Exception as error:
            if self.findings.refusals:
                raise Refused(self.findings.refusals[0]) from error
            raise
        finally:
            moved = moved_generators(before, generator_states())
            set_generator_states(before)
            self._put_back()
        if moved:
            self.findings.refusals.insert(
                0, f"its forward draws random numbers from {moved[0]} that no tensor's operation draws"
            )
        if ambient() != around:
            self.findings.refuse("its forward leaves autocast, the grad mode or another global setting changed")
        CodeReader(self._block, self._ran, self.findings, self._several_inputs).read()
        if self.findings.refusals:
            raise Refused(self.findings.refusals[0])

    def _put_back(self) -> None:
        """Restores attributes, containers and classes that the forward changed."""
        for name, value in self._unset.items():
            read = self.findings.guard_of("block", (name,))
            if read is not None and read.value != self.sets[name]:  # the next call would read another value
                self.findings.refuse(f"its forward sets {name!r}")
            if value is MISSING:
                self._block.__dict__.pop(name, None)
            else:
                self._block.__dict__[name] = value
        for name, container, contents in self._containers.values():
            if items_of(container) != items_of(contents):
                fill(container, contents)
                self.findings.refuse(f"its forward changes what is in {name!r}")
        for cls, before in self._classes:
            for name in before.keys() | vars(cls).keys():
                value = vars(cls).get(name, MISSING)
                if value is not before.get(name, MISSING):
                    self.findings.refuse(f"its forward sets {name!r} of the class {cls.__name__}")
                    delattr(cls, name) if name not in before else setattr(cls, name, before[name])

    # Attributes

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        watch, set_, delete = self, nn.Module.__setattr__, nn.Module.__delattr__

        def read(module: nn.Module, name: str) -> Any:
            if watch._sees(sys._getframe(1)):
                return watch._read(module, name)
            return object.__getattribute__(module, name)

        def write(module: nn.Module, name: str, value: Any) -> None:
            if watch._sees_change(sys._getframe(1)) and not watch._sets_constant(module, name, value):
                raise watch.refuse(f"its forward sets {watch._name(module, name)}")
            set_(module, name, value)

        def remove(module: nn.Module, name: str) -> None:
            if watch._sees(sys._getframe(1)):
                raise watch.refuse(f"its forward deletes {watch._name(module, name)}")
            delete(module, name)

        originals = {name: getattr(nn.Module, name) for name in _LISTINGS}

        def list_held(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            found = original(module, *args, **kwargs)
            if not (watch._sees(sys._getframe(2)) and id(module) in watch._paths):
                return found
            what = original.__name__.removeprefix("named_")
            if what in ("children", "modules"):
                for inner in list(originals["modules"](module)) if what == "modules" else [module]:
                    watch._guard_names(inner)
                return found
            names = [name for name, _ in originals[f"named_{what}"](module)]
            stand_ins = [(name, watch._tensor(watch._dotted(module, name))) for name in names]
            return iter([tensor for _, tensor in stand_ins] if what == original.__name__ else stand_ins)

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__, nn.Module.__delattr__ = write, remove  # type: ignore[method-assign, assignment]
        for name, original in originals.items():
            setattr(nn.Module, name, _method(list_held, original))
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module.__delattr__ = set_, delete  # type: ignore[method-assign]
            for name, original in originals.items():
                setattr(nn.Module, name, original)
            for thing, kind in self._swapped.values():
                object.__setattr__(thing, "__class__", kind)

    def _sees(self, frame: types.FrameType) -> bool:
        return not self.paused and threading.get_ident() == self._thread and of_user(frame.f_code)

    def _sees_change(self, frame: types.FrameType) -> bool:
        """Whether a change is the forward's own or made for it by a method of `torch.nn.Module`."""
        file = frame.f_code.co_filename
        by_torch = file.startswith(TORCH) and not file.startswith(TORCH + "fx")
        return not self.paused and threading.get_ident() == self._thread and (by_torch or of_user(frame.f_code))

    def _dotted(self, module: nn.Module, name: str) -> str:
        return f"{self._paths[id(module)]}.{name}".lstrip(".")

    def _name(self, module: nn.Module, name: str) -> str:
        return f"{self._dotted(module, name)!r}" if id(module) in self._paths else f"{name!r} of another module"

    def _read(self, module: nn.Module, name: str) -> Any:
        if name in ("__dict__", "_parameters", "_buffers"):
            raise self.refuse(f"its forward reads {name} of a module")
        if "Proxy(" in name:
            raise self.refuse("its forward names an attribute by a number that it computes")
        modules = tuple(part for part in self._paths.get(id(module), "").split(".") if part)
        path = (*modules, name)
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            if id(module) in self._paths:
                self._read_registered(module, name, path)
            elif all(module.__dict__[kind].get(name) is None for kind in ("_parameters", "_buffers", "_modules")):
                raise self.refuse(f"its forward reads {name!r} of a module that isn't inside of it") from None
            raise
        if module is self._block and name in self.sets:
            return value
        if name == "training" and module is not self._block:
            self.guard(path, True, len(modules))
            return True
        if name.startswith("__") or name == "training":
            return value
        if _is_of_class(module, name):
            self._see_method(module, name, value, path)
            return value
        if id(module) not in self._paths:
            if is_constant(value):
                raise self.refuse(f"its forward reads {name!r} of a module that isn't inside of it")
            return value
        return self._value(path, value, len(modules))

    def _sets_constant(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute of the block gets a number or string that a converted forward can set as well."""
        held = module.__dict__
        registered = any(name in held[kind] for kind in ("_parameters", "_buffers", "_modules"))
        if module is not self._block or name == "training" or registered:
            return False
        if type(value) not in _SCALARS or hasattr(getattr(type(module), name, None), "__set__"):
            return False
        self._unset.setdefault(name, held.get(name, MISSING))
        self.sets[name] = value
        return True

    def _guard_names(self, module: nn.Module) -> None:
        """Guards the names of a module's children."""
        path = tuple(part for part in self._paths[id(module)].split(".") if part)
        self.guard(path, tuple(module._modules), len(path), "names")
        self._ran.children += [(*path, name) for name in module._modules]

    def _see_method(self, module: nn.Module, name: str, value: Any, path: tuple[str, ...]) -> None:
        """Guards a method of a child, which may be replaced later. `followed.py` compares the block's own methods."""
        function = getattr(value, "__func__", None)
        if module is self._block or not isinstance(function, types.FunctionType) or not of_user(function.__code__):
            return
        if can_be_pickled(function):
            self.guard((*path, "__func__"), function, len(path) - 1)
        else:
            raise self.refuse(f"its forward calls the method {'.'.join(path)!r}, which can't be imported by name")

    def _read_registered(self, module: nn.Module, name: str, path: tuple[str, ...]) -> None:
        """Guards what `nn.Module.__getattr__` will find."""
        kept = object.__getattribute__(module, "__dict__")
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in kept[kind]:
                found = kept[kind][name]
                if found is None:
                    self.guard(path, None, len(path) - 1)
                elif kind != "_modules":
                    self.guard((*path[:-1], f"{kind}[{name!r}]"), True, len(path) - 1, "present")
                else:
                    self.guard(path, True, len(path), "present")
                    self._ran.children.append(path)
                    if type(found) in MODULE_CONTAINERS:
                        self._guard_names(found)
                return
        if type(module).__getattr__ is not nn.Module.__getattr__:
            raise self.refuse(f"its forward reads {name!r}, which {type(module).__name__}.__getattr__ computes")
        self.guard(path, MISSING, len(path) - 1)

    def _value(self, path: tuple[str, ...], value: Any, num_modules: int) -> Any:
        """Guards the value of an attribute and returns it, or the stand-in of a tensor."""
        self._keep(".".join(path), value)
        if is_constant(value):
            self.guard(path, value, num_modules)
        elif isinstance(value, Tensor) and len(path) == num_modules + 1:
            return self._tensor(".".join(path))
        elif isinstance(value, (nn.Module, Tensor, types.ModuleType)):
            pass
        elif callable(value) and not isinstance(value, functools.partial) and can_be_pickled(value):
            self.guard(path, value, num_modules)
        elif not (
            (isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module))
            or (not isinstance(value, (list, dict, set, tuple)) and self._swap(value, path, num_modules))
        ):
            what = f"{'.'.join(path)!r} ({type(value).__name__})"
            raise self.refuse(f"its forward reads {what}, whose contents may change unnoticed")
        return value

    def _keep(self, name: str, value: Any) -> None:
        """Copies a list, dict or set, to see later whether its contents changed."""
        if type(value) in CONTAINERS:
            self._containers.setdefault(id(value), (name, value, value.copy()))

    def _swap(self, value: Any, path: tuple[str, ...], num_modules: int) -> bool:
        """Makes an object report reads of its attributes. Returns False if Python doesn't allow that."""
        if id(value) in self._swapped:
            return True
        original, watch = type(value), self
        if not hasattr(value, "__dict__") or original.__module__.startswith(("torch.", "numpy", "builtins")):
            return False
        if type(original) not in (type, abc.ABCMeta):
            return False

        def read(thing: Any, name: str) -> Any:
            if name == "__class__":
                return original
            found = original.__getattribute__(thing, name)  # type: ignore[call-arg]
            kept = object.__getattribute__(thing, "__dict__")
            seen = watch._sees(frame := sys._getframe(1)) or library_of(frame.f_code.co_filename) == "stdlib"
            if name.startswith("__") or watch.paused or not seen or (name not in kept and callable(found)):
                return found
            return watch._value((*path, name), found, num_modules)

        def write(thing: Any, name: str, new: Any) -> None:
            if watch._sees(sys._getframe(1)):
                raise watch.refuse(f"its forward sets {'.'.join((*path, name))!r}")
            original.__setattr__(thing, name, new)  # type: ignore[call-arg]

        members = {"__getattribute__": read, "__setattr__": write, "__module__": original.__module__, "__slots__": ()}
        try:
            kind = type(original.__name__, (_Nothing,), members)
            kind.__bases__ = (original,)  # set later, so that `__init_subclass__` isn't called
            object.__setattr__(value, "__class__", kind)
        except TypeError:
            return False
        self._swapped[id(value)] = (value, original)
        return True

    # Calls

    def _profile(self, frame: types.FrameType, event: str, called: Any) -> None:
        if self.paused or event not in ("call", "c_call"):
            return
        if event == "c_call":
            if of_user(frame.f_code):
                self.findings.refuse(why_not_built_in(called))
            return
        code, caller = frame.f_code, frame.f_back
        library = library_of(code.co_filename)
        if library == "user":
            if code not in self._ran.codes:
                self._ran.codes[code] = frame.f_globals
                for name in names_in(code):
                    self._keep(name, frame.f_globals.get(name))
            held = frame.f_locals
            self._ran.variables += [(code, name, held.get(name)) for name in code.co_freevars if name != "__class__"]
            self._ran.holders += [value for value in held.values() if isinstance(value, type)]
        if caller is None:
            return
        by_user = of_user(caller.f_code)
        if code.co_name == "__enter__" and (by_user or library == "user" or is_context(code, caller.f_code)):
            self.findings.refuse(f"its forward enters a context ({context_name(frame)}), which a graph doesn't have")
        elif library in ("torch", "stdlib") and by_user and code.co_name != "__init__":
            self.findings.refuse(why_not_library(code))


class _Nothing:
    """The first base of the class that a watched object has during the trace."""


_lock = threading.RLock()
"""Allows one trace at a time, as `nn.Module` itself is hooked during a trace."""


def _method(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(original, self, *args, **kwargs)

    return method


def _is_of_class(module: nn.Module, name: str) -> bool:
    """Whether `name` is a method or a property of the class. A property's own code is watched."""
    if name in object.__getattribute__(module, "__dict__"):
        return False
    found = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
    return isinstance(found, (types.FunctionType, property, staticmethod, classmethod)) or found is None
