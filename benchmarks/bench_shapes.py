"""Training's rate on squares alone and on all shapes of a config, in turns in one process: how much shapes cost.

    python benchmarks/bench_shapes.py output/shapes     # the released model on one GPU; needs no weights and no data
    python benchmarks/bench_shapes.py output/shapes --config CONFIG --batch 2 --steps 3 --precision float32   # on a CPU

The trainer's own step on random weights and synthetic latents (`training_worker.py`). The DiT's blocks are compiled,
which alone see the shape; the rest runs as it is. A line of JSON a turn, then one with the mean rates, their ratio, and
how many graphs were compiled after the warm-up.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from harness import ROOT

from mige import config
from mige.config import Config
from mige.data.shapes import image_sizes
from mige.inference.pipeline import MIGEPipeline
from mige.training import trainer
from mige.training.loader import build_loader
from mige.training.trainer import Trainer
from mige.training.warm_up import compiled_graphs

TURNS = ("squares", "shapes", "squares", "shapes")


def make_samples(args: argparse.Namespace, settings: Config, pipeline: MIGEPipeline):
    """Synthetic samples, in the shapes of the turn that they are of."""
    from training_worker import Samples

    class Shaped(Samples):
        """`Samples`, squares in every other turn."""

        sizes = image_sizes(settings.data, pipeline.sizes.step)

        def latent_shape(self, number: int) -> tuple[int, int, int]:
            step = number // args.batch - args.warm_up
            if step < 0 or TURNS[min(step // args.steps, len(TURNS) - 1)] == "squares":
                return self.shape
            cell, (height, width) = pipeline.sizes.cell, self.sizes[step % len(self.sizes)]
            return self.shape[0], height // cell, width // cell

    return Shaped(settings, pipeline)


class TurnsTrainer(Trainer):
    """Takes the steps of all turns, and no checkpoint."""

    args: argparse.Namespace

    def _widths(self) -> list[int]:
        return [min(width for width in super()._widths() if width >= self.args.tokens)]

    def _loop(self) -> int:
        batches = iter(build_loader(self.config, self.dataset, self.accelerator, self.step))
        self._steps(batches, self.args.warm_up)
        lines, graphs = [], compiled_graphs()
        for turn in TURNS:
            rate = self.args.batch * self.args.steps / self._steps(batches, self.args.steps)
            lines.append({"turn": turn, "samples_per_second": round(rate, 3), "steps": self.args.steps})
            print(json.dumps(lines[-1]), flush=True)
        rates = {turn: mean(line["samples_per_second"] for line in lines if line["turn"] == turn) for turn in TURNS}
        on_gpu = self.device.type == "cuda"
        print(json.dumps({
            **{turn: round(rate, 3) for turn, rate in rates.items()},
            "ratio": round(rates["shapes"] / rates["squares"], 4),
            "recompiles": compiled_graphs() - graphs,
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
            "batch": self.args.batch, "tokens": self.args.tokens,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
        }), flush=True)  # fmt: skip
        return 0

    def _steps(self, batches, many: int) -> float:
        """Seconds of so many steps, all that they gave the device included."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(many):
            self._train_step(batches)
            self.monitor.flush(all_but=1)
            self.step += 1
        wait()
        return time.perf_counter() - started


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run, which must not be there")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512_shapes.py")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=18, help="a turn")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the first turn")
    parser.add_argument("--tokens", type=int, default=256, help="positions of every prompt")
    parser.add_argument("--precision", default="bfloat16", help="train.precision")
    parser.add_argument("--workers", type=int, default=4)
    return parser.parse_args(argv)


def main() -> None:
    """Run all turns."""
    args = parse()
    os.environ["MIGE_BENCH"] = json.dumps({"tokens": args.tokens})
    from training_worker import fresh_pipeline

    settings = config.load(args.config, [
        f"train.batch_size={args.batch}", f"data.shape_block={args.batch}", f"data.workers={args.workers}",
        f"train.precision={args.precision}", "train.steps=1000000", "train.warmup=0", "train.sample_every=0",
        "train.trackers=[]", "data.features='memory'", "train.compile=['transformer']",
    ])  # fmt: skip
    trainer.load_pretrained, trainer.load_dataset = fresh_pipeline, partial(make_samples, args)
    trainer.frozen_digest = lambda *_: ""  # there is no tokenizer, and nothing is resumed
    TurnsTrainer.args = args
    TurnsTrainer(settings, args.folder).run()


if __name__ == "__main__":
    main()
