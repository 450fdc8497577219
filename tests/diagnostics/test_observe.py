"""Observers see every path, also in a converted model, whose blocks run their own forward in eval mode."""

import pytest
import torch

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from rdp_kernels.diagnostics.observe import observing, undisturbed


def test_converted_blocks_in_eval_mode_are_seen_and_give_what_they_did():
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    import timm

    model = timm.create_model("test_vit", img_size=32, drop_path_rate=0.2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rdp.convert(model, example_inputs=images)
    calls = []
    with torch.no_grad(), undisturbed(model):
        expected = model(images)
        with observing(model, calls.append) as names:
            torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert [call.name for call in calls] == names
    assert model.training
