"""Score results on a benchmark.

    python tools/evaluate.py --benchmark dreambench --results output/dreambench
    python tools/evaluate.py --benchmark migebench --results output/migebench --entities output/migebench/entities
    python tools/evaluate.py --benchmark mini --model output/mini/model --results output/mini/bench --per-kind 4
    python tools/evaluate.py --benchmark mini2 --model output/mini2/model --results output/mini2/bench --per-kind 2

The first two score the images that infer_scripts/*.sh made and write RESULTS/evaluation: report.html, report.json,
samples.jsonl. The mini-bench makes its images itself and resumes where it was stopped; its report covers all that
RESULTS holds. Mini-bench 2 is of the second world: --per-kind is of a kind and split; it writes RESULTS/scores.json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command
from mige.cli.choices import BACKBONES, CLIP, MEASURED, PRESERVATION, WORLD_KINDS

if TYPE_CHECKING:
    from mige.evaluation.backbones import Backbone
    from mige.evaluation.benchmarks.prepared import Prepared
    from mige.evaluation.scoring import PixelMeasure

MINI = ("mini", "mini2")  # make their images themselves


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--benchmark", choices=[*MINI, *MEASURED], required=True)
    parser.add_argument(
        "--results",
        type=command.folder_to_write,
        required=True,
        help="run folder of infer.py; mini: to make or resume",
    )
    parser.add_argument("--batch", type=int, default=16, help="images at a time (%(default)s)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    group = scored = parser.add_argument_group(", ".join(MEASURED))
    group.add_argument("--prepared", type=Path, help="folder of prepare_benchmark.py (default: RESULTS/benchmark)")
    group.add_argument("--clip", choices=CLIP, default="ViT-B/32", help="(%(default)s)")
    group.add_argument("--clip-weights", help="folder of them (default: OpenAI's, from the hub)")
    group.add_argument("--dino-weights", help="file of DINO ViT-S/16 (default: the release, from the hub)")
    group.add_argument("--jpeg", action="store_true", help="through JPEG first, as the official scripts save images")
    _add_extras(group)
    group.add_argument("--entities", type=Path, help="folder of extract_entities.py, for migebench's entity scores")
    group.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="REPORT", help="report.json of other runs"
    )
    group.add_argument("--label", help="name of the model in tables (default: the results' folder)")
    group = made = parser.add_argument_group(", ".join(MINI))
    group.add_argument("--model", help="checkpoint folder")
    command.add_lora(group)
    group.add_argument(
        "--per-kind", type=int, help="cases of each kind, even (104); mini2: of each kind and split (200)"
    )
    group.add_argument(
        "--test", action="store_true", help="mini2: the test cases, once and at the end, not those of development"
    )
    group.add_argument("--steps", type=int, help="of the sampler (default: the few-step student's own, else 20)")
    group.add_argument("--guidance", type=float, help="towards the instruction (default: 2; a student's is inside it)")
    group.add_argument("--source-guidance", type=float, help="towards the edited image (default: 1)")
    group.add_argument("--kinds", nargs="+", choices=WORLD_KINDS, default=list(WORLD_KINDS), metavar="KIND",
                       help=f"of task (all): {', '.join(WORLD_KINDS)}")  # fmt: skip
    args = parser.parse_args(argv)
    _refuse_options(parser, args, scored if args.benchmark in MINI else made)
    args.per_kind = {"mini2": 200}.get(args.benchmark, 104) if args.per_kind is None else args.per_kind
    if args.batch < 1 or (args.steps is not None and args.steps < 1) or not _fits(args):
        parser.error(f"--batch is {args.batch}, --steps {args.steps}, --per-kind {args.per_kind}; "
                     "expected >= 1, >= 1 and an even number >= 2 (mini2: >= 1)")  # fmt: skip
    if (args.benchmark in MINI) != (args.model is not None):
        parser.error(
            "--model belongs to --benchmark mini and mini2, which need it: the others score images that are there"
        )
    return args


def _refuse_options(parser: argparse.ArgumentParser, args: argparse.Namespace, others: argparse._ArgumentGroup) -> None:
    """End the script for an option that belongs to other benchmarks: it would be passed over."""
    given = [one for one in others._group_actions if one.dest != "model" and getattr(args, one.dest) != one.default]
    if given:
        option = given[0].option_strings[0]
        parser.error(f"{option} is for {others.title}; --benchmark {args.benchmark} does not read it, leave it out")
    if args.test and args.benchmark != "mini2":
        parser.error(f"--test is for mini2; --benchmark {args.benchmark} does not read it, leave it out")


def _add_extras(group: argparse._ArgumentGroup) -> None:
    """Measures beside a benchmark's own."""
    group.add_argument("--also", nargs="+", default=[], type=_backbone, metavar="NAME[=WEIGHTS]",
                       help=f"further backbones, a column each: {', '.join(BACKBONES)}")  # fmt: skip
    group.add_argument("--preservation", nargs="+", default=[], choices=PRESERVATION,
                       help="how much is kept, inside and outside of masks where there are some")  # fmt: skip
    group.add_argument("--lpips-weights", help="torchvision's AlexNet, a .pth file (default: fetched)")


def _backbone(text: str) -> tuple[str, str | None]:
    """The type of --also: a name, and a file or folder of weights behind an equals sign."""
    name, equals, weights = text.partition("=")
    if name not in BACKBONES:
        raise argparse.ArgumentTypeError(f"{name!r}, expected one of {', '.join(BACKBONES)}")
    return name, weights if equals else None


