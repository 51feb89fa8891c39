"""Compare two evaluated runs case by case.

    python tools/compare_runs.py output/emu_edit output/emu_edit_lora --output output/compared --bound CLIPdir=0.01
    python tools/compare_runs.py output/mini/bench output/mini/turbo --output output/compared --bound l1_subjects=0.02

Both are results folders of tools/evaluate.py, of a benchmark or a mini-bench, with the same cases, or RESULTS/judged of
tools/judge.py. Writes report.html, which shows the ten cases that differ most, and comparison.json. --bound names the
largest difference that counts as none: name it before you look at the scores. Differences are those of the second run
less the first.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command

if TYPE_CHECKING:
    from mige.evaluation.comparing import Run
    from mige.reports.cases import Case


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("first", type=Path, help="results folder of the one, such as the baseline")
    parser.add_argument("second", type=Path, help="results folder of the other")
    parser.add_argument("--output", type=command.folder_to_write, required=True, help="folder to write")
    parser.add_argument("--bound", type=_bound, nargs="+", default=[], metavar="MEASURE=X",
                        help="no effect larger than X counts as none")  # fmt: skip
    parser.add_argument("--rank-by", metavar="MEASURE", help="of the cases shown (default: what most cases have)")
    parser.add_argument("--prepared", type=Path, help="folder of prepare_benchmark.py (default: FIRST/benchmark)")
    return parser.parse_args(argv)


def _bound(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected MEASURE=X such as L1=0.01") from error


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.evaluation import comparing, comparison_page
    from mige.evaluation.benchmarks.files import BenchmarkError

    first, second = comparing.read_run(args.first), comparing.read_run(args.second)
    compared = comparing.compare(first, second, dict(args.bound))
    rank_by = args.rank_by or comparison_page.default_measure(compared)
    if rank_by not in {one.measure for one in compared}:
        raise BenchmarkError(f"--rank-by {rank_by}: expected one of {', '.join({one.measure: 0 for one in compared})}")
    shown = comparing.disagreements(first, second, rank_by)
    for one in (first, second):
        if missing := [name for name in shown if name not in one.images]:
            raise BenchmarkError(f"{one.folder}: no image of {missing[0]}; restore it, or evaluate again")
    written = comparison_page.write(first, second, compared, rank_by, _cases(args, first), args.output)
    print(comparison_page.text_table(compared))
    print(comparison_page.note(compared))
    print(f"{written}: the tables and images")


def _cases(args: argparse.Namespace, first: "Run") -> "Callable[[str], Case]":
    """Instruction and inputs of a case by its id."""
    if not (first.folder / "cases.jsonl").is_file():
        from mige.evaluation import page
        from mige.evaluation.benchmarks.prepared import read

        results = args.first.parent if (args.first / "samples.jsonl").is_file() else args.first
        rows = {row["id"]: row for row in read(args.prepared or results / "benchmark").rows}
        return lambda name: page.case(rows[name], first.rows[name]["scores"], first.images[name])
    from mige.data.synthetic.cases import make_cases
    from mige.mini.bench_report import Card

    largest = max(int(name.rsplit("-", 1)[1]) for name in first.rows)
    cases = {one.id: one for one in make_cases(2 * (largest + 1))}
    return lambda name: Card(cases[name], first.images[name], {}).case()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))
