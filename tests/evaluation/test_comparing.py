"""Two runs compared: differences, win rates and verdicts against scipy's; files that cannot be compared; the page."""

import json
import math
from pathlib import Path

import evaluation_files as files
import numpy as np
import pytest
from conftest import run_here
from scipy import stats

from mige.evaluation import comparing, statistics
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.prepared import prepare, read
from mige.evaluation.comparing import EVERY, Run, compare


def run(values: dict[str, float], measure: str = "CLIPim", clusters: dict[str, str] | None = None) -> Run:
    """A run of one measure; an id begins with its kind."""
    rows = {
        name: {"kind": name.split("-")[0], "cluster": (clusters or {}).get(name, name), "scores": {measure: value}}
        for name, value in values.items()
    }
    return Run(Path("r"), "r", rows, {}, {"benchmark": "x"})


def pair(rng, n: int, effect: float, noise: float, **options) -> tuple[Run, Run]:
    a = rng.normal(0.5, 1, n)
    b = a + effect + rng.normal(0, noise, n)
    names = [f"add-{i}" for i in range(n)]
    return tuple(run(dict(zip(names, map(float, values), strict=True)), **options) for values in (a, b))


def test_the_difference_is_the_paired_t_tests():
    first, second = pair(np.random.default_rng(0), 20, 0.3, 0.5)
    (one,) = compare(first, second)
    a, b = ([row["scores"]["CLIPim"] for row in side.rows.values()] for side in (first, second))
    expected = stats.ttest_rel(b, a)
    assert (one.first, one.second, one.n, one.kind) == (pytest.approx(np.mean(a)), pytest.approx(np.mean(b)), 20, EVERY)
    assert one.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert (one.low, one.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.98, 1.02, 2])
