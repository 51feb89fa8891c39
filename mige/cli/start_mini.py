"""What MIGE-mini's training starts from: a tokenizer of the world's grammar, a VAE of its images, fresh parts.

    python train_scripts/start_mini.py output/mini/start --steps 20000      # about 4 minutes on one H100
    python train_scripts/start_mini.py output/mini/again --from-model output/pretrained_models/mige-mini --seed 1
    python train_scripts/start_mini.py output/mini/on --finetune output/pretrained_models/mige-mini --seconds 150
    python train_scripts/start_mini.py output/mini/on --finetune output/pretrained_models/mige-mini --vae VAE --steps 0
    python train_scripts/start_mini.py output/mini2/start --config configs/mini2.py --steps 0 \
        --warm output/pretrained_models/mige-mini --vae output/pretrained_models/mini2-vae

In the first line the VAE is trained for the error of its reconstructions, with a slight pull of its latents to a
standard normal; its weights are averaged, and its scale factor is set so that scaled latents have variance 1. The
second takes tokenizer and VAE of a model and trains nothing. The third trains the VAE of a model and keeps all else;
the fourth puts another VAE in its place. The fifth makes a start for the second world of what MIGE-mini has learnt
of the first, with a tokenizer of its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import CONFIGS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    parser.add_argument("--config", type=Path, default=CONFIGS / "mini.py", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh parts (%(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="of the VAE's training (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the VAE's training after this time")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--finetune", type=Path, help="train the VAE of this checkpoint folder, keep its other parts")
    given.add_argument("--from-model", type=Path, help="take tokenizer and VAE of this checkpoint folder as they are")
    given.add_argument("--warm", type=Path, help="take from this checkpoint folder, of another world, what fits")
    parser.add_argument("--vae", type=Path, help="fine-tune this one instead")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_intermixed_args(argv)  # overrides may come before and after the options
    if args.from_model is not None and args.vae is not None:
        parser.error("--from-model takes the model's VAE as it is; give --vae with --finetune, or alone")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    import torch
    from diffusers import AutoencoderKL

    from mige import config
    from mige.data.synthetic.world import WORLDS
    from mige.diffusion.solver import DPMSolver2M
    from mige.inference.pipeline import MIGEPipeline
    from mige.mini.start import fresh_parts, start_from, take_what_fits, write_tokenizer
    from mige.mini.vae_training import set_scale, train_vae
    from mige.utils.files import atomic_directory

    args.device = command.check_device(command.parser(None), args.device)
    settings = config.load(args.config, args.overrides)
    device, sizes, world = torch.device(args.device), settings.model, WORLDS[settings.data.world_name]
    if args.from_model is not None:
        start_from(args.from_model, args.folder, sizes, args.seed)
        print(f"{args.folder}: fresh parts, tokenizer and VAE of {args.from_model}")
        return
    torch.manual_seed(args.seed)
    if args.finetune is not None:
        pipeline = MIGEPipeline.from_pretrained(args.finetune, dtype=torch.float32)
    else:
        pipeline = MIGEPipeline(**fresh_parts(sizes, args.seed), tokenizer=None, scheduler=DPMSolver2M())
    if args.vae is not None:
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32))
    curve = train_vae(pipeline.vae, args, device, world)
    pipeline.vae.eval()
    set_scale(pipeline.vae, device, world)
    pipeline.vae.cpu()
    with atomic_directory(args.folder) as folder:
        if args.finetune is None:
            pipeline.register_modules(tokenizer=write_tokenizer(folder, sizes.text_encoder["vocab_size"], world))
        if args.warm is not None:
            parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
            print("values taken:", take_what_fits(parts, args.warm, pipeline.tokenizer))
        pipeline.save_pretrained(folder)
        (folder / "vae_curve.json").write_text(json.dumps(curve) + "\n")
    print(f"{args.folder}: {curve[-1]['psnr_unseen']} dB, scale factor {pipeline.vae.config.scaling_factor}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted=command.STARTS_ANEW)
