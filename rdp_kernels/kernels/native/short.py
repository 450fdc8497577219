"""The compiled library's ops for calls whose arguments haven't been checked (`kernels.short`): they check them."""

from __future__ import annotations

import torch

from .launchers import without_python

residual_add = without_python(torch.ops.rdp.native_residual_add.default)
residual_add_rows = without_python(torch.ops.rdp.native_residual_add_rows.default)
residual_add_backward = without_python(torch.ops.rdp.native_residual_add_backward.default)
gather_rows = without_python(torch.ops.rdp.native_gather_rows.default)
gather_rows_backward = without_python(torch.ops.rdp.native_gather_rows_backward.default)
