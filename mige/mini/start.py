"""What a model of the miniature world starts from: fresh parts around a tokenizer and a VAE, or another's parts."""

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5TokenizerFast

from mige.checkpoints.folder import CheckpointError, verify
from mige.config import ModelConfig
from mige.data.synthetic import tasks
from mige.data.synthetic.world import FIRST, World
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.instruction import training_text
from mige.tasks import PLACEHOLDER
from mige.utils.files import atomic_directory

EXTRA_IDS = 100


def write_tokenizer(folder: Path, vocab_size: int, world: World = FIRST) -> PreTrainedTokenizerBase:
    """A sentencepiece model with T5's special ids, trained on the instructions of 30,000 cases of a world."""
    seen = world.splits()["seen"]
    texts = (tasks.sample(np.random.default_rng([1, i]), seen, world=world) for i in range(30_000))
    words = (training_text(c.task, c.prompt).replace(PLACEHOLDER, " ").replace("\n", " ") for c in texts)
    file = folder / "spiece.model"
    with file.open("wb") as output:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words,
            model_writer=output,
            vocab_size=vocab_size - EXTRA_IDS,
            model_type="bpe",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return T5TokenizerFast.from_pretrained(folder, extra_ids=EXTRA_IDS)


def fresh_parts(sizes: ModelConfig, seed: int) -> dict[str, nn.Module]:
    """All parts with weights drawn from the seed, float32; the DiT's last layer is zero.

    Variants whose fusion alone differs start from the same DiT, text encoder, vision tower and Q-Former.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = build_parts(sizes)
    nn.init.zeros_(parts["transformer"].proj_out.weight)  # a fresh DiT says "no noise", whatever it reads
    nn.init.zeros_(parts["transformer"].proj_out.bias)
    return parts


def trained_parts(model: Path, sizes: ModelConfig) -> tuple[AutoencoderKL, PreTrainedTokenizerBase]:
    """VAE (float32) and tokenizer of a checkpoint folder.

    Raises CheckpointError if the folder is not whole, or if a model of these sizes cannot work with them.
    """
    verify(model)
    vae = AutoencoderKL.from_pretrained(model / "vae", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    channels, words = sizes.vae["latent_channels"], sizes.text_encoder["vocab_size"]
    if vae.config.latent_channels != channels:
        got = vae.config.latent_channels
        raise CheckpointError(f"{model}: its VAE has {got} latent channels, the config's vae.latent_channels is "
                              f"{channels}: make them equal, or start from another model")  # fmt: skip
    if len(tokenizer) > words:
        raise CheckpointError(f"{model}: its tokenizer has {len(tokenizer)} tokens, the config's "
                              f"text_encoder.vocab_size is {words}: raise it, or start from another model")  # fmt: skip
    return vae, tokenizer


def start_from(model: Path, folder: Path, sizes: ModelConfig, seed: int) -> None:
    """Write a checkpoint folder to train from: fresh parts, VAE and tokenizer of `model`; whole or not at all.

    Raises FileExistsError if `folder` is there, CheckpointError as `trained_parts`.
    """
    vae, tokenizer = trained_parts(model, sizes)
    parts = fresh_parts(sizes, seed) | {"vae": vae}
    with atomic_directory(folder) as tmp:
        MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M()).save_pretrained(tmp)


@torch.no_grad()
def take_what_fits(parts: dict[str, nn.Module], model: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Copy into fresh parts what a model of another world has learnt; the number of values taken, by part.

    Taken are all tensors of the same name and shape, but the VAE's; the text encoder's vectors of the tokens that both
    vocabularies have; the vision tower's patch kernels, stretched to another size of patches (bilinear, times the ratio
    of areas, so that an image that is stretched as much gives about the same). Raises CheckpointError if the folder is
    not whole.
    """
    verify(model)
    theirs = MIGEPipeline.from_pretrained(model, dtype=torch.float32)
    taken = {}
    for name, part in parts.items():
        if name == "vae":
            continue
        own, other = part.state_dict(), getattr(theirs, name).state_dict()
        fits = {key: value for key, value in other.items() if key in own and own[key].shape == value.shape}
        for key in own.keys() & other.keys() - fits.keys():
            if name == "image_encoder" and own[key].ndim == 4:
                side = own[key].shape[-1]
                stretched = F.interpolate(other[key], size=(side, side), mode="bilinear")
                fits[key] = stretched * (other[key].shape[-1] / side) ** 2
        if name == "text_encoder":
            words, known = tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
            both = [(number, known[word]) for word, number in words.items() if word in known]
            for key in [key for key in own if own[key].shape[0] == part.config.vocab_size]:
                fits[key] = own[key].clone()
                fits[key][[mine for mine, _ in both]] = other[key][[there for _, there in both]]
        part.load_state_dict(own | fits)
        taken[name] = sum(value.numel() for value in fits.values())
    return taken


def start_with(model: Path, folder: Path, sizes: ModelConfig, seed: int) -> None:
    """Write a checkpoint folder to train from: all parts of `model`; whole or not at all.

    Its fusion may be another (without queries, with or without VAE features): what fits is taken, the rest is fresh, by
    the seed. Raises FileExistsError if `folder` is there, CheckpointError as `trained_parts`, or if another part
    has other sizes.
    """
    vae, tokenizer = trained_parts(model, sizes)
    parts = fresh_parts(sizes, seed) | {"vae": vae}
    given = MIGEPipeline.from_pretrained(model, dtype=torch.float32)
    for name, part in parts.items():
        own, theirs = part.state_dict(), getattr(given, name).state_dict()
        fits = {key: value for key, value in theirs.items() if key in own and own[key].shape == value.shape}
        if name != "fusion" and (other := sorted(own.keys() ^ fits.keys() | theirs.keys() ^ fits.keys())):
            raise CheckpointError(f"{model}: its {name} is not of the config's sizes ({len(other)} tensors differ, the "
                                  f"first {other[0]}): make them equal, or start from another model")  # fmt: skip
        part.load_state_dict(own | fits)
    with atomic_directory(folder) as tmp:
        MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M()).save_pretrained(tmp)
