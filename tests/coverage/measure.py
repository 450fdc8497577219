"""Checks that a converted model computes what the original does: keys, evaluation, training with masks, the two
iterations, copies. Nothing here relies on the checks of `rdp.convert` itself."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.paths.path import paths_of

from .found import Difference, Inputs, Measured, call, tensors_of
from .twins import Twins


def measure(model: nn.Module, example: Inputs, inputs: Inputs, drop_prob: float | None = None) -> Measured:
    """Converts `model` with `example` and measures on `inputs`; the model is reverted afterwards."""
    with quiet(), torch.random.fork_rng(devices=[]):
        original = copy.deepcopy(model)
        measured = Measured(rdp.convert(model, drop_prob, example_inputs=example))
        checks: dict[str, Callable[[], None]] = {
            "eval": lambda: _check_eval(original, model, inputs, "in eval mode"),
            "keys": lambda: _check_keys(original, model),
        }
        if measured.report.converted:
            twins = Twins(original, model, inputs, measured)
            checks |= {"masks": twins.check_masks, "pair": twins.check_pairs}
        checks["copies"] = lambda: _check_copies(original, model, inputs, measured)
        for name, check in checks.items():
            try:
                check()
            except Difference as difference:
                measured.failures[name] = str(difference)
            except Exception as error:
                measured.failures[name] = f"{type(error).__name__}: {error}"
    return measured


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' warnings, which don't matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_keys(original: nn.Module, model: nn.Module) -> None:
    before, after = list(original.state_dict()), list(model.state_dict())
    if before != after:
        raise Difference(f"other keys: {sorted(set(before) ^ set(after)) or 'in another order'}")
    model.load_state_dict(original.state_dict(), strict=True)


def _check_eval(original: nn.Module, model: nn.Module, inputs: Inputs, when: str) -> None:
    outputs = []
    for net in (original, model):
        modes = {module: module.training for module in net.modules()}
        with torch.no_grad():
            torch.manual_seed(0)
            outputs.append(tensors_of(call(net.eval(), inputs)))
        for module, mode in modes.items():
            module.training = mode
    expected, actual = outputs
    if not expected or len(expected) != len(actual):
        raise Difference(f"{when} {len(actual)} tensors come out instead of {len(expected)}")
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            raise Difference(f"{when} output {i} differs from the original's")


def _check_copies(original: nn.Module, model: nn.Module, inputs: Inputs, measured: Measured) -> None:
    copies = {"of a copy": lambda: copy.deepcopy(model)}
    try:
        pickle.dumps(original)
        copies["of a pickle"] = lambda: pickle.loads(pickle.dumps(model))
    except Exception as error:
        measured.note(f"pickle: the original can't be pickled ({type(error).__name__})")
    for what, make in copies.items():
        copied = make()
        if _kinds(copied) != _kinds(model):
            raise Difference(f"other blocks {what} are converted")
        _check_eval(original, copied, inputs, f"the evaluation {what}:")
    rdp.revert(model)
    if [type(module) for module in model.modules()] != [type(module) for module in original.modules()]:
        raise Difference("revert doesn't give the original classes back")
    _check_eval(original, model, inputs, "reverted")


def _kinds(model: nn.Module) -> list[tuple[str, list[str]]]:
    """The class and the paths of each module."""
    return [(type(module).__qualname__, [name for name, _ in paths_of(module)]) for module in model.modules()]
