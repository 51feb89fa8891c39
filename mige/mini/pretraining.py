"""MIGE-mini's encoder pretrained: a small head reconstructs its images, and predicts the layout of the answer.

Letters: B instructions, R images of all of them, L context positions, N patches of an image, C pixel values of a patch.
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
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mige.config import Config
from mige.data.order import ResumableBatchSampler
from mige.data.randomness import Dropout
from mige.data.synthetic import backgrounds, tasks
from mige.data.synthetic.scenes import SIDE, Scene, Scenes, draw
from mige.data.synthetic.stream import Drawn, WorldBatch, WorldDataset, collate_world, vision_pixels
from mige.data.synthetic.world import FIRST, WORLDS, World
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction, tokenize, training_text
from mige.models.mige import MIGEModel
from mige.models.vae import encode
from mige.training.muon import BatchedMuon, muon_groups
from mige.training.pretrained import check_sizes
from mige.utils.files import atomic_directory

MAX_IMAGES = 2  # that an instruction of the world shows
SUBJECT_SIDE = 100  # of a subject whose layout is predicted, as the head draws it, px
WIDTH, LAYERS, HEADS = 256, 2, 4
RATE = 2e-3
SEED = 20_000  # none that a training has
UNSEEN = 128  # cases of subjects that are not trained on


@dataclass(frozen=True)
class Layout:
    """The layout of the answers of B cases: every subject that an instruction brings or changes.

    Attributes:
        scenes: A of them, each a subject alone as the answer has it, large, on white.
        row_A: int64 [A], the case.
        place_A3: float32 [A, 3], the subject's place in the answer: x, y and size in sides of the image.
        world: whose subjects they are.
    """

    scenes: Scenes
    row_A: Tensor
    place_A3: Tensor
    world: World = FIRST


def layout_of(cases: Sequence[tasks.Case], world: World = FIRST) -> Layout | None:
    """The subjects that the cases ask for and their targets show; None if there is none."""
    there = [(row, s) for row, case in enumerate(cases) for s in case.asked if s in case.target.subjects]
    if not there:
        return None
    alone = [replace(subject, x=SIDE / 2, y=SIDE / 2, size=SUBJECT_SIDE) for _, subject in there]
    scenes = Scenes.stack([Scene(world.white, backgrounds.MIDDLE, (subject,)) for subject in alone])
    place = torch.tensor([(subject.x, subject.y, subject.size) for _, subject in there]) / SIDE
    return Layout(scenes, torch.tensor([row for row, _ in there]), place, world)


class LayoutDataset(WorldDataset):
    """Sample index -> sample of a `WorldDataset` and its case."""

    def __getitem__(self, index: int) -> tuple[Drawn, tasks.Case]:
        case = self.case(index)
        return self.sample(index, case), case


def collate_with_layout(drawn: Sequence[tuple[Drawn, tasks.Case]]) -> tuple[WorldBatch, Layout | None]:
    """Samples of a `LayoutDataset` -> batch and layout."""
    samples, cases = zip(*drawn, strict=True)
    batch = collate_world(samples)
    return batch, layout_of(cases, batch.world)


class ReconstructionHead(nn.Module):
    """Context -> patches of an image, by cross-attention from their positions, as the DiT reads.

    It is thrown away afterwards. It reconstructs an image of the instruction, queried by its number (`by_number`), or
    a subject of the answer, queried by its place there (`by_place`).

    Args:
        context_width: channels of the context. patches: of an image. channels: pixel values of a patch.
    """

    def __init__(self, context_width: int, patches: int, channels: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(patches, WIDTH))
        self.by_number = nn.Embedding(MAX_IMAGES, WIDTH)
        self.by_place = nn.Sequential(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.memory = nn.Linear(context_width, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, channels)

    def forward(self, context_RLC: Tensor, mask_RL: Tensor, query_RC: Tensor) -> Tensor:
        """Contexts, their masks (1: a token), and `by_number` or `by_place` of each -> [R, patches, channels]."""
        queries = self.position + query_RC[:, None]
        hidden = self.layers(queries, self.memory(context_RLC), memory_key_padding_mask=mask_RL == 0)
        return self.out(hidden)


def unexplained_variance(prediction_RNC: Tensor, images_RCHW: Tensor, side: int) -> Tensor:
    """Mean squared error by the images' variance: 0 exact, 1 a grey guess. Float32 [], with a gradient.

    prediction: of the patches, as `F.unfold` orders them; `side`: of a patch, px.
    """
    target_RNC = F.unfold(images_RCHW, side, stride=side).transpose(1, 2)
    return F.mse_loss(prediction_RNC.float(), target_RNC) / target_RNC.var(dim=(0, 1)).mean()


def losses(
    model: MIGEModel,
    head: ReconstructionHead,
    instructions: Sequence[Instruction],
    vision_RCHW: Tensor,
    references_RCHW: Tensor,
    layout: Layout | None = None,
) -> dict[str, Tensor]:
    """Unexplained variance, float32 [], of the R images and of the subjects of the layout.

    Args as in `MIGEModel.encode`, and `layout`, of the same instructions. Returns "images" and, with a layout,
    "layout", as `unexplained_variance`.
    """
    context_BLC, mask_BL = model.encoder(instructions, vision_RCHW, model.patchify(references_RCHW))
    device, tower = vision_RCHW.device, model.encoder.image_encoder.config
    row_R = torch.tensor([row for row, i in enumerate(instructions) for _ in range(i.num_images)], device=device)
    number_R = torch.tensor([n for i in instructions for n in range(i.num_images)], device=device)
    prediction = head(context_BLC[row_R], mask_BL[row_R], head.by_number(number_R))
    found = {"images": unexplained_variance(prediction, vision_RCHW, tower.patch_size)}
    if layout is not None:
        row_A = layout.row_A.to(device)
        prediction = head(context_BLC[row_A], mask_BL[row_A], head.by_place(layout.place_A3.to(device)))
        subjects = vision_pixels(draw(layout.scenes, device, world=layout.world), tower.image_size)
        found["layout"] = unexplained_variance(prediction, subjects, tower.patch_size)
    return found


def unseen_pairs(
    pipeline: MIGEPipeline, device: torch.device, world: World = FIRST
) -> tuple[list[Instruction], Tensor, Tensor, Layout]:
    """`UNSEEN` cases of two references to unseen subjects of a world.

    Returns the instructions, the tower's images [2 * UNSEEN, 3, S, S], unscaled latents [2 * UNSEEN, 4, h, w], layout.
    """
    subjects = list(world.splits().values())[1]
    rngs = (np.random.default_rng([10_003, i]) for i in range(UNSEEN))
    cases = [tasks.make("two_references", rng, subjects, world=world) for rng in rngs]
    pixels = draw(Scenes.stack([image for case in cases for image in case.references]), device, world=world)
    instructions = [tokenize(training_text(case.task, case.prompt), pipeline.tokenizer) for case in cases]
    size = pipeline.image_encoder.config.image_size
    return instructions, vision_pixels(pixels, size), encode(pipeline.vae, pixels).mean, layout_of(cases, world)


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

    The head predicts the layout of the answers too, so the encoder learns what an instruction means. Returns the curve,
    which it prints. Raises RuntimeError for a gradient that is not finite.
    """
    device, model = torch.device(device), pipeline.model.to(device)
    pipeline.vae.to(device).requires_grad_(False)
    loader = _loader(pipeline, settings, batch, workers, seed)
    torch.manual_seed(seed)
    head = _head(pipeline).to(device)
    model.encoder.train().requires_grad_(True)
    trained = [*model.encoder.parameters(), *head.parameters()]
    optimizers = _optimizers(model, head, trained, rate)
    world = WORLDS[settings.data.world_name]
    held_out, curve, started = unseen_pairs(pipeline, device, world), [], time.perf_counter()
    for step, (drawn, layout) in enumerate(loader, start=1):  # which never ends
        done = max(step / steps, (time.perf_counter() - started) / seconds)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, step / 50, 1.25 * (1 - min(done, 0.999)))
        samples = drawn.to(device)
        references = samples.latents(pipeline.vae)[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = losses(model, head, samples.instructions, samples.vision_RCHW, references, layout)
        sum(found.values()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1 or step % 100 == 0 or done >= 1:
            with torch.no_grad():
                unseen = losses(model, head, *held_out)
            shares = found | {f"{name}_unseen": share for name, share in unseen.items()}
            line = {"step": step} | {name: round(share.item(), 4) for name, share in shares.items()}
            curve.append(line | {"seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(curve[-1]), flush=True)
            if done >= 1:
                return curve


def _loader(pipeline: MIGEPipeline, settings: Config, batch: int, workers: int, seed: int) -> DataLoader:
    """Batches of squares of the world's stream with their layouts, without end."""
    dataset = LayoutDataset(
        settings.data.world,
        pipeline.tokenizer,
        seed=seed,
        size=settings.data.size,
        latent_shape=pipeline.latent_shape(settings.data.size, settings.data.size),
        vision_size=pipeline.image_encoder.config.image_size,
        dropout=Dropout(0, 0, 0),
        noise_levels=1,
        world=WORLDS[settings.data.world_name],
    )
    indices = ResumableBatchSampler(batch=batch, processes=1, rank=0, gradient_accumulation_steps=1, start=0)
    return DataLoader(dataset, batch_sampler=indices, collate_fn=collate_with_layout, num_workers=workers)


def _head(pipeline: MIGEPipeline) -> ReconstructionHead:
    """A fresh head for the patches of the pipeline's vision tower."""
    tower = pipeline.image_encoder.config
    patches, channels = (tower.image_size // tower.patch_size) ** 2, 3 * tower.patch_size**2
    return ReconstructionHead(pipeline.fusion.config.text_width, patches, channels)


def _optimizers(
    model: MIGEModel, head: ReconstructionHead, trained: Sequence[nn.Parameter], rate: float
) -> list[Optimizer]:
    """Muon for the matrices of repeated blocks, AdamW for the rest."""
    groups = muon_groups([*model.blocks(("text_encoder", "image_encoder", "qformer")), *head.layers.layers])
    matrices = {id(p) for group in groups for p in group["params"]}
    others = [p for p in trained if id(p) not in matrices]
    return [
        BatchedMuon(groups, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def teach(start: Path, folder: Path, settings: Config, **how: Any) -> None:
    """Write a checkpoint folder: that of `start` after `pretrain`, and its curve; whole or not at all.

    `how`: arguments of `pretrain`. Raises FileExistsError if `folder` is there, CheckpointError if `start` is not
    whole, ConfigError if it is not of the settings' sizes.
    """
    with atomic_directory(folder) as tmp:
        pipeline = MIGEPipeline.from_pretrained(start, dtype=torch.float32)
        check_sizes(settings, pipeline)
        curve = pretrain(pipeline, settings, **how)
        pipeline.to("cpu").save_pretrained(tmp)
        (tmp / "encoder_curve.json").write_text(json.dumps(curve) + "\n")
