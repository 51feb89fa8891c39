"""The official model's keys <-> ours: a printable table, and both ways through it.

Our parts take their tensors from `model.pth` as the released code names them: DiT, vision tower (BLIP-2's), Q-Former,
T5 and fusion. The VAE has diffusers' names on both sides.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from mige.checkpoints.errors import CheckpointError


@dataclass(frozen=True)
class KeyMapping:
    """Where one of our tensors comes from."""

    part: str
    key: str
    official: tuple[str, ...]
    rows: tuple[int, int] | None = None  # (i, n): the i-th of n equal blocks of rows; None: the whole tensor

    def __str__(self) -> str:
        how = "" if self.rows is None else f" rows {self.rows[0] + 1}/{self.rows[1]}"
        how = " + zeros + ".join(self.official) if len(self.official) > 1 else self.official[0] + how
        return f"{how}  ->  {self.part}/{self.key}"


# Per part: (our key, official name, rows). A pattern matches a whole key; "{0}" is its first group.
_WB = r"\.(weight|bias)"
_RULES: dict[str, list[tuple[str, str | tuple[str, ...], tuple[int, int] | None]]] = {
    "transformer": [
        (r"pos_embed\.proj" + _WB, "x_embedder.proj.{0}", None),
        (r"adaln_single\.emb\.timestep_embedder\.linear_1" + _WB, "t_embedder.mlp.0.{0}", None),
        (r"adaln_single\.emb\.timestep_embedder\.linear_2" + _WB, "t_embedder.mlp.2.{0}", None),
        (r"adaln_single\.linear" + _WB, "t_block.1.{0}", None),
        (r"caption_projection\.linear_([12])" + _WB, "y_embedder.y_proj.fc{0}.{1}", None),
        (r"transformer_blocks\.(\d+)\.scale_shift_table", "blocks.{0}.scale_shift_table", None),
        (r"transformer_blocks\.(\d+)\.attn1\.to_q" + _WB, "blocks.{0}.attn.qkv.{1}", (0, 3)),
        (r"transformer_blocks\.(\d+)\.attn1\.to_k" + _WB, "blocks.{0}.attn.qkv.{1}", (1, 3)),
        (r"transformer_blocks\.(\d+)\.attn1\.to_v" + _WB, "blocks.{0}.attn.qkv.{1}", (2, 3)),
        (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0" + _WB, "blocks.{0}.attn.proj.{1}", None),
        (r"transformer_blocks\.(\d+)\.attn2\.to_q" + _WB, "blocks.{0}.cross_attn.q_linear.{1}", None),
        (r"transformer_blocks\.(\d+)\.attn2\.to_k" + _WB, "blocks.{0}.cross_attn.kv_linear.{1}", (0, 2)),
        (r"transformer_blocks\.(\d+)\.attn2\.to_v" + _WB, "blocks.{0}.cross_attn.kv_linear.{1}", (1, 2)),
        (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0" + _WB, "blocks.{0}.cross_attn.proj.{1}", None),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj" + _WB, "blocks.{0}.mlp.fc1.{1}", None),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2" + _WB, "blocks.{0}.mlp.fc2.{1}", None),
        (r"proj_out" + _WB, "final_layer.linear.{0}", None),
        (r"scale_shift_table", "final_layer.scale_shift_table", None),
    ],
    "image_encoder": [
        (r"embeddings\.class_embedding", "visual_encoder.cls_token", None),
        (r"embeddings\.position_embedding", "visual_encoder.pos_embed", None),
        (r"embeddings\.patch_embedding" + _WB, "visual_encoder.patch_embed.proj.{0}", None),
        (r"encoder\.layers\.(\d+)\.layer_norm([12])" + _WB, "visual_encoder.blocks.{0}.norm{1}.{2}", None),
        (r"encoder\.layers\.(\d+)\.self_attn\.qkv\.weight", "visual_encoder.blocks.{0}.attn.qkv.weight", None),
        (
            r"encoder\.layers\.(\d+)\.self_attn\.qkv\.bias",  # EVA has no key bias: zeros between the two
            ("visual_encoder.blocks.{0}.attn.q_bias", "visual_encoder.blocks.{0}.attn.v_bias"),
            None,
        ),
        (r"encoder\.layers\.(\d+)\.self_attn\.projection" + _WB, "visual_encoder.blocks.{0}.attn.proj.{1}", None),
        (r"encoder\.layers\.(\d+)\.mlp\.fc([12])" + _WB, "visual_encoder.blocks.{0}.mlp.fc{1}.{2}", None),
        (r"post_layernorm" + _WB, "ln_vision.{0}", None),
    ],
    "qformer": [
        (r"layernorm" + _WB, "Qformer.bert.embeddings.LayerNorm.{0}", None),
        (r"(encoder\.layer\.\d+)\.attention\.attention\.(.+)", "Qformer.bert.{0}.attention.self.{1}", None),
        (r"(encoder\.layer\.\d+)\.crossattention\.attention\.(.+)", "Qformer.bert.{0}.crossattention.self.{1}", None),
        (r"(encoder\.layer\..+)", "Qformer.bert.{0}", None),
    ],
    "text_encoder": [(r"(.+)", "t5_model.{0}", None)],
    "fusion": [
        (r"query_tokens", "query_tokens", None),
        (r"null_context", "y_embedder.y_embedding", None),
        (r"text_proj" + _WB, "t5_proj.{0}", None),
        (r"fusion\.q_proj\.weight", "FFM.q_proj_1.weight", None),
        (r"fusion\.([kv])_proj\.([02])" + _WB, "FFM.{0}_proj_1.{1}.{2}", None),
        (r"fusion\.([qkv])_norm" + _WB, "FFM.ln_{0}_1.{1}", None),
        (r"fusion\.attention\.(.+)", "FFM.clip_attn.{0}", None),
        (r"fusion\.out" + _WB, "FFM.mlp.{0}", None),
        (r"fusion\.out_norm" + _WB, "FFM.ln_out.{0}", None),
    ],
}

# Buffers of the official model that ours computes: read, compared, not stored.
POSITION_TABLE = "pos_embed"
POSITION_IDS = "Qformer.bert.embeddings.position_ids"
COMPUTED = (POSITION_TABLE, POSITION_IDS)


def key_mappings(parts: Mapping[str, nn.Module]) -> Iterator[KeyMapping]:
    """The table: one `KeyMapping` for every entry of the parts' state dicts (the VAE has official names of its own).

    Raises CheckpointError for an entry that the released model does not have.
    """
    for part, rules in _RULES.items():
        for key in parts[part].state_dict() if part in parts else ():
            matches = ((re.fullmatch(pattern, key), official, rows) for pattern, official, rows in rules)
            match, official, rows = next((found for found in matches if found[0]), (None, "", None))
            if match is None:
                raise CheckpointError(f"{part}/{key}: the released model has no such tensor; check the config")
            names = (official,) if isinstance(official, str) else official
            yield KeyMapping(part, key, tuple(name.format(*match.groups()) for name in names), rows)


def official_shapes(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Every key and shape of an official `model.pth` for parts of these sizes (they may be on the meta device)."""
    shapes: dict[str, tuple[int, ...]] = {
        POSITION_TABLE: tuple(position_table(parts["transformer"]).shape),
        POSITION_IDS: (1, parts["qformer"].config.max_position_embeddings),
    }
    tensors = {name: part.state_dict() for name, part in parts.items()}
    for mapping in key_mappings(parts):
        rows, *rest = tensors[mapping.part][mapping.key].shape
        if mapping.rows is not None:
            rows *= mapping.rows[1]
        if len(mapping.official) > 1:
            rows //= len(mapping.official) + 1  # the zeros between
        shapes.update({name: (rows, *rest) for name in mapping.official})
    return shapes


