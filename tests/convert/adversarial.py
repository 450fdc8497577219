"""Small residual blocks. Each does one kind of thing that blocks of real libraries may do.

A decorator declares the outcome of `rdp.convert` on a block. `right`: it trains exactly as before. `refused`: it stays
as it was, for a reason that matches. `either`: one of the two. Blocks not declared `right` train exactly as before too.

The state that blocks share outside of modules is the lower-case data of this module and of the classes; `reset` puts
all of it back.
"""

import collections
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import logging
import os
import random
import threading
import time
import types
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from .nets import DIM, DropPath

ENVIRON = "ADVERSARIAL_SCALE"
KINDS: dict[str, type] = {}

number = 1.0
flags = {"double": False}
config = types.SimpleNamespace(scale=1.0)
deadline = [float("inf")]
local = threading.local()
local.scale = 1.0
context_scale = contextvars.ContextVar("scale", default=1.0)
log: list = []
counts = {"calls": 0}
ticks = [itertools.count()]
neighbour = nn.Identity()
neighbour.feature = None
generator = torch.Generator().manual_seed(3)


def _declare(outcome, reason):
    def register(kind):
        kind.outcome, kind.reason = outcome, reason
        KINDS[kind.__name__] = kind
        return kind

    return register


right = _declare("right", "")
either = _declare("either", "")


def refused(reason):
    return _declare("refused", reason)


class Residual(nn.Module):
    """`x + drop_path(branch(x))`, to be varied."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop_path = nn.Linear(DIM, DIM), DropPath(0.0)

    def forward(self, x):
        return x + self.drop_path(self.branch(x))

    def branch(self, x):
        return self.fc(x)

    # How it is used

    @staticmethod
    def call(block, x):
        """The block's output as the network calls it."""
        return block(x)

    @staticmethod
    def take(out):
        """The tensor that the next block gets."""
        return out

    plain = True
    """Whether its output is the residual plus the update of one path, and nothing in it is random."""

    @staticmethod
    def later(model):
        """What changes after conversion and two steps of training."""

    @staticmethod
    def inputs(step):
        return torch.randn(6, 5, DIM, generator=torch.Generator().manual_seed(10 + step))


class Scaled(Residual):
    """A branch scaled by a number; subclasses say where it comes from."""

    def branch(self, x):
        return self.scale_now() * self.fc(x)


def each(change):
    """A `later` for every block."""

    @staticmethod
    def later(model):
        for block in model.blocks:
            change(block)

    return later


# Randomness


@refused("draws random numbers")
class LayerDropByTorch(Residual):
    """Skips itself by a number that torch draws."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return super().forward(x)


@refused("draws random numbers")
class LayerDropByRandom(Residual):
    """Skips itself by a number of Python's generator, as fairseq's LayerDrop."""

    def forward(self, x):
        return x if self.training and random.random() < 0.5 else super().forward(x)


@refused("draws random numbers")
class LayerDropByNumpy(Residual):
    """Skips itself by a number of numpy's generator."""

    def forward(self, x):
        return x if self.training and np.random.uniform() < 0.5 else super().forward(x)


@refused("draws random numbers")
class RandomChild(Residual):
    """Python's generator chooses which child is called."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(DIM, DIM)

    def branch(self, x):
        return random.choice([self.fc, self.other])(x)


@refused("draws random numbers")
class RandomNumber(Residual):
    """A random tensor without samples scales the branch, as in shake-shake."""

    def branch(self, x):
        return self.fc(x) * (torch.rand(()) + 0.5)


@right
class RandomInChild(Residual):
    """A child adds noise of its own."""

    plain = False

    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.rand_like(x) if self.training else x

    def __init__(self):
        super().__init__()
        self.noise = self.Noise()

    def branch(self, x):
        return self.noise(self.fc(x))


@right
class NoiseLikeInput(Residual):
    """Adds noise in the shape of a tensor."""

    plain = False

    def branch(self, x):
        y = self.fc(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


@either
class NoiseOfSize(Residual):
    """Adds noise whose shape is made of sizes, the batch among them."""

    plain = False

    def branch(self, x):
        y = self.fc(x)
        return y + 0.1 * torch.randn(x.shape[0], 1, DIM, device=x.device)


@refused("generator")
class OwnGenerator(Residual):
    """Draws from a generator of its own."""

    def branch(self, x):
        return self.fc(x) * (0.5 + torch.rand(DIM, generator=generator))


@right
class DropoutFunction(Residual):
    """Dropout as a function."""

    plain = False

    def branch(self, x):
        return F.dropout(self.fc(x), 0.3, self.training)


@right
class DropoutChild(Residual):
    """Dropout as a child."""

    plain = False

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def branch(self, x):
        return self.dropout(self.fc(x))


@right
class DropoutRateOfBlock(Residual):
    """Dropout as a function, with a rate of the block's that is raised later."""

    plain = False

    def __init__(self):
        super().__init__()
        self.rate = 0.1

    def branch(self, x):
        return F.dropout(self.fc(x), self.rate, self.training)

    later = each(lambda block: setattr(block, "rate", 0.5))


@right
class BernoulliInPlace(Residual):
    """DropBlock's way to draw a mask: a new tensor, filled in place."""

    plain = False

    def branch(self, x):
        y = self.fc(x)
        return y * torch.empty_like(y).bernoulli_(0.8)


@refused("can't be traced")
class Shuffles(Residual):
    """Mixes samples by a random permutation, as manifold mixup."""

    def branch(self, x):
        return 0.7 * self.fc(x) + 0.3 * self.fc(x)[torch.randperm(len(x))]


@refused("draws random numbers")
class SeedsItself(Residual):
    """Sets torch's seed in the forward."""

    def branch(self, x):
        torch.manual_seed(7)
        return self.fc(x)


