"""MIGE-mini's encoder taught to tell its images and what stands where in the answer: a transformer reads both back.

Letters: B instructions, R images of all of them, L context positions, N patches of an image, C values.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mige.config import Config
from mige.data.order import ResumableBatchSampler
from mige.data.randomness import Dropout
from mige.data.synthetic import backgrounds, sprites, tasks
from mige.data.synthetic.scenes import SIDE, Scene, Scenes, draw
from mige.data.synthetic.stream import Drawn, WorldBatch, WorldDataset, collate_world, vision_pixels
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction, tokenize, training_text
from mige.models.mige import MIGEModel
from mige.models.vae import encode
from mige.training.muon import BatchedMuon, muon_groups
from mige.training.pretrained import check_sizes
from mige.utils.files import atomic_directory

MOST = 2  # images an instruction of the world shows at most
SHOWN = 100  # side of a subject that is asked for by its place, px
WIDTH, LAYERS, HEADS = 256, 2, 4
RATE = 2e-3
SEED = 20_000  # none that a training has
UNSEEN = 128  # cases of subjects that are not trained on


@dataclass(frozen=True)
class Answers:
    """What stands where in the answers of B cases: every subject that an instruction brings or changes.

    Attributes:
        scenes: A of them, each a subject alone as the answer has it, large, on white.
        row_A: int64, the case.
        where_A3: float32, where the subject stands in the answer: x, y and size in sides of the image.
    """

    scenes: Scenes
    row_A: Tensor
    where_A3: Tensor


def answers(cases: Sequence[tasks.Case]) -> Answers | None:
    """The subjects that the cases ask for and their targets show; None if there is none."""
    there = [(row, s) for row, case in enumerate(cases) for s in case.asked if s in case.target.subjects]
    if not there:
        return None
    alone = [replace(subject, x=SIDE / 2, y=SIDE / 2, size=SHOWN) for _, subject in there]
    scenes = Scenes.stack([Scene(backgrounds.PLAIN_WHITE, backgrounds.MIDDLE, (subject,)) for subject in alone])
    where = torch.tensor([(subject.x, subject.y, subject.size) for _, subject in there]) / SIDE
    return Answers(scenes, torch.tensor([row for row, _ in there]), where)


class AnsweredDataset(WorldDataset):
    """Counter -> sample of a `WorldDataset` and its case."""

    def __getitem__(self, counter: int) -> tuple[Drawn, tasks.Case]:
        case = self.case(counter)
        return self.sample(counter, case), case


def collate_answered(drawn: Sequence[tuple[Drawn, tasks.Case]]) -> tuple[WorldBatch, Answers | None]:
    """Samples of an `AnsweredDataset` -> batch and answers."""
    samples, cases = zip(*drawn, strict=True)
    return collate_world(samples), answers(cases)


class Reader(nn.Module):
    """Context -> patches of an image, by cross-attention from their positions, as the DiT reads.

    It is asked for an image of the instruction by its number (`which`), or for a subject of the answer by where it
    stands there (`where`).

    Args:
        context_width: channels of the context. patches: of an image. values: of a patch.
    """

    def __init__(self, context_width: int, patches: int, values: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(patches, WIDTH))
        self.which = nn.Embedding(MOST, WIDTH)
        self.where = nn.Sequential(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.memory = nn.Linear(context_width, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, values)

    def forward(self, context_RLC: Tensor, mask_RL: Tensor, asked_RC: Tensor) -> Tensor:
        """Contexts, their masks, and what `which` or `where` make of a question to each -> [R, patches, values]."""
        asked = self.position + asked_RC[:, None]
        read = self.layers(asked, self.memory(context_RLC), memory_key_padding_mask=mask_RL == 0)
        return self.out(read)


def lost(told_RNC: Tensor, images_RCHW: Tensor, side: int) -> Tensor:
    """Share of the images' variance that a reader did not tell; 1 for a grey guess. Float32 [], with a gradient.

    told: values of the patches, as `F.unfold` orders them; `side`: of a patch, px.
    """
    truth_RNC = F.unfold(images_RCHW, side, stride=side).transpose(1, 2)
    return F.mse_loss(told_RNC.float(), truth_RNC) / truth_RNC.var(dim=(0, 1)).mean()


def read(
    model: MIGEModel,
    reader: Reader,
    instructions: Sequence[Instruction],
    vision_RCHW: Tensor,
    references_RCHW: Tensor,
    answered: Answers | None = None,
) -> dict[str, Tensor]:
    """What is lost of the R images, asked for by number, and of the subjects of the answers, asked for by place.

    Args as in `MIGEModel.encode`, and `answered`, of the same instructions. Returns "lost" and, with answers,
    "lost_answers", as `lost`.
    """
    context_BLC, mask_BL = model.encoder(instructions, vision_RCHW, model.patchify(references_RCHW))
    device, tower = vision_RCHW.device, model.encoder.image_encoder.config
    row_R = torch.tensor([row for row, i in enumerate(instructions) for _ in range(i.num_images)], device=device)
    which_R = torch.tensor([n for i in instructions for n in range(i.num_images)], device=device)
    told = reader(context_BLC[row_R], mask_BL[row_R], reader.which(which_R))
    found = {"lost": lost(told, vision_RCHW, tower.patch_size)}
    if answered is not None:
        row_A = answered.row_A.to(device)
        told = reader(context_BLC[row_A], mask_BL[row_A], reader.where(answered.where_A3.to(device)))
        subjects = vision_pixels(draw(answered.scenes, device), tower.image_size)
        found["lost_answers"] = lost(told, subjects, tower.patch_size)
    return found


def unseen_pairs(pipeline: MIGEPipeline, device: torch.device) -> tuple[list[Instruction], Tensor, Tensor, Answers]:
    """`UNSEEN` cases of two references to unseen subjects: instructions, tower images, unscaled latents, answers."""
    subjects, rngs = sprites.split()[1], (np.random.default_rng([10_003, i]) for i in range(UNSEEN))
    cases = [tasks.make("two_references", rng, subjects) for rng in rngs]
    pixels = draw(Scenes.stack([image for case in cases for image in case.references]), device)
    told = [tokenize(training_text(case.task, case.prompt), pipeline.tokenizer) for case in cases]
    size = pipeline.image_encoder.config.image_size
    return told, vision_pixels(pixels, size), encode(pipeline.vae, pixels).mean, answers(cases)


def pretrain(
    pipeline: MIGEPipeline,
    settings: Config,
    *,
    steps: int,
    batch: int,
    workers: int,
    device: str,
    seconds: float = math.inf,
    rate: float = RATE,
    seed: int = SEED,
) -> list[dict]:
    """Train the encoder of `pipeline` in place, on `settings.data.world`, until so many steps or seconds are over.

    The reader is asked for the subjects of the answers too, by where they stand there, so the encoder learns what an
    instruction means. Matrices of repeated blocks are Muon's, the rest AdamW's. Returns the curve, which it prints.
    Raises RuntimeError for a gradient that is not finite.
    """
    device, model = torch.device(device), pipeline.model.to(device)
    pipeline.vae.to(device).requires_grad_(False)
    tower = pipeline.image_encoder.config
    dataset = AnsweredDataset(
        settings.data.world,
        pipeline.tokenizer,
        seed=seed,
        size=settings.data.size,
        latent_shape=pipeline.latent_shape(settings.data.size, settings.data.size),
        vision_size=tower.image_size,
        dropout=Dropout(0, 0, 0),
        noise_levels=1,
    )
    indices = ResumableBatchSampler(batch=batch, processes=1, rank=0, accumulate=1, start=0)
    loader = DataLoader(dataset, batch_sampler=indices, collate_fn=collate_answered, num_workers=workers)
    torch.manual_seed(seed)
    patches, values = (tower.image_size // tower.patch_size) ** 2, 3 * tower.patch_size**2
    reader = Reader(pipeline.fusion.config.text_width, patches, values).to(device)
    model.encoder.train().requires_grad_(True)
    trained = [*model.encoder.parameters(), *reader.parameters()]
    blocks = [*model.blocks(("text_encoder", "image_encoder", "qformer")), *reader.layers.layers]
    groups = muon_groups(blocks)
    matrices = {id(p) for group in groups for p in group["params"]}
    others = [p for p in trained if id(p) not in matrices]
    optimizers = [
        BatchedMuon(groups, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    held_out, curve, started = unseen_pairs(pipeline, device), [], time.perf_counter()
    for step, (drawn, answered) in enumerate(loader, start=1):  # which never ends
        done = max(step / steps, (time.perf_counter() - started) / seconds)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, step / 50, 1.25 * (1 - min(done, 0.999)))
        samples = drawn.to(device)
        references = samples.latents(pipeline.vae)[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = read(model, reader, samples.instructions, samples.vision_RCHW, references, answered)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1 or step % 100 == 0 or done >= 1:
            with torch.no_grad():
                unseen = read(model, reader, *held_out)
            now = losses | {f"{name}_unseen": share for name, share in unseen.items()}
            line = {"step": step} | {name: round(share.item(), 4) for name, share in now.items()}
            curve.append(line | {"seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(curve[-1]), flush=True)
            if done >= 1:
                return curve


def teach(start: Path, folder: Path, settings: Config, **how: Any) -> None:
    """Write a checkpoint folder: that of `start` after `pretrain`, and its curve; whole or not at all.

    `how`: arguments of `pretrain`. Raises FileExistsError if `folder` is there, CheckpointError if `start` is not
    whole, ConfigError if it is not of the settings' sizes.
    """
    with atomic_directory(folder) as beside:
        pipeline = MIGEPipeline.from_pretrained(start, dtype=torch.float32)
        check_sizes(settings, pipeline)
        curve = pretrain(pipeline, settings, **how)
        pipeline.to("cpu").save_pretrained(beside)
        (beside / "encoder_curve.json").write_text(json.dumps(curve) + "\n")
