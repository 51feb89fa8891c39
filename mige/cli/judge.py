"""Have a vision-language model score results on a benchmark, with its reasons.

    python tools/judge.py --benchmark gedit --results output/gedit --judge Qwen/Qwen2.5-VL-7B-Instruct
    python tools/judge.py --benchmark gedit --results output/gedit --judge Qwen/Qwen2.5-VL-7B-Instruct \\
        --adapter EditScore/EditScore-7B --scale 25
    python tools/judge.py --benchmark dreambench_plus --results output/dreambench_plus --judge gpt-4.1 \\
        --endpoint https://api.openai.com/v1 --repeats 3 --swap

Without --endpoint the judge is a model of transformers, on this machine. With it, any server of OpenAI's chat
completions; the key is read from the environment. Writes RESULTS/judged: report.html, report.json, samples.jsonl, and
answers.jsonl, where every answer is kept as it came: the same command resumes and asks only for what is missing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.choices import BENCHMARKS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument("--results", type=command.folder_to_write, required=True, help="run folder of infer.py")
    parser.add_argument("--prepared", type=Path, help="folder of prepare_benchmark.py (default: RESULTS/benchmark)")
    parser.add_argument("--judge", required=True, help="hub name or folder; with --endpoint the model's name there")
    parser.add_argument("--repeats", type=int, default=1, help="times each question is asked (%(default)s)")
    parser.add_argument(
        "--swap", action="store_true", help="ask again with the result shown first: tests the order's bias"
    )
    parser.add_argument("--scale", type=int, metavar="POINTS", help="VIEScore's questions: points of the scale (10)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the judge's answers (%(default)s)")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="REPORT", help="report.json of other runs"
    )
    parser.add_argument("--label", help="name of the model in tables (default: the results' folder)")
    group = parser.add_argument_group("a judge behind an endpoint")
    group.add_argument("--endpoint", metavar="URL", help="with its version, such as http://localhost:8000/v1")
    group.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME",
                       help="environment variable of the key, or none (%(default)s)")  # fmt: skip
    group.add_argument("--workers", type=int, default=8, help="questions under way at once (%(default)s)")
    group.add_argument("--timeout", type=float, default=180, help="seconds for one answer (%(default)g)")
    group = parser.add_argument_group("a judge on this machine")
    group.add_argument("--adapter", help="PEFT's folder or hub name, such as EditScore/EditScore-7B")
    group.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if min(args.repeats, args.workers, args.scale or 1) < 1 or not (args.timeout > 0 and 0 <= args.temperature <= 2):
        parser.error("expected --repeats, --workers, --scale >= 1, --timeout > 0 and --temperature from 0 to 2")
    if args.endpoint is None and args.repeats > 1 and args.temperature == 0:
        parser.error("a model on this machine gives the same answer each time at --temperature 0; give one above, or "
                     "leave --repeats out")  # fmt: skip
    if args.endpoint is not None and (args.adapter or args.device):
        parser.error("--adapter and --device belong to a judge on this machine, not to --endpoint")
    if args.scale and args.benchmark in ("dreambench_plus", "imgedit", "omnicontext"):
        parser.error(f"--scale is of VIEScore's questions; {args.benchmark} has a scale of its own")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    import json

    from mige.evaluation import outputs, summary
    from mige.evaluation.benchmarks.files import BenchmarkError
    from mige.evaluation.benchmarks.prepared import read
    from mige.evaluation.judges import judging, page, report
    from mige.utils.files import folder_lock, json_lines, write_text

    prepared = read(args.prepared or args.results / "benchmark")
    if prepared.name != args.benchmark:
        raise BenchmarkError(f"{prepared.folder} is {prepared.name}, expected {args.benchmark}")
    others = [summary.read_report(path) for path in args.compare]
    found, out = outputs.outputs(prepared, args.results), args.results / "judged"
    plan = judging.Plan(args.repeats, args.swap, args.scale)
    judge = _judge(args)
    beside = summary.beside({"protocol": report.protocol(prepared, judge, plan)}, others)  # refused before the work
    out.mkdir(exist_ok=True)
    with folder_lock(out):
        workers = args.workers if args.endpoint else 1
        lines = judging.judge_results(prepared, found, judge, out, plan, workers=workers)
        facts = report.facts(prepared, judge, plan, lines, args.label or args.results.name)
        facts["table"] += beside
        write_text(out / "samples.jsonl", json_lines(lines))
        write_text(out / "report.json", json.dumps(facts, indent=2) + "\n")
        written = page.write(prepared, facts, lines, found, out)
    print(page.text_table(facts))
    print(f"{written}: the tables and images")


def _judge(args: argparse.Namespace):
    """The judge that was asked for."""
    if args.endpoint:
        from mige.evaluation.judges.endpoint import Endpoint, key_from

        key = None if args.key_env == "none" else key_from(args.key_env)
        return Endpoint(args.judge, args.endpoint, key, temperature=args.temperature, timeout=args.timeout)
    from mige.evaluation.judges.local import LocalJudge

    device = command.check_device(command.parser(None), args.device)
    return LocalJudge(args.judge, args.adapter, device=device, temperature=args.temperature)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))