@refused("context")
class ForksTheGenerator(Residual):
    """Draws in a fork of the generator, as invertible networks do."""

    def branch(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.fc(x) + 0.1 * torch.rand_like(x)


# Python values that change later


@right
class ModuleGlobal(Scaled):
    """Reads a global of its module."""

    def scale_now(self):
        return number

    @staticmethod
    def later(model):
        global number
        number = 2.0


@refused("reads 'act'")
class ClosureFlag(Residual):
    """Calls a function whose closure holds a flag."""

    def __init__(self):
        super().__init__()
        shared = flags
        self.act = lambda y: 2 * y if shared["double"] else y

    def branch(self, x):
        return self.act(self.fc(x))

    @staticmethod
    def later(model):
        flags["double"] = True


@right
class ClassAttribute(Scaled):
    """Reads an attribute of its class, changed later for all blocks at once."""

    scale = 1.0

    def scale_now(self):
        return self.scale

    @staticmethod
    def later(model):
        ClassAttribute.scale = 2.0


@right
class ClassAttributeByName(Scaled):
    """Reads an attribute of its class by the class's name."""

    scale = 1.0

    def scale_now(self):
        return ClassAttributeByName.scale

    @staticmethod
    def later(model):
        ClassAttributeByName.scale = 2.0


@refused("reads '(fc.)?config'")
class ConfigObject(Scaled):
    """Reads an attribute of a configuration that all blocks share."""

    def __init__(self):
        super().__init__()
        self.config = config

    def scale_now(self):
        return self.config.scale

    @staticmethod
    def later(model):
        config.scale = 2.0


def strict(kind):
    """Checks what is set, as the configurations of transformers do."""
    original = kind.__setattr__

    def checked(self, name, value):
        original(self, name, float(value))

    kind.__setattr__ = checked
    return kind


@strict
class StrictConfig:
    """Wrapped by a decorator."""


@right
class ConfigStrict(Scaled):
    """Reads a configuration whose class checks what is set."""

    def __init__(self):
        super().__init__()
        self.config = StrictConfig()
        self.config.scale = 1.0

    def scale_now(self):
        return self.config.scale

    later = each(lambda block: setattr(block.config, "scale", 2.0))


@right
class ConfigDict(Scaled):
    """Reads a dictionary that it owns."""

    def __init__(self):
        super().__init__()
        self.settings = {"scale": 1.0}

    def scale_now(self):
        return self.settings["scale"]

    later = each(lambda block: block.settings.update(scale=2.0))


@right
class ListOfNumbers(Scaled):
    """Reads a list whose contents change."""

    def __init__(self):
        super().__init__()
        self.scales = [1.0]

    def scale_now(self):
        return self.scales[0]

    later = each(lambda block: block.scales.__setitem__(0, 2.0))


@right
class SetOfNames(Scaled):
    """Checks whether a set holds a name."""

    def __init__(self):
        super().__init__()
        self.modes = {"plain"}

    def scale_now(self):
        return 2.0 if "double" in self.modes else 1.0

    later = each(lambda block: block.modes.add("double"))


class Mode(enum.Enum):
    PLAIN = 1.0
    DOUBLE = 2.0


@right
class EnumAttribute(Scaled):
    """Reads an Enum."""

    def __init__(self):
        super().__init__()
        self.mode = Mode.PLAIN

    def scale_now(self):
        return self.mode.value

    later = each(lambda block: setattr(block, "mode", Mode.DOUBLE))


@right
class NumpyNumber(Scaled):
    """Reads a number of numpy's."""

    def __init__(self):
        super().__init__()
        self.scale = np.float32(1.0)

    def scale_now(self):
        return float(self.scale)

    later = each(lambda block: setattr(block, "scale", np.float32(2.0)))


@right
class PrivateAttribute(Scaled):
    """Reads an attribute whose name begins with an underscore."""

    def __init__(self):
        super().__init__()
        self._scale = 1.0

    def scale_now(self):
        return self._scale

    later = each(lambda block: setattr(block, "_scale", 2.0))


@right
class PropertyOfBlock(Scaled):
    """Reads a property."""

    def __init__(self):
        super().__init__()
        self._scale = 1.0

    @property
    def scale(self):
        return self._scale

    def scale_now(self):
        return self.scale

    later = each(lambda block: setattr(block, "_scale", 2.0))


@right
class MissingAttribute(Scaled):
    """Looks for an attribute that doesn't exist yet."""

    def scale_now(self):
        return getattr(self, "scale", 1.0)

    later = each(lambda block: setattr(block, "scale", 2.0))


@right
class ChildAttribute(Scaled):
    """Reads a number from a child."""

    def __init__(self):
        super().__init__()
        self.fc.scale = 1.0

    def scale_now(self):
        return self.fc.scale

    later = each(lambda block: setattr(block.fc, "scale", 2.0))


@refused("training")
class ChildTraining(Residual):
    """Checks whether a child is in training, as for frozen BatchNorm."""

    def branch(self, x):
        return self.fc(x) if self.fc.training else 2 * self.fc(x)

    later = each(
        lambda block: setattr(block.fc, "train", lambda mode=True: block.fc) or setattr(block.fc, "training", False)
    )


@right
class OwnTraining(Residual):
    """Does something else in training."""

    def branch(self, x):
        return 2 * self.fc(x) if self.training else self.fc(x)


@refused("reads (__dict__|_parameters)")
class AttributeByGetattr(Scaled):
    """`__getattr__` finds settings in a dictionary."""

    def __init__(self):
        super().__init__()
        self.__dict__["settings"] = {"scale": 1.0}

    def __getattr__(self, name):
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def scale_now(self):
        return self.scale

    later = each(lambda block: block.settings.update(scale=2.0))


@refused("os.environ")
class Environment(Scaled):
    """Reads an environment variable."""

    def scale_now(self):
        return float(os.environ.get(ENVIRON, "1"))

    @staticmethod
    def later(model):
        os.environ[ENVIRON] = "2"


@refused("calls")
class Clock(Scaled):
    """Reads the clock."""

    def scale_now(self):
        return 2.0 if time.time() > deadline[0] else 1.0

    @staticmethod
    def later(model):
        deadline[0] = 0.0


@right
class ThreadLocal(Scaled):
    """Reads a number that belongs to the thread."""

    def scale_now(self):
        return local.scale

    @staticmethod
    def later(model):
        local.scale = 2.0


@refused("calls")
class ContextVariable(Scaled):
    """Reads a context variable."""

    def scale_now(self):
        return context_scale.get()

    @staticmethod
    def later(model):
        context_scale.set(2.0)


@right
class ReplacedFunction(Residual):
    """Its activation is a function that is replaced later."""

    def __init__(self):
        super().__init__()
        self.act = F.relu

    def branch(self, x):
        return self.act(self.fc(x))

    later = each(lambda block: setattr(block, "act", F.gelu))


@refused("reads 'act'")
class ReplacedPartial(Residual):
    """Its activation is a partial function that is replaced later."""

    def __init__(self):
        super().__init__()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def branch(self, x):
        return self.act(self.fc(x))

    later = each(lambda block: setattr(block, "act", functools.partial(F.leaky_relu, negative_slope=0.5)))


@right
class ReplacedMethod(Residual):
    """A method of the instance is replaced later, as monkey patches do."""

    later = each(lambda block: setattr(block, "branch", lambda x: 2 * block.fc(x)))


@right
class ReplacedForward(Residual):
    """The forward of the instance is replaced later, as accelerate does."""

    later = each(lambda block: setattr(block, "forward", lambda x: x + 2 * block.fc(x)))


@right
class ReplacedChild(Residual):
    """A child is replaced by another module later."""

    later = each(lambda block: setattr(block, "fc", nn.Sequential(block.fc, nn.Tanh())))


@right
class ReplacedLibraryFunction(Residual):
    """A function of its module's is replaced later, as libraries are patched."""

    def branch(self, x):
        return activation(self.fc(x))

    @staticmethod
    def later(model):
        global activation
        activation = torch.tanh


activation = torch.relu


@right
class AdapterAdded(Residual):
    """A child that was None becomes a module later."""

    def __init__(self):
        super().__init__()
        self.adapter = None

    def branch(self, x):
        return self.fc(x) if self.adapter is None else self.fc(x) + self.adapter(x)

    later = each(lambda block: setattr(block, "adapter", nn.Tanh()))


@right
class AdapterRemoved(AdapterAdded):
    """A child becomes None later."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(DIM, DIM)

    later = each(lambda block: setattr(block, "adapter", None))


@right
class GrowingList(Residual):
    """Loops over a ModuleList that grows later."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])

    def branch(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    later = each(lambda block: block.layers.append(nn.Tanh()))


@right
class ChildByName(Residual):
    """Chooses a child by an attribute that changes later."""

    def __init__(self):
        super().__init__()
        self.other, self.which = nn.Linear(DIM, DIM), "fc"

    def branch(self, x):
        return getattr(self, self.which)(x)

    later = each(lambda block: setattr(block, "which", "other"))


@right
class HookAddedLater(Residual):
    """A forward hook on a child, added later, changes its output."""

    later = each(lambda block: block.fc.register_forward_hook(lambda module, args, out: 2 * out))


@right
class ReplacedMethodOfClass(Residual):
    """A method of its class is replaced later, as libraries patch attention."""

    def branch(self, x):
        return self.fc(x)

    @staticmethod
    def later(model):
        ReplacedMethodOfClass.branch = lambda self, x: 2 * self.fc(x)


@right
class ReplacedForwardOfClass(Residual):
    """The forward of its class is replaced later."""

    def forward(self, x):
        return super().forward(x)

    @staticmethod
    def later(model):
        ReplacedForwardOfClass.forward = lambda self, x: x + 2 * self.fc(x)


def decorated(forward):
    """Records each call, as the decorators of transformers do."""

    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        counts["calls"] += 1
        return forward(self, *args, **kwargs)

    return call


@refused("'(counts|log|ticks)'")
class DecoratedForward(Residual):
    """A decorator around its forward has effects of its own."""

    @decorated
    def forward(self, x):
        return super().forward(x)


@refused("default argument")
class DefaultArgument(Residual):
    """A mutable default argument holds state between the calls."""

    plain = False

    def forward(self, x, cache={"calls": 0}):  # noqa: B006
        cache["calls"] += 1
        return x + self.drop_path(min(cache["calls"], 3) * self.fc(x))

    @staticmethod
    def call(block, x):
        DefaultArgument.forward.__defaults__[0]["calls"] = counts["calls"] = counts["calls"] + 1
        return block(x)


@right
class NeighboursWeight(Residual):
    """Uses a weight of a module that isn't its own."""

    neighbours: tuple = ()

    def branch(self, x):
        return self.fc(x) + F.linear(x, self.neighbours[0].weight) if self.neighbours else self.fc(x)

    later = each(lambda block: block.__dict__.update(neighbours=(nn.Linear(DIM, DIM),)))


@refused("reads '(cache|history|tables|neighbours)'")
class TellsNeighbour(Residual):
    """Leaves a tensor on a module that isn't its own, as UNets pass on features."""

    def __init__(self):
        super().__init__()
        self.neighbours = [neighbour]

    def branch(self, x):
        y = self.fc(x)
        self.neighbours[0].feature = y.detach()
        return y


@refused("reads '(fc.)?config'")
class ConfigOfChild(Scaled):
    """Reads a configuration through a child."""

    def __init__(self):
        super().__init__()
        self.fc.config = config

    def scale_now(self):
        return self.fc.config.scale

    @staticmethod
    def later(model):
        config.scale = 2.0


@refused("reads 'scales'")
class TupleOfNumpy(Scaled):
    """Reads an array of numpy's."""

    def __init__(self):
        super().__init__()
        self.scales = np.ones(2)

    def scale_now(self):
        return float(self.scales[0])

    later = each(lambda block: block.scales.fill(2.0))


@right
class TensorAttribute(Scaled):
    """Reads a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(DIM)

    def scale_now(self):
        return self.scale

    later = each(lambda block: setattr(block, "scale", torch.full((DIM,), 2.0)))


@right
class DtypeAttribute(Residual):
    """Casts to a dtype that is an attribute of a configuration."""

    def __init__(self):
        super().__init__()
        self.settings = {"dtype": torch.float32}

    def branch(self, x):
        return self.fc(x).to(self.settings["dtype"]).to(x.dtype)

    later = each(lambda block: block.settings.update(dtype=torch.bfloat16))


@right
class ParametersAdded(Residual):
    """A child is wrapped by low-rank adapters later, as peft does."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a = base, nn.Linear(DIM, DIM, bias=False)

        def forward(self, x):
            return self.base(x) + self.a(x)

    later = each(lambda block: setattr(block, "fc", ParametersAdded.Adapted(block.fc)))


# Values read from parameters, buffers and inputs


@refused("numbers in a tensor")
class SignOfParameter(Residual):
    """A parameter's number decides."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(1.0))

    def branch(self, x):
        return self.fc(x) * self.gate if self.gate.item() > 0 else self.fc(x)

    @staticmethod
    def later(model):
        for block in model.blocks:
            block.gate.data.fill_(-1.0)


@refused("numbers in a tensor")
class InitialisedByData(Residual):
    """Takes its scale from the first batch, as ActNorm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("scale", torch.ones(DIM))

    def branch(self, x):
        y = self.fc(x)
        if self.training and not self.ready:
            self.scale.copy_(1 / (y.detach().abs().mean((0, 1)) + 0.1))
            self.ready.fill_(True)
        return y * self.scale


@right
class NumberOfBuffer(Residual):
    """A buffer's number scales, read by item()."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def branch(self, x):
        return self.fc(x) * self.scale.item()

    later = each(lambda block: block.scale.fill_(2.0))


@refused("numbers in a tensor")
class EpochInBuffer(Residual):
    """A schedule that a buffer's number decides."""

    def __init__(self):
        super().__init__()
        self.register_buffer("epoch", torch.tensor(0))

    def branch(self, x):
        return self.fc(x) if int(self.epoch) < 3 else 2 * self.fc(x)

    later = each(lambda block: block.epoch.fill_(5))


@refused("requires_grad of a tensor")
class FrozenOrNot(Residual):
    """Checks whether a weight learns."""

    def branch(self, x):
        return self.fc(x) if self.fc.weight.requires_grad else 2 * self.fc(x)

    later = each(lambda block: block.fc.requires_grad_(False))


@refused("requires_grad of a tensor")
class InputLearns(Residual):
    """Checks whether its input requires grad, as reentrant checkpointing does."""

    def branch(self, x):
        return 2 * self.fc(x) if x.requires_grad else self.fc(x)


@refused("calls")
class GradEnabled(Residual):
    """Checks whether gradients are recorded."""

    def branch(self, x):
        return 2 * self.fc(x) if torch.is_grad_enabled() else self.fc(x)


@refused("calls")
class AutocastEnabled(Residual):
    """Checks whether autocast is on."""

    def branch(self, x):
        return 2 * self.fc(x) if torch.is_autocast_enabled("cpu") else self.fc(x)


@refused("calls")
class DefaultDtype(Scaled):
    """Reads torch's default dtype."""

    def scale_now(self):
        return 1.0 if torch.get_default_dtype() == torch.float32 else 2.0

    @staticmethod
    def later(model):
        torch.set_default_dtype(torch.float64)


@refused("calls")
class ThreadsOfTorch(Scaled):
    """Reads a setting of torch's backends."""

    def scale_now(self):
        return 2.0 if torch.are_deterministic_algorithms_enabled() else 1.0

    @staticmethod
    def later(model):
        torch.use_deterministic_algorithms(True)


@right
class DtypeOfParameters(Residual):
    """Casts its input to the dtype of its parameters, which is changed later."""

    def branch(self, x):
        return self.fc(x.to(next(self.parameters()).dtype))

    @staticmethod
    def later(model):
        model.double()


@right
class DeviceOfParameters(Residual):
    """Moves its input to the device of its parameters, which is changed later."""

    def branch(self, x):
        return self.fc(x.to(next(self.parameters()).device))

    @staticmethod
    def later(model):
        model.to("meta")


@right
class DtypeOfInput(Residual):
    """Its input's dtype decides."""

    def branch(self, x):
        return 2 * self.fc(x) if x.dtype == torch.bfloat16 else self.fc(x)


@right
class CastToInput(Residual):
    """Casts to its input's dtype."""

    def branch(self, x):
        return self.fc(x).float().sigmoid().to(x.dtype)


@right
class HalfOnly(Residual):
    """Clamps what could overflow in float16, as transformers' T5 does."""

    plain = False

    def forward(self, x):
        x = super().forward(x)
        if x.dtype == torch.float16:
            x = x.clamp(-6e4, 6e4)
        return x


@right
class ShapeOfInput(Residual):
    """The number of tokens decides."""

    def branch(self, x):
        return self.fc(x) if x.shape[1] > 4 else 2 * self.fc(x)

    @staticmethod
    def inputs(step):
        return Residual.inputs(step)[:, : 3 if step in (2, 5) else 5]


@refused("number of samples")
class BatchOfInput(Residual):
    """The number of samples decides, beyond those of the conversion."""

    def branch(self, x):
        return self.fc(x) if len(x) > 4 else 2 * self.fc(x)

    @staticmethod
    def inputs(step):
        return Residual.inputs(step)[: 2 if step in (2, 5) else 6]


@refused("is_contiguous")
class StridesOfInput(Residual):
    """Contiguity decides."""

    def branch(self, x):
        return self.fc(x) if x.is_contiguous() else 2 * self.fc(x)

    @staticmethod
    def call(block, x):
        return block(x.transpose(0, 1).contiguous().transpose(0, 1) if x.requires_grad else x)


@right
class DeviceOfInput(Residual):
    """The device decides."""

    def branch(self, x):
        return self.fc(x) if x.device.type == "cpu" else 2 * self.fc(x)

    @staticmethod
    def later(model):
        model.to("meta")


@refused("numbers in a tensor")
class NumbersOfInput(Residual):
    """Numbers of the input decide."""

    def branch(self, x):
        return self.fc(x) if x.sum() > 0 else 2 * self.fc(x)


@refused("numbers in a tensor")
class NumbersAsPython(Residual):
    """Takes numbers out of a tensor."""

    def branch(self, x):
        return self.fc(x) * max(x.detach().abs().flatten().tolist())


@refused("can't be traced")
class ThroughNumpy(Residual):
    """Computes a part in numpy."""

    def branch(self, x):
        return self.fc(x) + torch.from_numpy(np.tanh(x.detach().float().numpy()))


@right
class WhereOfInput(Residual):
    """Chooses element by element."""

    def branch(self, x):
        y = self.fc(x)
        return torch.where(y > 0, y, 0.1 * y)


@either
class InstanceOfTensor(Residual):
    """Checks whether its input is a tensor."""

    def forward(self, x):
        if isinstance(x, Tensor):
            return super().forward(x)
        return [super().forward(t) for t in x]


@refused("differs")
class TypeOfInput(Residual):
    """Looks up its input's type."""

    def branch(self, x):
        return {Tensor: 2}.get(type(x), 1) * self.fc(x)


@refused("differs")
class HasAttribute(Residual):
    """Checks whether its input has an attribute."""

    def branch(self, x):
        return 2 * self.fc(x) if hasattr(x, "mask") else self.fc(x)


@refused("one batch size")
class TriesAnAttribute(Residual):
    """Catches the error of a missing attribute."""

    def branch(self, x):
        try:
            return self.fc(x) + x.positions
        except AttributeError:
            return self.fc(x)


@refused("one batch size")
class CatchesErrors(Residual):
    """Catches the error of a wrong shape and continues."""

    def branch(self, x):
        try:
            return self.fc(x) + x.new_zeros(3)
        except RuntimeError:
            return 2 * self.fc(x)


# Contexts


@refused("context")
class AutocastOff(Residual):
    """A part in float32 whatever autocast says."""

    def branch(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.fc(x.float())


@refused("context")
class AutocastOn(Residual):
    """A part in bfloat16 in any context."""

    def branch(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x)


@refused("autocast|context")
class DecoratedByAutocast(Residual):
    """A forward that is decorated by autocast."""

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        x = x.float()
        return x + self.drop_path(self.fc(x))


@refused("context")
class NoGrad(Residual):
    """Targets without gradients, as momentum encoders make them."""

    def branch(self, x):
        with torch.no_grad():
            scale = self.fc(x).sigmoid()
        return scale * self.fc(x)


@refused("context")
class NoGradAfterwards(Residual):
    """The residual add is recorded, a part of the residual after it isn't."""

    plain = False

    def forward(self, x):
        x = super().forward(x)
        with torch.no_grad():
            scale = 1 + x.abs().mean(-1, keepdim=True)
        return x / scale


@refused("context")
class SetGradEnabled(Residual):
    """Turns gradients off and on again by calls."""

    def branch(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        scale = self.fc(x).sigmoid()
        torch.set_grad_enabled(before)
        return scale * self.fc(x)


@refused("context")
class DecoratedHelper(Residual):
    """A helper method without gradients."""

    @torch.no_grad()
    def scale(self, x):
        return self.fc(x).sigmoid()

    def branch(self, x):
        return self.scale(x) * self.fc(x)


@refused("context")
class EnablesGrad(Residual):
    """Records gradients for a part, in any context."""

    def branch(self, x):
        with torch.enable_grad():
            return self.fc(x)


@refused("context")
class RecordFunction(Residual):
    """Labels a part for the profiler."""

    def branch(self, x):
        with torch.profiler.record_function("branch"):
            return self.fc(x)


@refused("context")
class KernelsOfAttention(Residual):
    """Says which kernels of attention may serve."""

    def branch(self, x):
        q = self.fc(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, x, x)


@contextlib.contextmanager
def doubled():
    global number
    before, number = number, 2.0
    try:
        yield
    finally:
        number = before


class Times(nn.Module):
    """A child that reads a global."""

    def forward(self, x):
        return number * x


@refused("context")
class OwnContext(Residual):
    """A context of its own that a child sees."""

    def __init__(self):
        super().__init__()
        self.times = Times()

    def branch(self, x):
        with doubled():
            return self.times(self.fc(x))


@refused("context")
class StackOfContexts(Residual):
    """An ExitStack of contexts."""

    def branch(self, x):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(torch.profiler.record_function("branch"))
            return self.fc(x.float())


@refused("context")
class CountsSavedTensors(Residual):
    """Watches what autograd saves."""

    def branch(self, x):
        def pack(t):
            counts["calls"] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return self.fc(x) ** 2


@right
class CheckpointsItself(Residual):
    """Checkpoints around its forward, as transformers' layers do."""

    def __call__(self, x):
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, x, use_reentrant=False)
        return super().__call__(x)


@either
class Checkpointed(Residual):
    """Recomputes its branch in backward."""

    def branch(self, x):
        return checkpoint(self.fc, x, use_reentrant=False)


@refused("requires_grad of a tensor")
class CheckpointedReentrant(Residual):
    """Recomputes its branch in backward, in the old way, where it learns."""

    def branch(self, x):
        return checkpoint(self.fc, x, use_reentrant=True) if x.requires_grad else self.fc(x)


@refused("StopIteration|checkpoint|context")
class CheckpointedWhole(Residual):
    """Recomputes all of its forward in training, as transformers' `gradient_checkpointing`."""

    def forward(self, x):
        if self.training:
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


# Side effects


@refused("sets")
class KeepsOutput(Residual):
    """Leaves its branch's output on itself, as for attention maps."""

    def __init__(self):
        super().__init__()
        self.last = None

    def branch(self, x):
        self.last = self.fc(x)
        return self.last


@refused("sets")
class KeepsSize(Residual):
    """Leaves a size on itself."""

    tokens = None

    def branch(self, x):
        self.tokens = x.shape[1]
        return self.fc(x)


@right
class SetsWhatIsSet(Residual):
    """Sets an attribute to what every call sets it to, until somebody changes what it depends on."""

    window, shift = 4, 0

    def __init__(self):
        super().__init__()
        self.window, self.shift = 4, 0

    def branch(self, x):
        if self.window >= 4:
            self.shift = 0
        return self.fc(x).roll(self.shift, 1)

    @staticmethod
    def later(model):
        for block in model.blocks:
            block.window, block.shift = 3, 1


@refused("depends on the dtype of fc, which differs under autocast")
class DoublesNarrow(Residual):
    """Does another thing in float32 than under autocast."""

    def branch(self, x):
        y = self.fc(x)
        return y if y.dtype == torch.float32 else y * 2


@right
class ClampsWindow(Residual):
    """Sets numbers on itself that are the same in every call, as Swin does where a window is as large as the image."""

    def __init__(self):
        super().__init__()
        self.window, self.shift, self.mode = DIM, DIM // 2, None

    def branch(self, x):
        if self.window >= DIM:
            self.window, self.shift, self.mode = DIM, 0, "whole"
        return self.fc(x) if self.shift == 0 else self.fc(x.roll(self.shift, -1))


@refused("sets 'window'")
class ClampsLargerWindow(ClampsWindow):
    """Sets a number on itself in its first call that the next ones read."""

    def __init__(self):
        super().__init__()
        self.window = 2 * DIM


@refused("sets 'even'")
class TakesTurns(Residual):
    """Does another thing in every second call."""

    plain = False

    even = False

    def branch(self, x):
        self.even = not self.even
        return self.fc(x) if self.even else -self.fc(x)


@refused("numbers in a tensor")
class KeepsPythonNumber(Residual):
    """Leaves a Python number on itself that the input decides."""

    largest = 0.0

    def forward(self, x):
        self.largest = max(self.largest, float(x.detach().abs().max()))
        return super().forward(x)


@refused("sets")
class KeepsOnChild(Residual):
    """Leaves a tensor on a child."""

    def branch(self, x):
        y = self.fc(x)
        self.fc.last = y.detach()
        return y


@refused("reads '(cache|history|tables|neighbours)'")
class KeepsInDict(Residual):
    """Leaves a tensor in a dictionary of its own."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def branch(self, x):
        self.cache["last"] = self.fc(x)
        return self.cache["last"]


@refused("reads (__dict__|_parameters)")
class KeepsByDict(Residual):
    """Leaves a tensor on itself past `__setattr__`."""

    def branch(self, x):
        self.__dict__["last"] = self.fc(x)
        return self.last


@right
class ChildKeeps(Residual):
    """A child leaves a tensor on itself, as attention leaves its weights."""

    class Attention(nn.Linear):
        last = None

        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    def __init__(self):
        super().__init__()
        self.fc = self.Attention(DIM, DIM)


@refused("sets")
class AuxiliaryLoss(Residual):
    """Leaves a loss on itself that the training adds, as experts do."""

    def branch(self, x):
        y = self.fc(x)
        self.aux_loss = y.square().mean()
        return y


@refused("sets")
class CountsCalls(Scaled):
    """Counts its calls, and warms up by that."""

    plain = False

    def __init__(self):
        super().__init__()
        self.calls = 0

    def scale_now(self):
        self.calls += 1
        return min(self.calls / 3, 1.0)


@refused("sets")
class CountsWithoutUse(Residual):
    """Counts its calls, which changes nothing."""

    calls = 0

    def branch(self, x):
        self.calls += 1
        return self.fc(x)


@refused("sets")
class CountsOnClass(Residual):
    """Counts its calls on its class."""

    calls = 0

    def branch(self, x):
        type(self).calls += 1
        return self.fc(x)


@refused("sets")
class CountsInBuffer(Residual):
    """Counts its calls in a buffer by +=."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def branch(self, x):
        self.calls += 1
        return self.fc(x)


@refused("in place")
class CountsInBufferByAdd(CountsInBuffer):
    """Counts its calls in a buffer by a method."""

    def branch(self, x):
        self.calls.add_(1)
        return self.fc(x)


@refused("sets|changes")
class CountsInBufferAndUses(CountsInBuffer):
    """Counts its calls in a buffer and scales by that."""

    plain = False

    def branch(self, x):
        return self.fc(x) * self.calls.add_(1)


@refused("sets")
class CountsByAssignment(CountsInBuffer):
    """Counts its calls in a buffer that is assigned."""

    def branch(self, x):
        self.calls = self.calls + 1
        return self.fc(x)


@refused("'(counts|log|ticks)'")
class CountsInDict(Residual):
    """Counts calls in a dictionary of its module."""

    def branch(self, x):
        counts["calls"] += 1
        return self.fc(x)


@refused("'(counts|log|ticks)'")
class CountsByIterator(Scaled):
    """Takes the next number of an iterator."""

    plain = False

    def scale_now(self):
        return 1 + next(ticks[0]) % 2


@refused("'(counts|log|ticks)'")
class AppendsNumber(Residual):
    """Appends a size to a global list."""

    def branch(self, x):
        log.append(x.shape[1])
        return self.fc(x)


@refused("changes what is in 'history'")
class AppendsTensor(Residual):
    """Appends a tensor to a list of its own."""

    def __init__(self):
        super().__init__()
        self.history = []

    def branch(self, x):
        y = self.fc(x)
        self.history.append(y.detach())
        return y


@refused("reads '(cache|history|tables|neighbours)'")
class MemoisesByShape(Residual):
    """Keeps a table for each size that it meets, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.tables = {}

    def branch(self, x):
        size = x.shape[1]
        if size not in self.tables:
            self.tables[size] = torch.linspace(0, 1, size)[:, None]
        return self.fc(x) + self.tables[size]

    @staticmethod
    def inputs(step):
        return Residual.inputs(step)[:, : 3 if step in (2, 5) else 5]


@functools.lru_cache
def table(size):
    return torch.linspace(0, 1, size)[:, None]


@right
class MemoisedHelper(Residual):
    """Calls a memoised function of a size."""

    def branch(self, x):
        return self.fc(x) + table(x.shape[1])

    inputs = MemoisesByShape.inputs


@right
class TableInChild(Residual):
    """A child makes a table for each size that it meets."""

    class Positions(nn.Module):
        def forward(self, x):
            return x + table(x.shape[1])

    def __init__(self):
        super().__init__()
        self.positions = self.Positions()

    def branch(self, x):
        return self.fc(self.positions(x))

    inputs = MemoisesByShape.inputs


@either
class LazyBuffer(Residual):
    """Registers a buffer in its first forward."""

    def branch(self, x):
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(0, 1, DIM))
        return self.fc(x) + self.positions


@either
class LazyChild(Residual):
    """Makes a child in its first forward."""

    def __init__(self):
        super().__init__()
        self.extra = None

    def branch(self, x):
        if self.extra is None:
            self.extra = nn.Linear(DIM, DIM)
        return self.extra(self.fc(x))


@refused("reads (__dict__|_parameters)")
class LazyParameter(Residual):
    """Makes a parameter in its first forward."""

    def branch(self, x):
        if "gamma" not in self._parameters:
            self.register_parameter("gamma", nn.Parameter(torch.ones(x.shape[-1])))
        return self.gamma * self.fc(x)


@refused("in place")
class AverageOfActivations(Residual):
    """Follows its activations by a moving average in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(DIM))

    def branch(self, x):
        y = self.fc(x)
        if self.training:
            self.average.mul_(0.9).add_(0.1 * y.detach().mean((0, 1)))
        return y - self.average


@refused("context")
class AverageOfWeights(Residual):
    """A teacher's weights follow in the forward, as MoCo's."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(DIM, DIM).requires_grad_(False)

    def branch(self, x):
        if self.training:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.fc.weight, 0.1)
        return self.fc(x) + self.teacher(x)


@refused("in place")
class ClampsWeights(Residual):
    """Clamps its weights in the forward of training."""

    def branch(self, x):
        if self.training:
            self.fc.weight.data.clamp_(-0.2, 0.2)
        return self.fc(x)


@refused("sets")
class MemoryBank(Residual):
    """Attends to a buffer of earlier activations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(4, DIM))

    def branch(self, x):
        y = self.fc(x) + self.bank.mean(0)
        self.bank = torch.cat([self.bank, y.detach().float()[:, 0]])[-4:]
        return y


@refused("in place")
class FreezesItself(Residual):
    """Sets requires_grad in the forward."""

    def branch(self, x):
        self.fc.bias.requires_grad_(not self.training)
        return self.fc(x)


@refused("picks rows by number")
class ScalesFirstRows(Residual):
    """Treats the rows from the sixth on in another way; the checks' batches have fewer."""

    def branch(self, x):
        y = self.fc(x)
        return torch.cat([2 * y[:5], y[5:]])


@refused("compares the number of its rows")
class ScalesOneBatchSize(Residual):
    """Doubles its result for one number of samples."""

    def branch(self, x):
        return self.fc(x) * (1 + (x.shape[0] == 6))


@refused("sets 'dropout.training'")
class ChildToEval(DropoutChild):
    """Puts a child into eval mode in the forward."""

    def branch(self, x):
        self.dropout.eval()
        return super().branch(x)


@refused("calls")
class Prints(Residual):
    """Prints."""

    def branch(self, x):
        print("called with", x.shape[-1])
        return self.fc(x)


class LogsToList(logging.Handler):
    def emit(self, record):
        log.append(record.getMessage())


logger = logging.getLogger("adversarial")
logger.addHandler(LogsToList())
logger.propagate = False


@refused("calls")
class Logs(Residual):
    """Logs."""

    def branch(self, x):
        logger.warning("called in training: %s", self.training)
        return self.fc(x)


@refused("calls")
class Warns(Residual):
    """Warns."""

    def branch(self, x):
        warnings.warn("this block is old", UserWarning, stacklevel=1)
        return self.fc(x)


@refused("sets")
class Remembers(Residual):
    """Checks whether it is called with the same object again."""

    plain = False

    key, again = None, 0

    def forward(self, x):
        self.again += self.key is x
        self.key = x
        return super().forward(x)


@refused("calls register_forward_hook of a module, which changes it")
class HooksInForward(Residual):
    """Registers a hook on a child for one call."""

    def branch(self, x):
        seen = []
        handle = self.fc.register_forward_hook(lambda module, args, out: seen.append(2 * out))
        self.fc(x)
        handle.remove()
        return seen[0]


# Batch statistics


@refused("differs|changes")
class BatchNormFunction(Residual):
    """Batch norm as a function, its statistics in buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))

    def branch(self, x):
        return F.batch_norm(self.fc(x), self.mean, self.var, training=self.training)


@right
class BatchNormChild(Residual):
    """Batch norm as a child."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(5)

    def branch(self, x):
        return self.bn(self.fc(x))


@right
class BatchNormWithoutStatistics(BatchNormChild):
    """Batch norm that normalises by the batch always."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(5, track_running_stats=False)


@refused("training")
class InstanceNormTracked(BatchNormChild):
    """Instance norm, which follows means over the batch in training."""

    def __init__(self):
        super().__init__()
        self.bn = nn.InstanceNorm1d(5, track_running_stats=True)


class EvoNorm(nn.Module):
    """Normalises by the batch's variance."""

    def __init__(self):
        super().__init__()
        self.register_buffer("var", torch.ones(DIM))

    def forward(self, x):
        var = self.var
        if self.training:
            var = x.var((0, 1))
            self.var.lerp_(var.detach().to(self.var.dtype), 0.1)
        return x / (var + 1e-5).sqrt()


@refused("training|batch")
class EvoNormChild(Residual):
    """A norm of another library's that uses the batch's statistics in training alone."""

    def __init__(self):
        super().__init__()
        self.norm = EvoNorm()

    def branch(self, x):
        return self.norm(self.fc(x))


class Router(nn.Module):
    """Each expert takes the tokens that want it most, from the whole batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert = nn.Linear(DIM, 1), nn.Linear(DIM, DIM)

    def forward(self, x):
        flat = x.flatten(0, 1)
        weight = self.gate(flat).sigmoid()
        chosen = weight[:, 0].topk(max(len(flat) // 2, 1)).indices
        return (
            torch.zeros_like(flat)
            .index_copy(0, chosen, (weight * self.expert(flat).to(flat.dtype))[chosen].to(flat.dtype))
            .view_as(x)
        )


@refused("differs")
class Capacity(Residual):
    """Experts of a limited capacity: which tokens are served depends on the others."""

    def __init__(self):
        super().__init__()
        self.fc = Router()


class Codebook(nn.Module):
    """The nearest entries; they follow by moving averages in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, DIM))

    def forward(self, x):
        flat = x.detach().to(self.codes.dtype).flatten(0, 1)
        nearest = torch.cdist(flat, self.codes).argmin(-1)
        codes = self.codes[nearest]
        if self.training:
            one_hot = F.one_hot(nearest, 4).to(flat.dtype)
            self.codes.lerp_((one_hot.T @ flat) / (one_hot.sum(0)[:, None] + 1), 0.1)
        return x + (codes.view_as(x) - x).detach()


