"""
timm: every class of `timm.models` that owns a `DropPath`, in the smallest model that calls it.

Found by building all of `timm.list_models()` at `drop_path_rate=0.2`, and by reading the sources for classes that get a
rate in no model. Images are as small as the strides allow, or twice that where batch norm would see one pixel.
"""

from __future__ import annotations

from typing import Any

from .models import DROP_PROB, Call, Case, Ref, Shape


def _net(build: str | Call, inputs: Shape, *classes: str, fill: tuple[str, ...] = (), **kwargs: Any) -> list[Case]:
    """A case for each of `classes` (module.Class below `timm.models`) of one model; a string is a name in timm."""
    if isinstance(build, str):
        build = Call("timm.create_model", build, drop_path_rate=DROP_PROB, **kwargs)
    return [Case("timm", f"timm.models.{name}", build, inputs, fill=fill) for name in classes]


def _timm(name: str, **kwargs: Any) -> Call:
    """A call of something below `timm.models`."""
    return Call(f"timm.models.{name}", **kwargs)


def _plain(name: str, inputs: Shape, block_class: str, **kwargs: Any) -> Case:
    """A model without a drop-path."""
    build = Call("timm.create_model", name, **kwargs)
    return Case("timm", f"timm.models.{block_class}", build, inputs, drop_path=False)


def _efficientnet() -> Call:
    """One block of each kind twice, as a string describes them in timm's files; the second is residual."""
    stages = [
        ["cn_r2_k3_s1_e1_c16_skip"],
        ["er_r2_k3_s2_e2_c16"],
        ["ds_r2_k3_s1_e1_c16"],
        ["ir_r2_k3_s2_e2_c16_se0.25"],
        ["ir_r2_k3_s1_e2_c24_cc4"],
        ["mqa_r2_k3_h2_s1_v2_d16_c24"],
        ["uir_r2_a3_k3_s1_e2_c32"],
    ]
    blocks = Call("timm.models._efficientnet_builder.decode_arch_def", stages)
    return _timm(
        "efficientnet.EfficientNet", block_args=blocks, num_features=64, stem_size=16, drop_path_rate=DROP_PROB
    )


_EFFICIENTNET_BLOCKS = (
    "CondConvResidual",
    "ConvBnAct",
    "DepthwiseSeparableConv",
    "EdgeResidual",
    "InvertedResidual",
    "MobileAttention",
    "UniversalInvertedResidual",
)


def _byobnet(block: str, **kwargs: Any) -> Call:
    """Two stages of two blocks of one kind."""
    stages = tuple(_timm("byobnet.ByoBlockCfg", type=block, d=2, c=32, s=2, br=0.5) for _ in range(2))
    return Call("timm.create_model", "test_byobnet", drop_path_rate=DROP_PROB, blocks=stages, **kwargs)


def _cspnet(**kwargs: Any) -> Call:
    return _timm("cspnet.CspStagesCfg", depth=(1, 2, 2), out_chs=(32, 32, 64), stride=2, **kwargs)


def _mixer(block: str, **kwargs: Any) -> Call:
    layer = Ref(f"timm.models.mlp_mixer.{block}")
    return _timm(
        "mlp_mixer.MlpMixer",
        drop_path_rate=DROP_PROB,
        block_layer=layer,
        img_size=32,
        num_blocks=2,
        embed_dim=32,
        **kwargs,
    )


def _volo() -> Call:
    return _timm(
        "volo.VOLO",
        drop_path_rate=DROP_PROB,
        img_size=64,
        layers=(1, 1, 2, 1),
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 4, 4, 4),
    )


