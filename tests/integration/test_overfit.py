"""A tiny model learns six records by heart: records -> trainer -> checkpoint -> inference run -> images.

The two records of a task differ in one input only, the subject in its reference, the edit in its text, the
subject-driven edit in its source. So an image that is like its own target and unlike the others' has read that input.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from golden import golden_state
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoTokenizer

from mige import config
from mige.checkpoints.key_map import load_official
from mige.data.parsing import read_records
from mige.data.records import Record
from mige.diffusion.solver import DPMSolver2M
from mige.inference import run as inference
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.vae import decode, encode, scale
from mige.training.trainer import Trainer
from mige.utils import images

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
SIZE = 16  # pixels; latents are 4 x 4 x 4
MODEL = [
    "model.transformer.sample_size=4",
    "model.image_encoder.num_hidden_layers=1",
    "model.qformer.num_hidden_layers=2",
    "model.text_encoder.num_layers=1",
    "model.vae.block_out_channels=[16,16,16]",
    f"model.vae.down_block_types={['DownEncoderBlock2D'] * 3}",
    f"model.vae.up_block_types={['UpDecoderBlock2D'] * 3}",
]
TRAINING = {
    "train.steps": 360,
    "train.batch_size": 6,  # every record once
    "train.noise_levels": 8,
    "train.snr_gamma": 1.0,  # or fine detail at low noise drowns what tells the records apart at high noise
    "train.learning_rate": 4e-3,
    "train.lr_reference_batch": 6,
    "train.warmup": 20,
    "train.cooldown": 180,
    "train.weight_decay": 0.0,
    "train.ema": 0.98,
    "train.checkpoint_every": 360,
    "train.log_every": 100,
    "train.sample_every": 0,
    "data.size": SIZE,
    "data.drop_text": 0.0,
    "data.drop_source": 0.0,
    "data.drop_both": 0.0,
}

RED, GREEN, BLUE, SKY, SAND = "#d22828", "#28aa46", "#2846c8", "#78b4e6", "#c8aa78"
DISC, SQUARE = ("ellipse", (3, 3, 12, 12), RED), ("rectangle", (3, 3, 12, 12), BLUE)
GRASS, DUNE, SNOW = (("rectangle", (0, 10, 16, 16), colour) for colour in (GREEN, SAND, "#f0f0f0"))
SUN = ("ellipse", (2, 6, 8, 12), RED)
IMAGES = {
    "disc": ("#000000", DISC),
    "square": ("#000000", SQUARE),
    "disc_on_beach": (SAND, DISC),
    "square_on_beach": (SAND, SQUARE),
    "meadow": (SKY, GRASS),
    "meadow_at_night": ("#14143c", GRASS),
    "meadow_in_snow": (SKY, SNOW),
    "desert": ("#e6c828", DUNE),
    "meadow_with_disc": (SKY, GRASS, SUN),
    "desert_with_disc": ("#e6c828", DUNE, SUN),
}
RECORDS = [  # prompt, references, source, target
    ("a<imagehere>on the beach", ["disc"], [], "disc_on_beach"),
    ("a<imagehere>on the beach", ["square"], [], "square_on_beach"),
    ("make<imagehere>night", ["meadow"], ["meadow"], "meadow_at_night"),
    ("make<imagehere>snow", ["meadow"], ["meadow"], "meadow_in_snow"),
    ("add the<imagehere>to<imagehere>", ["disc", "meadow"], ["meadow"], "meadow_with_disc"),
    ("add the<imagehere>to<imagehere>", ["disc", "desert"], ["desert"], "desert_with_disc"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    folder = tmp_path_factory.mktemp("data")
    for name, (background, *shapes) in IMAGES.items():
        image = Image.new("RGB", (SIZE, SIZE), background)
        for shape, box, colour in shapes:
            getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
        image.save(folder / f"{name}.png")
    rows = [
        {"multi_prompt": prompt, "id": target, "image": f"{target}.png"}
        | {"entity_path": [f"{name}.png" for name in references], "source_path": [f"{name}.png" for name in source]}
        for prompt, references, source, target in RECORDS
    ]
    (folder / "records.json").write_text(json.dumps(rows))
    return read_records([folder / "records.json"]).raise_if_errors()


@pytest.fixture(scope="module")
def start(records, tiny_model, tmp_path_factory) -> Path:
    """Fresh DiT and T5, a VAE that knows the images, and the golden rule's vision tower, Q-Former and fusion.

    Of fresh ones, the tokens of two images differ by 1 % only, which would take many steps to grow.
    """
    torch.manual_seed(0)
    sizes = config.load(TINY, MODEL).model
    parts = build_parts(sizes)
    load_official(parts, golden_state(parts))
    parts |= build_parts(sizes, only=["transformer", "text_encoder"])
    train_vae(parts["vae"], open_all(sorted(records[0].target.parent.glob("*.png"))))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    folder = tmp_path_factory.mktemp("start") / "model"
    MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M()).save_pretrained(folder)
    return folder


def train_vae(vae: AutoencoderKL, pixels: Tensor, steps: int = 300) -> None:
    """Fit the means; the standard deviation is set to e^-4, small as a real VAE's, and latents to unit scale."""
    with torch.no_grad():
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0.0, -8.0
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        loss = F.mse_loss(vae.decode(vae.encode(pixels).latent_dist.mean).sample, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / encode(vae, pixels).mean.std()))