@refused("training|batch")
class CodebookChild(Residual):
    """A codebook in the branch, as EnCodec's."""

    def __init__(self):
        super().__init__()
        self.codebook = Codebook()

    def branch(self, x):
        return self.codebook(self.fc(x))


@refused("differs")
class CentresBatch(Residual):
    """Subtracts the mean of the batch in training."""

    def branch(self, x):
        y = self.fc(x)
        return y - y.mean(0, keepdim=True) if self.training else y


class LooksAlike(Residual):
    """Its child mixes samples where an attribute says so, which no name or graph shows."""

    class Mixes(nn.Linear):
        mixes = False

        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0, keepdim=True) if self.mixes else y

    def __init__(self):
        super().__init__()
        self.fc = self.Mixes(DIM, DIM)


# Arguments


@right
class DictArgument(Residual):
    """Is called with a dictionary."""

    def forward(self, inputs):
        return super().forward(inputs["x"])

    @staticmethod
    def call(block, x):
        return block({"x": x, "mask": None})


@refused("list or dict that it is called with")
class FillsDictArgument(Residual):
    """Adds an entry to the dictionary that it is called with."""

    def forward(self, x, state):
        y = self.fc(x)
        state["hidden"] = y
        return x + self.drop_path(y)

    @staticmethod
    def call(block, x):
        state = {}
        return block(x, state), state

    @staticmethod
    def take(out):
        return out[0]


