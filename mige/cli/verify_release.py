"""Check a model against what is known of it, and its scores against the paper's; tools/verify_release.sh calls both.

    python tools/verify_release.py model output/pretrained_models/mige --output output/verified
    python tools/verify_release.py scores output/verified

`model` writes OUTPUT/model.json: keys, file hashes and the numbers of every stage for one fixed case, and compares them
with the file of tools/reference_values that has the same keys. `scores` reads the reports below a folder and writes
scores.md, and report.md, which holds both: paste it into an issue, whatever came out. Exit code 3: something differs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mige.cli import command

DIFFERS = 3
REFERENCES = Path(__file__).parents[2] / "tools" / "reference_values"
_NONE = "no values to compare with: nobody has reported the numbers of these stages yet. Yours are in model.json"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model", help="keys, hashes and stages of a checkpoint folder")
    model.add_argument("model", type=Path, help="checkpoint folder")
    model.add_argument("--output", type=command.folder_to_write, required=True, help="folder to write")
    model.add_argument("--against", type=Path, default=REFERENCES, help="folder of known values (%(default)s)")
    model.add_argument("--device", help="default: a GPU where there is one")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    scores = kinds.add_parser("scores", help="reports beside the paper's rows")
    scores.add_argument("results", type=Path, help="folder of runs, as verify_release.sh makes it")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    return check_model(args) if args.kind == "model" else check_scores(args)


def check_model(args: argparse.Namespace) -> int:
    """Fingerprint a model and compare it; the exit code."""
    import torch

    from mige.evaluation.summary import versions
    from mige.inference import fingerprint
    from mige.inference.pipeline import MIGEPipeline
    from mige.utils.files import write_text

    device = command.check_device(command.parser(None), args.device)
    command.quiet_libraries()
    pipeline = MIGEPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device)
    found = {"dtype": args.dtype, "device": _name(device), "versions": versions()}
    found |= {"parts": fingerprint.parts_of(pipeline, args.model), "stages": fingerprint.stages_of(pipeline)}
    known = _reference(found["parts"], args.against)
    lines = ["no known model has these keys"] if known is None else fingerprint.differences(found, known, args.dtype)
    found |= {"compared with": None if known is None else known["model"], "differences": lines}
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "model.json", json.dumps(found, indent=1) + "\n")
    name = "" if known is None else f"{known['model']}: "
    print(f"{name}{len(lines)} differences" + "".join(f"\n  {line}" for line in lines))
    if known is not None and not known["stages"]:
        print(f"  {_NONE}")
    print(args.output / "model.json")
    return DIFFERS if lines else 0


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _reference(parts: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any] | None:
    """The known values of the model with these keys, if there are any."""
    from mige.utils.files import read_json_object

    for path in sorted(folder.glob("*.json")):
        known = read_json_object(path)
        if all(part["keys"] == parts[name]["keys"] for name, part in known["parts"].items()):
            return known
    return None


def check_scores(args: argparse.Namespace) -> int:
    """Compare the reports below a folder with the paper's rows, and write what to report; the exit code."""
    from mige.evaluation import release_check
    from mige.utils.files import read_json_object, write_text

    found = release_check.lines(args.results)
    table = release_check.text(found)
    write_text(args.results / "scores.md", table + "\n")
    model = args.results / "model.json"
    lines = ["# What came out", ""]
    if model.is_file():
        facts = read_json_object(model)
        machine = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines += [f"- device: {facts['device']}, {facts['dtype']}; {machine}",
                  f"- compared with: {facts['compared with']}; differences: {len(facts['differences'])}",
                  *(f"  - {line}" for line in facts["differences"]), ""]  # fmt: skip
        stages = {key: facts["stages"][key] for key in sorted(facts["stages"])}
        lines += ["```json", json.dumps(stages), "```", ""]
    write_text(args.results / "report.md", "\n".join([*lines, table, ""]))
    print(table)
    print(f"{args.results / 'report.md'}: paste it into an issue (the form is 'Released weights: what came out')")
    return DIFFERS if any(one.verdict == "differs" for one in found) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError)