@pytest.fixture(scope="module")
def trained(start, records, tmp_path_factory) -> Path:
    """The model/ folder of the run's last checkpoint."""
    run = tmp_path_factory.mktemp("run")
    file = str(records[0].target.with_name("records.json"))
    settings = TRAINING | {"train.pretrained": str(start), "data.sets": [{"file": file, "weight": 1.0}]}
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(config.load(TINY, [*MODEL, *(f"{key}={value!r}" for key, value in settings.items())]), run).run()
    return run / "checkpoints" / f"step-{TRAINING['train.steps']:08d}" / "model"


def open_all(paths: list[Path]) -> Tensor:
    return torch.stack([images.to_pixels(images.open_image(path)) for path in paths])


def sample(model: Path, records: list[Record], seed: int, folder: Path) -> Tensor:
    """Images [6, 3, H, W] in [-1, 1] of an inference run, with the official solver and no guidance."""
    how = inference.Settings(str(model), "float32", seed=seed, steps=20, guidance=1.0, source_guidance=1.0)
    inference.run(records, MIGEPipeline.from_pretrained(model), how, folder)
    return open_all([folder / "images" / f"{record.id}.png" for record in records])


def psnr(made: Tensor, targets: Tensor) -> Tensor:
    """Decibels of every image against every target: [6, 6]."""
    return -10 * ((made[:, None] - targets[None]) / 2).square().mean((2, 3, 4)).log10()


def report(name: str, decibels: Tensor, records: list[Record]) -> str:
    """A line an image: its PSNR against its own target and against the nearest other."""
    others = decibels.clone().fill_diagonal_(-torch.inf).amax(1)
    lines = [
        f"  {record.task:12} {record.id:17} {own:5.1f} dB, another's target at most {other:5.1f} dB"
        for record, own, other in zip(records, decibels.diag(), others, strict=True)
    ]
    return "\n".join([f"PSNR of {name}:", *lines])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampled_images_match_their_targets(start, trained, records, tmp_path, seed):
    targets = open_all([record.target for record in records])
    vae = AutoencoderKL.from_pretrained(start / "vae")
    with torch.no_grad():
        reconstructed = psnr(decode(vae, scale(vae, encode(vae, targets).mean)), targets)
    before = psnr(sample(start, records, seed, tmp_path / "before"), targets)
    after = psnr(sample(trained, records, seed, tmp_path / "after"), targets)
    message = "\n".join(
        report(name, values, records)
        for name, values in (("the VAE alone", reconstructed), ("untrained", before), ("trained", after))
    )
    print(message)
    assert before.max() < 18, message
    assert after.diag().min() > 25, message
    permuted = after.clone().fill_diagonal_(-torch.inf)
    assert (after.diag() - permuted.amax(1)).min() > 8, message