@refused("list or dict that it is called with")
class FillsListArgument(FillsDictArgument):
    """Appends to the list that it is called with."""

    def forward(self, x, features):
        y = self.fc(x)
        features.append(y)
        return x + self.drop_path(y)

    @staticmethod
    def call(block, x):
        features = []
        return block(x, features), features


@right
class KeywordOnly(Residual):
    """A keyword-only argument."""

    def forward(self, x, *, scale=1.0):
        return x + self.drop_path(scale * self.fc(x))

    @staticmethod
    def call(block, x):
        return block(x, scale=0.5)


@right
class AnyArguments(Residual):
    """`*args` and `**kwargs`."""

    def forward(self, *args, **kwargs):
        return super().forward(*args)

    @staticmethod
    def call(block, x):
        return block(x)


@right
class NumberArgument(Residual):
    """A number that is another one later."""

    def forward(self, x, scale):
        return x + self.drop_path(scale * self.fc(x))

    @staticmethod
    def call(block, x):
        return block(x, 2.0 if flags["double"] else 1.0)

    @staticmethod
    def later(model):
        flags["double"] = True


@right
class NestedLists(Residual):
    """Tensors in lists of lists."""

    def forward(self, inputs):
        ((x, (bias,)),) = inputs
        return x + self.drop_path(self.fc(x) + bias)

    @staticmethod
    def call(block, x):
        return block([[x, [x.mean(1, keepdim=True)]]])


