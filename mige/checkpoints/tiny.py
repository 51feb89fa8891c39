"""A tiny, seeded, untrained model in the official file layout, so that demo and tests convert real files."""

import itertools
from pathlib import Path

import sentencepiece
import torch

from mige import config
from mige.checkpoints.key_map import to_official
from mige.models.build import build_parts
from mige.utils.files import atomic_directory

EXTRA_IDS = 100  # T5's sentinel tokens come after the sentencepiece vocabulary


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A sentencepiece model with T5's special ids, trained on sentences of the kind that prompts are made of."""
    subjects = [
        "cat",
        "dog",
        "cup",
        "flower",
        "rocket",
        "pencil",
        "astronaut",
        "pagoda",
        "teapot",
        "backpack",
        "toy",
        "car",
        "bear",
        "vase",
        "person",
    ]
    places = ["in the jungle", "on the beach", "in the snow", "on a wooden table", "in front of a mountain", "at night"]
    verbs = ["replace the", "remove the", "add a", "make the sky dark above the", "change the colour of the"]
    templates = ["a {} {} next to a {}", "follow the instruction to edit the image: " + "{1} {0} and the {2}"]
    sentences = [
        template.format(subject, middle, other)
        for subject, other in itertools.permutations(subjects, 2)
        for template, middles in zip(templates, (places, verbs), strict=True)
        for middle in middles
    ]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=vocab_size - EXTRA_IDS,
            hard_vocab_limit=False,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def write_official(folder: Path, config_file: Path, seed: int) -> None:
    """model.pth, vae/ and t5/ of a config's sizes, fresh from the seed. Raises FileExistsError if it is there."""
    sizes = config.load(config_file).model
    torch.manual_seed(seed)
    parts = build_parts(sizes)
    with atomic_directory(folder) as made:
        released = dict(state_dict=to_official(parts), optimizer={}, scheduler={}, epoch=0)
        torch.save(released, made / "model.pth")
        parts["vae"].save_pretrained(made / "vae")
        parts["text_encoder"].save_pretrained(made / "t5")
        write_tokenizer(made / "t5" / "spiece.model", sizes.text_encoder["vocab_size"])