def load_official(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Put a checked, complete official state dict into the parts, which may be on the meta device.

    Args:
        parts: by their names in a checkpoint folder.
        state: tensors by official name, of the shapes of `official_shapes`, any float dtype, on the CPU.

    Whole tensors stay views of `state` (of the file, if that is mapped); split and joined ones are copies. Raises
    KeyError for a missing tensor.
    """
    filled: dict[str, dict[str, Tensor]] = {name: {} for name in _RULES}
    for mapping in key_mappings(parts):
        filled[mapping.part][mapping.key] = _cut([state[name] for name in mapping.official], mapping.rows)
    for name, tensors in filled.items():
        parts[name].load_state_dict(tensors, assign=True)
    parts["text_encoder"].tie_weights()  # assigning has given the embedding's two names a parameter each


def to_official(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The way back: an official state dict from our parts (the inverse of `load_official`).

    Args:
        parts: every part that `key_mappings` asks for, by its name in a checkpoint folder.

    Returns tensors by official name, on the CPU, of the parts' dtypes and the official shapes; the computed tables
    (positions float, position ids int64) are added. Raises KeyError for a part that is not given.
    """
    state: dict[str, Tensor] = {}
    tensors = {name: part.state_dict() for name, part in parts.items()}
    for mapping in key_mappings(parts):
        tensor = tensors[mapping.part][mapping.key].cpu()
        if len(mapping.official) == 2:
            query_bias, _, value_bias = tensor.chunk(3)
            state |= dict(zip(mapping.official, (query_bias.clone(), value_bias.clone()), strict=True))
        else:  # the blocks of rows are in order in the table
            name = mapping.official[0]
            state[name] = torch.cat([state[name], tensor]) if name in state else tensor
    shapes = official_shapes(parts)
    state[POSITION_TABLE] = position_table(parts["transformer"])
    state[POSITION_IDS] = torch.arange(shapes[POSITION_IDS][1]).expand(shapes[POSITION_IDS])
    return state


def _cut(tensors: list[Tensor], rows: tuple[int, int] | None) -> Tensor:
    if len(tensors) == 2:
        return torch.cat([tensors[0], torch.zeros_like(tensors[0]), tensors[1]])
    if rows is not None:
        return tensors[0].chunk(rows[1])[rows[0]].clone()  # a copy: safetensors refuses tensors that share storage
    return tensors[0]


def position_table(transformer: nn.Module) -> Tensor:
    """The DiT's sine-cosine table of positions, float32 [1, N, C], of N patches (DiT, arXiv 2212.09748)."""
    side = transformer.config.sample_size // transformer.config.patch_size
    table = get_2d_sincos_pos_embed(transformer.inner_dim, side, base_size=side, output_type="pt")
    return table.float()[None]
