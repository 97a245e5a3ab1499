"""Models of timm with fused attention off."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.coverage.cases.batches import ROWS
from benchmarks.coverage.cases.hugging_face import Case

_SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4}
_WINDOWS: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}

#: Arguments of timm.create_model.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_base_patch16_siglip_224": {"img_size": 64, **_SMALL},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 64, **_SMALL},
    "beit_base_patch16_224": {"img_size": 64, **_SMALL},
    "beitv2_base_patch16_224": {"img_size": 64, **_SMALL},
    "eva_giant_patch14_224": {"img_size": 56, **_SMALL},
    "swin_tiny_patch4_window7_224": {"img_size": 56, **_WINDOWS},
    "swinv2_tiny_window8_256": {"img_size": 64, **_WINDOWS},
    "swinv2_cr_tiny_224": {"img_size": 224, **_WINDOWS},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "coat_tiny": {"img_size": 64},
    "twins_pcpvt_small": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "pvt_v2_b0": {},
    "pvt_v2_b2_li": {},
    "maxvit_tiny_tf_224": {"img_size": 224, "depths": (1, 1), "embed_dim": (32, 64)},
    "coatnet_nano_rw_224": {"img_size": 64},
    "maxxvit_rmlp_nano_rw_256": {"img_size": 256, "depths": (1, 1, 1, 1)},
    "levit_128s": {},
    "levit_conv_128s": {},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "edgenext_xx_small": {},
    "efficientformerv2_s0": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "nest_tiny": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "tnt_s_legacy_patch16_224": {"img_size": 64, "depth": 2},
    "gcvit_xxtiny": {"img_size": 64},
    "convit_tiny": {"img_size": 64},
    "repvit_m1": {},
    "tiny_vit_5m_224": {},
    "rdnet_tiny": {},
    "vit_medium_patch16_gap_240": {"img_size": 64, "depth": 2},
    "csatv2": {},
    "shvit_s1": {},
}
#: Image sizes of models whose windows or strides fix them.
_FIXED = {
    "tiny_vit_5m_224": 224,
    "levit_128s": 224,
    "levit_conv_128s": 224,
    "efficientformerv2_s0": 224,
    "efficientvit_m0": 224,
    "davit_tiny": 112,
}


def build(name: str) -> Case:
    import timm
    from timm.layers.config import set_fused_attn

    set_fused_attn(False)
    arguments = MODELS[name]
    model = timm.create_model(name, pretrained=False, num_classes=10, **arguments)
    size = _FIXED.get(name) or arguments.get("img_size", 64)
    return model, (torch.randn(ROWS, 3, size, size),)
