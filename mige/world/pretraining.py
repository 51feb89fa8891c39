"""MIGE-mini's encoder taught to tell all of a picture: what it tells is read back from the context by a transformer.

Letters: B instructions, R pictures of all of them, L context positions, N patches of a picture, C values.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mige import latents
from mige.checkpoint import whole_folder
from mige.config import Config
from mige.dataset import Counters, Dropout
from mige.instruction import Instruction, tokenize, training_text
from mige.model import MIGEModel
from mige.muon import BatchedMuon, muon_groups
from mige.pipeline import MIGEPipeline
from mige.trainer import check_sizes
from mige.world import sprites, tasks
from mige.world.scenes import Scenes, draw
from mige.world.stream import WorldDataset, collate_world, vision_pixels

MOST = 2  # pictures an instruction of the world shows at most
WIDTH, LAYERS, HEADS = 256, 2, 4
RATE = 2e-3
SEED = 20_000  # none that a training has


class Reader(nn.Module):
    """Context -> patches of a picture of the instruction, by cross-attention from their positions, as the DiT reads.

    Args:
        context_width: channels of the context. patches: of a picture. values: of a patch.
    """

    def __init__(self, context_width: int, patches: int, values: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(patches, WIDTH))
        self.which = nn.Parameter(torch.randn(MOST, WIDTH))
        self.memory = nn.Linear(context_width, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, values)

    def forward(self, context_RLC: Tensor, mask_RL: Tensor, which_R: Tensor) -> Tensor:
        """Context of every picture's instruction, its mask, the picture's number in it -> [R, patches, values]."""
        asked = self.position + self.which[which_R][:, None]
        read = self.layers(asked, self.memory(context_RLC), memory_key_padding_mask=mask_RL == 0)
        return self.out(read)


def lost(
    model: MIGEModel, reader: Reader, instructions: Sequence[Instruction], vision_RCHW: Tensor, references_RCHW: Tensor
) -> Tensor:
    """Share of the variance of R pictures that the reader doesn't get out of their contexts; 1 for a grey guess.

    Args as in `MIGEModel.encode`; float32 [], with a gradient.
    """
    context_BLC, mask_BL = model.encoder(instructions, vision_RCHW, model.patchify(references_RCHW))
    device = vision_RCHW.device
    row_R = torch.tensor([row for row, i in enumerate(instructions) for _ in range(i.pictures)], device=device)
    which_R = torch.tensor([n for i in instructions for n in range(i.pictures)], device=device)
    side = model.encoder.image_encoder.config.patch_size
    told_RNC = reader(context_BLC[row_R], mask_BL[row_R], which_R)
    truth_RNC = F.unfold(vision_RCHW, side, stride=side).transpose(1, 2)
    return F.mse_loss(told_RNC.float(), truth_RNC) / truth_RNC.var(dim=(0, 1)).mean()


def unseen_pictures(pipeline: MIGEPipeline, device: torch.device) -> tuple[list[Instruction], Tensor, Tensor]:
    """128 portraits of unseen subjects as instructions, tower pictures and unscaled latents."""
    subjects, rngs = sprites.split()[1], (np.random.default_rng([10_003, i]) for i in range(128))
    cases = [tasks.make("one_reference", rng, subjects) for rng in rngs]
    pixels = draw(Scenes.stack([case.references[0] for case in cases]), device)
    told = [tokenize(training_text(case.task, case.prompt), pipeline.tokenizer) for case in cases]
    size = pipeline.image_encoder.config.image_size
    return told, vision_pixels(pixels, size), latents.encode(pipeline.vae, pixels).mean


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

    Matrices of repeated blocks are Muon's, the rest AdamW's. Returns the curve, which it prints.
    Raises RuntimeError for a gradient that is not finite.
    """
    device, model = torch.device(device), pipeline.model.to(device)
    pipeline.vae.to(device).requires_grad_(False)
    tower = pipeline.image_encoder.config
    dataset = WorldDataset(
        settings.data.world,
        pipeline.tokenizer,
        seed=seed,
        size=settings.data.size,
        latent_shape=pipeline.latent_shape(settings.data.size, settings.data.size),
        vision_size=tower.image_size,
        dropout=Dropout(0, 0, 0),
        noise_levels=1,
    )
    counters = Counters(batch=batch, processes=1, rank=0, accumulate=1, start=0)
    loader = DataLoader(dataset, batch_sampler=counters, collate_fn=collate_world, num_workers=workers)
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
    held_out, curve, started = unseen_pictures(pipeline, device), [], time.perf_counter()
    for step, drawn in enumerate(loader, start=1):  # which never ends
        done = max(step / steps, (time.perf_counter() - started) / seconds)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, step / 50, 1.25 * (1 - min(done, 0.999)))
        samples = drawn.to(device)
        references = samples.latents(pipeline.vae)[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = lost(model, reader, samples.instructions, samples.vision_RCHW, references)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1 or step % 100 == 0 or done >= 1:
            with torch.no_grad():
                unseen = float(lost(model, reader, *held_out))
            line = {"step": step, "lost": round(loss.item(), 4), "lost_unseen": round(unseen, 4)}
            curve.append(line | {"seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(curve[-1]), flush=True)
            if done >= 1:
                return curve


def teach(start: Path, folder: Path, settings: Config, **how: Any) -> None:
    """Write a checkpoint folder: that of `start` after `pretrain`, and its curve; whole or not at all.

    `how`: arguments of `pretrain`. Raises FileExistsError if `folder` is there, CheckpointError if `start` is not
    whole, ConfigError if it is not of the settings' sizes.
    """
    with whole_folder(folder) as beside:
        pipeline = MIGEPipeline.from_pretrained(start, dtype=torch.float32)
        check_sizes(settings, pipeline)
        curve = pretrain(pipeline, settings, **how)
        pipeline.to("cpu").save_pretrained(beside)
        (beside / "encoder_curve.json").write_text(json.dumps(curve) + "\n")
