"""The ablations: intervals against closed forms, the right checkpoints compared, kills, refusals, whole toy runs."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, image_size, run_script
from PIL import Image
from processes import start_python

from mige import config
from mige.checkpoints.folder import CheckpointError
from mige.evaluation.statistics import Estimate, estimate, spread, t_quantile
from mige.inference.pipeline import MIGEPipeline
from mige.mini import ablation, ablation_report, ablation_scores, bench, bench_measures, pretraining
from mige.mini.ablation import VARIANTS, Plan
from mige.mini.ablation_comparisons import COMPARISONS, Comparison, Scores, compare
from mige.mini.ablation_scores import AblationError
from mige.mini.start import start_from, start_with
from mige.tasks import Task
from mige.training import checkpointing as training_state
from mige.training.optimizers import learning_rate

TOY = f"""
_base_ = {str(ROOT / "configs" / "tiny.py")!r}
model = dict(fusion=dict(vae_features=True))
data = dict(sets=[], world=dict(one_reference=2, two_references=2, add=1, remove=1, add_by_reference=1,
                                replace_by_reference=1))
train = dict(steps=4, batch_size=4, lr_reference_batch=4, warmup=1, optimizer="muon", trainable="all", ema=0.9995,
             noise_levels=2, snr_gamma=5.0, snr_power=0.5, log_every=1, sample_every=0, sample_records=[])
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """The config file of the toy runs."""
    file = tmp_path_factory.mktemp("config") / "toy.py"
    file.write_text(TOY)
    return file


def plan(out: Path, toy: Path, model: Path, *overrides: str, **more) -> Plan:
    script = ROOT / "train_scripts" / "train_mige.py"
    return Plan(out, toy, overrides, model, script, **{"per_kind": 2, "sampler_steps": 2} | more)


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799), (1e5, 1.9600)],
)
def test_the_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=3e-4)


def test_with_one_seed_it_is_the_paired_t_interval_over_cases():
    a, b = np.random.default_rng(0).random((2, 1, 21))
    found = estimate(a, b, alike=[a, b], share=False)
    half = 2.08596 * (a - b).std(ddof=1) / np.sqrt(21)  # t of 20 degrees of freedom
    assert (found.cases, found.over_seeds) == (21, False)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-4)


def test_where_all_cases_are_alike_it_is_the_pooled_t_interval_of_two_samples():
    a, b, c = np.array([0.3, 0.5]), np.array([0.2, 0.3, 0.7]), np.array([0.9, 0.4])
    a_SC, b_SC, c_SC = (np.repeat(x[:, None], 8, axis=1) for x in (a, b, c))
    found = estimate(a_SC, b_SC, alike=[a_SC, b_SC, c_SC], share=False)
    pooled = sum(((x - x.mean()) ** 2).sum() for x in (a, b, c)) / 4  # 1 + 2 + 1 degrees of freedom
    assert spread([a_SC, b_SC, c_SC]) == (pytest.approx(pooled), 4)
    half = 2.77645 * np.sqrt(pooled * (1 / 2 + 1 / 3))
    assert found.over_seeds and found.mean == pytest.approx(0)
    assert (found.low, found.high) == pytest.approx((-half, half), rel=1e-4)


def test_a_fixed_baseline_adds_no_seeds_and_missing_cases_are_left_out():
    runs = np.array([[0.0, 1, 1, np.nan], [1.0, 1, 0, np.nan]])
    fixed = np.array([0.5, 0, 0, 0])
    found = estimate(runs, fixed, alike=[runs], share=False)
    between, cases = spread([runs])[0], np.array([0.0, 1, 0.5])
    assert found.cases == 3 and found.mean == pytest.approx(0.5)
    parts = cases.var(ddof=1) / 3, between / 2
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1) if parts[1] else 2
    assert found.high - found.mean == pytest.approx(t_quantile(freedom) * np.sqrt(sum(parts)))


