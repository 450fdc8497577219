"""Writes the source of a converted class from a carved graph, and makes the class from it, also when unpickling."""

from __future__ import annotations

import copyreg
import functools
import importlib
import inspect
import linecache
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..paths.path import CONVERTED
from . import converted
from .calls import Refused
from .carve import Carved
from .followed import Followed
from .guards import Guards
from .spec import Recipe
from .trace import Trace

_PASSED_ON = {"num_items_in_batch", "use_cache"}
"""Arguments that models of transformers hand down through every `**kwargs`. Only the loss and caches use them."""
_ALWAYS = {"inf": float("inf"), "nan": float("nan"), "NoneType": type(None)}
_classes: dict[tuple[Any, ...], type] = {}


def recipe_of(traced: Trace, carved: Carved) -> Recipe:
    """Writes a block's source. Raises `Refused` if it would use an object that can't be imported."""
    functions = {"_forward": carved.graph} | {f"_branch_{i}": graph for i, graph in enumerate(carved.branches)}
    parts, names = [], dict[str, tuple[str, str]]()
    for name, graph in functions.items():
        text, used = _function(name, graph)
        parts.append(text)
        names |= used
    return Recipe(
        "\n\n".join(parts), tuple(names.items()), traced.signature, traced.guards, traced.inputs, traced.sets,
        tuple(carved.paths),
    )  # fmt: skip


class _Function(fx.CodeGen):
    """Writes a function of the given name in place of `forward`."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def gen_fn_def(self, free_vars: list[str], *args: Any, **options: Any) -> str:
        """The line with `def`. torch passes a return annotation, which is empty here, and options of newer versions."""
        return f"def {self._name}({', '.join(['self', *free_vars])}):"


def _function(name: str, graph: fx.Graph) -> tuple[str, dict[str, tuple[str, str]]]:
    for node in graph.nodes:
        node.type = None  # annotations would have to be imported
    graph.set_codegen(_Function(name))
    code = graph.python_code("self")
    names = {used: _place_of(value) for used, value in code.globals.items() if used not in _ALWAYS}
    return code.src.strip("\n") + "\n", names


def _place_of(value: Any) -> tuple[str, str]:
    """The Python module and the name that an object can be imported by."""
    if isinstance(value, types.ModuleType):
        return value.__name__, ""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", ""))
    for candidate in (module, "torch", "torch.nn.functional", "torch._C._nn", "builtins"):
        try:
            if candidate is not None and _import(candidate, name) is value:
                return candidate, name
        except (ImportError, AttributeError):
            continue
    raise Refused(f"its forward calls {name or value!r}, which can't be imported by name")


def _import(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    return operator.attrgetter(name)(found) if name else found


def class_of(base: type[nn.Module], recipe: Recipe, digest: str | None = None) -> type[nn.Module]:
    """The subclass of `base` that a recipe describes. It is the same object for the same recipe and the same code.

    `digest` is the digest of the code that was followed when the recipe was made; None if the recipe is made now.
    """
    followed = Followed.of(base)
    digest = followed.digest() if digest is None else digest
    key = (base, followed.identities(), digest, repr(recipe))  # equal recipes may differ when pickled
    if key not in _classes:
        _classes[key] = _make(base, recipe, followed, digest)
    return _classes[key]


def _executed(base: type[nn.Module], recipe: Recipe) -> dict[str, Any]:
    """The functions in a recipe's source, by name. `inspect` finds the source."""
    file = f"<rdp.convert: {base.__module__}.{base.__qualname__} {len(_classes)}>"
    linecache.cache[file] = (len(recipe.source), None, recipe.source.splitlines(True), file)
    space = {name: _import(*place) for name, place in recipe.names} | _ALWAYS
    exec(compile(recipe.source, file, "exec"), space)
    return space