# Outputs


class Output(collections.OrderedDict):
    """A dictionary with attributes, as transformers' ModelOutput."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@right
class DictSubclass(Residual):
    """Returns a subclass of dict."""

    def forward(self, x):
        return Output(hidden=super().forward(x))

    @staticmethod
    def take(out):
        return out.hidden


@right
class PlainDict(DictSubclass):
    """Returns a dictionary."""

    def forward(self, x):
        return {"hidden": Residual.forward(self, x), "nothing": None}

    @staticmethod
    def take(out):
        return out["hidden"]


Pair = collections.namedtuple("Pair", ["hidden", "size"])


@right
class NamedTuple(DictSubclass):
    """Returns a named tuple that holds a Python number too."""

    def forward(self, x):
        return Pair(Residual.forward(self, x), x.shape[1])


@dataclasses.dataclass
class Record:
    hidden: Tensor


@right
class Dataclass(DictSubclass):
    """Returns a dataclass."""

    def forward(self, x):
        return Record(Residual.forward(self, x))


@right
class ListOutput(Residual):
    """Returns a list."""

    def forward(self, x):
        return [super().forward(x), x]

    @staticmethod
    def take(out):
        return out[0]


@right
class SameTwice(ListOutput):
    """Returns the same tensor twice."""

    def forward(self, x):
        x = Residual.forward(self, x)
        return x, x


@right
class OutputWithNumbers(ListOutput):
    """Returns Python numbers beside its tensor."""

    def forward(self, x):
        return Residual.forward(self, x), 3, "name", x.shape[1] // 2, self.training


@right
class InputItself(ListOutput):
    """Returns its input object beside the sum."""

    def forward(self, x):
        return Residual.forward(self, x), x

    @staticmethod
    def call(block, x):
        out = block(x)
        return *out, out[1] is x


@refused("frozen")
class WeightAsOutput(Residual):
    """Returns a weight beside the sum."""

    def forward(self, x):
        return x + self.drop_path(self.branch(x)), self.fc.weight

    take = ListOutput.take


# In place


@refused("assigns to a part of a tensor")
class SetsItem(Residual):
    """Assigns to a part of a tensor."""

    def branch(self, x):
        y = self.fc(x)
        y[:, 0] = 0
        return y


@refused("in place")
class InPlaceOnView(Residual):
    """Changes a view of its branch's output."""

    def branch(self, x):
        y = self.fc(x)
        y[:, 0].zero_()
        return y


