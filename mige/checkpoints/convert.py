"""Official weight files -> our parts: a printable table, and an account of every key.

Two ways in: the released `model.pth` (`from_release`), and the files training starts from (`from_training_files`).
A file with a missing, unexpected or misshapen key is refused, naming all of them; surplus that is known to be in the
public files (BLIP-2's text parts, EVA's fortieth block) is listed. Pickles load with `weights_only=True`, mapped.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from mige.checkpoints.errors import CheckpointError
from mige.config import Config
from mige.models.build import build_parts


@dataclass(frozen=True)
class Piece:
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
_POSITION_TABLE = "pos_embed"
_POSITION_IDS = "Qformer.bert.embeddings.position_ids"
_COMPUTED = (_POSITION_TABLE, _POSITION_IDS)

_SURPLUS = {
    "pixart": r"pos_embed|y_embedder\.y_embedding",
    "eva": r"blocks\.39\..+|(norm|fc_norm|head)\..+",
    "blip2": r"Qformer\.(cls\..+|bert\.embeddings\.(position_ids|(word_embeddings|position_embeddings)\..+)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\..+)|visual_encoder\..+|t5_model\..+",
}
_FRESH = r"FFM\..+|y_embedder\.y_embedding"  # what training starts without


def pieces(parts: Mapping[str, nn.Module]) -> Iterator[Piece]:
    """The table: one `Piece` for every entry of the parts' state dicts (the VAE has official names of its own)."""
    for part, rules in _RULES.items():
        for key in parts[part].state_dict() if part in parts else ():
            matches = ((re.fullmatch(pattern, key), official, rows) for pattern, official, rows in rules)
            match, official, rows = next((found for found in matches if found[0]), (None, "", None))
            if match is None:
                raise CheckpointError(f"{part}/{key}: the released model has no such tensor; check the config")
            names = (official,) if isinstance(official, str) else official
            yield Piece(part, key, tuple(name.format(*match.groups()) for name in names), rows)