def test_a_share_of_none_is_not_certain():
    none = np.zeros((2, 20))
    found = estimate(none, np.full(20, 1 / 64), alike=[none], share=True)
    assert found.low < -1 / 64 < 0 < found.high and found.verdict() == "not resolved"
    assert estimate(none, None, alike=[none], share=False).high == 0


def test_too_few_cases_are_refused():
    with pytest.raises(ValueError, match="at least two cases, got 1: raise the number of cases"):
        estimate(np.array([[1.0, np.nan]]), None, alike=[], share=True)


@pytest.mark.parametrize(("seeds", "between"), [(2, 0.0), (2, 0.1), (3, 0.05)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, between):
    """Runs of three variants that are equally good: hard and easy cases, seeds apart by `between`."""
    rng, held = np.random.default_rng(seeds), 0
    for _ in range(400):
        ease = rng.random(40)
        runs = [(rng.random((seeds, 40)) < 0.6 * ease + 0.2 + rng.normal(0, between, (seeds, 1))).astype(float)
                for _ in range(3)]  # fmt: skip
        found = estimate(runs[0], runs[1], alike=runs, share=True)
        held += found.low <= 0 <= found.high
    assert held >= 0.93 * 400


@pytest.mark.parametrize(
    ("low", "high", "higher", "word"),
    [
        (0.1, 0.3, True, "supported"),
        (-0.3, -0.1, True, "contradicted"),
        (-0.3, -0.1, False, "supported"),
        (0.1, 0.3, False, "contradicted"),
        (-0.1, 0.3, True, "not resolved"),
        (0.0, 0.3, True, "not resolved"),
        (0.0, 0.0, False, "not resolved"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, higher, word):
    assert Estimate((low + high) / 2, low, high, 10, True).verdict(higher) == word


# ---- variants --------------------------------------------------------------------------------------------------------


def test_the_variants_are_parts_of_the_joint_mixture():
    mixture = config.load(ROOT / "configs" / "ablation.py").data.world
    assert [ablation.share(mixture, [task]) for task in (Task.SUBJECT, Task.EDIT, Task.SUBJECT_EDIT)] == [
        0.5,
        0.25,
        0.25,
    ]
    shares = {name: ablation.share(mixture, variant.trains) for name, variant in VARIANTS.items()}
    assert shares["subject_only"] == 0.5 and shares["edit_only"] == shares["text_only"] == 0.25
    assert shares["joint"] == shares["without_vae_features"] == 1 and shares["without_subject_edit"] == 0.75
    by_reference = {"add_by_reference", "add_by_reference_relative", "replace_by_reference"}
    left = ablation.kinds_of(mixture, VARIANTS["without_subject_edit"].trains)
    assert set(left) == mixture.keys() - by_reference
    assert set(ablation.kinds_of(mixture, VARIANTS["without_subject_edit"].scored)) == by_reference


def test_every_variant_is_a_config(tmp_path):
    made, loaded = plan(tmp_path, ROOT / "configs" / "ablation.py", tmp_path, "train.steps=800"), {}
    for name in VARIANTS:
        loaded[name] = config.load(made.file, ablation.overrides(made, name, 3))
        train = loaded[name].train
        assert (train.steps, train.seed, train.checkpoint_every) == (800, 3, 200)
        assert train.keep_checkpoints >= 800  # also beside those that a stop leaves
        assert train.pretrained == str(tmp_path / "runs" / f"{name}-3" / "start")
    joint = loaded["joint"]
    for name in ("subject_only", "edit_only", "without_subject_edit"):
        assert loaded[name].model == joint.model
        assert loaded[name].data.world.items() < joint.data.world.items()  # the other weights kept
    assert loaded["without_vae_features"].model.fusion == joint.model.fusion | {"vae_features": False}
    assert loaded["text_only"].model.fusion == joint.model.fusion | {"num_queries": 0}
    assert loaded["text_only"].data == loaded["edit_only"].data
    assert loaded["without_vae_features"].data == joint.data


def test_a_checkpoint_in_mid_run_has_seen_the_rates_of_a_shorter_run():
    long, short = (config.load(ROOT / "configs" / "ablation.py", [f"train.steps={n}"]).train for n in (1200, 300))
    assert [learning_rate(long, step, 512) for step in range(300)] == [learning_rate(short, s, 512) for s in range(300)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=6", "train.steps is 6, expected a multiple of 4"),
        ("train.cooldown=2", "train.cooldown is 2, expected 0"),
        ("data.world={'one_reference': 1, 'add': 1, 'add_by_reference': 1}", "subject make 0.333 of the mixture"),
        ("data.world={'one_reference': 1, 'add_by_reference': 1}", "edit make 0.000 of the mixture"),
    ],
)
def test_a_config_that_does_not_suit_is_refused(toy, tmp_path, override, message):
    with pytest.raises(AblationError, match=message):
        _ = plan(tmp_path, toy, tmp_path, override).config


# ---- scores, made up -------------------------------------------------------------------------------------------------

STEPS = [300, 600, 900, 1200]


def fake(out: Path, runs: dict[str, list[int]], worth, per_kind: int = 8) -> Path:
    """A folder of scores: `worth(variant, seed, step, measure)` for every case, but for a ripple over the cases."""
    made = plan(out, ROOT / "configs" / "ablation.py", ROOT / "configs", f"train.steps={STEPS[-1]}", per_kind=per_kind)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(made.settings()))
    setting, lines = ablation_scores.digest(made.settings()), []
    for name, seeds in runs.items():
        kinds = ablation.kinds_of(made.config.data.world, VARIANTS[name].scored)
        for seed in seeds:
            for step in made.steps:
                for kind in kinds:
                    edit = ablation.task_of(kind) is not Task.SUBJECT
                    measures = {"l1_subjects"} | ({"success", "l1_inside", "l1_outside"} if edit else set())
                    measures |= {"identity"} if kind in bench_measures.BY_REFERENCE else set()
                    for measure in measures:
                        for split in ("seen", "unseen"):
                            ripple = 0.01 * (np.arange(per_kind // 2) % 2)
                            values = (worth(name, seed, step, measure) + ripple).tolist()
                            line = {"setting": setting, "variant": name, "seed": seed, "step": step}
                            line |= {"samples": 512 * step, "kind": kind, "split": split, "measure": measure}
                            line |= {"n": len(values), "mean": float(np.mean(values)), "values": values}
                            line |= {"copy": [0.2] * len(values) if edit else None, "vae": [0.9] * len(values)}
                            lines.append(line)
    (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def step_and_place(name: str, seed: int, step: int, measure: str) -> float:
    """A number from which variant and step can be read."""
    return step / 10_000 + list(VARIANTS).index(name)


ALL = {name: [0, 1] for name in VARIANTS}


def test_comparisons_take_the_right_checkpoints(tmp_path):
    scores = Scores(fake(tmp_path, ALL, step_and_place))
    at = {}
    for c in COMPARISONS:
        entry = compare(scores, c, "unseen")
        if c.b not in ("chance", "copy"):
            apart = list(VARIANTS).index(c.a) - list(VARIANTS).index(c.b)
            at[c.b, c.equal] = round((1200 / 10_000 - (entry["mean"] - apart)) * 10_000)
            assert entry["steps"] == {c.a: 1200, c.b: at[c.b, c.equal]}
        elif c.b == "chance":
            assert entry["mean"] == pytest.approx(step_and_place(c.a, 0, 1200, "") + 0.005 - 1 / 64)
        else:
            assert entry["mean"] == pytest.approx(step_and_place(c.a, 0, 1200, "") + 0.005 - 0.2)
    samples = {"subject_only": 600, "edit_only": 300, "without_subject_edit": 900}  # half, a quarter, three quarters
    ends = dict.fromkeys(
        ["subject_only", "edit_only", "without_subject_edit", "without_vae_features", "text_only"], 1200
    )
    assert at == {**{(b, "samples"): s for b, s in samples.items()}, **{(b, "compute"): s for b, s in ends.items()}}


def test_a_comparison_says_what_it_found(tmp_path):
    c = Comparison("joint training improves editing", "joint", "edit_only", "samples", Task.EDIT, "success")

    def worth(name, seed, step, measure):
        return 0.5 + 0.02 * seed + (0.3 if (name, step) == ("joint", 1200) else 0.0)

    entry = compare(Scores(fake(tmp_path / "two", ALL, worth)), c, "unseen")
    assert entry["of_each_seed"] == {"0": pytest.approx(0.3), "1": pytest.approx(0.3)}
    assert (entry["cases"], entry["over_seeds"], entry["verdict"]) == (24, True, "supported")
    start = "joint minus edits only at equal samples, success in edits, unseen subjects: +0.300 [+0."
    assert entry["sentence"].startswith(start) and entry["sentence"].endswith("], supported")
    one = compare(Scores(fake(tmp_path / "one", {name: [0] for name in VARIANTS}, worth)), c, "unseen")
    assert not one["over_seeds"] and one["verdict"] == "supported (1 seed)"
    assert one["high"] - one["low"] < entry["high"] - entry["low"]
    lower = Comparison("", "joint", "edit_only", "samples", Task.EDIT, "l1_inside")
    assert compare(Scores(tmp_path / "two"), lower, "seen")["verdict"] == "contradicted"  # its error is the larger one


def test_what_is_missing_is_named_and_the_rest_is_reported(tmp_path):
    runs = {"joint": [0, 1], "edit_only": [1], "without_subject_edit": [0, 1]}
    out = fake(tmp_path, runs, lambda name, seed, step, measure: 0.3 + step / 10_000 + 0.01 * seed)
    table, sentences = ablation_report.write(out)
    text = table.read_text()
    assert "**Incomplete.** subject-driven only: no run; edits only: not seed 0; without VAE features: no run" in text
    assert "| joint − edits only, equal compute | edits: success | 2 / 1 |" in text
    row = "| joint − subject-driven only, equal samples | subject-driven generation: L1 of subjects | - | - | not run |"
    assert row in text
    assert "| without VAE feature fusion | 0.098 |" in text and "arXiv 2502.21291" in text
    assert sum("not run" in line for line in text.splitlines()) == 10
    assert "incomplete: edits only: not seed 0" in sentences
    report = json.loads((out / "report.json").read_text())
    assert report["complete"] is False and len(report["comparisons"]) == 2 * (len(COMPARISONS) - 10)
    assert len(np.unique(np.asarray(Image.open(out / "curves.png").convert("L")))) > 20
    assert not list(out.glob(".*.part"))


def test_a_complete_set_says_so(tmp_path):
    table, sentences = ablation_report.write(fake(tmp_path, ALL, step_and_place))
    assert "Incomplete" not in table.read_text() and "not run" not in table.read_text()
    assert len(sentences) == len(COMPARISONS)
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is True


def test_scores_of_two_folders_can_be_joined(tmp_path):
    one, other = (fake(tmp_path / str(seed), {name: [seed] for name in VARIANTS}, step_and_place) for seed in (0, 1))
    joined = shutil.copytree(one, tmp_path / "joined")
    more = (other / "scores.jsonl").read_text()
    with (joined / "scores.jsonl").open("a") as file:
        file.write(more + more)  # the same twice is the same
    assert Scores(joined).seeds == ALL
    assert len(ablation_scores.read_scores(joined)) == 2 * len(ablation_scores.read_scores(one))


def test_scores_that_contradict_each_other_are_refused(tmp_path):
    out = fake(tmp_path, {"joint": [0]}, step_and_place)
    path, whole = out / "scores.jsonl", (out / "scores.jsonl").read_text()
    first = json.loads(whole.splitlines()[0])
    many = len(whole.splitlines())

    def refusal(line: str) -> str:
        path.write_text(whole + line)
        with pytest.raises(AblationError) as caught:
            ablation_scores.read_scores(out)
        return str(caught.value)

    assert f"line {many + 1}: joint, seed 0 is there twice with other scores" in refusal(
        json.dumps(first | {"mean": 9})
    )
    assert f"line {many + 1} was made with other settings (abc, " in refusal(json.dumps(first | {"setting": "abc"}))
    assert f"line {many + 1} is not a line of scores" in refusal(json.dumps(first)[:-9])
    assert f"line {many + 1} is not a line of scores" in refusal("[]")
    (out / "settings.json").unlink()
    with pytest.raises(AblationError, match=r"no settings\.json: copy that of the runs"):
        ablation_scores.read_scores(out)


def test_a_run_without_all_its_checkpoints_is_not_finished(tmp_path):
    out = fake(tmp_path, {"joint": [0], "edit_only": [0]}, step_and_place)
    lines = ablation_scores.read_scores(out)
    assert ablation_scores.finished(lines, STEPS) == {("joint", 0), ("edit_only", 0)}
    fewer = [line for line in lines if (line["variant"], line["step"]) != ("joint", 600)]
    assert ablation_scores.finished(fewer, STEPS) == {("edit_only", 0)}
    (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in fewer))
    assert "joint: no run" in Scores(out).missing()


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(AblationError, match=r"holds no scores: run tools/ablate\.py first"):
        ablation_report.write(tmp_path)


def test_lines_of_scores_keep_every_case_in_its_place():
    rows = [
        {"id": f"add-unseen-{n:03d}", "kind": "add", "split": "unseen", "model": scores, "vae": scores, "copy": {}}
        for n, scores in ((1, {"success": 1.0}), (0, {"l1_inside": 0.25}), (2, {"success": 0.0, "l1_inside": 1 / 3}))
    ]
    success, inside = ablation_scores.score_lines(rows)
    assert success == {
        "kind": "add", "split": "unseen", "measure": "success", "n": 2, "mean": 0.5,
        "values": [None, 1.0, 0.0], "vae": [None, 1.0, 0.0], "copy": None,
    }  # fmt: skip
    assert inside["values"] == [0.25, None, 0.333333] and inside["n"] == 2


# ---- whole runs ------------------------------------------------------------------------------------------------------


def arguments(out: Path, toy: Path, model: Path, *variants: str) -> list[str]:
    given = [out, "--config", toy, "--from-model", model, "--seeds", 0, "--per-kind", 2, "--sampler-steps", 2]
    return [*map(str, given), "--variants", *variants]


@pytest.fixture(scope="module")
def forked_trainings():
    """What starts a training in a process of its own starts a fork."""
    start = lambda command, **options: start_python(*command[1:], **options)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "subprocess", SimpleNamespace(Popen=start))
        yield


@pytest.fixture(scope="module")
def whole(toy, tiny_model, forked_trainings, tmp_path_factory) -> tuple[Path, str]:
    """Two variants from one seed, without a stop: their folder (don't write into it) and what was printed."""
    out, printed = tmp_path_factory.mktemp("ablation") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_script("tools/ablate.py", *arguments(out, toy, tiny_model, "text_only", "edit_only"))
    return out, printed.getvalue()


@pytest.mark.processes
def test_a_toy_run_ends_with_a_table_and_curves(whole):
    out, printed = whole
    assert "edits only minus edits only, text-only at equal compute, L1 inside in edits, unseen subjects: " in printed
    text = (out / "table.md").read_text()
    assert "1 seed (0), 4 steps, 16 samples a run; 1 cases of each kind and split, 2 sampler steps" in text
    assert "**Incomplete.** joint: no run;" in text
    assert image_size(out / "curves.png")[0] > 1000
    lines = ablation_scores.read_scores(out)
    assert ablation_scores.finished(lines, [1, 2, 3, 4]) == {("text_only", 0), ("edit_only", 0)}
    assert {line["kind"] for line in lines} == {"add", "remove"}  # what the comparison needs
    means = {(line["variant"], line["step"]): line["mean"] for line in lines if line["measure"] == "l1_inside"}
    assert len(set(means.values())) == 8  # every checkpoint is another model
    assert all(line["samples"] == 4 * line["step"] for line in lines)


@pytest.mark.processes
def test_of_a_scored_run_the_weights_are_gone_and_the_last_images_stay(whole):
    out, _ = whole
    assert not list(out.rglob("*.safetensors"))
    for name in ("text_only-0", "edit_only-0"):
        assert len(list((out / "runs" / name / "bench").glob("*/images/*.png"))) == 4
        assert (out / "runs" / name / "metrics.jsonl").is_file()


@pytest.mark.processes
def test_a_run_killed_in_training_and_stopped_in_scoring_gives_the_same_scores(
    whole, toy, tiny_model, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run = out / "runs" / "edit_only-0"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    given = arguments(out, toy, tiny_model, "edit_only")
    process = start_python(ROOT / "tools" / "ablate.py", *given, start_new_session=True, **streams)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    trained = [path.name for path in training_state.list_checkpoints(run)]
    assert trained[:2] == ["step-00000001", "step-00000002"] and not (out / "scores.jsonl").exists()

    answer, batches = bench._answer, []

    def stop(*given):
        batches.append(given)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(bench, "_answer", stop)
    made = plan(out, toy, tiny_model, batch=2)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(made, ["edit_only"], [0])
    assert len((run / "bench" / "step-00000002" / "cases.jsonl").read_text().splitlines()) == 2
    assert not (out / "scores.jsonl").exists()

    object.__setattr__(made, "trainer", tmp_path / "nothing.py")  # it is trained
    ablation.run(made, ["edit_only"], [0])
    assert len(batches) == 4 + 1 + 2 * 2
    expected = [line for line in ablation_scores.read_scores(whole[0]) if line["variant"] == "edit_only"]
    found = ablation_scores.read_scores(out)
    for one, other in zip(found, expected, strict=True):
        assert {**one, "mean": 0, "values": 0} == {**other, "mean": 0, "values": 0}
        assert one["values"] == pytest.approx(other["values"], abs=2e-5)  # another size of batch rounds otherwise


@pytest.mark.processes
def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(whole, toy, tiny_model, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = (out / "scores.jsonl").read_bytes()
    quick = plan(out, toy, tiny_model)
    object.__setattr__(quick, "trainer", tmp_path / "nothing.py")  # would fail
    ablation.run(quick, ["text_only", "edit_only"], [0])
    with pytest.raises(
        AblationError, match=r"other settings \(per_kind: 2 there, 4 now; train.steps: 4 there, 8 now\)"
    ):
        ablation.run(plan(out, toy, tiny_model, "train.steps=8", per_kind=4), ["edit_only"], [0])
    assert (out / "scores.jsonl").read_bytes() == before


def test_without_a_model_to_start_from_nothing_is_begun(toy, tmp_path):
    with pytest.raises(AblationError, match=r"no model to start from; make it with train_scripts/start_ablation\.py"):
        ablation.run(plan(tmp_path / "out", toy, tmp_path / "nowhere"), ["joint"], [0])
    (tmp_path / "half").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        ablation.run(plan(tmp_path / "out", toy, tmp_path / "half"), ["joint"], [0])
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_training_that_fails_is_reported(toy, tiny_model, forked_trainings, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit(3)")
    failing = Plan(tmp_path / "out", toy, (), tiny_model, script, per_kind=2, sampler_steps=2)
    with pytest.raises(AblationError, match=r"training of joint, seed 0, ended with exit code 3: see .*/log\.txt"):
        ablation.run(failing, ["joint"], [0])


@pytest.mark.processes
def test_a_folder_is_worked_on_by_one_at_a_time_even_if_only_its_training_is_left(toy, tiny_model, tmp_path):
    out, child = tmp_path / "out", None
    out.mkdir()
    try:
        with ablation._alone(out) as lock:
            child = start_python("-c", "input()", stdin=subprocess.PIPE, pass_fds=[lock])
        with pytest.raises(AblationError, match=r"at work already: another tools/ablate\.py, or a training"):
            ablation.run(plan(out, toy, tiny_model), ["joint"], [0])
    finally:
        child.communicate("\n")
    with ablation._alone(out):
        pass


# ---- the start -------------------------------------------------------------------------------------------------------


def test_a_start_has_the_vae_and_tokenizer_of_the_model_and_fresh_parts_from_the_seed(toy, tiny_model, tmp_path):
    sizes = config.load(toy).model
    other = config.load(toy, ["model.fusion.vae_features=False"]).model
    for name, of, seed in (("one", sizes, 0), ("again", sizes, 0), ("other", sizes, 1), ("without", other, 0)):
        start_from(tiny_model, tmp_path / name, of, seed)
    given = MIGEPipeline.from_pretrained(tiny_model)
    one, again, seeded, without = (
        MIGEPipeline.from_pretrained(tmp_path / n) for n in ("one", "again", "other", "without")
    )
    assert one.tokenizer("a cat").input_ids == given.tokenizer("a cat").input_ids
    for key, value in given.vae.state_dict().items():
        assert np.array_equal(one.vae.state_dict()[key], value)
    state = one.model.state_dict()
    assert all(np.array_equal(again.model.state_dict()[key], value) for key, value in state.items())
    key = "transformer.transformer_blocks.0.attn1.to_q.weight"
    assert not np.array_equal(seeded.model.state_dict()[key], state[key])
    for name, value in without.model.state_dict().items():
        assert name.startswith("encoder.fusion.") or np.array_equal(value, state[name]), name
    assert not state["transformer.proj_out.weight"].any()
    with pytest.raises(FileExistsError):
        start_from(tiny_model, tmp_path / "one", sizes, 0)


def test_a_start_that_cannot_work_is_refused(toy, tiny_model, tmp_path):
    few = config.load(toy, ["model.text_encoder.vocab_size=40"]).model
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ tokens, the config's .* is 40: raise it"):
        start_from(tiny_model, tmp_path / "start", few, 0)
    channels = ["model.vae.latent_channels=8", "model.transformer.in_channels=16", "model.transformer.out_channels=16"]
    with pytest.raises(CheckpointError, match=r"its VAE has 4 latent channels, the config's .* is 8: make them equal"):
        start_from(tiny_model, tmp_path / "start", config.load(toy, channels).model, 0)
    assert not list(tmp_path.iterdir())


def test_the_script_makes_such_a_start(toy, tiny_model, tmp_path):
    given = ["--config", toy, "--from-model", tiny_model, "--seed", "1", "model.fusion.num_queries=0"]
    run_script("train_scripts/start_mini.py", tmp_path / "start", *given)
    start_from(tiny_model, tmp_path / "same", config.load(toy, ["model.fusion.num_queries=0"]).model, 1)
    one, same = (MIGEPipeline.from_pretrained(tmp_path / name).model.state_dict() for name in ("start", "same"))
    assert all(np.array_equal(one[key], same[key]) for key in same)


def test_a_run_starts_with_all_parts_of_the_model_and_of_a_changed_fusion_with_what_fits(toy, tiny_model, tmp_path):
    given = MIGEPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    given.fusion.fusion.out.weight.data.normal_()  # no longer as a fresh one
    given.save_pretrained(tmp_path / "given")
    states = {}
    for change in ((), ("model.fusion.vae_features=False",), ("model.fusion.num_queries=0",)):
        folder = tmp_path / f"start{len(states)}"
        start_with(tmp_path / "given", folder, config.load(toy, change).model, 7)
        states[change] = MIGEPipeline.from_pretrained(folder, dtype=torch.float32).model.state_dict()
    whole, without, textual = states.values()
    theirs = given.model.state_dict()
    assert whole.keys() == theirs.keys() and all(torch.equal(whole[key], theirs[key]) for key in theirs)
    assert without.keys() == {key for key in theirs if ".fusion.fusion." not in key}
    assert all(torch.equal(without[key], theirs[key]) for key in without)
    queries = "encoder.fusion.query_tokens"
    assert textual[queries].shape[1] == 0
    assert all(torch.equal(textual[key], theirs[key]) for key in theirs if key != queries)

    start_with(tmp_path / "start1", tmp_path / "back", config.load(toy).model, 7)  # VAE features after a start without
    back = MIGEPipeline.from_pretrained(tmp_path / "back", dtype=torch.float32).model.state_dict()
    assert all(torch.equal(back[key], value) for key, value in without.items())
    assert not back["encoder.fusion.fusion.out.weight"].any()
    with pytest.raises(CheckpointError, match=r"its transformer is not of the config's sizes \(\d+ tensors differ"):
        start_with(tiny_model, tmp_path / "deep", config.load(toy, ["model.transformer.num_layers=3"]).model, 0)
    assert not (tmp_path / "deep").exists()


@pytest.mark.processes
def test_what_the_ablations_start_from(toy, tiny_model, forked_trainings, tmp_path):
    few = ("--encoder-steps", 2, "--encoder-batch", 2, "--steps", 2, "data.workers=0", "train.trackers=[]")
    script = ("train_scripts/start_ablation.py", tmp_path / "base", "--config", toy, "--from-model", tiny_model, *few)
    taught, teach = [], pretraining.teach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "UNSEEN", 4)
        patch.setattr(pretraining, "teach", lambda *given, **how: taught.append(given[2]) or teach(*given, **how))
        run_script(*script)
    mixture = {"one_reference": 2, "two_references": 2, "add": 1, "remove": 1, "text_to_image": 2}
    assert taught[0].data.world == mixture  # names a quarter, no subject edits
    names = ("start", "seeing", "model")
    start, seeing, model = (MIGEPipeline.from_pretrained(tmp_path / "base" / n).model.state_dict() for n in names)
    dit = [key for key in start if key.startswith("transformer.")]
    assert all(torch.equal(start[key], seeing[key]) for key in dit)
    tower = [key for key in start if key.startswith("encoder.image_encoder.") and key.endswith("qkv.weight")]
    assert tower and not any(torch.equal(start[key], seeing[key]) for key in tower)
    assert any(not torch.equal(seeing[key], model[key]) for key in dit)
    assert not any(".fusion.fusion." in key for key in model)
    words = [key for key in start if key.startswith("encoder.text_encoder.") and key.endswith("SelfAttention.k.weight")]
    assert words and not any(torch.equal(start[key], seeing[key]) for key in words)
    assert all(torch.equal(seeing[key], model[key]) for key in words)  # or it would forget the images
    metrics = (tmp_path / "base" / "text" / "metrics.jsonl").read_text()
    assert "loss/subject" in metrics and "loss/edit" not in metrics
    shutil.rmtree(tmp_path / "base" / "model")  # stopped before the end: the stages that are done are kept
    kept = (tmp_path / "base" / "seeing" / "model_index.json").stat().st_mtime_ns
    run_script(*script)
    assert (tmp_path / "base" / "seeing" / "model_index.json").stat().st_mtime_ns == kept
    again = MIGEPipeline.from_pretrained(tmp_path / "base" / "model").model.state_dict()
    assert all(torch.equal(again[key], model[key]) for key in model)
    with pytest.raises(SystemExit, match="is there: it is done, or give another folder"):
        run_script(*script)


def test_the_published_scores_can_be_resumed(monkeypatch):
    """The shipped start, the config and the defaults give the settings that mige/mini/published was made with."""
    published, base = ROOT / "mige" / "mini" / "published", ROOT / "output" / "pretrained_models" / "ablation-base"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # they were made in bf16
    script = ROOT / "train_scripts" / "train_mige.py"
    made = Plan(Path("unused"), ROOT / "configs" / "ablation.py", (), base, script)
    assert made.settings() == json.loads((published / "settings.json").read_text("utf-8"))
    scored = ablation_scores.finished(ablation_scores.read_scores(published), made.steps)
    assert scored >= {(name, seed) for name in VARIANTS for seed in (0, 1)}
    pipeline = MIGEPipeline.from_pretrained(base, dtype=torch.float32)  # verified key by key
    assert pipeline.fusion.config.vae_features is False