def _make(base: type[nn.Module], recipe: Recipe, followed: Followed, digest: str) -> type[nn.Module]:
    now = followed.digest()
    out_of_date = "" not in (digest, now) and digest != now
    space = _executed(base, recipe)
    traced, signature, wanted = space["_forward"], recipe.signature, recipe.inputs
    guards = Guards(recipe.guards, base)
    passed_on = _PASSED_ON - inspect.signature(base.forward).parameters.keys()

    def why_not(self: nn.Module, inputs: list[Any] | None) -> str | None:
        """Why the trace doesn't hold for this call; None if it does."""
        if out_of_date:
            return "its class has other code than when it was converted"
        replaced = followed.replaced() or followed.replaced_on(self)
        if replaced is not None:
            return f"{replaced} was replaced after its conversion"
        if inputs is None:
            return "it is called in another way than when it was converted"
        if not guards.hold(self):
            return guards.first_difference(self)
        for _, path in self.__dict__[CONVERTED]:
            reason: str | None = path.why_not()
            if reason is not None:
                return reason
        if wanted is None or _fit(inputs, wanted):
            return None
        if any(isinstance(value, fx.Proxy) for value in inputs):
            return "its inputs have no shape while torch.fx records it"
        return "its inputs had another shape, dtype or device when it was converted"

    def call(self: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not (self.training or converted.is_observed(self)):
            return base.forward(self, *args, **kwargs)
        inputs = signature.inputs_of(args, kwargs)
        if inputs is None and not passed_on.isdisjoint(kwargs):
            inputs = signature.inputs_of(args, {name: v for name, v in kwargs.items() if name not in passed_on})
        reason = why_not(self, inputs)
        if reason is not None:
            return converted.fall_back(self, reason, args, kwargs)
        assert inputs is not None
        for name, value in recipe.sets:
            setattr(self, name, value)
        return traced(self, *inputs)

    members: Mapping[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
        "__prepare_scriptable__": _prepare_scriptable,
        "_rdp_recipe": recipe,
        "_rdp_digest": digest,
        converted.RUN_PATH: converted.run,
        "_rdp_branches": [space[f"_branch_{i}"] for i in range(len(recipe.paths))],
        "forward": _named_as(base.forward, call),
    }
    return type(base.__name__, (base,), dict(members))


def _named_as(original: Callable[..., Any], _rdp_call: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls `_rdp_call(self, args, kwargs)`. Its globals are the original's, as `torch.jit.script`
    compiles the original's source in its place and looks there for the names in it."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return _rdp_call(self, args, kwargs)

    space = getattr(original, "__globals__", globals())
    method = types.FunctionType(forward.__code__, space, original.__name__, None, forward.__closure__)
    return functools.wraps(original)(method)


def _prepare_scriptable(self: nn.Module) -> nn.Module:
    """`torch.jit.script` calls this, and then compiles the forward that the block had before."""
    if self.training:
        raise RuntimeError(
            f"torch.jit.script compiles {type(self).__name__} as it was before its conversion, which drops rows in "
            "another way in training: call model.eval() or rdp.revert(model) first"
        )
    return self


def _fit(inputs: list[Any], wanted: tuple[Any, ...]) -> bool:
    for value, known in zip(inputs, wanted, strict=True):
        if isinstance(value, fx.Proxy):
            return False
        if not isinstance(value, Tensor):
            if value != known:
                return False
            continue
        shape, dtype, device = known
        if value.shape[1:] != shape or dtype not in (None, value.dtype) or device not in (None, value.device.type):
            return False
    return True


def install(block: nn.Module, recipe: Recipe, drop_prob: float | None) -> None:
    """Makes `block` an instance of the converted class."""
    block.__class__ = class_of(type(block), recipe)
    block.__dict__[CONVERTED] = [
        (spec.name.replace(".", "_"), converted.ConvertedPath(block, index, spec, drop_prob))
        for index, spec in enumerate(recipe.paths)
    ]


def uninstall(block: nn.Module) -> None:
    block.__class__ = converted.original_of(block)
    for name in (CONVERTED, "_rdp_warned"):
        block.__dict__.pop(name, None)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    kind: Any = converted.class_among(self)
    base = kind.__bases__[0]
    make, args, *state = base.__reduce_ex__(self, max(protocol, 2))
    if make is not copyreg.__newobj__ or args != (kind,):  # type: ignore[attr-defined]
        return make, args, *state
    return rebuild, (base, kind._rdp_recipe, kind._rdp_digest), *state


def _set_state(self: nn.Module, state: Any) -> None:
    """Fills a copy. `copy.copy` passes the original's contents, including the paths."""
    converted.original_of(self).__setstate__(self, state)
    converted.own_paths(self)


def rebuild(base: type[nn.Module], recipe: Recipe, digest: str | None = None) -> nn.Module:
    """An instance without contents. Unpickling a converted block begins with it."""
    return object.__new__(class_of(base, recipe, digest))
