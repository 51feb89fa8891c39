"""The tiny configuration and the weight rule of the golden file (reference values of the official implementation)."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mige import config
from mige.checkpoints.key_map import load_official, official_shapes
from mige.models.build import build_parts
from mige.models.mige import MIGEModel

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = Path(__file__).parent.parent / "configs" / "tiny.py"
# the golden values were made with these sizes in place of the demo's
OVERRIDES = (
    "model.transformer.sample_size=8",
    "model.text_encoder.vocab_size=50",
    "model.fusion.max_tokens=24",
    "model.qformer.max_position_embeddings=16",
)

_HALF = (
    "query_tokens",
    "cls_token",
    "visual_encoder.pos_embed",
    "scale_shift_table",
    "y_embedding",
    "shared.weight",
    "relative_attention_bias.weight",
)


def rule_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The official key's weight: random numbers seeded by the key's name, scaled by its kind; float32."""
    key = key.replace("encoder.embed_tokens.weight", "shared.weight")
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith(_HALF):
        w = 0.5 * r
    elif len(shape) == 1:
        w = 1 + 0.1 * r if key.endswith(".weight") else 0.1 * r
    else:
        w = r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(w.astype(np.float32))


def golden_state(parts) -> dict[str, Tensor]:
    """The official state dict of the golden model."""
    return {key: rule_weight(key, shape) for key, shape in official_shapes(parts).items()}


def golden_model() -> MIGEModel:
    """The golden model in float32 on the CPU, in evaluation mode."""
    parts = build_parts(config.load(CONFIG, OVERRIDES).model)
    load_official(parts, golden_state(parts))
    return MIGEModel(*(parts[n] for n in ("image_encoder", "qformer", "fusion", "text_encoder", "transformer")))