@refused("nothing to skip")
class InPlaceThroughName(Residual):
    """Changes a view by +=, whose result has a name of its own."""

    def branch(self, x):
        y = self.fc(x)
        part = y[..., :4]
        part += 1
        return y


@refused("in place")
class InPlaceOnInput(Residual):
    """Changes its input."""

    plain = False

    def branch(self, x):
        return self.fc(x.mul_(2))


@refused("in place")
class InPlaceOnViewOfInput(Residual):
    """Changes a view of its input by an operator."""

    plain = False

    def forward(self, x):
        first = x[:, :1]
        first += 1
        return super().forward(x)


@either
class AddsInPlace(Residual):
    """Adds the branch to its input in place."""

    def forward(self, x):
        x += self.drop_path(self.fc(x))
        return x


@right
class InPlaceActivation(Residual):
    """An activation in place after the add."""

    plain = False

    def forward(self, x):
        return F.relu_(super().forward(x))


@refused("context")
class WritesOut(Residual):
    """Writes into a tensor by out=."""

    def branch(self, x):
        y = self.fc(x)
        with torch.no_grad():
            scale = torch.empty_like(y)
            torch.sigmoid(y, out=scale)
        return y * scale


@refused("in place")
class InPlaceInChild(Residual):
    """A child changes its input, which is the residual."""

    plain = False

    class Doubles(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    def __init__(self):
        super().__init__()
        self.fc = self.Doubles(DIM, DIM)


# Gradients


@right
class DetachedResidual(Residual):
    """The residual gets no gradient."""

    def forward(self, x):
        return x.detach() + self.drop_path(self.fc(x))


@right
class DetachedByData(Residual):
    """A part without gradients by `.data`."""

    def branch(self, x):
        return self.fc(x) * x.data.sigmoid()


@refused("requires_grad of a tensor")
class HookOnTensor(Residual):
    """A hook on a tensor scales its gradient."""

    def branch(self, x):
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda g: 0.5 * g)
        return y


@refused("can't be traced")
class HookOnInput(Residual):
    """A hook on its input scales the gradient of everything."""

    plain = False

    def forward(self, x):
        if self.training:
            x.register_hook(lambda g: 0.5 * g)
        return super().forward(x)


@refused("sets")
class RetainsGrad(Residual):
    """Keeps a tensor's gradient."""

    def branch(self, x):
        self.last = self.fc(x)
        if self.last.requires_grad:
            self.last.retain_grad()
        return self.last


class Halve(torch.autograd.Function):
    """The identity, whose gradient is half."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


@refused("context")
class OwnFunction(Residual):
    """A custom autograd function."""

    def branch(self, x):
        return Halve.apply(self.fc(x))


@right
class OwnFunctionInChild(Residual):
    """A child with a custom autograd function."""

    class Halves(nn.Module):
        def forward(self, x):
            return Halve.apply(x)

    def __init__(self):
        super().__init__()
        self.halve = self.Halves()

    def branch(self, x):
        return self.halve(self.fc(x))


@refused("context")
class GradientInForward(Residual):
    """Takes a gradient in its forward."""

    def branch(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.fc(z).square().sum(), z)
        return self.fc(x) - 0.1 * gradient.to(x.dtype)


@refused("can't be traced")
class Mapped(Residual):
    """Maps over samples by torch.func."""

    def branch(self, x):
        return torch.func.vmap(self.fc)(x)


@refused("can't be traced")
class CalledFunctionally(Residual):
    """Calls a child with other weights."""

    def branch(self, x):
        weights = {name: 0.5 * p for name, p in self.fc.named_parameters()}
        return torch.func.functional_call(self.fc, weights, (x,))


@right
class StraightThrough(Residual):
    """Rounds, and lets the gradient pass."""

    def branch(self, x):
        y = self.fc(x)
        return y + (y.round() - y).detach()


# Children and calls


@right
class ChildTwice(Residual):
    """Calls a child twice."""

    def branch(self, x):
        return self.fc(self.fc(x).relu())


@right
class ChildForward(Residual):
    """Calls a child's forward, past its hooks."""

    def branch(self, x):
        return self.fc.forward(x)


@refused("reads 'layers'")
class ChildInPlainList(Residual):
    """Children in a plain list, registered elsewhere."""

    def __init__(self):
        super().__init__()
        self.layers = [self.fc]

    def branch(self, x):
        return self.layers[0](x)