@pytest.mark.parametrize("effect", [0.0, 0.1, -0.1])
def test_equivalence_is_two_one_sided_tests(share, effect):
    """Schuirmann's: both "not below -x" and "not above x" are rejected at 5 %, x around where they are."""
    first, second = pair(np.random.default_rng(1), 25, effect, 0.4)
    gaps = [second.rows[name]["scores"]["CLIPim"] - row["scores"]["CLIPim"] for name, row in first.rows.items()]
    bound = share * (abs(np.mean(gaps)) + stats.t.ppf(0.95, 24) * stats.sem(gaps))
    (one,) = compare(first, second, {"CLIPim": bound})
    above = stats.ttest_1samp(gaps, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(gaps, bound, alternative="less").pvalue
    assert one.equivalent == (max(above, below) < 0.05) == (share > 1)
    assert (f"no effect larger than {bound:g}" in one.verdict) == one.equivalent


def test_verdicts_in_words():
    rng = np.random.default_rng(2)
    first, second = pair(rng, 40, 0.5, 0.1)
    assert compare(first, second)[0].verdict == "second better"
    assert compare(second, first)[0].verdict == "first better"
    assert compare(first, second, {"CLIPim": 1})[0].verdict == "second better, but no effect larger than 1"
    first, second = pair(rng, 40, 0.5, 0.1, measure="L1 (stretched)")  # an error: more is worse
    assert compare(first, second)[0].verdict == "first better" and compare(first, second)[0].wins == 0
    first, second = pair(rng, 6, 0.0, 3.0)
    (one,) = compare(first, second, {"CLIPim": 0.5})
    assert one.verdict == "not resolved" and one.equivalent is False
    (one,) = compare(run({"add-0": 1.0}), run({"add-0": 2.0}), {"CLIPim": 9})
    assert one.low is None and one.verdict == "not resolved" and one.wins == 1


def test_no_effect_is_said_falsely_at_most_as_often_as_stated():
    """The true effect is the bound itself: equivalence must be claimed in at most 5 of 100 comparisons."""
    rng, said = np.random.default_rng(3), 0
    for _ in range(400):
        first, second = pair(rng, 20, 0.3, 0.3)
        said += compare(first, second, {"CLIPim": 0.3})[0].equivalent
    assert 0.02 * 400 <= said <= 0.085 * 400


def test_wins_count_ties_half_and_clusters_widen_them():
    first = run({"add-0": 1.0, "add-1": 1.0, "remove-0": 1.0, "remove-1": 1.0})
    second = run({"add-0": 2.0, "add-1": 1.0, "remove-0": 3.0, "remove-1": 0.0})
    every, add, remove = compare(first, second)
    assert (every.kind, add.kind, remove.kind) == (EVERY, "add", "remove")
    assert (every.wins, add.wins, remove.wins) == (0.625, 0.75, 0.5)
    assert (every.wins_low, every.wins_high) == statistics.wilson(2.5, 4)
    two = {"add-0": "a", "add-1": "a", "remove-0": "b", "remove-1": "b"}
    clustered = compare(run({n: r["scores"]["CLIPim"] for n, r in first.rows.items()}, clusters=two), second)[0]
    assert (clustered.wins_low, clustered.wins_high) == statistics.wilson(1.25, 2)
    gaps = [1.0, 0.0, 2.0, -1.0]
    assert (clustered.low, clustered.high) == statistics.t_interval(gaps, ["a", "a", "b", "b"])


def test_shares_that_never_differ_are_not_certain():
    """Eight of eight equal: the interval has a width, as one more case for and one against would make it."""
    first = run({f"add-{n}": 1.0 for n in range(8)}, "success")
    (one,) = compare(first, first, {"success": 0.1})
    half = stats.t.ppf(0.975, 7) * math.sqrt(2 / 7 / 8)
    assert (one.low, one.high) == pytest.approx((-half, half)) and one.equivalent is False
    many = run({f"add-{n}": 1.0 for n in range(400)}, "success")
    assert compare(many, many, {"success": 0.1})[0].verdict == "no effect larger than 0.1"


def test_the_largest_disagreements_come_first():
    first = run({f"add-{n}": 0.0 for n in range(20)})
    second = run({f"add-{n}": float(n * (-1) ** n) for n in range(20)})
    assert comparing.disagreements(first, second, "CLIPim") == [f"add-{n}" for n in range(19, 9, -1)]


# ---- files -----------------------------------------------------------------------------------------------------------


def evaluated(folder: Path, data: Path, values: list[float], label: str, protocol: dict | None = None) -> Path:
    """A results folder of MagicBrush as evaluate.py leaves it."""
    prepare("magicbrush", Options(str(data)), folder / "benchmark")
    rows = read(folder / "benchmark").rows
    lines = []
    for row, value in zip(rows, values, strict=True):
        files.save(folder / "images" / f"{row['id']}.png", int(1000 * value))
        line = {"id": row["id"], "group": row["score"]["group"], "cluster": row["score"]["cluster"]}
        lines.append(line | {"model": {"L1": value, "DINO": 1 - value}, "copy": {"L1": 0.0}})
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"label": label, "protocol": protocol or {"benchmark": "magicbrush", "CLIP": "ViT-B/32"}, "table": []}
    (folder / "evaluation" / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    data = files.magicbrush(tmp_path / "data")
    return (evaluated(tmp_path / "a", data, [0.1, 0.2, 0.3], "plain"),
            evaluated(tmp_path / "b", data, [0.11, 0.15, 0.1], "adapted"))  # fmt: skip


def test_the_tool_writes_a_page_with_the_cases_that_differ_most(two, tmp_path):
    out = tmp_path / "out"
    done = run_here("tools/compare_runs.py", *two, "--output", out, "--bound", "L1=0.5", "DINO=0.01")
    assert done.returncode == 0, done.stderr
    assert "every kind  L1" in done.stdout and "no effect larger than 0.5" not in done.stdout  # of two sessions
    report = json.loads((out / "comparison.json").read_text())
    assert (report["first"], report["second"]) == ("plain", "adapted")
    line = next(one for one in report["table"] if (one["kind"], one["measure"]) == (EVERY, "L1"))
    assert line["difference"] == pytest.approx(-0.08) and line["wins"] == pytest.approx(2 / 3) and line["bound"] == 0.5
    html = (out / "report.html").read_text()
    order = [html.index(f"first {a:.4f}, second {b:.4f}") for a, b in ((0.3, 0.1), (0.2, 0.15), (0.1, 0.11))]
    assert order == sorted(order)
    images = {part.split('"')[0] for part in html.split('src="')[1:]}
    assert len(images) >= 9 and all((out / link).is_file() for link in images)
    for label in ("first of ", "second of ", "true image of "):
        assert html.count(f'alt="{label}') == 3


def test_two_protocols_and_other_cases_are_refused(two, tmp_path):
    first, second = two
    report = second / "evaluation" / "report.json"
    report.write_text(json.dumps({"label": "x", "protocol": {"benchmark": "magicbrush", "CLIP": "ViT-L/14"}}))
    with pytest.raises(BenchmarkError, match=r"two protocols \(CLIP: ViT-B/32 and ViT-L/14\)"):
        compare(comparing.read_run(first), comparing.read_run(second))
    report.write_text((first / "evaluation" / "report.json").read_text())
    samples = second / "evaluation" / "samples.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(BenchmarkError, match=r"a alone has 1 \(30-1\); evaluate both on the same ones"):
        compare(comparing.read_run(first), comparing.read_run(second))
    samples.write_text('{"id": "x", "group": "g", "model": {"L1": "much"}}\n')
    with pytest.raises(BenchmarkError, match=r"samples.jsonl, line 1: no case with an id"):
        comparing.read_run(second)
    samples.unlink()
    with pytest.raises(BenchmarkError, match=r"run tools/evaluate\.py first"):
        comparing.read_run(second)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--bound", "CLIPdir=1"], "a bound of 'CLIPdir', expected one of L1, DINO"),
        (["--bound", "L1=0"], "the bound of L1 is 0, expected more than 0"),
        (["--bound", "L1"], "expected MEASURE=X such as L1=0.01"),
        (["--rank-by", "CLIPdir"], "--rank-by CLIPdir: expected one of L1, DINO"),
    ],
)
def test_bounds_and_measures_that_are_none(two, tmp_path, given, said):
    done = run_here("tools/compare_runs.py", *two, "--output", tmp_path / "out", *given)
    assert done.returncode and said in done.stderr


