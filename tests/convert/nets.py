"""Small blocks in the ways that model libraries write theirs."""

import torch
from torch import nn

DIM = 8


class DropPath(nn.Module):
    """A library's own drop-path, which `rdp.convert` knows by its name."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = (torch.rand(len(x), device=x.device) >= self.drop_prob).to(x.dtype).div(1 - self.drop_prob)
        return x * keep.reshape(-1, *[1] * (x.dim() - 1))


def mlp(dim=DIM):
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Block(nn.Module):
    """Two branches: with a parameter of the block, a bias for all samples and a row for each."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.proj, self.mlp = nn.Linear(DIM, DIM), mlp()
        self.gamma = nn.Parameter(torch.rand(DIM))
        self.drop_path1, self.drop_path2 = DropPath(drop_prob), DropPath(drop_prob)
        self.heads = 2

    def forward(self, x, bias=None, context=None):
        batch, tokens, dim = x.shape
        y = self.norm1(x).reshape(batch, tokens, self.heads, dim // self.heads).transpose(2, 3).flatten(2)
        y = self.proj(y)
        if bias is not None:
            y = y + bias
        if context is not None:
            y = y * context[:, None]
        x = x + self.drop_path1(self.gamma * y)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Shared(nn.Module):
    """One drop-path for two branches, the residual second."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.norm1, self.fn1, self.fn2 = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.drop_path = DropPath(drop_prob)

    def forward(self, x):
        x = self.drop_path(self.fn1(self.norm1(x))) + x
        return torch.add(x, self.drop_path(self.fn2(x)))


class Conv(nn.Module):
    """NCHW, a shortcut, BatchNorm, and ReLU in place after the add."""

    def __init__(self, inp=DIM, out=DIM, drop_prob=0.2):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out)
        self.downsample = nn.Conv2d(inp, out, 1) if inp != out else None
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_prob)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.drop_path(self.bn(self.conv(x)))
        out += shortcut
        return self.act(out)


class Windows(nn.Module):
    """Rows are windows, two for each sample."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.norm, self.fn, self.drop_path = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), DropPath(drop_prob)

    def forward(self, x):
        batch, tokens, dim = x.shape
        windows = x.reshape(batch * 2, tokens // 2, dim)
        windows = windows + self.drop_path(self.fn(self.norm(windows)))
        return windows.reshape(batch, tokens, dim)


class Concat(nn.Module):
    """The update is concatenated, not added."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.fn, self.out, self.drop_path = mlp(), nn.Linear(2 * DIM, DIM), DropPath(drop_prob)

    def forward(self, x):
        return self.out(torch.cat([x, self.drop_path(self.fn(x))], dim=-1))


class Between(nn.Module):
    """Something not linear stands between the drop-path and the add."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.fn, self.drop_path = mlp(), DropPath(drop_prob)

    def forward(self, x):
        return x + torch.cos(self.drop_path(self.fn(x)))


class Trains(nn.Module):
    """Does something else in training."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.fn, self.drop_path = mlp(), DropPath(drop_prob)

    def forward(self, x):
        y = self.fn(x)
        if self.training:
            y = 3 * y
        return x + self.drop_path(y)


class Sizes(nn.Module):
    """An `if` over sizes, and a result that is a tuple."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.fn, self.drop_path = mlp(), DropPath(drop_prob)

    def forward(self, x):
        pad = -x.shape[1] % 4
        y = nn.functional.pad(x, (0, 0, 0, pad)) if pad > 0 else x
        y = self.fn(y)[:, : x.shape[1]]
        return (x + self.drop_path(y), None)[0]


class Nested(nn.Module):
    """A drop-path in the branch of another."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.fn, self.inner = mlp(), nn.Linear(DIM, DIM)
        self.drop_path = DropPath(drop_prob)

    def forward(self, x):
        y = self.fn(x)
        y = y + self.drop_path(self.inner(y))
        return x + self.drop_path(y)


class Plain(nn.Module):
    """Residual adds without a drop-path."""

    def __init__(self):
        super().__init__()
        self.norm, self.fn, self.proj = nn.LayerNorm(DIM), mlp(), nn.Linear(DIM, DIM)

    def forward(self, x):
        x = x + self.fn(self.norm(x))
        return x + self.proj(x)


class DinoBlock(nn.Module):
    """Like the blocks of DINOv2's own code: functions within the forward, and other code at each rate."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM), mlp()
        self.drop_path1 = DropPath(drop_prob) if drop_prob > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_prob) if drop_prob > 0 else nn.Identity()
        self.sample_drop_ratio = drop_prob

    def forward(self, x):
        def attn_residual(x):
            return self.attn(self.norm1(x))

        def mlp_residual(x):
            return self.mlp(self.norm2(x))

        if self.training and self.sample_drop_ratio > 0.1:
            rows = torch.randperm(len(x))[: max(int(len(x) * (1 - self.sample_drop_ratio)), 1)]
            for function in (attn_residual, mlp_residual):
                x = torch.index_add(x, 0, rows, function(x[rows]), alpha=len(x) / len(rows))
            return x
        if self.training and self.sample_drop_ratio > 0:
            x = x + self.drop_path1(attn_residual(x))
            return x + self.drop_path1(mlp_residual(x))
        x = x + attn_residual(x)
        return x + mlp_residual(x)


TOKENS = (Block, Shared, Windows, Concat, Between, Trains, Sizes)


class Net(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, *blocks, stem=None, pool=(1,)):
        super().__init__()
        self.stem = nn.Linear(DIM, DIM) if stem is None else stem
        self.blocks = nn.ModuleList(blocks)
        self.head, self.pool = nn.Linear(DIM, 3), pool

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(self.pool))


def tokens_net(*blocks):
    torch.manual_seed(0)
    return Net(*(block() if isinstance(block, type) else block for block in blocks)).train()


def image_net():
    torch.manual_seed(0)
    return Net(Conv(), Conv(), stem=nn.Conv2d(3, DIM, 1), pool=(2, 3)).train()


def tokens(batch=6, dtype=torch.float32):
    return torch.randn(batch, 6, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def images(batch=6, dtype=torch.float32):
    return torch.randn(batch, 3, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
