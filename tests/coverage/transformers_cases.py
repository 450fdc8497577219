"""
transformers: every class that owns a `*DropPath`, in the model of its file at sizes of two layers.

`DinatLayer` is left out, as its attention needs the compiled package natten. EoMT (both) and VidEoMT need scipy, for a
loss that isn't used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .models import DROP_PROB, Call, Case, Frames, Shape, Tokens


def _net(
    folder: str,
    block_class: str,
    model: str,
    inputs: int | Mapping[str, Shape],
    *,
    config: str = "",
    file: str = "",
    fill: tuple[str, ...] = (),
    **kwargs: Any,
) -> Case:
    """
    `transformers.models.<folder>.modeling_<file or folder>.<model>` from a config.

    `config` is its class (else the model's with Config for Model), `kwargs` its arguments; an int is an image size.
    """
    module = f"transformers.models.{folder}.modeling_{file or folder}"
    config = config or model.removesuffix("Model") + "Config"
    configuration = f"transformers.models.{folder}.configuration_{file or folder}.{config}"
    if not fill:
        kwargs.setdefault("drop_path_rate", DROP_PROB)
    build = Call(f"{module}.{model}", Call(configuration, **kwargs))
    if isinstance(inputs, int):
        inputs = {"pixel_values": inputs}
    return Case("transformers", f"{module}.{block_class}", build, inputs, fill=fill)


_LAYERS: dict[str, Any] = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
_VIT: dict[str, Any] = dict(**_LAYERS, image_size=32, patch_size=16)
_MLP: dict[str, Any] = dict(intermediate_size=96)
_STILL: dict[str, Any] = dict(pos_embed_rescale=None)  # otherwise training draws a scale for the positions in each call
_SWIN: dict[str, Any] = dict(image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
_WIDTHS = [16, 32, 48, 64]
_DEPTHS = [1, 1, 2, 1]
_HEADS = [1, 2, 3, 4]
_BIT: dict[str, Any] = dict(embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 2, 2], num_groups=4)
_SEGMENTER: dict[str, Any] = dict(
    _LAYERS, num_hidden_layers=3, image_size=64, patch_size=16, num_blocks=1, num_queries=4
)
_FLORENCE: dict[str, Any] = dict(
    depths=_DEPTHS, embed_dim=_WIDTHS, num_heads=_HEADS, num_groups=_HEADS, window_size=4, projection_dim=32
)


def _grounding(**kwargs: Any) -> dict[str, Any]:
    """Swin and BERT of two layers, fused in two more."""
    swin = Call("transformers.SwinConfig", **_SWIN, out_indices=[1, 2], drop_path_rate=0.0)
    bert = Call(
        "transformers.BertConfig",
        **_LAYERS,
        **_MLP,
        vocab_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return dict(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=4,
        num_feature_levels=2,
        dropout=0.0,
        fusion_droppath=DROP_PROB,
        disable_custom_kernels=True,
        **kwargs,
    )


_TEXT_AND_IMAGE: dict[str, Shape] = {"pixel_values": 64, "input_ids": Tokens((6,), 100)}
_PROMPTED = {"pixel_values": (3, 32, 32), "prompt_pixel_values": (3, 32, 32), "prompt_masks": (3, 32, 32)}

# fmt: off
CASES: list[Case] = [
    _net("beit", "BeitLayer", "BeitModel", 32, **_VIT, **_MLP, use_relative_position_bias=True),
    _net("bit", "BitPreActivationBottleneckLayer", "BitModel", 64, **_BIT),
    _net("bit", "BitBottleneckLayer", "BitModel", 64, **_BIT, layer_type="bottleneck"),
    _net("clap", "ClapAudioLayer", "ClapAudioModel", {"input_features": (1, 64, 16)}, spec_size=32,
        hidden_dropout_prob=0.0, num_mel_bins=16, window_size=4, depths=[2, 2], num_attention_heads=[2, 4],
        patch_embeds_hidden_size=16, hidden_size=32, num_hidden_layers=2),
    _net("convnext", "ConvNextLayer", "ConvNextModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS),
    _net("convnextv2", "ConvNextV2Layer", "ConvNextV2Model", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS),
    _net("cvt", "CvtLayer", "CvtModel", 64, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3],
        drop_path_rate=[DROP_PROB] * 3),
    _net("data2vec", "Data2VecVisionLayer", "Data2VecVisionModel", 32, file="data2vec_vision", **_VIT, **_MLP,
        use_relative_position_bias=True),
    _net("dinov2", "Dinov2Layer", "Dinov2Model", 32, **_VIT),
    _net("dinov2_with_registers", "Dinov2WithRegistersLayer", "Dinov2WithRegistersModel", 32, **_VIT),
    _net("dinov3_convnext", "DINOv3ConvNextLayer", "DINOv3ConvNextModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS),
    _net("dinov3_vit", "DINOv3ViTLayer", "DINOv3ViTModel", 32, **_VIT, **_MLP, **_STILL),
    _net("donut", "DonutSwinLayer", "DonutSwinModel", 32, file="donut_swin", **_SWIN),
    _net("eomt", "EomtLayer", "EomtForUniversalSegmentation", 64, config="EomtConfig", **_SEGMENTER),
    _net("eomt_dinov3", "EomtDinov3Layer", "EomtDinov3ForUniversalSegmentation", 64, config="EomtDinov3Config",
        **_SEGMENTER, **_MLP, **_STILL),
    _net("florence2", "Florence2VisionChannelBlock", "Florence2VisionBackbone", {"hidden_states": 64},
        config="Florence2VisionConfig", **_FLORENCE),
    _net("florence2", "Florence2VisionSpatialBlock", "Florence2VisionBackbone", {"hidden_states": 64},
        config="Florence2VisionConfig", **_FLORENCE),
    _net("focalnet", "FocalNetLayer", "FocalNetModel", 64, image_size=64, embed_dim=16, hidden_sizes=_WIDTHS,
        depths=_DEPTHS),
    _net("glpn", "GLPNLayer", "GLPNModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS, num_attention_heads=_HEADS),
    _net("grounding_dino", "GroundingDinoFusionLayer", "GroundingDinoModel", _TEXT_AND_IMAGE, **_grounding()),
    _net("hiera", "HieraLayer", "HieraModel", 64, image_size=[64, 64], embed_dim=16, depths=_DEPTHS),
    _net("maskformer", "MaskFormerSwinLayer", "MaskFormerSwinModel", 32, file="maskformer_swin", **_SWIN),
    _net("mgp_str", "MgpstrLayer", "MgpstrModel", 32, **_LAYERS, image_size=[32, 32], patch_size=8),
    _net("mm_grounding_dino", "MMGroundingDinoFusionLayer", "MMGroundingDinoModel", _TEXT_AND_IMAGE, **_grounding()),
    _net("pixio", "PixioLayer", "PixioModel", 32, **_VIT),
    _net("poolformer", "PoolFormerLayer", "PoolFormerModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS),
    _net("poolformer", "PoolFormerOutput", "PoolFormerModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS),
    _net("pvt", "PvtLayer", "PvtModel", 64, image_size=64, hidden_sizes=_WIDTHS, depths=_DEPTHS,
        num_attention_heads=_HEADS),
    _net("pvt_v2", "PvtV2BlockLayer", "PvtV2Model", 64, image_size=64, hidden_sizes=_WIDTHS, depths=_DEPTHS,
        num_attention_heads=_HEADS),
    _net("qianfan_ocr", "QianfanOCRVisionLayer", "QianfanOCRVisionModel", 32, **_LAYERS, **_MLP, image_size=[32, 32],
        patch_size=[16, 16]),
    _net("radio", "RadioLayer", "RadioModel", 32, **_VIT, max_img_size=64),
    _net("rf_detr", "RfDetrDinov2Layer", "RfDetrDinov2Backbone", 64, config="RfDetrDinov2Config", **{**_VIT,
        "image_size": 64}, num_windows=2),
    _net("sapiens2", "Sapiens2Layer", "Sapiens2Model", 32, **_VIT, **_MLP, **_STILL, num_key_value_attention_heads=3),
    _net("segformer", "SegformerLayer", "SegformerModel", 64, hidden_sizes=_WIDTHS, depths=_DEPTHS,
        num_attention_heads=_HEADS),
    _net("seggpt", "SegGptLayer", "SegGptModel", _PROMPTED, **_LAYERS, image_size=[64, 32], pretrain_image_size=32,
        intermediate_hidden_state_indices=[1], merge_index=0),
    _net("swiftformer", "SwiftFormerEncoderBlock", "SwiftFormerModel", 64, embed_dims=_WIDTHS, depths=[2, 2, 2, 2]),
    _net("swin", "SwinLayer", "SwinModel", 32, **_SWIN),
    _net("swin2sr", "Swin2SRLayer", "Swin2SRModel", 32, fill=("drop_path",), **_SWIN),
    _net("swinv2", "Swinv2Layer", "Swinv2Model", 32, **_SWIN),
    _net("timesformer", "TimesformerLayer", "TimesformerModel", {"pixel_values": (2, 3, 32, 32)}, fill=("drop_path",),
        **_VIT, **_MLP, num_frames=2),
    _net("tipsv2", "Tipsv2VisionLayer", "Tipsv2VisionModel", 32, file="tipsv2", **_VIT),
    _net("videomt", "VideomtLayer", "VideomtForUniversalSegmentation", {"pixel_values_videos": (2, 3, 64, 64)},
        config="VideomtConfig", **_SEGMENTER),
    _net("vitdet", "VitDetLayer", "VitDetModel", 64, **{**_VIT, "image_size": 64}, pretrain_image_size=64,
        window_block_indices=[0], window_size=3, residual_block_indices=[1]),
    _net("vjepa2", "VJEPA2Layer", "VJEPA2Model", {"pixel_values_videos": (2, 3, 32, 32)}, **_LAYERS, crop_size=32,
        frames_per_clip=2, pred_hidden_size=48, pred_num_attention_heads=3, pred_num_hidden_layers=2),
    _net("x_clip", "XCLIPVisionEncoderLayer", "XCLIPVisionModel", {"pixel_values": Frames(2, (3, 32, 32))}, **_VIT,
        **_MLP, num_frames=2),
]
# fmt: on
