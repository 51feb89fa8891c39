"""A pipeline of any size with random weights, and samples for it: what bench_inference.py runs; no file is needed.

    python benchmarks/random_model.py output/random --config configs/mige_512.py --dtype bfloat16

writes such a pipeline as a checkpoint folder, with a tokenizer of few words: 13 GB at full size in bfloat16.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from harness import ROOT

from mige import config
from mige.checkpoints.convert import load_tokenizer
from mige.checkpoints.tiny import EXTRA_IDS, write_tokenizer
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise, make_sample
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.tasks import Task
from mige.utils import images

PHOTOS = ROOT / "example_data" / "images"


class Words:
    """In place of a tokenizer, which would need a file: about as many tokens as T5's, of arbitrary ids."""

    eos_token_id, unk_token_id, all_special_tokens = 1, 2, ("</s>",)

    def __call__(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        pieces = [word[start : start + 5] for word in text.split() for start in range(0, len(word), 5)]
        return SimpleNamespace(input_ids=[3 + sum(piece.encode()) % 400 for piece in pieces])


def random_pipeline(file: Path, device: torch.device, dtype: torch.dtype) -> MIGEPipeline:
    """The parts of a config with random weights, in the dtypes that `from_pretrained` would give them."""
    sizes = config.load(file).model
    torch.manual_seed(0)
    parts = build_parts(sizes, device=device, dtype=dtype)
    if dtype != torch.float32:
        set_product_dtype(parts["image_encoder"], getattr(torch, sizes.fusion["vision_dtype"]))
    pipeline = MIGEPipeline(**parts, tokenizer=Words(), scheduler=DPMSolver2M())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(task: Task, batch: int) -> list[Sample]:
    """Prompts of different lengths, in turn."""
    cat, cup, coffee, flower = (
        images.open_image(PHOTOS / f"{name}.jpg") for name in ("cat", "cup_on_black", "coffee", "flower_on_black")
    )
    rows = {
        Task.SUBJECT: [
            ("a<imagehere>next to a<imagehere>on a wooden table", [cat, cup], None),
            ("a<imagehere>in the jungle", [cat], None),
        ],
        Task.EDIT: [
            ("make the sky night in<imagehere>", [], cat),
            ("replace the cup on the table in<imagehere>with a glass of orange juice", [], coffee),
            ("remove the spoon from the picture", [], coffee),
        ],
        Task.SUBJECT_EDIT: [("replace the cup in<imagehere>with<imagehere>", [coffee, flower], coffee)],
    }[task]
    return [make_sample(*rows[n % len(rows)]) for n in range(batch)]


def draw(pipeline: MIGEPipeline, chosen: list[Sample]) -> list[SampleNoise]:
    """The noise of every sample, at the native size; sample n from seed n."""
    size = pipeline.output_size(None, None)
    return [
        pipeline.draw_noise(sample.task, len(sample.references), torch.Generator().manual_seed(n), *size)
        for n, sample in enumerate(chosen)
    ]


WORDS = 412  # of the tokenizer's model


def save_random(file: Path, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """The random pipeline of a config as a checkpoint folder, its VAE in float32."""
    pipeline = random_pipeline(file, device, dtype)
    limit = pipeline.text_encoder.config.vocab_size
    with tempfile.TemporaryDirectory() as made:
        write_tokenizer(Path(made) / "spiece.model", min(limit, WORDS + EXTRA_IDS))
        pipeline.text_encoder.config.save_pretrained(made)  # of which transformers knows whose tokenizer it is
        pipeline.register_modules(tokenizer=load_tokenizer(Path(made), limit))
    pipeline.save_pretrained(folder)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py", help="(%(default)s)")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="(%(default)s)")
    args = made.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save_random(args.config, args.folder, device, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
