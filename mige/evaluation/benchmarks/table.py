"""The benchmarks as a table: rows, size, measures. Those without measures are scored by a judge alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige.evaluation.benchmarks.files import Options
from mige.evaluation.benchmarks.judged_rows import dreambench_plus, gedit, imgedit, omnicontext
from mige.evaluation.benchmarks.rows import dreambench, emu_edit, magicbrush, migebench


@dataclass(frozen=True)
class Metric:
    """One column: which function of the output and of the entry of this name in a row's "score"."""

    name: str
    of: str  # "clip", "dino" or another backbone's name, "direction", or one of PIXELS
    against: str  # "references", "source", "target", "caption", "local_caption", "entity"
    crop: bool = False  # of the entity cut out of the output instead of the output
    not_found: str = "left out"  # an entity that was not: "left out", "whole" (the whole output stands for it), "zero"
    fit: str = "stretch"  # pixels of two sizes: the output is stretched to the other's, or "crop": the other is cropped
    region: str = ""  # pixels: of all, or only "inside" or "outside" of the row's mask

    @property
    def lower_is_better(self) -> bool:
        """True of errors, False of similarities."""
        return self.of in ("l1", "l2", "lpips")


PIXELS = ("l1", "l2", "psnr", "ssim", "lpips")
"""Measures of two images of one size, which need no features."""

NOT_FOUND = {"left out": "", "whole": " (not found: whole image)", "zero": " (not found: 0)"}
"""The three ways to count outputs without the entity, and what their columns are called; "whole" is the official."""

CAPTIONS = ("caption", "local_caption")  # what a measure may compare with that is no image


@dataclass(frozen=True)
class Benchmark:
    """A literal row of the table below."""

    title: str
    size: Callable[[Options], int]  # samples of the whole benchmark
    rows: Callable[[Options, Path], Iterator[dict[str, Any]]]
    metrics: tuple[Metric, ...]  # the first ranks the cases
    clusters: str | None = None  # what samples share that go together, by "cluster" of a row; None: each is on its own
    hub: str | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "dreambench": Benchmark(
        "DreamBench",
        lambda options: 750 * options.samples,
        dreambench,
        (
            Metric("DINO", "dino", "references"),
            Metric("CLIP-I", "clip", "references"),
            Metric("CLIP-T", "clip", "caption"),
        ),
        clusters="subjects",
    ),
    "emu_edit": Benchmark(
        "Emu Edit",
        lambda options: {"validation": 3589, "test": 2022}[options.split],
        emu_edit,
        (
            Metric("CLIPdir", "direction", "caption"),
            Metric("CLIPim", "clip", "source"),
            Metric("CLIPout", "clip", "caption"),
            Metric("L1", "l1", "source", fit="crop"),
            Metric("L1 (stretched)", "l1", "source"),
            Metric("DINO", "dino", "source"),
        ),
        clusters="source images",
        hub="facebook/emu_edit_test_set",
    ),
    "magicbrush": Benchmark(
        "MagicBrush test",
        lambda options: 1053 if options.iterative is None else 535,
        magicbrush,
        (
            Metric("L1", "l1", "target"),
            Metric("L2", "l2", "target"),
            Metric("CLIP-I", "clip", "target"),
            Metric("DINO", "dino", "target"),
            Metric("CLIP-T (local captions)", "clip", "local_caption"),
            Metric("CLIP-T (global captions)", "clip", "caption"),
        ),
        clusters="editing sessions",
    ),
    "migebench": Benchmark(
        "MIGEBench",
        lambda options: 1000,
        migebench,
        (
            Metric("DINO", "dino", "target"),
            Metric("CLIP-I", "clip", "target"),
            Metric("CLIP-T", "clip", "caption"),
            Metric("L1", "l1", "target"),
            *(
                Metric(f"entity {name}{words}", of, "entity", crop=True, not_found=how)
                for how, words in NOT_FOUND.items()
                for name, of in (("DINO", "dino"), ("CLIP-I", "clip"))
            ),
        ),
        clusters="source images",
        hub="EurekaTian/MIGEBench",
    ),
    "dreambench_plus": Benchmark(
        "DreamBench++",
        lambda options: 1350,
        dreambench_plus,
        (
            Metric("DINO", "dino", "references"),
            Metric("CLIP-I", "clip", "references"),
            Metric("CLIP-T", "clip", "caption"),
        ),
        clusters="subjects",
    ),
    "gedit": Benchmark("GEdit-Bench", lambda options: 606, gedit, (), "source images", "stepfun-ai/GEdit-Bench"),
    "imgedit": Benchmark("ImgEdit-Bench", lambda options: 737, imgedit, (), "source images"),
    "omnicontext": Benchmark("OmniContext", lambda options: 400, omnicontext, (), hub="OmniGen2/OmniContext"),
}