def _fits(args: argparse.Namespace) -> bool:
    """Whether the benchmark can have so many cases of a kind."""
    return args.per_kind >= 1 if args.benchmark == "mini2" else args.per_kind >= 2 and args.per_kind % 2 == 0


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    args.device = command.check_device(command.parser(None), args.device)
    mini(args) if args.benchmark in MINI else published(args)


def mini(args: argparse.Namespace) -> None:
    """Generate and measure the cases of mini-bench or mini-bench 2."""
    import torch

    from mige.data.synthetic.cases import DEVELOPMENT_SEED, SEED, TEST_SEED, make_cases, make_second_cases
    from mige.inference.adapters import add_adapters
    from mige.inference.pipeline import MIGEPipeline
    from mige.mini import bench, bench2_report, bench_report

    second, seed = args.benchmark == "mini2", SEED
    if second:
        seed = TEST_SEED if args.test else DEVELOPMENT_SEED
        chosen = make_second_cases(args.per_kind, seed, args.kinds)
    else:
        chosen = make_cases(args.per_kind, kinds=args.kinds)
    pipeline = MIGEPipeline.from_pretrained(args.model, dtype=torch.float32)
    for path, scale in args.lora:
        add_adapters(pipeline, path, scale)
    settings = {"steps": args.steps, "guidance": args.guidance, "source_guidance": args.source_guidance}
    model = " + ".join([args.model, *(path if scale == 1 else f"{scale:g} {path}" for path, scale in args.lora)])
    settings |= {"model": model, "batch": args.batch, "bench_seed": seed}
    rows = bench.run(pipeline.to(args.device), chosen, args.results, **settings)
    if second:
        print(bench2_report.text_table(rows))
        print(f"{bench2_report.write(rows, args.results)}: the table")
        return
    chosen, rows = bench.all_finished(args.results)  # what earlier calls made stays in the report
    written = bench_report.write(chosen, rows, args.results)
    print(bench_report.text_table(rows))
    print(f"{written}: the tables and images")


def published(args: argparse.Namespace) -> None:
    """Measure the images of a results folder on a published benchmark; raises BenchmarkError for another's."""
    from mige.evaluation import outputs, page, scoring, summary
    from mige.evaluation.benchmarks.files import BenchmarkError
    from mige.evaluation.benchmarks.prepared import read

    prepared = read(args.prepared or args.results / "benchmark")
    if prepared.name != args.benchmark:
        raise BenchmarkError(f"{prepared.folder} is {prepared.name}, expected {args.benchmark}")
    reports = [summary.read_report(path) for path in args.compare]
    found = outputs.outputs(prepared, args.results)
    crops = outputs.crops(prepared, args.entities) if args.entities else None
    prepared, pixels = _with_extras(args, prepared)
    networks = _networks(args)
    protocol = summary.protocol(prepared, networks, jpeg=args.jpeg)
    others = summary.beside({"protocol": protocol}, reports)  # refused before the work, not after it
    cache = prepared.folder / "features"
    how = {"entities": crops, "jpeg": args.jpeg, "pixels": pixels, "batch": args.batch}
    scores = scoring.score(prepared, found, networks, cache, **how)
    table = summary.table(prepared, scores.rows)
    facts = {"label": args.label or args.results.name, "clip": args.clip, "samples": len(scores.rows)}
    facts |= {"protocol": protocol, "versions": summary.versions()}
    facts |= {"note": page.note(table, scores.notes, scores.rows), "table": table}
    facts["table"] = table + others
    out = args.results / "evaluation"
    written = page.write(prepared, facts, scores.rows, found, out)
    scoring.write_rows(scores.rows, out / "samples.jsonl")
    print(page.text_table(prepared, facts))
    print(f"{written}: the tables and images")


def _networks(args: argparse.Namespace) -> "dict[str, Backbone]":
    """The backbones by the names that measures call them; nothing is loaded where a file is missing."""
    from mige.evaluation import backbones

    given = [("--clip-weights", args.clip_weights), ("--dino-weights", args.dino_weights)]
    for option, path in given + [(f"--also {name}", path) for name, path in args.also]:
        backbones.require_file(path, option)
    networks = {
        "clip": backbones.Clip(args.clip, args.clip_weights, args.device),
        "dino": backbones.Dino("DINO ViT-S/16", args.dino_weights, args.device),
    }
    for name, path in args.also:
        network = backbones.Siglip if name in backbones.SIGLIP else backbones.Dino
        networks[name] = network(name, path, args.device)
    return networks


def _with_extras(args: argparse.Namespace, prepared: "Prepared") -> "tuple[Prepared, dict[str, PixelMeasure]]":
    """The benchmark with the measures asked for beside its own, and what measures pixels."""
    from mige.evaluation import backbones, extra_metrics, metrics

    backbones.require_file(args.lpips_weights, "--lpips-weights")
    extra = [metric for name, _ in args.also for metric in extra_metrics.by_backbone(prepared, name)]
    pixels = dict(metrics.PIXELS)
    if args.preservation:
        from mige.evaluation import preservation

        extra += extra_metrics.of_preservation(prepared, args.preservation)
        pixels |= {"psnr": preservation.psnr, "ssim": preservation.ssim}
        if "lpips" in args.preservation:
            pixels["lpips"] = preservation.Lpips(args.lpips_weights, args.device)
    return replace(prepared, extra=extra), pixels


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))
