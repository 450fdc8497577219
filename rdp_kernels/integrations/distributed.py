"""The scheme in several processes: ranks agree on what is dropped, and DDP sends only the gradients of what learns.

`register` is for `torch.nn.parallel.DistributedDataParallel` and adds a communication hook to it. `agree` works with
any kind of data parallelism.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._utils.checks import check_bool
from .._utils.ranks import world_size
from ..paths.path import path_modules_among
from ..scheme.iteration import Iteration
from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme

__all__ = ["Agreement", "agree", "register"]

Facts = dict[str, Any]
"""What ranks have to agree on, by name. An error message says "rank 1 has NAME VALUE"."""


def register(
    ddp: DistributedDataParallel,
    scheme: ResidualDropPath,
    *,
    every_iteration: bool = True,
    compress: torch.dtype | None = None,
    timeout: timedelta | None = None,
) -> Agreement:
    """Prepares a DistributedDataParallel model for the iterations of a scheme.

    Gradients equal those of one process on the joined batch. What doesn't learn has no gradient on any rank and isn't
    sent. Every rank has to call this before the first iteration, and again for another scheme of the same DDP. Calling
    it twice has no further effect.

    DDP sends gradients in buckets, cut by size. If only some parameters of a bucket learn, only their gradients are
    sent, joined into one tensor. So the bytes are proportional to what learns, however the buckets were cut, and the
    number of messages doesn't change. Buckets cut by path would save the copy but cost a message for each path.

    Args:
        ddp: built with `find_unused_parameters=True`, because dropped and frozen parameters are unused.
        scheme: the scheme of the model or of a part of it. Gradients of parameters outside of the scheme's model are
            sent in every iteration.
        every_iteration: passed to `agree`.
        compress: the dtype in which gradients are sent, for example `torch.bfloat16`. None means their own.
        timeout: passed to `agree`.

    Returns:
        The handle of `agree`.

    Raises:
        RuntimeError: if ranks disagree, or if `ddp` already has a communication hook. In the latter case
            `agree(scheme, ddp.process_group)` does everything except saving bytes.
        TypeError: if an argument has another type.
        ValueError: if `ddp` was built with other options, or if the scheme isn't of the model in `ddp`.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> from rdp_kernels.integrations import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)  # the same seed on every rank
        >>> ddp = DistributedDataParallel(model, find_unused_parameters=True)
        >>> agreement = distributed.register(ddp, scheme)
        >>> for _ in scheme.iterations():
        ...     ddp(torch.randn(8, 8)).square().mean().backward()
        >>> dist.destroy_process_group()
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}")
    check_scheme(scheme)
    if ddp.static_graph or not ddp.find_unused_parameters:
        wrong = "static_graph=True" if ddp.static_graph else "find_unused_parameters=False"
        raise ValueError(
            "ddp must be built with find_unused_parameters=True and without static_graph, as iterations leave "
            f"different parameters unused, got {wrong}"
        )
    if compress is not None and not (isinstance(compress, torch.dtype) and compress.is_floating_point):
        raise TypeError(f"compress must be a floating-point torch.dtype or None, got {compress!r}")
    known = {id(p) for p in ddp.module.parameters()}
    for path in scheme.paths:
        if any(id(p) not in known for p in path.parameters()):
            raise ValueError(
                f"scheme must belong to the model in ddp, which lacks the parameters of path {path.name!r}"
            )
    agreement = agree(scheme, ddp.process_group, every_iteration=every_iteration, timeout=timeout)
    sending = _sending_of.get(ddp)
    if sending is None:
        sending = _Sending()
        try:
            ddp.register_comm_hook(sending, _send)
        except BaseException:
            agreement.remove()
            raise
        ddp.register_forward_pre_hook(sending.before_forward)
        _sending_of[ddp] = sending
    sending.follow(scheme, ddp.process_group, compress)
    return agreement


def agree(
    scheme: ResidualDropPath,
    process_group: dist.ProcessGroup | None = None,
    *,
    every_iteration: bool = True,
    timeout: timedelta | None = None,
) -> Agreement:
    """Checks that all ranks have the same scheme, now and at the start of every iteration.

    All ranks have to call it. It compares the scheme's options and state, its paths, their drop probabilities and their
    parameters. At each iteration it compares the number and the phase of the iteration, the probabilities and, in block
    mode, the plan. In sample mode ranks draw different masks. There each iteration also exchanges which paths learn on
    any rank, so that all ranks run the reuse iteration if one rank has to.

    If ranks disagree at the start of an iteration, no iteration is open afterwards, and a pending one stays pending.
    CPU tensors are exchanged in a separate gloo group, so that nothing waits for the device. `scheme.remove()` also
    ends it.

    Args:
        scheme: the scheme of this rank.
        process_group: the ranks. None means all.
        every_iteration: whether to compare at each start of an iteration in block mode. The hosts exchange 8 bytes
            then, and wait for each other.
        timeout: how long a rank waits. None is torch's default, half an hour. A rank that died is noticed at once.

    Returns:
        A handle. Its `remove()` ends the comparison.

    Raises:
        RuntimeError: on every rank, if ranks disagree. The message says which rank has what. Also if there is no
            process group.
        TypeError: if `scheme` or `every_iteration` has another type.

    Example:
        >>> import torch.distributed as dist
        >>> from rdp_kernels.integrations import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
        >>> agreement = distributed.agree(scheme)
        >>> agreement.ranks
        [0]
        >>> agreement.remove()
        >>> dist.destroy_process_group()
    """
    return Agreement(check_scheme(scheme), process_group, check_bool("every_iteration", every_iteration), timeout)


