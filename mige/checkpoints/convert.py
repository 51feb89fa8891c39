"""Official weight files -> our parts, with an account of every key.

Two ways in: the released `model.pth` (`from_release`), and the files training starts from (`from_training_files`).
A file with a missing or unexpected key, or one of another shape, is refused, naming all of them; extra keys that are
known to be in the public files (BLIP-2's text parts, EVA's fortieth block) are listed. Pickles load with
`weights_only=True`, mapped.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.key_map import (
    COMPUTED,
    POSITION_IDS,
    POSITION_TABLE,
    key_mappings,
    load_official,
    official_shapes,
    position_table,
)
from mige.checkpoints.official_files import check_keys, read_weights
from mige.config import Config
from mige.models.build import build_parts

_EXTRA_KEYS = {
    "pixart": r"pos_embed|y_embedder\.y_embedding",
    "eva": r"blocks\.39\..+|(norm|fc_norm|head)\..+",
    "blip2": r"Qformer\.(cls\..+|bert\.embeddings\.(position_ids|(word_embeddings|position_embeddings)\..+)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\..+)|visual_encoder\..+|t5_model\..+",
}
_FRESH = r"FFM\..+|y_embedder\.y_embedding"  # what training starts without


def from_release(config: Config, model_pth: Path, vae_dir: Path) -> tuple[dict[str, nn.Module], list[str]]:
    """The released `model.pth` (dict with `state_dict`; optimizer and scheduler are not read) and the SD VAE's folder.

    Returns the six parts in the files' dtypes, and the report to print: a line a key. Peak memory: the file, mapped,
    and copies of the DiT's split matrices (a tenth of it). Raises CheckpointError for a file that is missing or
    damaged, for keys that are missing, unexpected or of another shape, and for computed tables that differ from ours.
    """
    parts = build_parts(config.model, device="meta")
    state = read_weights(model_pth, "state_dict")
    check_keys(state, official_shapes(parts), str(model_pth))
    _check_computed(parts, state, model_pth)
    load_official(parts, state)
    parts["vae"] = load_vae(vae_dir, parts["vae"])
    computed = [f"{key}  ->  computed, compared" for key in COMPUTED]
    return parts, [*map(str, key_mappings(parts)), *computed]


def from_training_files(
    config: Config, *, pixart: Path, eva: Path, blip2: Path, t5_dir: Path, vae_dir: Path, seed: int
) -> tuple[dict[str, nn.Module], list[str]]:
    """The files training starts from; feature fusion and null context start fresh from `seed`.

    PixArt's patch convolution gets four more input channels, zero, for the source latent (MIGE, arXiv 2502.21291).

    Args:
        pixart, eva, blip2: PixArt-XL-2-512x512.pth, eva_vit_g.pth, blip2_pretrained_flant5xxl.pth.
        t5_dir, vae_dir: folders in the libraries' layouts.

    Returns the six parts in the files' dtypes, and the report: a line a key. Raises CheckpointError for a file that is
    missing or damaged, and for keys that are missing, unexpected or of another shape.
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
        extra = check_keys(tensors, expected, str(path), _EXTRA_KEYS[name])
        report += [f"{path.name}: {key}  ->  not used" for key in extra]
        state |= {(prefix if name == "eva" else "") + key: tensors[key] for key in expected}
    conv = state["x_embedder.proj.weight"]
    state["x_embedder.proj.weight"] = torch.cat([conv, torch.zeros_like(conv)], dim=1)
    state |= _fresh_fusion(config, seed)
    with _loading(t5_dir):
        t5, info = T5EncoderModel.from_pretrained(t5_dir, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise CheckpointError(f"{t5_dir}: the T5 encoder lacks {sorted(info['missing_keys'])}")
    state |= {f"t5_model.{key}": value for key, value in t5.state_dict().items()}
    check_keys(state, {k: v for k, v in official_shapes(parts).items() if k not in COMPUTED}, "all files together")
    load_official(parts, state)
    parts["vae"] = load_vae(vae_dir, parts["vae"])
    report += [str(mapping) for mapping in key_mappings(parts) if not re.fullmatch(_FRESH, mapping.official[0])]
    report += [
        f"fresh, seed {seed}  ->  {p.part}/{p.key}" for p in key_mappings(parts) if re.fullmatch(_FRESH, p.official[0])
    ]
    return parts, report


def load_vae(folder: Path, expected: AutoencoderKL) -> AutoencoderKL:
    """A VAE in diffusers' layout (sd-vae-ft-ema), float32, of the sizes and scale of `expected` (may be on "meta").

    Raises CheckpointError if it cannot be loaded, lacks weights or is another VAE.
    """
    with _loading(folder):
        vae, info = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    lacks, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if lacks or extra:
        raise CheckpointError(f"{folder}: not the VAE its config says: it lacks {lacks}, and has besides {extra}")
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
            "is smapping.model there and whole?"
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
    if official in COMPUTED:
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
    table = (mapping for mapping in key_mappings(fresh) if re.fullmatch(_FRESH, mapping.official[0]))
    return {mapping.official[0]: tensors[mapping.key] for mapping in table}


def _check_computed(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor], path: Path) -> None:
    """Buffers that ours computes must hold in the file what ours will compute."""
    table = position_table(parts["transformer"])
    if not torch.allclose(state[POSITION_TABLE].float(), table, atol=1e-2):  # the file may be bfloat16
        raise CheckpointError(f"{path}: {POSITION_TABLE} is not the sine-cosine table of shape {list(table.shape)}")
    positions = state[POSITION_IDS]
    if not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        raise CheckpointError(f"{path}: {POSITION_IDS} does not count from 0 to {positions.numel() - 1}")
    if not torch.equal(state["t5_model.shared.weight"], state["t5_model.encoder.embed_tokens.weight"]):
        raise CheckpointError(f"{path}: the two copies of T5's embedding differ; they are one tensor in the model")