_VIT: dict[str, Any] = dict(img_size=32, embed_dim=48, depth=2, num_heads=3)
_WIDTHS = (16, 32, 48, 64)
_DEPTHS = (1, 1, 2, 1)
_XCEPTION = (
    dict(in_chs=64, out_chs=64, stride=2),
    *[dict(in_chs=64, out_chs=64, stride=1)] * 2,
    dict(in_chs=64, out_chs=(64, 64, 96), stride=2),
)
_VITAMIN = Call(
    "timm.create_model",
    "vitamin_small_224",
    img_size=64,
    embed_dim=48,
    depth=2,
    num_heads=3,
    embed_cfg=_timm(
        "vitamin.VitCfg",
        embed_dim=(16, 32, 48),
        depths=(2, 2, 1),
        stem_width=16,
        conv_cfg=_timm("vitamin.VitConvCfg", norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    ),
)

# fmt: off
CASES: list[Case] = [
    case
    for net in [
        _net(_efficientnet(), 64, *(f"_efficientnet_blocks.{name}" for name in _EFFICIENTNET_BLOCKS)),
        _net("beit_base_patch16_224", 32, "beit.Block", **_VIT),
        _net("test_byobnet", 64, "byobnet.BasicBlock", "byobnet.BottleneckBlock", "byobnet.DarkBlock"),
        _net(_byobnet("one"), 64, "byobnet.MobileOneBlock"),
        _net(_byobnet("rep"), 64, "byobnet.RepVggBlock"),
        _net(_byobnet("self_attn", self_attn_layer="bottleneck", img_size=64), 64, "byobnet.SelfAttnBlock"),
        _net(_byobnet("edge"), 64, "byobnet.EdgeBlock"),
        _net("cait_xxs24_224", 32, "cait.LayerScaleBlock", **_VIT),
        _net("cait_xxs24_224", 32, "cait.LayerScaleBlockClassAttn", fill=("drop_path",), **_VIT),
        _net("coat_tiny", 64, "coat.ParallelBlock", "coat.SerialBlock", img_size=64, embed_dims=(16,) * 4,
            serial_depths=(2,) * 4, parallel_depth=2),
        _net("convit_tiny", 32, "convit.Block", img_size=32, embed_dim=12, depth=2),
        _net("test_convnext", 64, "convnext.ConvNeXtBlock"),
        _net("cpubone_nano", 64, "cpubone.ResidualBlock", width_list=(8, 16, 32, 48, 64), depth_list=(1, 1, 1, 2, 2)),
        _net("crossvit_tiny_240", 48, "crossvit.CrossAttentionBlock", img_size=48, img_scale=(1.0, 1.0),
            embed_dim=(24, 48)),
        _net("csatv2", 64, "csatv2.Block", "csatv2.TransformerBlock", transformer_drop_path=True, dims=(32, 32, 48,
            64), depths=(2, 2, 3, 3), transformer_depths=(0, 0, 2, 2)),
        _net("cspresnet50", 64, "cspnet.BottleneckBlock", stages=_cspnet(block_type="bottle", bottle_ratio=0.5,
            expand_ratio=2.0)),
        _net("cs3darknet_focus_s", 64, "cspnet.DarkBlock"),
        _net("cs3edgenet_x", 64, "cspnet.EdgeBlock", stages=_cspnet(stage_type="cs3", block_type="edge",
            bottle_ratio=1.5, block_ratio=0.5)),
        _net("cspnext_tiny", 64, "cspnext.CspNextBlock"),
        _net("davit_tiny", 64, "davit.ChannelBlock", "davit.SpatialBlock", depths=_DEPTHS, embed_dims=_WIDTHS,
            num_heads=(1, 2, 3, 4)),
        _net("deepseek_vit_412m", 84, "deepseek_vit.DeepseekVitBlock", img_size=84, embed_dim=48, depth=2, num_heads=3),
        _net("edgenext_xx_small", 64, "edgenext.ConvBlock", "edgenext.SplitTransposeBlock"),
        _net("efficientformer_l1", 224, "efficientformer.MetaBlock1d", "efficientformer.MetaBlock2d", depths=(1, 1, 1,
            3), embed_dims=_WIDTHS),
        _net("efficientformerv2_s0", 64, "efficientformer_v2.EfficientFormerV2Block", img_size=64),
        _net("efficientvim_m1", 64, "efficientvim.EfficientViMBlock", embed_dim=(16, 32, 48)),
        _net("eva02_tiny_patch14_224", 28, "eva.EvaBlock", **{**_VIT, "img_size": 28}),
        _net("eva02_enormous_patch14_clip_224", 28, "eva.EvaBlockPostNorm", **{**_VIT, "img_size": 28}),
        _net("fasternet_t0", 64, "fasternet.MLPBlock", embed_dim=16, depths=_DEPTHS, feature_dim=64),
        _net("fastvit_sa12", 64, "fastvit.AttentionBlock", "fastvit.RepMixerBlock", layers=(1, 1, 1, 2),
            embed_dims=(32, 32, 64, 64)),
        _net(_timm("focalnet.FocalNet", drop_path_rate=DROP_PROB, embed_dim=16, depths=_DEPTHS), 64,
            "focalnet.FocalNetBlock"),
        _net(_timm("gcvit.GlobalContextVit", drop_path_rate=DROP_PROB, img_size=64, embed_dim=16, depths=_DEPTHS,
            num_heads=(1, 1, 2, 2)), 64, "gcvit.GlobalContextVitBlock"),
        _net("gemma4_vit_167m", 48, "gemma4_vit.Gemma4Block", img_size=48, embed_dim=48, depth=2, num_heads=3,
            intermediate_size=96, position_embedding_size=64),
        _net("hgnetv2_b0", 64, "hgnet.HighPerfGpuBlock"),
        _net("hiera_tiny_224", 64, "hiera.HieraBlock", img_size=(64, 64), embed_dim=16, stages=_DEPTHS),
        _net("sam2_hiera_tiny", 64, "hieradet_sam2.MultiScaleBlock", embed_dim=16, stages=_DEPTHS,
            global_att_blocks=(3,), window_spec=(8, 4, 4, 4)),
        _net("iformer_t", 64, "iformer.Residual", depths=(1, 1, 4, 3), dims=_WIDTHS, attn_groups=(0, 0, 1, 1)),
        _net("inception_next_atto", 64, "inception_next.MetaNeXtBlock", depths=_DEPTHS, dims=(32, 64, 96, 128)),
        _net("levit_128s", 64, "levit.LevitBlock", "levit.LevitDownsample", img_size=64, embed_dim=(32, 48, 64),
            num_heads=(2, 3, 4), depth=(2, 2, 2)),
        _net("lowformer_b0", 64, "lowformer.ResidualBlock", width_list=(8, 16, 32, 48, 64), depth_list=(1, 1, 1, 2, 2)),
        _net("test_mambaout", 64, "mambaout.GatedConvBlock"),
        _net("test_coatnet", 64, "maxxvit.MbConvBlock", "maxxvit.TransformerBlock2d", img_size=64),
        _net("test_maxvit", 64, "maxxvit.PartitionAttentionCl", img_size=64),
        _net("test_maxvit", 64, "maxxvit.PartitionAttention2d", img_size=64, transformer_use_nchw_attn=True),
        _net("coatnext_nano_rw_224", 64, "maxxvit.ConvNeXtBlock", img_size=64, embed_dim=(64,) * 4, depths=_DEPTHS),
        _net("maxvit_tiny_pm_256", 64, "maxxvit.ParallelPartitionAttention", img_size=64, embed_dim=(32, 32, 64, 64),
            depths=_DEPTHS),
        _net(_timm("metaformer.MetaFormer", drop_path_rate=DROP_PROB, depths=_DEPTHS, dims=_WIDTHS), 64,
            "metaformer.MetaFormerBlock"),
        _net(_mixer("MixerBlock", mlp_layer=Ref("timm.layers.GluMlp")), 32, "mlp_mixer.MixerBlock"),
        _net(_mixer("ResBlock", mlp_ratio=4, norm_layer=Ref("timm.models.mlp_mixer.Affine")), 32, "mlp_mixer.ResBlock"),
        _net(_mixer("SpatialGatingBlock", mlp_ratio=6, mlp_layer=Ref("timm.layers.GatedMlp")), 32,
            "mlp_mixer.SpatialGatingBlock"),
        _net("mobilevitv2_050", 64, "mobilevit.LinearTransformerBlock"),
        _net(_timm("mvitv2.MultiScaleVit", drop_path_rate=DROP_PROB, cfg=_timm("mvitv2.MultiScaleVitCfg", depths=(1,
            1, 2, 1), embed_dim=16), img_size=64), 64, "mvitv2.MultiScaleBlock"),
        _net(_timm("nest.Nest", drop_path_rate=DROP_PROB, img_size=32, embed_dims=(16, 32, 48), num_heads=(1, 2, 3),
            depths=(1, 1, 2)), 32, "nest.TransformerLayer"),
        _net("nextvit_small", 64, "nextvit.NextConvBlock", "nextvit.NextTransformerBlock", depths=(1, 1, 5, 1)),
        _net("test_nfnet", 64, "nfnet.NormFreeBlock"),
        _net("pvt_v2_b0", 64, "pvt_v2.Block", depths=_DEPTHS, embed_dims=(16, 32, 40, 64)),
        _net("rdnet_tiny", 64, "rdnet.DenseBlock", growth_rates=(16,) * 7, num_blocks_list=(2,) * 7,
            num_init_features=16),
        _net("regnetx_002", 64, "regnet.Bottleneck"),
        _net("regnetv_040", 64, "regnet.PreBottleneck", depth=8, w0=16, wa=16.0, wm=2.0, group_size=8),
        _net("res2next50", 64, "res2net.Bottle2neck", layers=(1, 1, 2, 1), channels=(16, 32, 48, 64), base_width=8),
        _net("resnest14d", 64, "resnest.ResNestBottleneck", channels=_WIDTHS),
        _net("test_resnet", 64, "resnet.BasicBlock", "resnet.Bottleneck"),
        _net("resnetv2_18", 64, "resnetv2.PreActBasic", layers=(1, 1, 2, 2), channels=_WIDTHS),
        _net("resnetv2_50", 64, "resnetv2.PreActBottleneck", layers=(1, 1, 2, 2), channels=_WIDTHS),
        _net("resnetv2_50", 64, "resnetv2.Bottleneck", preact=False, layers=(1, 1, 2, 2), channels=_WIDTHS),
        _net("rexnet_100", 64, "rexnet.LinearBottleneck"),
        _net("sequencer2d_s", 56, "sequencer.Sequencer2dBlock", layers=_DEPTHS, embed_dims=(24, 48, 48, 48),
            hidden_sizes=(6, 12, 12, 12), img_size=56),
        _net("skresnet18", 64, "sknet.SelectiveKernelBasic", layers=(1, 1, 2, 1), channels=_WIDTHS),
        _net("skresnet50", 64, "sknet.SelectiveKernelBottleneck", layers=(1, 1, 2, 1), channels=_WIDTHS),
        _net("starnet_s050", 64, "starnet.Block"),
        _net("swiftformer_xs", 64, "swiftformer.Block", "swiftformer.ConvEncoder", layers=(2, 2, 2, 2),
            embed_dims=_WIDTHS),
        _net("swiftformer_xs", 64, "swiftformer.LocalRepresentation", fill=("drop_path",), layers=(2, 2, 2, 2),
            embed_dims=_WIDTHS),
        _net("swin_tiny_patch4_window7_224", 32, "swin_transformer.SwinTransformerBlock", img_size=32, window_size=4,
            embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        _net("swinv2_tiny_window8_256", 32, "swin_transformer_v2.SwinTransformerV2Block", img_size=32, window_size=4,
            embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        _net("swinv2_cr_tiny_224", 32, "swin_transformer_v2_cr.SwinTransformerV2CrBlock", img_size=32, window_size=4,
            embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        _net("tiny_vit_5m_224", 64, "tiny_vit.MBConv", "tiny_vit.TinyVitBlock", depths=(2, 2, 2, 2),
            embed_dims=_WIDTHS, num_heads=(1, 2, 3, 4)),
        _net("tnt_s_patch16_224", 32, "tnt.Block", img_size=32, embed_dim=48, depth=2, num_heads_outer=3, inner_dim=8,
            num_heads_inner=2),
        _net("tresnet_m", 64, "tresnet.BasicBlock", "tresnet.Bottleneck", layers=(1, 1, 2, 2), width_factor=0.25),
        _net("twins_svt_small", 64, "twins.Block", img_size=64, embed_dims=_WIDTHS, num_heads=(1, 2, 3, 4), depths=(1,
            1, 2, 1)),
        _net("visformer_tiny", 32, "visformer.Block", img_size=32, init_channels=16, embed_dim=96, depth=(1, 1, 2),
            num_heads=3),
        _net("test_vit", 32, "vision_transformer.Block", img_size=32),
        _net("vit_dpwee_patch16_reg1_gap_256", 32, "vision_transformer.DiffParallelScalingBlock", img_size=32,
            embed_dim=48, depth=2, num_heads=3),
        _net("vit_pwee_patch16_reg1_gap_256", 32, "vision_transformer.ParallelScalingBlock", **_VIT),
        _net("vit_base_patch16_rpn_224", 32, "vision_transformer.ResPostBlock", **_VIT),
        _net("vit_small_patch16_18x2_224", 32, "vision_transformer.ParallelThingsBlock", **_VIT),
        _net("test_vit_relpos", 32, "vision_transformer_relpos.RelPosBlock", img_size=32),
        _net("vit_relpos_small_patch16_rpn_224", 32, "vision_transformer_relpos.ResPostRelPosBlock", **_VIT),
        _net("samvit_base_patch16_224", 64, "vision_transformer_sam.Block", img_size=64, embed_dim=48, depth=2,
            num_heads=3, window_size=2, global_attn_indexes=(1,)),
        _net(_volo(), 64, "volo.Transformer"),
        _net(_volo(), 64, "volo.Outlooker", "volo.ClassBlock", fill=("drop_path1", "drop_path2")),
        _net(_VITAMIN, 64, "vitamin.MbConvLNBlock", fill=("drop_path",)),
        _net("ese_vovnet19b_slim_dw", 64, "vovnet.OsaBlock"),
        _net("xception41p", 64, "xception_aligned.PreXceptionModule", block_cfg=_XCEPTION),
        _net("xception41", 64, "xception_aligned.XceptionModule", block_cfg=_XCEPTION),
        _net("xcit_nano_12_p8_224", 32, "xcit.XCABlock", img_size=32, embed_dim=32, depth=2, num_heads=2),
        _net("xcit_nano_12_p8_224", 32, "xcit.ClassAttentionBlock", fill=("drop_path1", "drop_path2"), img_size=32,
            embed_dim=32, depth=2, num_heads=2),
    ]
    for case in net
] + [
    _plain("test_resnet", 64, "resnet.BasicBlock"),
    _plain("test_resnet", 64, "resnet.Bottleneck"),
    _plain("densenet121", 64, "densenet.DenseLayer", growth_rate=8, block_config=(2, 2, 2, 2)),
    _plain(
        "rdnet_tiny", 64, "rdnet.DenseBlock", growth_rates=(16,) * 7, num_blocks_list=(2,) * 7, num_init_features=16
    ),
]
# fmt: on
