"""A byte-level GPT built from residual paths, and text sampled from it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.digits.seeds import seed_of
from examples.language.data import FILE_START
from examples.models import Attention, ResidualClassifier, mlp

BYTES = 256


class CausalAttention(Attention):
    """Causal self-attention: each place attends to itself and earlier places."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ByteGPT(ResidualClassifier):
    """Maps bytes, int64 `[B, N]` with N ≤ context, to logits of the byte after each, `[B, N, 256]`.

    It is pre-norm. Each block is two paths, attention and MLP. The head shares the embedding's weight, which belongs to
    the rest. Weights are initialised as in GPT-2.
    """

    def __init__(self, depth: int, width: int, heads: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.paths = rdp.ResidualSequence(
            *(
                rdp.ResidualBranch(fn, norm=nn.LayerNorm(width))
                for _ in range(depth)
                for fn in (CausalAttention(width, heads), mlp(width))
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            last = name.endswith(("fn.proj.weight", "fn.2.weight"))  # the more branches, the smaller their updates
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, text: Tensor) -> Tensor:
        return self.embedding(text) + self.position[: text.shape[1]]

    def classify(self, stream: Tensor) -> Tensor:
        return self.head(self.norm(stream))


@torch.no_grad()
def sample(model: ByteGPT, count: int, temperature: float, seed: int) -> bytes:
    """Samples the first `count` bytes of a file. Temperature 0 always takes the likeliest byte."""
    device, context = model.position.device, len(model.position)
    generator = torch.Generator().manual_seed(seed_of(seed))
    text = torch.tensor([list(FILE_START)])
    model.eval()
    for _ in range(count):
        logits = model(text[:, -context:].to(device))[0, -1].float().cpu()
        if temperature == 0:
            next_input = logits.argmax().view(1)
        else:
            next_input = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        text = torch.cat([text, next_input.view(1, 1)], dim=1)
    return bytes(text[0, len(FILE_START) :].tolist())
