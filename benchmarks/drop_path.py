"""Ordinary drop-path in sample mode: providers that skip dropped samples, and one that doesn't. Each provider draws its
own masks at each step, as in users' training."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from rdp_kernels.integrations.compile import compile_branches

from .cases import BOUND, CPU, VERIFIED, VERIFIED_PLANS, config_of, labels_of, turn_of, unavailable, verify
from .harness import Case, Check, Provider, told
from .library_models import Library, drop_paths
from .machine import Device, one_thread
from .pairs import Plain
from .textbook import Textbook, largest_difference

MODELS = ("vit-s", "vit-b")
DROP_PROB = 0.4
COMPILER = "inductor"
UNIT = "two steps of drop-path"


class OwnMasks(Plain):
    """Two steps of timm's drop-path: every branch is computed, then multiplied by a mask."""

    name = "drop-path"
    minimal = False
    compiled = False
    skips = False
    """Whether a branch without kept rows is skipped, so that its weights have no gradient."""

    def __init__(
        self,
        network: Library,
        images: Tensor,
        labels: Tensor,
        drop_prob: float,
        autocast: bool = False,
        recorded: bool = False,
    ):
        """`recorded` must be True if `drawn` is called later."""
        self.drop_prob, self._recorded = drop_prob, recorded
        self.prepare(network, images)
        super().__init__(network, images, labels, "sample", autocast)

    def prepare(self, network: Library, images: Tensor) -> None:
        modules = drop_paths(len(network.places), self.drop_prob)
        self._recorders = [_Recorder(module, images) for module in modules]
        network.set_drop_paths(self._recorders if self._recorded else modules)

    def drawn(self) -> tuple[Tensor, float]:
        """Runs forward and backward. Returns the rows that each path kept, bool `[paths, B]`, and p."""
        self.backward()
        return torch.stack([recorder.kept for recorder in self._recorders]).cpu(), self.drop_prob


class Compiled(OwnMasks):
    """`OwnMasks` with the whole network compiled."""

    name = "compiled drop-path"
    compiled = True

    def prepare(self, network: Library, images: Tensor) -> None:
        super().prepare(network, images)
        network.model.compile(dynamic=False, backend=COMPILER)


class Subset(OwnMasks):
    """DINOv2's drop-path: each branch runs on a fixed number of random rows, and its update is scaled by B / rows."""

    name = "subset"

    def prepare(self, network: Library, images: Tensor) -> None:
        kept, blocks = max(int(len(images) * (1 - self.drop_prob)), 1), cast(nn.Sequential, network.model.blocks)
        self._blocks = [_SubsetBlock(block, kept, self.compiled) for block in blocks]
        network.model.blocks = nn.Sequential(*self._blocks)

    def drawn(self) -> tuple[Tensor, float]:
        self.backward()
        rows = [rows.cpu() for block in self._blocks for rows in block.rows]
        keep = torch.zeros(len(rows), len(self.images), dtype=torch.bool)
        return keep.scatter(1, torch.stack(rows), True), 1 - len(rows[0]) / len(self.images)


class CompiledSubset(Subset):
    """`Subset` with each block compiled."""

    name = "compiled subset"
    compiled = True


class Ours(OwnMasks):
    """The converted network without a scheme: branches run on the rows that are kept."""

    name = "ours drop-path"
    skips = True

    def prepare(self, network: Library, images: Tensor) -> None:
        network.prepare(images[:2], self.drop_prob)

    def drawn(self) -> tuple[Tensor, float]:
        """Predicts the masks from torch's global CPU generator, which draws them path by path."""
        state = torch.get_rng_state()
        keep = torch.stack([torch.rand(len(self.images)) >= self.drop_prob for _ in self.network.branches])
        torch.set_rng_state(state)
        self.backward()
        return keep, self.drop_prob


class OursCompiled(Ours):
    """`Ours` with each branch compiled."""

    name = "ours compiled drop-path"
    compiled = True

    def prepare(self, network: Library, images: Tensor) -> None:
        super().prepare(network, images)
        compile_branches(network.model, backend=COMPILER)


TRAINERS: tuple[type[OwnMasks], ...] = (OwnMasks, Compiled, Subset, CompiledSubset, Ours, OursCompiled)