class Agreement:
    """The handle that `agree` and `register` return.

    The ranks exchange CPU tensors in `group`, a gloo group of their own.

    Args:
        scheme: as in `agree`.
        process_group: as in `agree`.
        every_iteration: as in `agree`.
        timeout: as in `agree`.

    Attributes:
        ranks: the global ranks that take part.
        group: the gloo group.

    Raises:
        RuntimeError: if ranks disagree, or if there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from rdp_kernels.integrations import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> agreement = distributed.agree(rdp.ResidualDropPath(model, drop_prob=0.5))
        >>> agreement.gather(torch.tensor([1, 2]))
        tensor([[1, 2]])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        scheme: ResidualDropPath,
        process_group: dist.ProcessGroup | None,
        every_iteration: bool,
        timeout: timedelta | None,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed.init_process_group() must be called first")
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        # A separate group, so that other collectives of a rank that skips an iteration aren't mixed up with these.
        self.group = dist.new_group(self.ranks, timeout, backend="gloo", use_local_synchronization=True)
        self._scheme, self._every_iteration = weakref.ref(scheme), every_iteration
        self.compare(facts_of(scheme))
        others = [call for call in scheme._on_begin if not isinstance(getattr(call, "__self__", None), Agreement)]
        scheme._on_begin[:] = [*others, self._begin]

    def remove(self) -> None:
        """Ends the comparison of iterations."""
        scheme = self._scheme()
        if scheme is not None and self._begin in scheme._on_begin:
            scheme._on_begin.remove(self._begin)

    def gather(self, values: Tensor) -> Tensor:
        """Gathers a CPU tensor from all ranks.

        Args:
            values: a tensor whose shape and dtype are equal on all ranks.

        Returns:
            `[world, *values.shape]`.
        """
        out = [torch.empty_like(values) for _ in self.ranks]
        dist.all_gather(out, values, group=self.group)
        return torch.stack(out)

    def compare(self, facts: Facts) -> None:
        """Compares facts between ranks.

        Args:
            facts: values by name. The names appear in the message of the error.

        Raises:
            RuntimeError: on every rank, unless `facts` are equal on all ranks.
        """
        fingerprints = self.gather(_fingerprint(facts))
        if (fingerprints == fingerprints[0]).all():
            return
        of_ranks: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(of_ranks, facts, group=self.group)
        raise RuntimeError(differences(self.ranks, of_ranks))

    def _begin(self, iteration: Iteration) -> None:
        scheme = self._scheme()
        assert scheme is not None
        by_sample = iteration.plan.mode == "sample"
        if by_sample or self._every_iteration:
            self.compare(facts_of_iteration(scheme, iteration))
        if by_sample:
            iteration.join(self.gather(iteration.presence()).any(dim=0))


def check_trained(model: nn.Module, scheme: ResidualDropPath) -> None:
    """Checks that `model`, which the loop calls, is the scheme's model in any number of wrappers.

    Every rank has to call this, because the ranks then agree on the masks. Raises `ValueError` if it isn't the scheme's
    model, for example because it is a copy. Raises `ValueError` for `DataParallel`, whose threads would freeze and
    unfreeze the same modules.
    """
    if isinstance(model, DataParallel):
        raise ValueError("model must not be in DataParallel: run one process for each device (torchrun), or use one")
    if not any(path_module.binding.scheme is scheme for path_module in path_modules_among(model.modules())):
        raise ValueError(
            "scheme must belong to the model that is trained, but none of its paths is in that model: was the model "
            "copied or made anew (model_init) after the scheme?"
        )
    if isinstance(model, DistributedDataParallel):
        register(model, scheme)
    elif world_size() > 1:
        agree(scheme)


def facts_of(scheme: ResidualDropPath) -> Facts:
    """Returns what has to be equal on all ranks when training begins or resumes."""
    facts: Facts = {
        "number of paths": len(scheme.paths),
        "mode": scheme.mode,
        "seed": scheme.seed,
        "plans drawn": scheme._pairs.drawn,
        "iteration": scheme.phase or ("reuse pending" if scheme.reuse_pending else "none open"),
        "sampling": scheme.sampling,
        "options": scheme._rules,
    }
    if scheme.plan is not None and scheme.mode == "block":
        facts["plan that drops paths"] = scheme.plan.dropped_paths
    for path in scheme.paths:
        facts[f"path {path.index}"] = path.name
        facts[f"drop_prob of path {path.name!r}"] = path.drop_prob
        facts[f"parameters in path {path.name!r}"] = [_describe(p) for p in path.parameters()]
    facts["parameters in the rest"] = [_describe(p) for p in scheme._rest.parameters()]
    return facts


def facts_of_iteration(scheme: ResidualDropPath, iteration: Iteration) -> Facts:
    """Returns what has to be equal on all ranks in an iteration."""
    plan = iteration.plan
    facts = {"seed": scheme.seed, "plans drawn": scheme._pairs.drawn, "iteration": iteration.phase}
    if plan.mode == "block":
        facts["plan that drops paths"] = plan.dropped_paths
    else:
        facts["number of forwards"] = len(iteration.forwards)
    for path, drop_prob in zip(iteration.paths, plan.drop_probs, strict=True):
        facts[f"drop_prob of path {path.name!r}"] = drop_prob
    return facts


def differences(ranks: Sequence[int], of_ranks: Sequence[Facts], most: int = 3) -> str:
    """Describes the first `most` facts that differ, for example "ranks disagree: rank 1 has seed 4, rank 0 has 3"."""
    sentences = []
    for name in dict.fromkeys(name for facts in of_ranks for name in facts):
        values = [_shortened(facts.get(name, "none")) for facts in of_ranks]
        usual, count = Counter(values).most_common(1)[0]  # in a tie, the lowest rank's
        if count == len(ranks):
            continue
        others = [f"rank {rank} has {name} {v}" for rank, v in zip(ranks, values, strict=True) if v != usual]
        holder = f"rank {ranks[values.index(usual)]} has" if count == 1 else f"the other {count} have"
        sentences.append(f"{', '.join(others[:most])}{' and others' * (len(others) > most)}, {holder} {usual}")
    more = f"; and {len(sentences) - most} more" * (len(sentences) > most)
    return f"ranks disagree: {'; '.join(sentences[:most])}{more}"


class _Sending:
    """Determines which gradients of a DDP's model the communication hook leaves out.

    It does so in the forward, because backward may run after the iteration has ended. A pickle or copy sends
    everything.
    """

    group: dist.ProcessGroup | None = None
    compress: torch.dtype | None = None

    def __init__(self) -> None:
        self._scheme: Callable[[], ResidualDropPath | None] = lambda: None
        self.idle: frozenset[int] = frozenset()

    def follow(self, scheme: ResidualDropPath, group: dist.ProcessGroup | None, compress: torch.dtype | None) -> None:
        self._scheme, self.group, self.compress = weakref.ref(scheme), group, compress

    def before_forward(self, ddp: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():
            scheme = self._scheme()
            # A forward in eval mode ignores an iteration.
            planned = scheme is not None and scheme.phase is not None and ddp.module.training  # type: ignore[union-attr]
            self.idle = frozenset(map(id, scheme.idle_parameters())) if planned else frozenset()  # type: ignore[union-attr]

    def __reduce__(self) -> tuple:
        return _Sending, ()


_sending_of: weakref.WeakKeyDictionary[DistributedDataParallel, _Sending] = weakref.WeakKeyDictionary()


def _send(state, bucket):  # no annotations: torch checks them and doesn't understand strings
    """The communication hook: averages the gradients that learn in a `dist.GradBucket` over the ranks, in place.

    Nothing reads the other gradients of the bucket. Returns a future of the bucket's buffer.
    """
    buffer = bucket.buffer()
    parts = [g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True) if id(p) not in state.idle]
    if not parts:
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done
    whole = len(parts) == len(bucket.parameters())
    sent = buffer if whole else torch.cat([part.flatten() for part in parts])
    sent = sent.to(state.compress or sent.dtype)
    sent.div_(dist.get_world_size(state.group))  # before the sum, which could overflow in 16 bits

    def put_back(future: Future) -> Tensor:
        (mean,) = future.value()
        if whole:
            return buffer if mean.dtype == buffer.dtype else buffer.copy_(mean)
        for part, value in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
            part.copy_(value.view_as(part))
        return buffer

    return dist.all_reduce(sent, group=state.group, async_op=True).get_future().then(put_back)


def _describe(parameter: nn.Parameter) -> str:
    kind = "" if parameter.requires_grad else " frozen"
    return f"{list(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}{kind}"


def _fingerprint(facts: Facts) -> Tensor:
    """Returns the first 8 bytes of a hash, uint8 `[8]`."""
    return torch.frombuffer(bytearray(hashlib.sha256(repr(facts).encode()).digest()[:8]), dtype=torch.uint8)


def _shortened(value: object, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
