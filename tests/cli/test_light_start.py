"""Scripts parse before they import: `--help` and a wrong option answer at once, and check_data never needs torch."""

import json
import sys

import pytest
from conftest import ROOT
from processes import run_program

HEAVY = {"torch", "transformers", "diffusers", "gradio", "datasets", "timm", "peft", "torchvision", "accelerate"}
SCRIPTS = sorted(
    path for folder in ("tools", "train_scripts", "infer_scripts") for path in (ROOT / folder).glob("*.py")
)
STARTS = {str(path) for path in SCRIPTS if path.stem in ("demo", "download_weights", "web_demo")}  # need no argument
LOOK = f"""
import contextlib, io, json, runpy, sys
told = {{}}
for path in sys.argv[1:]:
    for option in ("--help", "--no-such-option", *[""] * (path not in {STARTS!r})):
        said = io.StringIO()
        sys.argv = [path, *[option] * bool(option)]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            told[path + option] = [end.code, "usage:" in said.getvalue(), sorted({HEAVY!r} & sys.modules.keys())]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict:
    """What every script says and imports, in one fresh process."""
    done = run_program(sys.executable, "-c", LOOK, *SCRIPTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_a_wrong_option_and_a_missing_argument_import_nothing_heavy(told, script):
    assert told[f"{script}--help"] == [0, True, []]
    assert told[f"{script}--no-such-option"] == [2, True, []]
    assert str(script) in STARTS or told[str(script)] == [2, True, []]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_its_main_in_the_package(script):
    name = script.stem
    lines = f'"""The script of mige/cli/{name}.py."""\n\nfrom mige.cli.{name} import main\n\n'
    assert script.read_text() == lines + 'if __name__ == "__main__":\n    raise SystemExit(main())\n'


def test_names_of_options_are_the_facts():
    from mige.cli import ablate, choices, evaluate, pretrain_mini_encoder
    from mige.data.latent_store.meta import DTYPES, PRECISIONS
    from mige.data.prepare.sources import SOURCES
    from mige.data.synthetic import tasks
    from mige.data.synthetic.cases import PER_KIND
    from mige.evaluation import backbones, entities, extra_metrics
    from mige.evaluation.benchmarks.table import BENCHMARKS
    from mige.mini import ablation, pretraining

    assert tuple(BENCHMARKS) == choices.BENCHMARKS
    assert tuple(backbones.CLIP) == choices.CLIP
    assert tuple(extra_metrics.BACKBONES) == choices.BACKBONES and extra_metrics.PRESERVATION == choices.PRESERVATION
    assert set(choices.BACKBONES) <= {*backbones.DINO, *backbones.SIGLIP}
    assert (entities.DETECTOR, entities.SEGMENTER) == (choices.DETECTOR, choices.SEGMENTER)
    assert set(SOURCES) == set(choices.SOURCES)
    assert tuple(DTYPES) == choices.STORE_DTYPES and ("auto", *PRECISIONS) == choices.STORE_PRECISIONS
    assert set(tasks.KINDS) == set(choices.WORLD_KINDS) and list(tasks.KINDS) == list(choices.WORLD_KINDS)
    assert tuple(ablation.VARIANTS) == choices.VARIANTS
    plan, given = ablation.Plan, ablate.parse(["out"])
    assert (plan.per_kind, plan.sampler_steps, plan.batch) == (given.per_kind, given.sampler_steps, given.batch)
    assert evaluate.parse(["--benchmark", "mini", "--model", "m", "--results", "r"]).per_kind == PER_KIND
    given = pretrain_mini_encoder.parse(["out", "--start", "s"])
    assert (given.rate, given.seed) == (pretraining.RATE, pretraining.SEED)


@pytest.mark.processes
def test_check_data_needs_no_torch(tmp_path):
    rows = [{"multi_prompt": "a<imagehere>", "entity_path": [str(ROOT / "example_data/images/cat.jpg")],
             "image": str(ROOT / "example_data/images/cat.jpg")}]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(rows))
    code = f"""
import sys
from mige.cli.check_data import main
code = main([{str(tmp_path / "r.json")!r}, "--workers", "1"])
print(code, sorted({HEAVY!r} & sys.modules.keys()))
"""
    done = run_program(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
