"""Paths and drop-paths while `torch.fx` or `torch.jit` records them: plain torch ops, masks drawn in the graph.

What is recorded runs later, without the host's decisions: as under `torch.compile`, every branch runs on all rows.
"""

from __future__ import annotations

from torch import Tensor, fx

from ..kernels.recorded import drop_rows
from ..kernels.spec import activated
from ..plan import kept_scale
from .arguments import Args, Kwargs
from .binding import PathModule, not_a_tensor


def check_arguments(module: object, args: object, kwargs: object) -> None:
    if isinstance(args, fx.Proxy) or isinstance(kwargs, fx.Proxy):
        raise TypeError(
            f"torch.fx can't record {type(module).__name__} by itself, as its forward takes any further arguments: "
            "record a module that calls it, such as torch.nn.Sequential(it)"
        )


def run_path(module: PathModule, x: Tensor, args: Args, kwargs: Kwargs, residual: Tensor | None = None) -> Tensor:
    """As `call.run_path`, at the path's own drop probability.

    Raises `RuntimeError` inside an iteration, because the recording couldn't follow another plan, and `TypeError` where
    `torch.fx` passes `*args` and `**kwargs` as proxies.
    """
    check_arguments(module, args, kwargs)
    phase = module.binding.decider.phase
    if module.training and phase is not None:
        raise RuntimeError(
            f"torch.fx and torch.jit.trace can't record the {phase} iteration that is open, because the graph would "
            "always follow its plan: record the model in eval mode, or outside of iterations"
        )
    branch = module.run_branch(x, args, kwargs)
    if not isinstance(branch, (Tensor, fx.Proxy)):
        raise not_a_tensor(module, "branch", branch)
    if module.gamma is not None:
        dim = module.channel_dim
        branch = branch * module.gamma if dim == -1 else (branch.movedim(dim, -1) * module.gamma).movedim(-1, dim)
    if module.training and module.drop_prob > 0:
        scale = kept_scale(module.drop_prob, module.scale_by_keep)
        branch = drop_rows(branch, module.drop_prob, scale, whole_batch=module.mode == "block")
    if residual is None:
        residual = x if module.shortcut is None else module.shortcut(x)
    out, whose = residual + branch, "residual" if module.promotion is None else module.promotion.whose
    if whose != "both":
        out = out.type_as(residual if whose == "residual" else branch)
    return activated(out, module.activation)