@refused("reads 'layers'")
class ChildNobodyKnows(Residual):
    """A child in a plain list, and not registered."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(DIM, DIM)]

    def branch(self, x):
        return self.layers[0](self.fc(x))


@right
class WeightsOfChild(Residual):
    """Uses a child's weights by a function."""

    def branch(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


@right
class ComputedWeight(Residual):
    """Normalises a child's weight at every call, as weight standardisation."""

    def branch(self, x):
        weight = self.fc.weight
        return F.linear(x, weight - weight.mean(1, keepdim=True), self.fc.bias)


@right
class WeightNorm(Residual):
    """A parametrised child."""

    def __init__(self):
        super().__init__()
        self.fc = parametrizations.weight_norm(self.fc)


@right
class WeightOfParametrised(WeightNorm):
    """Reads the weight of a parametrised child."""

    def branch(self, x):
        return F.linear(x, self.fc.weight)


@refused("context")
class CachedParametrisation(WeightNorm):
    """Computes a parametrised weight once for two calls."""

    def branch(self, x):
        with parametrize.cached():
            return self.fc(self.fc(x))


@refused("in training")
class SpectralNorm(Residual):
    """Spectral norm, whose power iteration moves buffers in training."""

    def __init__(self):
        super().__init__()
        self.fc = parametrizations.spectral_norm(self.fc)


@right
class OldWeightNorm(Residual):
    """Weights that a pre-hook computes, as torch's old weight norm and spectral norm."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(DIM, 1))
        del self.fc._parameters["weight"]
        self.fc.v = nn.Parameter(torch.randn(DIM, DIM))
        self.fc.weight = self.fc.v.detach()
        self.fc.register_forward_pre_hook(ComputeWeight())


class ComputeWeight:
    def __call__(self, module, args):
        module.weight = module.v / module.v.norm()


@right
class PreHook(Residual):
    """A pre-hook on the block changes its input."""

    plain = False

    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(double_input)


def double_input(module, args):
    return tuple(2 * a for a in args)


@right
class CallOverridden(Residual):
    """`__call__` does more than the forward."""

    def __call__(self, x):
        return 0.5 * super().__call__(2 * x)


@right
class SmallerInside(Residual):
    """Runs its own method on another size of its input, as multi-crop."""

    def branch(self, x):
        return self.fc(x) + self.features(x[:, :3]).mean(1, keepdim=True)

    def features(self, x):
        return self.fc(x).relu()


@right
class WhileLoop(Residual):
    """Iterates to a depth."""

    depth = 3

    def branch(self, x):
        depth = self.depth
        while depth > 0:
            x, depth = self.fc(x).tanh(), depth - 1
        return x


@refused("numbers in a tensor")
class WhileNotConverged(Residual):
    """Iterates until numbers converge, as equilibrium models."""

    def branch(self, x):
        y, steps = self.fc(x).tanh(), 0
        while steps < 5 and float((self.fc(y).tanh() - y).detach().abs().max()) > 0.5:
            y, steps = self.fc(y).tanh(), steps + 1
        return y


@right
class Recursion(Residual):
    """Calls itself."""

    def branch(self, x, depth=2):
        return self.fc(x) if depth == 0 else self.fc(self.branch(x, depth - 1))


@right
class Yields(Residual):
    """Goes through a generator."""

    def pieces(self, x):
        for _ in range(2):
            x = self.fc(x).tanh()
            yield x

    def branch(self, x):
        return sum(self.pieces(x))


@refused("can't be traced")
class CopiesChild(Residual):
    """Computes with a copy of a child."""

    def branch(self, x):
        return self.fc(x) + copy.deepcopy(self.fc)(x)


@right
class Fourier(Residual):
    """Complex numbers within the branch."""

    def branch(self, x):
        return torch.fft.irfft(torch.fft.rfft(self.fc(x).float(), dim=1), n=5, dim=1).to(x.dtype)


@right
class Asserts(Residual):
    """Asserts something of its input."""

    def forward(self, x):
        torch._assert(x.shape[-1] == DIM, "wrong width")
        return super().forward(x)


@right
class EmptyPiece(Residual):
    """Splits its input and has an empty piece."""

    def branch(self, x):
        first, rest, empty = x.split([3, DIM - 3, 0], dim=-1)
        return self.fc(torch.cat([rest, first, empty], dim=-1))


@right
class ClassToken(Residual):
    """Prepends a token that is expanded to the batch."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))

    def branch(self, x):
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.fc(y)[:, 1:] + self.fc(y)[:, :1]


@refused("number of samples")
class Windowed(Residual):
    """The original Swin's windows, whose number is divided by a float."""

    def branch(self, x):
        windows = self.fc(x.reshape(x.shape[0] * 2, -1, DIM // 2).repeat(1, 1, 2))[..., : DIM // 2]
        batch = int(windows.shape[0] / 2.0)
        return windows.reshape(batch, -1, DIM)


@refused("differs")
class TemporalShift(Residual):
    """Shifts channels between neighbouring samples, which are frames."""

    def branch(self, x):
        return self.fc(torch.cat([x[..., :4].roll(1, 0), x[..., 4:]], dim=-1))


@refused("few dropped")
class HalvesOfBatch(Residual):
    """Runs the halves of the batch one after the other."""

    def branch(self, x):
        return torch.cat([self.fc(half) for half in x.chunk(2)])


@right
class SortsSamples(Residual):
    """Sorts samples, and puts them back, as packed sequences do."""

    def branch(self, x):
        order = x[:, 0, 0].argsort()
        return self.fc(x[order])[order.argsort()]


@right
class Recurrent(Residual):
    """A recurrent child, of whose outputs the first is used."""

    def __init__(self):
        super().__init__()
        self.fc = nn.GRU(DIM, DIM, batch_first=True)

    def branch(self, x):
        return self.fc(x)[0]

    later = each(lambda block: block.fc.flatten_parameters())


@right
class Attention(Residual):
    """torch's attention, of whose outputs the first is used."""

    def __init__(self):
        super().__init__()
        self.fc = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def branch(self, x):
        return self.fc(x, x, x, need_weights=False)[0]


@right
class RelativeBias(Residual):
    """A bias that an index in a buffer picks from a parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def branch(self, x):
        return self.table[self.index].softmax(-1) @ self.fc(x)


@refused("context")
class InferenceInside(Residual):
    """A part in inference mode."""

    def branch(self, x):
        with torch.inference_mode():
            bias = self.fc(x).tanh()
        return self.fc(x) + bias.clone()


@either
class ReadsLayersOfItself(Residual):
    """Loops over its own children by their types."""

    def branch(self, x):
        for child in self.children():
            if isinstance(child, nn.Linear):
                x = child(x)
        return x

    later = each(lambda block: block.add_module("second", nn.Linear(DIM, DIM)))


@right
class AsksForCompilers(Residual):
    """Checks whether it is being scripted, traced, compiled or exported, as libraries do."""

    def branch(self, x):
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return 2 * self.fc(x)
        return self.fc(x)


@right
class DecoratedForScript(Residual):
    """A helper that TorchScript leaves alone."""

    @torch.jit.ignore
    def scale(self, y):
        return 0.5 * y

    def branch(self, x):
        return self.scale(self.fc(x))


@right
class DecoratedForDynamo(Residual):
    """A helper that torch.compile leaves alone."""

    @torch._dynamo.disable
    def scale(self, y):
        return 0.5 * y

    def branch(self, x):
        return self.scale(self.fc(x))


@right
class NumberOfDimensions(Residual):
    """The number of dimensions decides."""

    def branch(self, x):
        return self.fc(x) if x.dim() == 3 and x.ndim == 3 else 2 * self.fc(x)


@refused("replaced|differs")
class ForwardAssigned(Residual):
    """Chooses its forward when it is made, as RepVGG's blocks do."""

    def __init__(self):
        super().__init__()
        self.forward = self.forward_doubled

    def forward_doubled(self, x):
        return x + self.drop_path(2 * self.fc(x))


@right
class CalledTwice(Residual):
    """A block that the network calls twice, as ALBERT's."""

    plain = False

    @staticmethod
    def call(block, x):
        return block(block(x))


def halve_gradients(module, gradients, _):
    return tuple(0.5 * g for g in gradients)


@right
class BackwardHookOnChild(Residual):
    """A backward hook on a child scales gradients."""

    def __init__(self):
        super().__init__()
        self.fc.register_full_backward_hook(halve_gradients)


@right
class BackwardHookOnBlock(Residual):
    """A backward hook on the block scales gradients."""

    def __init__(self):
        super().__init__()
        self.register_full_backward_hook(halve_gradients)


# Drop-paths


@refused("nothing to skip")
class DropPathOnResidual(Residual):
    """Drops the residual."""

    plain = False

    def forward(self, x):
        return self.drop_path(x) + self.fc(x)


@refused("nothing to skip")
class DropPathOnHalf(Residual):
    """Drops one half of the channels."""

    plain = False

    def forward(self, x):
        first, second = self.fc(x).chunk(2, dim=-1)
        return x + torch.cat([self.drop_path(first), second], dim=-1)


@refused("nothing to skip")
class DropPathInWhere(Residual):
    """What was dropped is replaced where it is positive."""

    plain = False

    def forward(self, x):
        y = self.fc(x)
        return x + torch.where(y > 0, self.drop_path(y), 0.1 * y)


@right
class DropPathTwice(Residual):
    """One drop-path for two branches."""

    plain = False

    def forward(self, x):
        x = x + self.drop_path(self.fc(x))
        return x + self.drop_path(self.fc(x))


@refused("drop_prob|traced")
class DropPathInForward(Residual):
    """Makes its drop-path anew in each forward."""

    def __init__(self):
        super().__init__()
        del self.drop_path

    def forward(self, x):
        return x + DropPath(0.0)(self.fc(x))


class CountingDropPath(DropPath):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@refused("calls")
class DropPathCounts(Residual):
    """Its drop-path counts its calls."""

    def __init__(self):
        super().__init__()
        self.drop_path = CountingDropPath(0.0)


class AlternatingDropPath(nn.Module):
    """Drops in every second call of all drop-paths."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        counts["calls"] += 1
        return x * (2.0 * (counts["calls"] % 2))


@refused("outside of the module")
class DropPathWithState(Residual):
    """Its drop-path shares a state with others."""

    def __init__(self):
        super().__init__()
        self.drop_path = AlternatingDropPath(0.5)


class ChannelDropPath(nn.Module):
    """Drops channels, not samples."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(1, 1, x.shape[-1]).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


@refused("parts of a row")
class DropPathOfChannels(Residual):
    """Its drop-path drops channels."""

    def __init__(self):
        super().__init__()
        self.drop_path = ChannelDropPath(0.5)


class AddingDropPath(DropPath):
    def forward(self, y, residual):
        return residual + super().forward(y)


@refused("more than drop")
class DropPathAdds(Residual):
    """Its drop-path adds the residual itself."""

    def __init__(self):
        super().__init__()
        self.drop_path = AddingDropPath(0.0)

    def forward(self, x):
        return self.drop_path(self.fc(x), x)


class LayerScaleDropPath(DropPath):
    def __init__(self, drop_prob):
        super().__init__(drop_prob)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return super().forward(self.scale * x)


@refused("isn't the identity")
class DropPathScales(Residual):
    """Its drop-path scales what it keeps, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.drop_path = LayerScaleDropPath(0.0)


@right
class DropPathShared(Residual):
    """All blocks have the same drop-path module."""

    shared = DropPath(0.0)

    def __init__(self):
        super().__init__()
        self.drop_path = self.shared


@refused("calls none of its drop-paths")
class DropPathDecided(Residual):
    """Calls its drop-path only where its rate isn't 0."""

    plain = False

    def forward(self, x):
        y = self.fc(x)
        return x + (self.drop_path(y) if self.drop_path.drop_prob > 0 else y)


@refused("hooks|differs")
class DropPathWithHook(Residual):
    """A hook on its drop-path scales what it returns."""

    def __init__(self):
        super().__init__()
        self.drop_path.register_forward_hook(halve_output)


def halve_output(module, args, out):
    return 0.5 * out


# Without a drop-path


class Bare(Residual):
    """`x + branch(x)`."""

    def __init__(self):
        super().__init__()
        self.drop_path = None

    def forward(self, x):
        return x + self.branch(x)


@right
class BarePlain(Bare):
    """Nothing special."""


@right
class BareFunctionOfTimm(Bare):
    """A drop-path that is a function, with a rate of the block's, which is raised later."""

    plain = False

    def __init__(self):
        super().__init__()
        self.rate = 0.0

    def forward(self, x):
        return x + drop_path(self.fc(x), self.rate, self.training)

    later = each(lambda block: setattr(block, "rate", 0.5))


def drop_path(x, drop_prob, training):
    if drop_prob == 0.0 or not training:
        return x
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - drop_prob) / (1 - drop_prob)


@refused("random")
class BareLayerDrop(Bare):
    """Skips itself at random."""

    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else super().forward(x)


@refused("sets")
class BareKeeps(Bare):
    """Leaves a tensor on itself."""

    def branch(self, x):
        self.last = self.fc(x)
        return self.last


@refused("returns")
class BareOutput(Bare):
    """Returns a subclass of dict."""

    def forward(self, x):
        return Output(hidden=x + self.fc(x))

    take = DictSubclass.take


@refused("context")
class BareAutocastOff(Bare):
    """A part in float32 whatever autocast says."""

    def branch(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.fc(x.float())


@refused("random")
class BareLoop(Bare):
    """An encoder that skips its layers at random."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x):
        x = x + self.fc(x)
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = x + layer(x)
        return x


# Reached by other ways than `self` and globals


class Settings:
    """A class with state, which a class method reads."""

    scale = 1.0
    calls = 0

    @classmethod
    def get(cls):
        return cls.scale


def settings_doubled(model):
    Settings.scale = 2.0


@right
class AliasOfClass(Scaled):
    """Reads an attribute of a class through a local variable."""

    later = staticmethod(settings_doubled)

    def scale_now(self):
        settings = Settings
        return settings.scale


@right
class ClassMethodOfOther(AliasOfClass):
    """Reads what a class holds."""

    def scale_now(self):
        return Settings.get()


@refused("sets 'calls' of Settings")
class CountsOnOtherClass(Residual):
    """Counts its calls on a class that is no module's."""

    def branch(self, x):
        Settings.calls += 1
        return self.fc(x)


class HasScale(Scaled):
    scale = 1.0


@right
class AttributeOfBase(HasScale):
    """Reads an attribute of its base class by `super()`."""

    def scale_now(self):
        return super().scale

    @staticmethod
    def later(model):
        HasScale.scale = 2.0


@right
class AttributeOfType(Scaled):
    """Reads an attribute of the class that it is an instance of."""

    scale = 1.0

    def scale_now(self):
        kind = type(self)
        return kind.scale

    @staticmethod
    def later(model):
        AttributeOfType.scale = 2.0


@right
class ImportsInside(Scaled):
    """Imports a module in its forward and reads from it."""

    def scale_now(self):
        from . import adversarial

        return adversarial.number

    @staticmethod
    def later(model):
        global number
        number = 2.0


def scaled_by_attribute(x):
    return x * scaled_by_attribute.scale


scaled_by_attribute.scale = 1.0


@right
class AttributeOfFunction(Residual):
    """A helper keeps its settings on itself."""

    def branch(self, x):
        return scaled_by_attribute(self.fc(x))

    @staticmethod
    def later(model):
        scaled_by_attribute.scale = 2.0


@dataclasses.dataclass
class Options:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class FixedOptions:
    scale: float = 1.0


options = Options()


@right
class OptionsAsDict(Scaled):
    """Reads a data class through the standard library."""

    def __init__(self):
        super().__init__()
        self.options = Options()

    def scale_now(self):
        return dataclasses.asdict(self.options)["scale"]

    @staticmethod
    def later(model):
        for block in model.blocks:
            block.options.scale = 2.0


@right
class OptionsCompared(OptionsAsDict):
    """Compares a data class with another."""

    def scale_now(self):
        return 1.0 if self.options == Options() else 3.0


@right
class OptionsFixed(OptionsAsDict):
    """Reads a frozen data class, which is replaced later."""

    def __init__(self):
        super().__init__()
        self.options = FixedOptions()

    def scale_now(self):
        return self.options.scale

    later = each(lambda block: setattr(block, "options", FixedOptions(2.0)))


@refused("default argument")
class OptionsByDefault(Residual):
    """An object is a default argument."""

    def branch(self, x, by=options):
        return by.scale * self.fc(x)

    @staticmethod
    def later(model):
        options.scale = 2.0


@refused("Namespace")
class CountsOnObject(Residual):
    """Counts its calls on an object that it holds; conversion leaves that as it was."""

    def __init__(self):
        super().__init__()
        self.statistics = types.SimpleNamespace(calls=0)

    def branch(self, x):
        self.statistics.calls += 1
        return self.fc(x)


@refused("__setattr__")
class SetsByObject(Residual):
    """Sets an attribute past `nn.Module`."""

    def branch(self, x):
        object.__setattr__(self, "width", 5)
        return self.fc(x)


@right
class NumberBecomesParameter(Scaled):
    """A number is replaced by a parameter that equals it."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def scale_now(self):
        return self.scale

    later = each(lambda block: setattr(block, "scale", nn.Parameter(torch.tensor(1.0))))


@right
class NumberBecomesVector(NumberBecomesParameter):
    """A number is replaced by a tensor of several."""

    later = each(lambda block: setattr(block, "scale", torch.full((DIM,), 2.0)))


@either
class SizeInSet(Residual):
    """Looks a size up in a set."""

    def branch(self, x):
        y = self.fc(x)
        return y * 2 if x.shape[1] in {7, 9} else y

    @staticmethod
    def inputs(step):
        return torch.randn(6, 5 + 2 * (step % 2), DIM, generator=torch.Generator().manual_seed(step))


@either
class SizeInDict(SizeInSet):
    """Looks a size up in a dict, with a default."""

    def branch(self, x):
        return self.fc(x) * {7: 3.0}.get(x.shape[1], 1.0)


@refused("names an attribute")
class SizeInName(SizeInSet):
    """Reads an attribute whose name a size is part of."""

    scale_7 = 3.0

    def branch(self, x):
        return self.fc(x) * getattr(self, f"scale_{x.shape[1]}", 1.0)


@refused("number of samples")
class ShapeIsConstant(Residual):
    """Compares its input's shape with one that it knows."""

    def branch(self, x):
        y = self.fc(x)
        return y * 2 if x.shape == (6, 5, DIM) else y


@refused("number of samples")
class ShapeOfOneSample(Residual):
    """Compares two shapes, which are the same for one sample."""

    def branch(self, x):
        y = self.fc(x)
        return y * 2 if x.mean(0, keepdim=True).shape == x.shape else y

    @staticmethod
    def inputs(step):
        return torch.randn(1 if step else 4, 5, DIM, generator=torch.Generator().manual_seed(step))


@right
class AssertsShape(Residual):
    """Makes sure of a shape by the sizes that it took before."""

    def branch(self, x):
        samples, tokens, dim = x.shape
        y = self.fc(x.reshape(samples * tokens, dim)).reshape(samples, tokens, dim)
        if y.size() != (samples, tokens, dim):
            raise ValueError("no such shape")
        return y


@right
class ShapeOfParameter(Residual):
    """Decides by the shape of a parameter, which is replaced later."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2))

    def branch(self, x):
        y = self.fc(x)
        return y * 2 if self.gate.shape[0] == 3 else y

    later = each(lambda block: setattr(block, "gate", nn.Parameter(torch.ones(3))))


@refused("`is`")
class SameArgument(Residual):
    """Checks whether two arguments are one tensor."""

    def forward(self, x, context):
        y = self.fc(x)
        return x + self.drop_path(y * 2 if context is x else y + context)

    @staticmethod
    def call(block, x):
        return block(x, x)


@refused("isn't inside of it")
class AsksNeighbour(Scaled):
    """Checks whether another module has an attribute."""

    def __init__(self):
        super().__init__()
        self.__dict__["neighbour"] = nn.Identity()

    def scale_now(self):
        return 2.0 if hasattr(self.neighbour, "turbo") else 1.0

    later = each(lambda block: setattr(block.neighbour, "turbo", True))


def passed_on(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


@right
class Wrapped(Residual):
    """A decorator calls what it holds."""

    @passed_on
    def branch(self, x):
        return self.fc(x)


# The state that they share


def reset():
    """Puts all that blocks share outside of modules back to what it was at first."""
    global number, activation
    number, activation = 1.0, torch.relu
    flags["double"], config.scale, deadline[0], local.scale, counts["calls"] = False, 1.0, float("inf"), 1.0, 0
    context_scale.set(1.0)
    log.clear()
    table.cache_clear()
    ticks[0], neighbour.feature = itertools.count(), None
    generator.manual_seed(3)
    os.environ.pop(ENVIRON, None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    for kind, attributes in _CLASS_STATE.items():
        for name, value in attributes.items():
            setattr(kind, name, value)
    DefaultArgument.forward.__defaults__[0]["calls"] = 0
    Settings.scale, Settings.calls, HasScale.scale, options.scale = 1.0, 0, 1.0, 1.0
    scaled_by_attribute.scale = 1.0


def shared_state():
    """What it is now."""
    values = {"number": number, "activation": activation, "flags": dict(flags), "config": dict(vars(config))}
    values |= {"deadline": deadline[0], "local": local.scale, "context": context_scale.get(), "log": list(log)}
    values |= {"counts": dict(counts), "ticks": repr(ticks[0]), "generator": generator.get_state()}
    values["feature"], values["settings"] = neighbour.feature, Settings.calls
    values |= {"environment": os.environ.get(ENVIRON), "dtype": torch.get_default_dtype()}
    values |= {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return values | {kind.__name__: class_state(kind) for kind in KINDS.values()}


def class_state(kind):
    """Attributes of the class that are numbers or strings."""
    own = {k: v for k, v in vars(kind).items() if isinstance(v, (int, float, str)) and not k.startswith("__")}
    return {k: v for k, v in own.items() if k not in ("outcome", "reason", "plain")}


_METHODS = ("branch", "forward")
_CLASS_STATE = {
    kind: class_state(kind) | {k: vars(kind)[k] for k in _METHODS if k in vars(kind)} for kind in KINDS.values()
}