def official_shapes(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Every key and shape of an official `model.pth` for parts of these sizes (they may be on the meta device)."""
    shapes: dict[str, tuple[int, ...]] = {
        _POSITION_TABLE: tuple(_position_table(parts["transformer"]).shape),
        _POSITION_IDS: (1, parts["qformer"].config.max_position_embeddings),
    }
    for piece in pieces(parts):
        rows, *rest = parts[piece.part].state_dict()[piece.key].shape
        if piece.rows is not None:
            rows *= piece.rows[1]
        if len(piece.official) > 1:
            rows //= len(piece.official) + 1  # the zeros between
        shapes.update({name: (rows, *rest) for name in piece.official})
    return shapes


def read_weights(path: Path, *wrappers: str) -> dict[str, Tensor]:
    """The tensors of a .pth / .bin / .safetensors file, memory-mapped, below the given keys of its top dict.

    Any shape and dtype, on the CPU.

    Raises CheckpointError for a missing or damaged file, a pickle that carries code, and anything that is no dict of
    tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's message goes on to advise switching the protection off
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path}: refused, it holds more than tensors or is damaged: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler raise anything, from KeyError to UnicodeDecodeError
        raise CheckpointError(f"{path}: cannot be read as a PyTorch file (damaged or truncated?): {error}") from error
    for key in wrappers:
        if not isinstance(data, dict) or key not in data:
            raise CheckpointError(f"{path}: expected a dict with the key {key!r}, got {_describe(data)}")
        data = data[key]
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {_describe(data)}")
    return dict(data)


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: str, surplus: str = r"(?!)"
) -> list[str]:
    """Compare a file with what it should hold.

    Args:
        state: the file's tensors, any shape and dtype. expected: the shape of every key.
        origin: what messages call the file. surplus: a pattern of keys that may be left over, which are returned.

    Raises CheckpointError naming every missing, unexpected and misshapen key.
    """
    left_over = sorted(state.keys() - expected.keys())
    known = [key for key in left_over if re.fullmatch(surplus, key)]
    faults = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    faults += [f"unexpected: {key} {list(state[key].shape)}" for key in left_over if key not in known]
    faults += [
        f"misshapen: {key} is {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    if faults:
        lines = "\n  ".join(faults)
        raise CheckpointError(
            f"{origin}: {len(faults)} of its keys do not fit the config; is it the right file?\n  {lines}"
        )
    return known


def fill(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Put a checked, complete official state dict into the parts, which may be on the meta device.

    Shapes are those that `check_keys` expects; dtypes stay the file's.

    Whole tensors stay views of `state` (of the file, if that is mapped); split and joined ones are copies.
    """
    filled: dict[str, dict[str, Tensor]] = {name: {} for name in _RULES}
    for piece in pieces(parts):
        filled[piece.part][piece.key] = _cut([state[name] for name in piece.official], piece.rows)
    for name, tensors in filled.items():
        parts[name].load_state_dict(tensors, assign=True)
    parts["text_encoder"].tie_weights()  # assigning has given the embedding's two names a parameter each


def to_official(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The way back: an official state dict from our parts (the inverse of `fill`).

    Args:
        parts: every part that `pieces` asks for, by its name in a checkpoint folder.

    Returns tensors by official name, on the CPU, of the parts' dtypes and the official shapes; the computed tables
    (positions float [1, N, C], position ids int64 [1, N]) are added. Raises KeyError for a part that is not given.
    """
    state: dict[str, Tensor] = {}
    for piece in pieces(parts):
        tensor = parts[piece.part].state_dict()[piece.key].cpu()
        if len(piece.official) == 2:
            query_bias, _, value_bias = tensor.chunk(3)
            state |= dict(zip(piece.official, (query_bias.clone(), value_bias.clone()), strict=True))
        else:  # the blocks of rows stand in order in the table
            name = piece.official[0]
            state[name] = torch.cat([state[name], tensor]) if name in state else tensor
    shapes = official_shapes(parts)
    state[_POSITION_TABLE] = _position_table(parts["transformer"])
    state[_POSITION_IDS] = torch.arange(shapes[_POSITION_IDS][1]).expand(shapes[_POSITION_IDS])
    return state


def _cut(tensors: list[Tensor], rows: tuple[int, int] | None) -> Tensor:
    if len(tensors) == 2:
        return torch.cat([tensors[0], torch.zeros_like(tensors[0]), tensors[1]])
    if rows is not None:
        return tensors[0].chunk(rows[1])[rows[0]].clone()  # a copy: safetensors refuses tensors that share storage
    return tensors[0]


def from_release(config: Config, model_pth: Path, vae_dir: Path) -> tuple[dict[str, nn.Module], list[str]]:
    """The released `model.pth` (dict with `state_dict`; optimizer and scheduler are not read) and the SD VAE's folder.

    Returns the six parts in the files' dtypes, and the report to print: a line a key. Peak memory: the file, mapped,
    and copies of the DiT's split matrices (a tenth of it).
    """
    parts = build_parts(config.model, device="meta")
    state = read_weights(model_pth, "state_dict")
    check_keys(state, official_shapes(parts), str(model_pth))
    _check_computed(parts, state, model_pth)
    fill(parts, state)
    parts["vae"] = load_vae(vae_dir, parts["vae"])
    computed = [f"{key}  ->  computed, compared" for key in _COMPUTED]
    return parts, [*map(str, pieces(parts)), *computed]


def from_training_files(
    config: Config, *, pixart: Path, eva: Path, blip2: Path, t5_dir: Path, vae_dir: Path, seed: int
) -> tuple[dict[str, nn.Module], list[str]]:
    """The files training starts from; feature fusion and null context start fresh from `seed`.

    PixArt's patch convolution gets four more input channels, zero, for the source latent. Returns parts and report.
    """
    parts = build_parts(config.model, device="meta")
    wanted = official_shapes(parts)
    report, state = [], {}
    prefix = "visual_encoder."
    for name, path, wrappers in (("pixart", pixart, ["state_dict"]), ("eva", eva, []), ("blip2", blip2, ["model"])):
        tensors = read_weights(path, *wrappers)
        expected = {key: shape for key, shape in wanted.items() if _comes_from(key) == name}
        if name == "eva":
            expected = {key.removeprefix(prefix): shape for key, shape in expected.items()}
        if name == "pixart":
            rows, channels, *kernel = expected["x_embedder.proj.weight"]
            expected["x_embedder.proj.weight"] = (rows, channels // 2, *kernel)
        surplus = check_keys(tensors, expected, str(path), _SURPLUS[name])
        report += [f"{path.name}: {key}  ->  not used" for key in surplus]
        state |= {(prefix if name == "eva" else "") + key: tensors[key] for key in expected}
    conv = state["x_embedder.proj.weight"]
    state["x_embedder.proj.weight"] = torch.cat([conv, torch.zeros_like(conv)], dim=1)
    state |= _fresh_fusion(config, seed)
    with _loading(t5_dir):
        t5, info = T5EncoderModel.from_pretrained(t5_dir, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise CheckpointError(f"{t5_dir}: the T5 encoder lacks {sorted(info['missing_keys'])}")
    state |= {f"t5_model.{key}": value for key, value in t5.state_dict().items()}
    check_keys(state, {k: v for k, v in official_shapes(parts).items() if k not in _COMPUTED}, "all files together")
    fill(parts, state)
    parts["vae"] = load_vae(vae_dir, parts["vae"])
    report += [str(piece) for piece in pieces(parts) if not re.fullmatch(_FRESH, piece.official[0])]
    report += [
        f"fresh, seed {seed}  ->  {p.part}/{p.key}" for p in pieces(parts) if re.fullmatch(_FRESH, p.official[0])
    ]
    return parts, report


def load_vae(folder: Path, expected: AutoencoderKL) -> AutoencoderKL:
    """A VAE in diffusers' layout (sd-vae-ft-ema), float32, of the sizes and scale of `expected` (may be on "meta").

    Raises CheckpointError if it cannot be loaded, lacks weights or is another VAE.
    """
    with _loading(folder):
        vae, info = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    lacks, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if lacks or surplus:
        raise CheckpointError(f"{folder}: not the VAE its config says: it lacks {lacks}, and has besides {surplus}")
    check_keys(vae.state_dict(), {key: tuple(t.shape) for key, t in expected.state_dict().items()}, str(folder))
    got, scale = vae.config.scaling_factor, expected.config.scaling_factor
    if got != scale:
        raise CheckpointError(f"{folder}: the VAE's scaling_factor is {got}, expected {scale}; is it the right VAE?")
    return vae


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """T5's tokenizer. Raises CheckpointError if it is not T5's: the library makes one up where its file is damaged."""
    with _loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = tokenizer.pad_token_id, tokenizer.eos_token_id
        unknown = tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False).input_ids
    if special != (0, 1) or unknown or len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: not T5's tokenizer ({len(tokenizer)} tokens, expected at most {vocab_size}); "
            "is spiece.model there and whole?"
        )
    return tokenizer


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Whatever a library raises for a damaged folder as CheckpointError. A missing one it would seek on the hub."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: expected a folder with a config.json")
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error


def _comes_from(official: str) -> str:
    """Which training file holds an official key; "fresh" for what starts anew, "" for what is computed."""
    if official in _COMPUTED:
        return ""
    if re.fullmatch(_FRESH, official):
        return "fresh"
    if official.startswith("visual_encoder."):
        return "eva"
    if official.startswith(("query_tokens", "ln_vision.", "Qformer.", "t5_proj.")):
        return "blip2"
    return "t5" if official.startswith("t5_model.") else "pixart"


def _fresh_fusion(config: Config, seed: int) -> dict[str, Tensor]:
    """The tensors no file has, under their official names, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_parts(config.model, only=("fusion",))
    tensors = fresh["fusion"].state_dict()
    table = (piece for piece in pieces(fresh) if re.fullmatch(_FRESH, piece.official[0]))
    return {piece.official[0]: tensors[piece.key] for piece in table}


def _check_computed(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor], path: Path) -> None:
    """Buffers that ours computes must hold in the file what ours will compute."""
    table = _position_table(parts["transformer"])
    if not torch.allclose(state[_POSITION_TABLE].float(), table, atol=1e-2):  # the file may be bfloat16
        raise CheckpointError(f"{path}: {_POSITION_TABLE} is not the sine-cosine table of shape {list(table.shape)}")
    positions = state[_POSITION_IDS]
    if not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        raise CheckpointError(f"{path}: {_POSITION_IDS} does not count from 0 to {positions.numel() - 1}")
    if not torch.equal(state["t5_model.shared.weight"], state["t5_model.encoder.embed_tokens.weight"]):
        raise CheckpointError(f"{path}: the two copies of T5's embedding differ; they are one tensor in the model")


def _position_table(transformer: nn.Module) -> Tensor:
    side = transformer.config.sample_size // transformer.config.patch_size
    table = get_2d_sincos_pos_embed(transformer.inner_dim, side, base_size=side, output_type="pt")
    return table.float()[None]


def _describe(data: object) -> str:
    return f"a dict with the keys {list(data)[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"