def drop_path_case(
    size: str,
    model: str,
    turns: int,
    device: Device,
    batch: int | None = None,
    autocast: bool = False,
    compiled: bool = True,
) -> Case:
    """Returns a case: two steps of drop-path at p = 0.4 on one of `MODELS`, and two plain steps as the baseline. The
    arguments are those of `cases.step_case`. `compiled` adds the compiled trainers, and compiles them at once."""
    kinds = [kind for kind in TRAINERS if compiled or not kind.compiled]
    config = config_of(size, model, device, batch)
    labels = labels_of(size, model, config, "sample", DROP_PROB, autocast, "drop-path")
    reason = unavailable(model)
    if reason is not None:
        return Case(labels, UNIT, Plain.name, [Provider.missing(kind.name, reason) for kind in (Plain, *kinds)])
    torch._dynamo.reset()  # compilations of earlier cases count towards dynamo's limit
    batches = config.batches(device)

    def provider(kind: type[OwnMasks]) -> Provider:
        try:
            trainer = kind(config.network(device.device), *batches[0], DROP_PROB, autocast)
            trainer.train()
        except Exception as error:
            if not kind.compiled:
                raise
            return Provider.missing(kind.name, told(error))  # compilers may fail here
        run = turn_of(trainer, batches, [None])
        return Provider(kind.name, run, lambda: verify_drawn(kind, model, device.device), compiled=kind.compiled)

    run_plain = turn_of(config.trainer(Plain, "sample", device.device, autocast), batches, [None])
    plain = Provider(Plain.name, run_plain, lambda: verify(Plain, model, "sample", DROP_PROB, device.device))
    return Case(labels, UNIT, Plain.name, [plain, *map(provider, kinds)])


@one_thread()
def verify_drawn(kind: type[OwnMasks], model: str, device: torch.device = CPU) -> Check:
    """Compares the gradients of a small float64 network, and which parameters have one, with the textbook's for the
    same masks."""
    config = VERIFIED[model]
    trainer = kind(config.network(device), *config.data(device), DROP_PROB, recorded=True)
    book = Textbook(config.network(device), trainer.images, trainer.labels)
    errors = []
    for _ in range(VERIFIED_PLANS):
        keep, drop_prob = trainer.drawn()
        book.drop(keep, [drop_prob] * len(keep), skip=kind.skips)
        errors.append(largest_difference([_gradients(book.network.model)], [_gradients(trainer.model)]))
    return Check(torch.tensor(errors, dtype=torch.float64).max().item(), BOUND)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients by the parameter's number, and clears them. Names would change when blocks are wrapped."""
    gradients = {str(number): p.grad for number, p in enumerate(model.parameters()) if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


class _Recorder(nn.Module):
    """Wraps a drop-path, and records in a buffer which rows it kept. Works in a compiled network too."""

    kept: Tensor

    def __init__(self, drop_path: nn.Module, images: Tensor):
        super().__init__()
        self.drop_path = drop_path
        self.register_buffer("kept", torch.zeros(len(images), dtype=torch.bool, device=images.device))

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path(x)
        self.kept.copy_((out != 0).flatten(1).any(dim=1))
        return out


class _SubsetBlock(nn.Module):
    """A block of timm's ViT whose branches run on `kept` random rows."""

    def __init__(self, block: nn.Module, kept: int, compiled: bool):
        super().__init__()
        self.block, self._kept = block, kept
        self._run = _subset_block
        if compiled:
            self._run = torch.compile(_subset_block, fullgraph=True, dynamic=False, backend=COMPILER)
        self.rows: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows = [torch.randperm(len(x), device=x.device)[: self._kept] for _ in range(2)]
        return self._run(self.block, x, *self.rows)


def _subset_block(block: nn.Module, x: Tensor, rows: Tensor, next_rows: Tensor) -> Tensor:
    x = _add_subset(x, rows, lambda x: block.ls1(block.attn(block.norm1(x))))
    return _add_subset(x, next_rows, lambda x: block.ls2(block.mlp(block.norm2(x))))


def _add_subset(x: Tensor, rows: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    update = branch(x.index_select(0, rows))
    return x.index_add(0, rows, update.to(x.dtype), alpha=len(x) / len(rows))
