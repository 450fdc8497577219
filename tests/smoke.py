"""Compares the compiled library with the eager reference, for any Python with any torch, where the whole test suite
can't run. Usage: `PYTHONPATH=. another/python tests/smoke.py` from a tree or folder that has the library."""

from pathlib import Path

import torch

import rdp_kernels as rdp

ROWS, NEXT_ROWS = [3, 0], [1, 4, 2]


def results(backend: str, dtype: torch.dtype, rows: list[int] | None) -> list[torch.Tensor]:
    """A sum, the rows of the sum that a next branch would get, and all gradients."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    # 67 is odd, and not a multiple of any vector's width
    residual, gamma = values(5, 3, 67), values(67)
    branch = values(5 if rows is None else len(rows), 3, 67)
    row_scale = torch.tensor([0.0, 2.0]).repeat(3)[: len(branch)]
    with rdp.use_backend(backend):
        out = rdp.residual_add(
            residual,
            branch,
            rows=None if rows is None else torch.tensor(rows),
            row_scale=row_scale,
            gamma=gamma,
        )
        next_input = rdp.gather_rows(out, torch.tensor(NEXT_ROWS))
        (out.float().square().sum() + next_input.float().sum()).backward()
    return [out.detach(), next_input.detach(), *(operand.grad for operand in (residual, branch, gamma))]


def main() -> None:
    missing = rdp.available_backends()["native"]
    if missing is not None:
        raise SystemExit(f"native is missing: {missing}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rows in (None, ROWS):
            torch.testing.assert_close(results("native", dtype, rows), results("eager", dtype, rows))
    print(Path(rdp.__file__).parent)
    print(f"the compiled library agrees with the eager reference on torch {torch.__version__}")


if __name__ == "__main__":
    main()
