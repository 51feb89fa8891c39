"""The VAE of the synthetic world's images: trained for the error of reconstructions, with a slight pull to a normal."""

import itertools
import json
import time
from argparse import Namespace

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mige.data.synthetic import tasks
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.data.synthetic.world import FIRST, World

CROP = 128  # px of an image that a step sees: more different images a second than whole ones of 256 px
EDGES = 1.0  # weight of the error of differences between neighbouring pixels: small inner detail is little else
KL = 1e-6  # weight of the pull where it and the error are both summed over an image, as in latent diffusion's VAEs


class WorldImages(Dataset):
    """Number -> two images of a case, without end: its target and its last reference, if it has one."""

    def __init__(self, seed: int, *, seen: bool, world: World):
        self.seed, self.world = seed, world
        halves = list(world.splits().values())
        self.subjects = halves[0] if seen else halves[1]

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> list[Scene]:
        case = tasks.sample(np.random.default_rng([self.seed, number]), self.subjects, world=self.world)
        return [case.target, case.references[-1] if case.references else case.target]


def stack(cases: list[list[Scene]]) -> Scenes:
    """The scenes of all cases in one batch."""
    return Scenes.stack([scene for case in cases for scene in case])


def _first(cases: WorldImages) -> Scenes:
    return stack([cases[i] for i in range(64)])


def _crop(images: Tensor) -> Tensor:
    """The same square of at most `CROP` px of all images [N, 3, H, W], at a random place."""
    if max(images.shape[-2:]) <= CROP:
        return images
    top, left = (int(torch.randint(max(side - CROP, 0) + 1, ())) for side in images.shape[-2:])
    return images[..., top : top + CROP, left : left + CROP]


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR in dB of the reconstructions of images [N, 3, H, W] in [-1, 1]."""
    with torch.no_grad():  # 32 at a time: at 256 px all would take tens of GB
        decoded = torch.cat([vae.decode(vae.encode(some).latent_dist.mode()).sample for some in images.split(32)])
    decoded = decoded.clamp(-1, 1)
    errors = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return float(-10 * errors.log10().mean())


@torch.no_grad()
def noise_share(vae: AutoencoderKL, images: Tensor) -> float:
    """Share of the latents' standard deviation that is noise of the posterior, which no model can predict: in [0, 1].

    images: [N, 3, H, W] in [-1, 1].
    """
    posterior = vae.encode(images).latent_dist
    return float((posterior.var.mean() / (posterior.mean.var() + posterior.var.mean())).sqrt())


def train_vae(vae: AutoencoderKL, args: Namespace, device: torch.device, world: World = FIRST) -> list[dict]:
    """Trains in place on square images of a world; returns the curve, whose last entry is the end, also of no steps."""
    vae.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    held_out = draw(_first(WorldImages(10_001, seen=False, world=world)), device, world=world)
    if args.steps == 0:
        return [{"step": 0, "psnr_unseen": round(psnr(vae, held_out), 2), "noise_share": noise_share(vae, held_out)}]
    loader = DataLoader(
        WorldImages(10_000, seen=True, world=world),
        batch_size=args.batch // 2,
        collate_fn=stack,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = EMAModel(vae.parameters(), decay=0.999, foreach=True)
    compiled = torch.compile(reconstruction_loss, disable=device.type != "cuda")
    curve, started, batches = [], time.perf_counter(), iter(loader)
    for step in itertools.count(1):
        done = max(step / args.steps, (time.perf_counter() - started) / args.seconds)
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, step / 100, 1.25 * (1 - min(done, 0.999)))
        images = _crop(draw(next(batches), device, world=world)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(vae, images)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(vae.parameters())
        if step % 500 == 0 or done >= 1:
            average.store(vae.parameters())
            average.copy_to(vae.parameters())
            curve.append({"step": step, "seconds": round(time.perf_counter() - started, 1), "loss": loss.item()})
            curve[-1]["psnr_unseen"] = round(psnr(vae, held_out), 2)
            curve[-1]["noise_share"] = round(noise_share(vae, held_out), 3)
            print(json.dumps(curve[-1]), flush=True)
            if done >= 1:
                break
            average.restore(vae.parameters())
    return curve


def reconstruction_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Errors of reconstructed images [N, 3, H, W], and a weak KL, all a pixel value: float32 [].

    The errors are the absolute, the squared, and the absolute one of differences to the next pixel, across and down.
    Much more KL makes the posterior wide, and a DiT that is trained on samples of it learns its noise.
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    error = decoded - images
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + EDGES * edges + KL * kl.float().sum() / error.numel()


def set_scale(vae: AutoencoderKL, device: torch.device, world: World = FIRST) -> None:
    """The scale factor that gives latents of the world's images variance 1."""
    images = draw(_first(WorldImages(10_002, seen=True, world=world)), device, world=world)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample(torch.Generator(device).manual_seed(0))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
