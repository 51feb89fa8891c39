"""What MIGE-mini's training starts from: a tokenizer of the world's grammar, a VAE of its pictures, fresh parts.

    python train_scripts/start_mini.py output/mini/start --steps 20000      # about 4 minutes on one H100
    python train_scripts/start_mini.py output/mini/again --from-model output/pretrained_models/mige-mini --seed 1
    python train_scripts/start_mini.py output/mini/on --go-on output/pretrained_models/mige-mini --seconds 150
    python train_scripts/start_mini.py output/mini/on --go-on output/pretrained_models/mige-mini --vae VAE --steps 0

In the first line the VAE is trained for the error of its reconstructions, with a slight pull of its latents to a
standard normal; its weights are averaged, and its scale factor is set so that scaled latents have variance 1. The
second takes tokenizer and VAE of a model and trains nothing. The third trains the VAE of a model and keeps all else;
the fourth puts another VAE in its place.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mige import config
from mige.checkpoints.folder import CheckpointError
from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.mini.start import fresh_parts, start_from, write_tokenizer
from mige.utils.files import whole_folder

KL = 1e-6  # weight of the pull where it and the error are both summed over a picture, as in latent diffusion's VAEs


class Pictures(Dataset):
    """Number -> two pictures of a case, without end: its target and its last reference, if it has one."""

    def __init__(self, seed: int, subjects: tuple[int, ...]):
        self.seed, self.subjects = seed, subjects

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> list[Scene]:
        case = tasks.sample(np.random.default_rng([self.seed, number]), self.subjects)
        return [case.target, case.references[-1] if case.references else case.target]


def stack(cases: list[list[Scene]]) -> Scenes:
    return Scenes.stack([scene for case in cases for scene in case])


def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((decoded - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float(-10 * errors.log10().mean())


@torch.no_grad()
def noise_share(vae: AutoencoderKL, pictures: Tensor) -> float:
    """How much of the latents' standard deviation is noise of the posterior: what no model can predict."""
    posterior = vae.encode(pictures).latent_dist
    return float((posterior.var.mean() / (posterior.mean.var() + posterior.var.mean())).sqrt())


def train_vae(vae: AutoencoderKL, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Trains in place; returns the curve, whose last entry tells of the end, also of no steps."""
    vae.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    held_out = draw(stack([Pictures(10_001, sprites.split()[1])[i] for i in range(64)]), device)
    if args.steps == 0:
        return [{"step": 0, "psnr_unseen": round(psnr(vae, held_out), 2), "noise_share": noise_share(vae, held_out)}]
    loader = DataLoader(
        Pictures(10_000, sprites.split()[0]),
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
        pictures = draw(next(batches), device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(vae, pictures)
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


def reconstruction_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Absolute and squared error of reconstructed pictures, and a weak KL, a value of the pictures.

    Much more of it makes the posterior wide, and a DiT that is trained on samples of it learns its noise.
    """
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    error = decoded - pictures
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    return error.abs().mean() + 2 * error.square().mean() + KL * kl.float().sum() / error.numel()


def set_scale(vae: AutoencoderKL, device: torch.device) -> None:
    """The scale factor that gives latents of the world's pictures variance 1."""
    pictures = draw(stack([Pictures(10_002, sprites.split()[0])[i] for i in range(64)]), device)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.sample(torch.Generator(device).manual_seed(0))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    parser.add_argument("--config", default="configs/mini.py")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh parts (%(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="of the VAE's training (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the VAE's training after this time")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--go-on", type=Path, help="go on with the VAE of this checkpoint folder, keep its other parts")
    given.add_argument("--from-model", type=Path, help="take tokenizer and VAE of this checkpoint folder as they are")
    parser.add_argument("--vae", type=Path, help="go on with this one instead")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_intermixed_args()  # overrides may stand before and after the options
    if args.from_model is not None and args.vae is not None:
        parser.error("--from-model takes the model's VAE as it is; give --vae with --go-on, or alone")
    device, sizes = torch.device(args.device), config.load(args.config, args.overrides).model
    if args.from_model is not None:
        start_from(args.from_model, args.folder, sizes, args.seed)
        print(f"{args.folder}: fresh parts, tokenizer and VAE of {args.from_model}")
        return
    torch.manual_seed(args.seed)
    if args.go_on is not None:
        pipeline = MIGEPipeline.from_pretrained(args.go_on, dtype=torch.float32)
    else:
        pipeline = MIGEPipeline(**fresh_parts(sizes, args.seed), tokenizer=None, scheduler=DPMSolver2M())
    if args.vae is not None:
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32))
    curve = train_vae(pipeline.vae, args, device)
    pipeline.vae.eval()
    set_scale(pipeline.vae, device)
    pipeline.vae.cpu()
    with whole_folder(args.folder) as folder:
        if args.go_on is None:
            pipeline.register_modules(tokenizer=write_tokenizer(folder, sizes.text_encoder["vocab_size"]))
        pipeline.save_pretrained(folder)
        (folder / "vae_curve.json").write_text(json.dumps(curve) + "\n")
    print(f"{args.folder}: {curve[-1]['psnr_unseen']} dB, scale factor {pipeline.vae.config.scaling_factor}")


if __name__ == "__main__":
    try:
        main()
    except (config.ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