def test_runs_of_the_mini_bench_are_compared(tmp_path):
    """Its cases.jsonl and settings.json, with other steps and another model; inputs are drawn anew."""
    from mige.data.synthetic.cases import make_cases

    for label, values in (("teacher", (0.1, 0.2)), ("student", (0.3, 0.1))):
        folder = tmp_path / label
        cases = make_cases(2, kinds=["replace_by_reference"])
        lines = []
        for one, value in zip(cases, values, strict=True):
            files.save(folder / "images" / f"{one.id}.png", int(10 * value), (128, 128))
            scores = {"l1_inside": value, "success": 1.0}
            lines.append({"id": one.id, "kind": one.case.kind, "split": one.split, "prompt": one.case.prompt,
                          "seed": one.seed, "model": scores})  # fmt: skip
        (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {"model": label, "bench_seed": 1, "steps": len(label), "guidance": 2.0, "source_guidance": 1.0}
        (folder / "settings.json").write_text(json.dumps(settings))
    done = run_here("tools/compare_runs.py", tmp_path / "teacher", tmp_path / "student", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "out" / "report.html").read_text()
    assert "first 0.1000, second 0.3000" in html and html.count('alt="second of ') == 2
    assert html.count('alt="image 2 of ') == 2  # the references, drawn anew
