"""What the ablations start from, in place of the paper's PixArt, T5 and BLIP-2: parts that know their own trade alone.

    python train_scripts/start_ablation.py output/ablation-base
    python tools/ablate.py output/ablation --from-model output/ablation-base/model

Only to make another one than output/pretrained_models/ablation-base, which ships. Tokenizer and VAE are those of
--from-model. The encoder is pretrained by reconstruction of its images and layout prediction of the answer, of all
tasks but the composed one, without VAE features; then the DiT learns to draw from names. It has never been asked to
draw what an image shows or to edit, nothing has seen a subject edit, and nothing VAE features. Stopped at any point,
the same command resumes after the last stage that was done.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import CONFIGS, MINI, ROOT
from mige.tasks import Task

WITHOUT_FEATURES = "model.fusion.vae_features=False"
NAMES = "text_to_image"  # the kind that the DiT learns, and a quarter of what the encoder does


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    parser.add_argument("--config", type=Path, default=CONFIGS / "ablation.py", help="(%(default)s)")
    parser.add_argument("--from-model", type=Path, default=MINI,
                        help="whose VAE and tokenizer are taken (%(default)s)")  # fmt: skip
    parser.add_argument("--encoder-steps", type=int, default=1750, help="of the encoder's training (%(default)s)")
    parser.add_argument("--encoder-batch", type=int, default=128, help="cases a step of it (%(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of drawing from names (%(default)s)")
    args = parser.parse_intermixed_args(argv)  # overrides may come before and after the options
    if min(args.encoder_steps, args.encoder_batch, args.steps) < 1:
        parser.error(f"--encoder-steps is {args.encoder_steps}, --encoder-batch {args.encoder_batch}, --steps "
                     f"{args.steps}; expected 1 and more")  # fmt: skip
    return args


def teach_encoder(start: Path, seeing: Path, args: argparse.Namespace) -> None:
    """`pretrain_mini_encoder.py` on names and the mixture without subject edits, whose emergence is tested."""
    import torch

    from mige import config
    from mige.mini import ablation
    from mige.mini.pretraining import teach

    own = [*args.overrides, WITHOUT_FEATURES, f"train.pretrained={str(start)!r}"]
    mixture = config.load(args.config, own).data.world
    known = {kind: mixture[kind] for kind in ablation.kinds_of(mixture, (Task.SUBJECT, Task.EDIT))}
    settings = config.load(args.config, [*own, f"data.world={known | {NAMES: sum(known.values()) / 3}}"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"steps": args.encoder_steps, "batch": args.encoder_batch, "workers": settings.data.workers}
    teach(start, seeing, settings, **how, device=device)


def teach_drawing(start: Path, run: Path, args: argparse.Namespace) -> Path:
    """A training on text to image alone, cooled down over its second half; returns the folder of its last weights.

    The text encoder stays as it is, or it would forget what it has learnt of images.
    """
    from mige.mini import ablation
    from mige.training import checkpointing

    own = [f"train.pretrained={str(start)!r}", f"train.steps={args.steps}", f"train.cooldown={args.steps // 2}",
           f"train.checkpoint_every={args.steps}", "train.trainable='text_encoder_frozen'",
           f"data.world={ {NAMES: 1} }"]  # fmt: skip
    trainer = ROOT / "train_scripts" / "train_mige.py"
    if code := ablation.launch(trainer, args.config, run, [*args.overrides, WITHOUT_FEATURES, *own]):
        sys.exit(code)
    return checkpointing.list_checkpoints(run)[-1] / "model"


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    import shutil

    from mige import config
    from mige.mini.start import start_from
    from mige.training.signals import PREEMPTED
    from mige.utils.files import atomic_directory

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # the training saves before it ends
    start, seeing, model = (args.folder / name for name in ("start", "seeing", "model"))
    if model.exists():
        raise FileExistsError(f"{model} is there: it is done, or give another folder")
    if not start.exists():
        start_from(args.from_model, start, config.load(args.config, [*args.overrides, WITHOUT_FEATURES]).model, seed=0)
    if not seeing.exists():
        teach_encoder(start, seeing, args)
    trained = teach_drawing(seeing, args.folder / "text", args)
    with atomic_directory(model) as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))
