"""What a forward does that its tensors don't show: Python values it reads, what it sets, calls and contexts.

While a forward is traced, accesses to attributes are seen, and the calls that its own code makes; the code itself is
read for the globals and closures that it names. What may have another value later becomes a guard. What can't be looked
at again, and what would not happen again in a converted forward, is a refusal.
"""

from __future__ import annotations

import abc
import contextlib
import dis
import enum
import functools
import importlib.util
import logging
import os
import re
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..drop_paths import CONTAINERS
from .calls import Refused
from .guards import MISSING, Guard, can_be_pickled, cells_of, contents_of, functions_of, is_constant
from .snapshot import CONTAINERS as COPIED
from .snapshot import fill, generator_states, items_of, moved_generators, set_generator_states

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib"))
_PURE = {
    "functools", "typing", "enum", "collections", "copy", "dataclasses", "abc", "numbers", "operator", "types", "re",
    "math", "itertools", "inspect", "contextlib", "string", "_collections_abc", "_weakrefset",
}  # fmt: skip
"""Modules of the standard library whose functions depend on nothing but their arguments."""
_PURE_BUILT_IN = {
    "builtins", "math", "cmath", "_operator", "itertools", "_functools", "_collections", "_abc", "_struct", "_typing"
}  # fmt: skip
_SCALARS = (int, float, bool, str, type(None))
_HARMLESS = (type(None), types.ModuleType, logging.Logger, nn.Module, enum.Enum)
_IMPURE = {"print", "open", "input", "exec", "eval", "id", "globals", "locals", "vars", "breakpoint"}
_AMBIENT = re.compile(
    r"(is|are|get|set|use)_(autocast|grad_enabled|inference_mode|anomaly|default|num_|float32|deterministic|rng)"
    r"|^(set_|is_|manual_seed|seed|initial_seed)|deterministic|_enabled$"
)
_FUNCTIONS_OF_TENSORS = {
    "is_tensor", "is_floating_point", "is_complex", "is_nonzero", "is_same_size", "is_signed", "is_conj", "is_neg",
    "is_storage", "is_scripting", "is_tracing", "is_compiling", "is_dynamo_compiling", "is_exporting", "set_",
    "is_distributed", "is_inference", "is_coalesced", "is_contiguous", "is_pinned", "is_set_to", "is_shared",
}  # fmt: skip
_IMPURE_TORCH = ("distributed", "random", "cuda", "backends", "amp", "autograd/graph", "autograd/grad_mode", "_C")


@functools.cache
def _library(file: str) -> str:
    """ "user", "torch", "ours", or "stdlib"."""
    if file.startswith(_OURS) or file.startswith("<rdp.convert"):
        return "ours"
    if file.startswith(_TORCH):
        return "torch"
    if file.startswith(_STDLIB) and "site-packages" not in file and "dist-packages" not in file:
        return "stdlib"
    return "stdlib" if file.startswith(("<frozen", "<string")) else "user"


def of_user(code: types.CodeType) -> bool:
    return _library(code.co_filename) == "user"


