"""The vision tower against an independent implementation of EVA: timm's, at full width, two blocks."""

import timm
import torch
from torch import nn

from mige import config
from mige.checkpoints.key_map import key_mappings
from mige.models import build as parts


def test_the_tower_equals_timm_s_eva():
    sizes = config.load("configs/mige_512.py", ["model.image_encoder.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    built = parts.build_parts(sizes, only=("image_encoder",))
    tower = built["image_encoder"]
    for parameter in tower.parameters():  # large enough that a wrong norm, bias or activation shows
        nn.init.normal_(parameter, std=0.05)

    reference = timm.create_model("eva_giant_patch14_224", depth=2, num_classes=0, global_pool="token").eval()
    reference.norm = nn.LayerNorm(1408, eps=1e-5)
    ours = tower.state_dict()
    state = {}
    for piece in key_mappings(built):
        names = [name.removeprefix("visual_encoder.").replace("ln_vision.", "norm.") for name in piece.official]
        state |= dict(zip(names, ours[piece.key].chunk(3)[::2] if len(names) == 2 else [ours[piece.key]], strict=True))
    for i in range(2):  # EVA has no key bias; ours carries the zeros
        ours[f"encoder.layers.{i}.self_attn.qkv.bias"][1408:2816] = 0
    reference.load_state_dict(state)

    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        got, want = tower(pixels).last_hidden_state, reference.forward_features(pixels)
    assert (got - want).norm() / want.norm() < 1e-5
