"""torchvision: every class that owns a `StochasticDepth`, and classes without one, in networks of a few blocks."""

from __future__ import annotations

from typing import Any

from .models import DROP_PROB, Call, Case, Ref, Shape


def _tv(name: str, *args: Any, **kwargs: Any) -> Call:
    """A call of something below `torchvision.models`."""
    return Call(f"torchvision.models.{name}", *args, **kwargs)


def _net(build: Call, inputs: Shape, *classes: str, drop_path: bool = True) -> list[Case]:
    """A case for each of `classes` (module.Class below `torchvision.models`) of one model."""
    return [Case("torchvision", f"torchvision.models.{name}", build, inputs, drop_path=drop_path) for name in classes]


def _efficientnet() -> Call:
    stages = [
        _tv("efficientnet.FusedMBConvConfig", 2, 3, 1, 16, 16, 2),  # expand ratio, kernel, stride, in, out, layers
        _tv("efficientnet.MBConvConfig", 2, 3, 2, 16, 32, 2),
    ]
    return _tv("efficientnet.EfficientNet", stages, dropout=0.0, stochastic_depth_prob=DROP_PROB, last_channel=64)


def _swin(block: str) -> Call:
    return _tv(
        "swin_transformer.SwinTransformer",
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=DROP_PROB,
        block=Ref(f"torchvision.models.swin_transformer.{block}"),
        downsample_layer=Ref(f"torchvision.models.swin_transformer.PatchMerging{'V2' * block.endswith('V2')}"),
    )


def _mvit() -> Call:
    """Video: `[batch, 3, frames, height, width]`; the second block pools its queries and so its residual."""
    blocks = [
        _tv("video.mvit.MSBlockConfig", 1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        _tv("video.mvit.MSBlockConfig", 2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        _tv("video.mvit.MSBlockConfig", 2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    return _tv(
        "video.mvit.MViT",
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        dropout=0.0,
        stochastic_depth_prob=DROP_PROB,
    )


_CONVNEXT = _tv(
    "convnext.ConvNeXt",
    [_tv("convnext.CNBlockConfig", 16, 32, 2), _tv("convnext.CNBlockConfig", 32, None, 2)],
    stochastic_depth_prob=DROP_PROB,
)
_MAXVIT = _tv(
    "maxvit.MaxVit",
    input_size=(64, 64),
    stem_channels=16,
    partition_size=2,
    block_channels=[16, 32],
    block_layers=[1, 2],
    head_dim=16,
    stochastic_depth_prob=DROP_PROB,
)
_VIT = _tv(
    "vision_transformer.VisionTransformer",
    image_size=32,
    patch_size=16,
    num_layers=2,
    num_heads=3,
    hidden_dim=48,
    mlp_dim=96,
)
_DENSENET = _tv("densenet.DenseNet", growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, bn_size=2)


def _resnet(block: str) -> Call:
    return _tv("resnet.ResNet", Ref(f"torchvision.models.resnet.{block}"), [1, 1, 1, 2], width_per_group=64)


CASES: list[Case] = [
    *_net(_CONVNEXT, 32, "convnext.CNBlock"),
    *_net(_efficientnet(), 32, "efficientnet.FusedMBConv", "efficientnet.MBConv"),
    *_net(_MAXVIT, 64, "maxvit.MBConv", "maxvit.PartitionAttentionLayer"),
    *_net(_swin("SwinTransformerBlock"), 32, "swin_transformer.SwinTransformerBlock"),
    *_net(_swin("SwinTransformerBlockV2"), 32, "swin_transformer.SwinTransformerBlockV2"),
    *_net(_mvit(), (3, 4, 32, 32), "video.mvit.MultiscaleBlock"),
    *_net(_resnet("BasicBlock"), 64, "resnet.BasicBlock", drop_path=False),
    *_net(_resnet("Bottleneck"), 64, "resnet.Bottleneck", drop_path=False),
    *_net(_VIT, 32, "vision_transformer.EncoderBlock", drop_path=False),
    *_net(_DENSENET, 64, "densenet._DenseLayer", drop_path=False),
]