class Watch:
    """Watches one trace of a block's forward.

    Args:
        tensor: makes what stands for a tensor that the block's code reads from a module, from its path.
    """

    def __init__(self, block: nn.Module, tensor: Callable[[str], Any]):
        self._block, self._tensor = block, tensor
        self._paths = {id(module): name for name, module in block.named_modules()}
        self._thread = threading.get_ident()
        self._swapped: dict[int, tuple[Any, type]] = {}
        self._codes: dict[types.CodeType, dict[str, Any]] = {}
        self._guards: dict[tuple[str, ...] | tuple[str, tuple[str, ...]] | Any, Guard] = {}
        self._refusals: list[str] = []
        self.sets: dict[str, Any] = {}
        """Attributes that the forward sets on the block to the same constant in each call."""
        self._unset: dict[str, Any] = {}
        """What these were before; MISSING where there was none."""
        self._children: list[tuple[str, ...]] = []
        self._held: list[tuple[types.CodeType, str, Any]] = []
        """What functions read of those that enclose them."""
        self._holders: list[Any] = []
        """Classes, modules and functions whose attributes may be read."""
        self._containers = {id(value): (name, value, value.copy()) for name, value in _global_containers(type(block))}
        self._classes = [
            (cls, dict(vars(cls))) for cls in {c for m in block.modules() for c in type(m).__mro__} if _of_user(cls)
        ]
        self.paused = False
        """Set while children run for their values."""
        self.several_inputs = False
        """Whether the forward is called with more than one tensor."""

    @property
    def guards(self) -> tuple[Guard, ...]:
        return tuple(self._guards.values())

    def refuse(self, reason: str) -> Refused:
        """Also where the forward catches what is raised."""
        self._refusals.append(reason)
        return Refused(reason)

    def guard(self, path: tuple[str, ...], value: Any, num_modules: int = 0, kind: str = "value") -> None:
        """On an attribute of the block."""
        self._guards.setdefault(("block", path, kind), Guard.of("block", path, value, num_modules, kind))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Raises `Refused` at the end where something was seen that a converted forward can't do."""
        before, profile, around = generator_states(), sys.getprofile(), ambient()
        try:
            with _lock, self._hooked():
                sys.setprofile(self._profile)
                try:
                    yield
                finally:
                    sys.setprofile(profile)
        except Refused:
            raise
        except Exception as error:
            if self._refusals:
                raise Refused(self._refusals[0]) from error
            raise
        finally:
            moved = moved_generators(before)
            set_generator_states(before)
            self._put_back()
        if moved:
            self._refusals.insert(
                0, f"its forward draws random numbers from {moved[0]} that no tensor's operation draws"
            )
        if ambient() != around:
            self._refusals.append("its forward leaves autocast, the grad mode or another global setting changed")
        self._read_codes()
        if self._refusals:
            raise Refused(self._refusals[0])

    def _put_back(self) -> None:
        """Attributes, containers and classes that the forward changed."""
        for name, value in self._unset.items():
            read = self._guards.get(("block", (name,), "value"))
            if read is not None and read.value != self.sets[name]:  # the next call would find another
                self._refusals.append(f"its forward sets {name!r}")
            if value is MISSING:
                self._block.__dict__.pop(name, None)
            else:
                self._block.__dict__[name] = value
        for name, container, contents in self._containers.values():
            if items_of(container) != items_of(contents):
                fill(container, contents)
                self._refusals.append(f"its forward changes what is in {name!r}")
        for cls, before in self._classes:
            for name in before.keys() | vars(cls).keys():
                value = vars(cls).get(name, MISSING)
                if value is not before.get(name, MISSING):
                    self._refusals.append(f"its forward sets {name!r} of the class {cls.__name__}")
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

        walks = {
            name: getattr(nn.Module, name) for name in ("parameters", "buffers", "named_parameters", "named_buffers")
        }

        def walk(original: Callable[..., Iterator[Any]], module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            found = original(module, *args, **kwargs)
            if not (watch._sees(sys._getframe(2)) and id(module) in watch._paths):
                return found
            named = original.__name__.startswith("named_")
            names = [name for name, _ in walks[f"named_{original.__name__.removeprefix('named_')}"](module)]
            stand_ins = [(name, watch._tensor(watch._dotted(module, name))) for name in names]
            return iter(stand_ins if named else [tensor for _, tensor in stand_ins])

        listings = {
            name: getattr(nn.Module, name) for name in ("children", "modules", "named_children", "named_modules")
        }

        def list_children(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            found = original(module, *args, **kwargs)
            if watch._sees(sys._getframe(2)) and id(module) in watch._paths:
                deep = original.__name__.endswith("modules")
                for inner in list(listings["modules"](module)) if deep else [module]:
                    watch._guard_names(inner)
            return found

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__, nn.Module.__delattr__ = write, remove  # type: ignore[method-assign, assignment]
        for name, original in walks.items():
            setattr(nn.Module, name, _method(walk, original))
        for name, original in listings.items():
            setattr(nn.Module, name, _method(list_children, original))
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module.__delattr__ = set_, delete  # type: ignore[method-assign]
            for name, original in (walks | listings).items():
                setattr(nn.Module, name, original)
            for thing, kind in self._swapped.values():
                object.__setattr__(thing, "__class__", kind)

    def _sees(self, frame: types.FrameType) -> bool:
        return not self.paused and threading.get_ident() == self._thread and of_user(frame.f_code)

    def _sees_change(self, frame: types.FrameType) -> bool:
        """Also where a method of `torch.nn.Module` makes it."""
        file = frame.f_code.co_filename
        by_torch = file.startswith(_TORCH) and not file.startswith(_TORCH + "fx")
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
        """On which children a module has."""
        path = tuple(part for part in self._paths[id(module)].split(".") if part)
        self.guard(path, tuple(module._modules), len(path), "names")
        self._children += [(*path, name) for name in module._modules]

    def _see_method(self, module: nn.Module, name: str, value: Any, path: tuple[str, ...]) -> None:
        """A method of a child may be replaced later; `followed.py` sees to the block's own."""
        function = getattr(value, "__func__", None)
        if module is self._block or not isinstance(function, types.FunctionType) or not of_user(function.__code__):
            return
        if can_be_pickled(function):
            self.guard((*path, "__func__"), function, len(path) - 1)
        else:
            raise self.refuse(f"its forward calls the method {'.'.join(path)!r}, which can't be imported by name")

    def _read_registered(self, module: nn.Module, name: str, path: tuple[str, ...]) -> None:
        """What `nn.Module.__getattr__` will find."""
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
                    self._children.append(path)
                    if type(found) in CONTAINERS:
                        self._guard_names(found)
                return
        if type(module).__getattr__ is not nn.Module.__getattr__:
            raise self.refuse(f"its forward reads {name!r}, which {type(module).__name__}.__getattr__ makes up")
        self.guard(path, MISSING, len(path) - 1)

    def _value(self, path: tuple[str, ...], value: Any, num_modules: int) -> Any:
        """The value of an attribute, guarded."""
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
            what = f"{'.'.join(path)!r}, a {type(value).__name__}"
            raise self.refuse(f"its forward reads {what}, whose contents may change without anybody's noticing")
        return value

    def _keep(self, name: str, value: Any) -> None:
        """To see whether what is in a list, dict or set changes."""
        if type(value) in COPIED:
            self._containers.setdefault(id(value), (name, value, value.copy()))

    def _swap(self, value: Any, path: tuple[str, ...], num_modules: int) -> bool:
        """Makes an object tell what is read from it. False where Python doesn't allow that."""
        if id(value) in self._swapped:
            return True
        original, watch = type(value), self
        if not hasattr(value, "__dict__") or original.__module__.startswith(("torch.", "numpy", "builtins")):
            return False
        told = [kind for kind in original.__mro__ if kind.__module__ not in ("builtins", "typing")]
        if type(original) not in (type, abc.ABCMeta) or any("__init_subclass__" in vars(kind) for kind in told):
            return False  # it would note the class that is made here

        def read(thing: Any, name: str) -> Any:
            if name == "__class__":
                return original
            found = original.__getattribute__(thing, name)  # type: ignore[call-arg]
            kept = object.__getattribute__(thing, "__dict__")
            seen = watch._sees(frame := sys._getframe(1)) or _library(frame.f_code.co_filename) == "stdlib"
            if name.startswith("__") or watch.paused or not seen or (name not in kept and callable(found)):
                return found
            return watch._value((*path, name), found, num_modules)

        def write(thing: Any, name: str, new: Any) -> None:
            if watch._sees(sys._getframe(1)):
                raise watch.refuse(f"its forward sets {'.'.join((*path, name))!r}")
            original.__setattr__(thing, name, new)  # type: ignore[call-arg]

        members = {"__getattribute__": read, "__setattr__": write, "__module__": original.__module__, "__slots__": ()}
        try:
            object.__setattr__(value, "__class__", type(original.__name__, (original,), members))
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
                self._see_built_in(called)
            return
        code, caller = frame.f_code, frame.f_back
        library = _library(code.co_filename)
        if library == "user":
            if code not in self._codes:
                self._codes[code] = frame.f_globals
                for name in _names_in(code):
                    self._keep(name, frame.f_globals.get(name))
            held = frame.f_locals
            self._held += [(code, name, held.get(name)) for name in code.co_freevars if name != "__class__"]
            self._holders += [value for value in held.values() if isinstance(value, type)]
        if caller is None:
            return
        by_user = of_user(caller.f_code)
        if code.co_name == "__enter__" and (by_user or library == "user" or _is_context(code, caller.f_code)):
            self._refusals.append(f"its forward enters a context ({_class_of(frame)}), which a graph doesn't have")
        elif library in ("torch", "stdlib") and by_user and code.co_name != "__init__":
            self._see_library(code)

    def _see_library(self, code: types.CodeType) -> None:
        """A Python function of torch or of the standard library."""
        file, name = code.co_filename, code.co_name
        if file.startswith(_TORCH):
            place = file[len(_TORCH) :].removesuffix(".py")
            if place == "nn/modules/module" and name.startswith(
                ("register_", "add_", "_apply", "load_", "zero_", "apply")
            ):
                self._refusals.append(f"its forward calls {name} of a module, which changes it")
            if place == "utils/checkpoint":
                self._refusals.append(
                    "its forward checkpoints: leave that out inside the block, and checkpoint the call of the block "
                    "in the model around it"
                )
            elif place == "autograd/function" and name == "apply":
                self._refusals.append("its forward calls an autograd function, whose backward a graph doesn't have")
            elif place.startswith(_IMPURE_TORCH) or (_AMBIENT.search(name) and name not in _FUNCTIONS_OF_TENSORS):
                self._refusals.append(f"its forward calls {name} of torch, which depends on more than its tensors")
            return
        module = os.path.basename(os.path.dirname(file) if file.endswith("__init__.py") else file).removesuffix(".py")
        if not file.startswith("<") and module not in _PURE:
            self._refusals.append(f"its forward calls {name} of Python's {module}, which would not be called again")

    def _see_built_in(self, called: Any) -> None:
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        module = getattr(called, "__module__", None) or getattr(owner, "__name__", None)
        if isinstance(owner, types.ModuleType) or (module or "").startswith("torch"):
            module = str(module)
            if module.startswith("torch"):
                if _AMBIENT.search(name) and name not in _FUNCTIONS_OF_TENSORS and not isinstance(owner, Tensor):
                    self._refusals.append(f"its forward calls {name} of torch, which depends on more than its tensors")
            elif module not in _PURE_BUILT_IN or name in _IMPURE:
                self._refusals.append(f"its forward calls {name} of {module}, which would not be called again")
        elif (
            owner is not None
            and type(owner).__module__ not in ("builtins", "collections", "torch")
            and not (isinstance(owner, (type, Tensor, nn.Module)))
        ):
            self._refusals.append(
                f"its forward calls {name} of a {type(owner).__name__}, which would not be called again"
            )

    # Code

    def _read_codes(self) -> None:
        for function in functions_of(type(self._block)):
            self._see_defaults(function)
        read, written = set[str](), set[str]()
        for code, space in self._codes.items():
            if _is_numeric_library(code.co_filename):
                continue
            self._read_globals(code, space)
            self._read_closure(code)
            names = _attributes_in(code)
            read |= names[0]
            written |= names[1]
            self._holders += _imported_in(code, space)
            self._holders += [space[name] for name in _names_in(code) if name in space]
            if "__class__" in code.co_freevars or {"type", "__class__"} & set(code.co_names):
                self._holders += [type(module) for module in self._block.modules()]
        self._holders += [value for _, _, value in self._held]
        self._read_holders(read, written)

    def _read_holders(self, read: set[str], written: set[str]) -> None:
        """Attributes of classes, modules and functions, by whatever variables they are reached."""
        seen: set[int] = set()
        while self._holders:
            holder = self._holders.pop()
            if id(holder) in seen or not _is_holder(holder):
                continue
            seen.add(id(holder))
            if isinstance(holder, type):
                self._holders += holder.__mro__
            for name, value in list(vars(holder).items()):
                if name in written and not _is_of_blocks(holder, self._block):
                    self._refusals.append(f"its forward sets {name!r} of {holder.__name__}")
                if name not in read or name.startswith("__"):
                    continue
                if _is_holder(value):
                    self._holders.append(value)
                elif is_constant(value) and not isinstance(value, enum.Enum):
                    self._guard_held(holder, name, value)
                elif not (callable(value) or hasattr(value, "__get__") or isinstance(value, _HARMLESS)):
                    what = f"{name!r} of {holder.__name__}, a {type(value).__name__}"
                    self._refusals.append(f"its forward may read {what}, whose contents may change")

    def _guard_held(self, holder: Any, name: str, value: Any) -> None:
        if isinstance(holder, types.ModuleType):
            place: str = holder.__name__
            path: tuple[str, ...] = (name,)
            known = sys.modules.get(place) is holder
        elif holder in type(self._block).__mro__:
            place, path, known = "class", (holder.__qualname__, name), True
        else:
            place, path, known = holder.__module__, (*holder.__qualname__.split("."), name), can_be_pickled(holder)
        if known:
            self._guards.setdefault((place, path), Guard.of(place, path, value))
        else:
            self._refusals.append(f"it may read {name!r} of {holder.__name__}, which can't be imported by name")

    def _see_defaults(self, function: types.FunctionType) -> None:
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if function.__code__ not in self._codes:
            return
        for value in defaults:
            if isinstance(value, (list, dict, set)) or not (
                is_constant(value) or callable(value) or isinstance(value, (*_HARMLESS, Tensor))
            ):
                self._refusals.append(
                    f"{function.__name__} has a {type(value).__name__} as a default argument, which may change"
                )

    def _read_globals(self, code: types.CodeType, space: dict[str, Any]) -> None:
        instructions = list(dis.get_instructions(code))
        for place, instruction in enumerate(instructions):
            name = instruction.opname
            if name in ("BEFORE_WITH", "SETUP_WITH") or (
                name == "LOAD_SPECIAL" and "enter" in str(instruction.argrepr)
            ):
                self._refusals.append(f"{code.co_name} has a with statement, which a graph doesn't have")
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and instruction.argval in ("__setattr__", "__delattr__"):
                self._refusals.append(f"{code.co_name} calls {instruction.argval}, which would not be called again")
            elif name == "IS_OP" and self.several_inputs and _are_locals(instructions[max(place - 2, 0) : place]):
                self._refusals.append(
                    f"{code.co_name} compares two variables by `is`; whether two arguments are one object isn't looked "
                    "at again"
                )
            elif name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
                if not any(_holds(other, code) for other in self._codes if other is not code):
                    self._refusals.append(f"{code.co_name} assigns to {instruction.argval!r} of an enclosing function")
            elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._refusals.append(f"{code.co_name} assigns to the global {instruction.argval!r}")
            elif name == "LOAD_GLOBAL" and instruction.argval in ("isinstance", "type", "issubclass"):
                for path in self._children:
                    child = self._block.get_submodule(".".join(path))
                    self.guard(path, type(child).__qualname__, len(path), "type")
            elif name in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in space:
                self._follow(code, space, [str(instruction.argval), *_attributes(instructions[place + 1 :])])

    def _follow(self, code: types.CodeType, space: dict[str, Any], names: list[str]) -> None:
        """A global and what is read from it."""
        value, path = space[names[0]], names[:1]
        for name in names[1:]:
            if isinstance(value, types.ModuleType) and _is_library(value):
                found = getattr(value, name, None)
                if isinstance(found, types.BuiltinFunctionType | types.FunctionType):
                    value, path = found, [*path, name]
                    break
                if value.__name__.partition(".")[0] in ("numpy", "os", "sys") and name in ("random", "environ", "argv"):
                    self._refusals.append(f"{code.co_name} reads {value.__name__}.{name}")
                return
            kept = value if isinstance(value, (types.ModuleType, type)) else None
            if kept is None and (isinstance(value, types.FunctionType) or name not in getattr(value, "__dict__", {})):
                break
            value = getattr(value, name, None)
            path.append(name)
        module = space.get("__name__")
        if isinstance(value, types.BuiltinFunctionType | types.FunctionType):
            self._see_function(code, value, path, module)
        elif isinstance(value, enum.Enum):
            pass
        elif is_constant(value):
            if not isinstance(module, str) or sys.modules.get(module) is None or vars(sys.modules[module]) is not space:
                self._refusals.append(
                    f"{code.co_name} reads the global {'.'.join(path)!r} of a module that isn't imported"
                )
                return
            self._guards.setdefault((module, tuple(path)), Guard.of(module, path, value))
        elif not (callable(value) or isinstance(value, (types.ModuleType, logging.Logger)) or value is torch):
            self._refusals.append(f"{code.co_name} reads the global {'.'.join(path)!r}, a {type(value).__name__}")

    def _see_function(self, code: types.CodeType, function: Any, path: list[str], module: Any) -> None:
        """A function may be replaced in its module; `followed.py` sees to those that a forward calls by one name."""
        if isinstance(function, types.FunctionType):
            self._see_defaults(function)
            if len(path) == 1:
                return
        if (
            can_be_pickled(function)
            and isinstance(module, str)
            and vars(sys.modules.get(module, torch)).get(path[0]) is not None
        ):
            self._guards.setdefault((module, tuple(path)), Guard.of(module, path, function))

    def _read_closure(self, code: types.CodeType) -> None:
        held = [(name, value) for other, name, value in self._held if other is code]
        names = [name for name in code.co_freevars if any(n == name and not _is_fixed(value) for n, value in held)]
        if not names or any(_holds(other, code) for other in self._codes if other is not code):
            return  # the enclosing function ran too: its variables are the trace's own
        cells = dict(cells_of(type(self._block)))
        for name in names:
            path = next((p for p in cells if p == (_qualified(code), name)), None)
            if path is not None and len({id(value) for n, value in held if n == name}) > 1:
                path = None  # of several functions with this code
            value = None if path is None else contents_of(cells[path])
            if path is None:
                self._refusals.append(f"{code.co_name} reads {name!r} of an enclosing function")
            elif is_constant(value):
                self._guards.setdefault(("closure", path), Guard.of("closure", path, value))
            elif not callable(value) and not isinstance(value, types.ModuleType):
                self._refusals.append(
                    f"{code.co_name} reads {name!r} of an enclosing function, a {type(value).__name__}"
                )


_lock = threading.RLock()
"""One trace at a time: `nn.Module` itself is hooked meanwhile."""


def _method(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(original, self, *args, **kwargs)

    return method


def _global_containers(base: type) -> Iterator[tuple[str, Any]]:
    """Lists, dicts and sets among the globals that functions of a class name, and those that these call."""
    seen: set[types.CodeType] = set()
    stack: list[types.FunctionType] = list(functions_of(base))
    while stack:
        function = stack.pop()
        if function.__code__ in seen or not of_user(function.__code__):
            continue
        seen.add(function.__code__)
        for name in _names_in(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType):
                stack.append(value)
            elif type(value) in COPIED:
                yield name, value
        stack += [f for cell in function.__closure__ or () if isinstance(f := contents_of(cell), types.FunctionType)]
        held = zip(function.__code__.co_freevars, map(contents_of, function.__closure__ or ()), strict=True)
        for name, value in (*held, *(("a default argument", value) for value in function.__defaults__ or ())):
            if type(value) in COPIED:
                yield name, value


def _names_in(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _of_user(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return cls.__module__ != "builtins" and (file is None or _library(file) == "user")


def _attributes(instructions: list[dis.Instruction]) -> Iterator[str]:
    """The attributes that are read one after the other."""
    for instruction in instructions:
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return
        yield str(instruction.argval)


def _is_fixed(value: Any) -> bool:
    """What an enclosing function's variable is not taken to change from."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type))


def _is_holder(value: Any) -> bool:
    """Classes, modules and functions of the user's."""
    if isinstance(value, types.FunctionType):
        return of_user(value.__code__)
    if isinstance(value, types.ModuleType):
        return not _is_library(value)
    return isinstance(value, type) and _of_user(value) and not issubclass(value, (enum.Enum, tuple))


def _is_of_blocks(holder: Any, block: nn.Module) -> bool:
    """Whether it is a class of a module inside, whose attributes are compared before and after."""
    return isinstance(holder, type) and any(isinstance(module, holder) for module in block.modules())


def _attributes_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of attributes that are read and set. Of `getattr` and the like they are strings."""
    found = list(dis.get_instructions(code))
    reads = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "IMPORT_FROM")
    read = {str(i.argval) for i in found if i.opname.startswith(reads)}
    written = {str(i.argval) for i in found if i.opname in ("STORE_ATTR", "DELETE_ATTR")}
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    if {"getattr", "hasattr", "attrgetter"} & set(code.co_names):
        read |= strings
    if {"setattr", "delattr"} & set(code.co_names):
        written |= strings
    return read, written


def _imported_in(code: types.CodeType, space: dict[str, Any]) -> Iterator[Any]:
    """The modules that a function imports when it is called."""
    for place, instruction in enumerate(instructions := list(dis.get_instructions(code))):
        if instruction.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval
            name = "." * (level if isinstance(level, int) else 0) + str(instruction.argval)
            with contextlib.suppress(ImportError):
                full = importlib.util.resolve_name(name, space.get("__package__"))
                yield sys.modules.get(full)
                yield sys.modules.get(full.partition(".")[0])


def _are_locals(loads: list[dis.Instruction]) -> bool:
    """Whether the last two values that are loaded are local variables; one instruction may load two."""
    names = [i.opname for i in loads]
    return names[-1].count("LOAD_FAST") > 1 or all(name.startswith("LOAD_FAST") for name in names)


def _qualified(code: types.CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)


def _holds(outer: types.CodeType, inner: types.CodeType) -> bool:
    codes = [c for c in outer.co_consts if isinstance(c, types.CodeType)]
    return any(code is inner or _holds(code, inner) for code in codes)


def _is_library(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or _library(file) != "user" or module.__name__.partition(".")[0] == "numpy"


@functools.cache
def _is_numeric_library(file: str) -> bool:
    return f"{os.sep}numpy{os.sep}" in file


def _is_of_class(module: nn.Module, name: str) -> bool:
    """Whether a method of the class is read, or a property, whose own code is watched."""
    if name in object.__getattribute__(module, "__dict__"):
        return False
    found = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
    return isinstance(found, (types.FunctionType, property, staticmethod, classmethod)) or found is None


def _is_context(code: types.CodeType, caller: types.CodeType) -> bool:
    """Whether a context of torch's, or one entered by Python's contextlib, is a forward's own, or a decorator of it."""
    places = ("amp/autocast_mode.py", "autograd/grad_mode.py", "autograd/graph.py", "autograd/profiler.py", "random.py")
    return caller.co_filename.endswith("contextlib.py") or code.co_filename.startswith(
        tuple(_TORCH + p for p in places)
    )


def _class_of(frame: types.FrameType) -> str:
    owner = frame.f_locals.get("self")
    function = getattr(owner, "func", None)  # of contextlib's generators
    return getattr(function, "__name__", None) or type(owner).__name__


def ambient() -> tuple:
    """What a forward may change around some of its operations."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    backends = torch.backends.cuda
    attention = [backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()]
    grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return (*autocast, *attention, *grad)
