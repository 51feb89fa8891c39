"""The mini-bench: the truth scores full marks and a copy none, a stopped run resumes, the report shows every kind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import Page

from mige.cli import evaluate as cli_evaluate
from mige.data.synthetic import backgrounds, sprites, tasks
from mige.data.synthetic.cases import PER_KIND, BenchCase, make_cases
from mige.data.synthetic.scenes import SIDE, Placed, Scene, Scenes, draw
from mige.evaluation.statistics import t_interval, wilson
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench, bench_report
from mige.mini import bench_measures as measures
from mige.utils import images

KINDS = ("two_references", "add", "replace_by_reference")  # of the runs here: one of each task
EDITS = [kind for kind in tasks.KINDS if tasks.make(kind, np.random.default_rng(0), range(50)).source is not None]
SETTINGS = dict(steps=2, guidance=2.0, source_guidance=1.0)
MIDDLE = np.full(backgrounds.VARIANT, 0.5, np.float32)


def image(*scenes: Scene) -> torch.Tensor:
    return draw(Scenes.stack(scenes))


def unit(pixels: torch.Tensor) -> torch.Tensor:
    return pixels / 2 + 0.5


def source_of(case: tasks.Case) -> torch.Tensor | None:
    return None if case.source is None else image(case.references[case.source])[0]


def one_case(kind: str, seed: int = 0) -> tasks.Case:
    return tasks.make(kind, np.random.default_rng(seed), sprites.split()[0])


# ---- cases -----------------------------------------------------------------------------------------------------------


def told(one: BenchCase) -> tuple:
    """All there is to a case, comparable."""
    scenes = Scenes.stack([one.case.target, *one.case.references])
    arrays = (scenes.background, scenes.variant, scenes.sprite, scenes.place, scenes.colour)
    return one.id, one.split, one.seed, one.case.kind, one.case.prompt, *(array.tolist() for array in arrays)


def test_cases_are_the_same_every_time_and_a_smaller_benchmark_is_a_part():
    small, again, large = (list(map(told, make_cases(per_kind))) for per_kind in (2, 2, 6))
    assert small == again
    assert len(small) == 2 * len(tasks.KINDS) and len(large) == 3 * len(small)
    large_by_id = {one[0]: one for one in large}
    assert len(large_by_id) == len(large)
    assert all(large_by_id[one[0]] == one for one in small)
    few = list(map(told, make_cases(6, kinds=KINDS)))
    assert all(large_by_id[one[0]] == one for one in few)
    assert told(make_cases(2, seed=1)[0]) != small[0]


def test_half_of_the_cases_are_about_unseen_subjects_and_no_two_share_their_noise():
    chosen = make_cases(8)
    assert len({one.seed for one in chosen}) == len(chosen)
    for one in chosen:
        halves = dict(zip(("seen", "unseen"), map(set, sprites.split()), strict=True))
        shown = {s.sprite for scene in one.case.references for s in scene.subjects}
        assert shown <= halves[one.split] and one.id.startswith(f"{one.case.kind}-{one.split}-")
    for kind in tasks.KINDS:
        assert [one.split for one in chosen if one.case.kind == kind] == ["seen"] * 4 + ["unseen"] * 4


@pytest.mark.parametrize("per_kind", [-2, 0, 1, 7])
def test_an_odd_or_empty_benchmark_is_refused(per_kind):
    with pytest.raises(ValueError, match=f"per_kind must be even and at least 2.*, got {per_kind}"):
        make_cases(per_kind)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"no task\(s\) juggle; known are text_to_image, "):
        make_cases(2, kinds=["add", "juggle"])


# ---- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_truth_has_full_marks_and_a_copy_fails(kind):
    """The rules could err on a truth too: of the whole benchmark they do on one background, of these cases on none."""
    for one in make_cases(4, kinds=[kind]):
        target, source = image(one.case.target)[0], source_of(one.case)
        outputs = torch.stack([target] if source is None else [target, source])
        truth, *copy = measures.measure(one.case, outputs, target, source)
        expected = {name: 1.0 for name in ("identity",) if kind in measures.BY_REFERENCE}
        expected |= {"identity_1": 1.0, "identity_2": 1.0} if kind == "two_references" else {}
        expected |= {"background": 1.0} if kind in measures.NEW_BACKGROUND else {}
        expected |= {"l1_inside": 0.0, "l1_outside": 0.0} if kind in EDITS else {}
        expected |= {"success": 1.0} if kind in EDITS and kind != "background" else {}
        expected |= {"l1_subjects": 0.0} if one.case.target.subjects else {}
        assert truth == expected, one.id
        for scores in copy:
            assert scores["l1_inside"] > 0 and scores["l1_outside"] <= 0.02, one.id
            assert scores.get("success", 0) == scores.get("background", 0) == scores.get("identity", 0) == 0, one.id


def test_measures_do_not_depend_on_how_many_images_are_measured():
    for kind in KINDS:
        case = one_case(kind)
        target, source = image(case.target)[0], source_of(case)
        noise = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        outputs = target + noise * torch.linspace(0, 1, 5)[:, None, None, None]
        together = measures.measure(case, outputs, target, source)
        assert len(together) == 5 and together[0] != together[4]
        for output, scores in zip(outputs, together, strict=True):
            assert scores == pytest.approx(measures.measure(case, output[None], target, source)[0], abs=1e-6)


def block(where: slice, value: float, ground: float = -1.0) -> torch.Tensor:
    made = torch.full((3, SIDE, SIDE), ground)
    made[:, where, where] = value
    return made


def test_the_changed_region_reaches_two_pixels_around_every_difference():
    source, target = torch.zeros(2, 3, 16, 20).unbind(0)
    target[1, 5:8, 10:14] = 0.05  # one channel, 0.025 of the range
    target[2, 15, 0] = -1.0  # in a corner
    target[0, 1, 18] = 0.039  # below 0.02 of the range
    expected = torch.zeros(16, 20, dtype=torch.bool)
    expected[3:10, 8:16] = True
    expected[13:, :3] = True
    assert torch.equal(measures.changed_region(source, target), expected)
    assert torch.equal(measures.changed_region(target, source), expected)


def edit_scores(output: torch.Tensor, target: torch.Tensor, source: torch.Tensor) -> dict[str, float]:
    empty = replace(one_case("remove"), target=Scene(0, MIDDLE))
    [scores] = measures.measure(empty, output[None], target, source)
    return scores


def test_an_edit_is_scored_as_worked_out_by_hand():
    """20 x 20 px change from black to white; with the margin the region has 24 x 24."""
    place = slice(40, 60)
    source, target = block(place, -1), block(place, 1)
    for share, success in ((0.0, 1), (0.49, 1), (0.51, 0), (1.0, 0)):
        expected = {"l1_inside": share * 400 / 576, "l1_outside": 0.0, "success": success}
        assert edit_scores(target + share * (source - target), target, source) == pytest.approx(expected, abs=1e-6)
    for outside, success in ((0.029, 1), (0.031, 0)):
        output = target + 2 * outside
        output[:, 38:62, 38:62] = target[:, 38:62, 38:62]
        expected = {"l1_inside": 0.0, "l1_outside": outside, "success": success}
        assert edit_scores(output, target, source) == pytest.approx(expected, abs=1e-6)


def test_pixels_beyond_the_range_count_as_the_nearest_within():
    source, target = block(slice(40, 60), -1), block(slice(40, 60), 1)
    assert edit_scores(target * 7, target, source) == {"l1_inside": 0.0, "l1_outside": 0.0, "success": 1.0}


def test_a_measure_of_an_empty_region_is_left_out():
    black, white = block(slice(0), 0), block(slice(0), 0, ground=1.0)
    assert edit_scores(black, black, black) == {"l1_outside": 0.0}  # nothing to change, no subject
    assert edit_scores(white, white, black) == {"l1_inside": 0.0, "success": 1.0}  # nothing outside
    assert edit_scores(black, white, black) == {"l1_inside": 1.0, "success": 0.0}


def test_candidates_are_64_subjects_of_one_split_that_the_scene_does_not_show():
    for one in make_cases(2, kinds=measures.BY_REFERENCE):
        for subject in one.case.asked:
            found = measures.candidates(one.case.target, subject)
            assert len(set(found)) == 64 and found[0] == subject.sprite
            assert set(found) <= set(sprites.split()[one.split == "unseen"])
            assert not set(found[1:]) & {s.sprite for s in one.case.target.subjects}
            assert found == measures.candidates(one.case.target, subject)


@pytest.mark.parametrize("kind", ["two_references", "add_by_reference_relative", "replace_by_reference"])
def test_retrieve_finds_the_subject_on_any_variant_and_rejects_another(kind):
    for one in make_cases(2, kinds=[kind]):
        scene, subject = one.case.target, one.case.asked[0]
        variants = np.random.default_rng(3).random((6, backgrounds.VARIANT), np.float32)
        right = [replace(scene, variant=variant) for variant in variants]
        other = [scene.exchange(subject, replace(subject, sprite=n)) for n in measures.candidates(scene, subject)[1:7]]
        found = measures.retrieve(scene, subject, unit(image(*right, *other)))
        assert found.tolist() == [1.0] * 6 + [0.0] * 6, one.id


def test_retrieve_finds_no_subject_that_cannot_be_seen():
    subject = Placed(sprites.split()[0][0], -60, 64, 40)
    scene = Scene(0, MIDDLE, (subject,))
    assert measures.retrieve(scene, subject, unit(image(scene, scene))).tolist() == [0.0, 0.0]


def test_the_nearest_background_is_right_for_fresh_variants():
    fresh = torch.from_numpy(np.random.default_rng(77).random((20, backgrounds.VARIANT), np.float32))
    uncovered = torch.zeros(SIDE, SIDE)
    right = [
        (measures.nearest_background(backgrounds.draw(kind, fresh, SIDE), uncovered) == kind).float().mean()
        for kind in range(backgrounds.KINDS)
    ]
    assert torch.stack(right).mean() >= 0.95 and min(right) >= 0.8


def test_the_nearest_background_does_not_look_at_subjects():
    covered = torch.zeros(SIDE, SIDE)
    covered[20:110, 20:110] = 1.0
    for kind in (1, 9, 23):
        outputs = backgrounds.draw(kind, torch.from_numpy(MIDDLE)[None], SIDE).repeat(2, 1, 1, 1)
        outputs[1, :, covered > 0] = torch.rand(3, 1)
        assert measures.nearest_background(outputs, covered).tolist() == [kind, kind]
    assert measures.nearest_background(outputs, torch.ones(SIDE, SIDE)).tolist() == [-1, -1]


# ---- table -----------------------------------------------------------------------------------------------------------


def row(kind: str, split: str, model: dict, **others: dict) -> dict:
    return {"id": f"{kind}-{split}", "kind": kind, "split": split, "model": model} | others


ROWS = [
    row("add", "seen", {"success": 1.0, "l1_outside": 0.1}, vae={"success": 1.0}, copy={"success": 0.0}),
    row("add", "seen", {"success": 0.0, "l1_outside": 0.3}, vae={"success": 1.0}, copy={"success": 0.0}),
    row("add", "unseen", {"success": 1.0}, vae={"success": 0.0}, copy={"success": 0.0}),
    row("one_reference", "unseen", {"identity": 0.5}, vae={"identity": 0.0}),
]


def test_rows_become_a_table_of_means():
    table = {(e["kind"], e["split"], e["measure"]): e for e in bench.summarise(ROWS)}
    measured = {("add", "seen", "success"): (2, 0.5), ("add", "unseen", "success"): (1, 1.0)}
    measured |= {("add", "all", "success"): (3, 2 / 3), ("add", "seen", "l1_outside"): (2, 0.2)}
    measured |= {("add", "all", "l1_outside"): (2, 0.2), ("one_reference", "unseen", "identity"): (1, 0.5)}
    measured |= {("one_reference", "all", "identity"): (1, 0.5)}
    assert table.keys() == measured.keys()
    for key, (n, mean) in measured.items():
        assert table[key]["n"] == n and table[key]["mean"] == pytest.approx(mean, abs=1e-12), key
    share, error = table["add", "all", "success"], table["add", "all", "l1_outside"]
    assert (share["low"], share["high"]) == wilson(2, 3)
    assert (error["low"], error["high"]) == t_interval([0.1, 0.3])
    assert {e["measure"] for e in bench.summarise(ROWS, "copy")} == {"success"}


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(lively) -> Path:
    return lively


@pytest.fixture(scope="module")
def pipeline(model) -> MIGEPipeline:
    return MIGEPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def chosen() -> list[BenchCase]:
    return make_cases(2, kinds=KINDS)


@pytest.fixture(scope="module")
def whole(pipeline, model, chosen, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run without a stop, a case at a time: its folder (don't write into it) and rows."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, bench.run(pipeline, chosen, folder, model=str(model), batch=1, **SETTINGS)


@pytest.fixture
def answered(monkeypatch) -> list[str]:
    """The ids of the cases that are generated from now on."""
    ids, answer = [], bench._answer

    def noted(pipeline, part, *args):
        ids.extend(one.id for one in part)
        return answer(pipeline, part, *args)

    monkeypatch.setattr(bench, "_answer", noted)
    return ids


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text("utf-8").splitlines()]


def test_a_run_gives_every_case_a_row_and_an_image(whole, chosen):
    folder, rows = whole
    assert [row["id"] for row in rows] == [one.id for one in chosen]
    assert lines(folder) == rows
    assert {path.stem for path in (folder / "images").iterdir()} == {one.id for one in chosen}
    for row, one in zip(rows, chosen, strict=True):
        versions = bench.VERSIONS if one.case.source is not None else bench.VERSIONS[:2]
        assert [name for name in row if name in bench.VERSIONS] == list(versions)
        assert (row["kind"], row["split"], row["seed"]) == (one.case.kind, one.split, one.seed)
        assert "copy" not in row or row["copy"]["success"] == 0


def test_a_row_is_what_the_saved_image_measures_and_the_pipeline_makes(whole, chosen, pipeline):
    folder, rows = whole
    for row, one in zip(rows, chosen, strict=True):
        saved = images.open_image(folder / "images" / f"{row['id']}.png")
        pixels, target = images.to_pixels(saved)[None], image(one.case.target)[0]
        assert pixels.shape == (1, 3, SIDE, SIDE)
        [scores] = measures.measure(one.case, pixels, target, source_of(one.case))
        assert row["model"] == pytest.approx(scores, abs=1e-6)
        references = images.to_pil(image(*one.case.references))
        source = None if one.case.source is None else references[one.case.source]
        settings = dict(num_inference_steps=2, guidance_scale=2.0, source_guidance_scale=1.0, seed=one.seed)
        made = pipeline(one.case.prompt, references, source, height=SIDE, width=SIDE, **settings).images[0]
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(saved, dtype=int)).max() <= 1


def test_the_size_of_a_batch_changes_no_number(whole, pipeline, model, chosen, tmp_path):
    rows = bench.run(pipeline, chosen, tmp_path, model=str(model), batch=3, **SETTINGS)
    for one, other in zip(rows, whole[1], strict=True):
        assert one.keys() == other.keys()
        for version in bench.VERSIONS:
            assert one.get(version, {}) == pytest.approx(other.get(version, {}), abs=1e-4)


def test_a_stopped_run_goes_on_where_it_was(whole, pipeline, model, chosen, tmp_path, answered):
    folder, rows = whole
    out = shutil.copytree(folder, tmp_path / "run")
    kept = (folder / "cases.jsonl").read_bytes().splitlines(keepends=True)
    (out / "cases.jsonl").write_bytes(b"".join(kept[:4]) + kept[4][:-20])  # stopped while it wrote a line
    (out / "images" / f"{chosen[1].id}.png").unlink()
    assert bench.run(pipeline, chosen, out, model=str(model), batch=1, **SETTINGS) == rows
    assert answered == [chosen[i].id for i in (1, 4, 5)]
    assert sorted(lines(out), key=str) == sorted(rows, key=str)
    for one in chosen:
        name = Path("images") / f"{one.id}.png"
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("line", ["", "[1]", "{}", '{"id": "../x", "model": {}}', "\x00"])
def test_a_foreign_line_is_named_and_its_case_made_again(
    whole, pipeline, model, chosen, tmp_path, answered, capsys, line
):
    out = shutil.copytree(whole[0], tmp_path / "out")
    lines = (out / "cases.jsonl").read_text().splitlines()
    (out / "cases.jsonl").write_text("\n".join([line, *lines[1:]]) + "\n")
    (out / "images" / f"{json.loads(lines[2])['id']}.png").write_bytes(b"")
    rows = bench.run(pipeline, chosen, out, model=model, steps=2)
    err = capsys.readouterr().err
    assert f"{out / 'cases.jsonl'}, line 1: " in err and f"{out / 'cases.jsonl'}, line 3: " in err
    assert sorted(answered) == sorted(json.loads(lines[n])["id"] for n in (0, 2))
    assert [row["id"] for row in rows] == [one.id for one in chosen]


def test_a_run_grows_and_a_finished_one_generates_nothing(whole, pipeline, model, chosen, tmp_path, answered):
    few = [chosen[3], chosen[0]]
    first = bench.run(pipeline, few, tmp_path, model=str(model), batch=1, **SETTINGS)
    assert first == [whole[1][3], whole[1][0]]
    assert bench.run(pipeline, chosen, tmp_path, model=f"{model.parent}/./model/", batch=1, **SETTINGS) == whole[1]
    assert sorted(answered) == sorted(one.id for one in chosen)
    assert bench.run(pipeline, few, tmp_path, model=str(model), batch=1, **SETTINGS) == first
    assert len(answered) == len(chosen) == len(lines(tmp_path))


@pytest.mark.parametrize(
    ("name", "new"), [("steps", 3), ("guidance", 2.5), ("source_guidance", 1.5), ("model", "another")]
)
def test_a_run_with_other_settings_is_refused(whole, pipeline, model, chosen, name, new):
    folder = whole[0]
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    settings = SETTINGS | {"model": str(model)}
    with pytest.raises(bench.BenchError) as caught:
        bench.run(pipeline, chosen, folder, **settings | {name: new})
    assert f"other settings ({name}: {settings[name]} there, {new} now)" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before


def test_a_batch_of_no_case_is_refused(pipeline, chosen, tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        bench.run(pipeline, chosen, tmp_path / "run", model="m", batch=0)
    assert not (tmp_path / "run").exists()


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_shows_every_kind_and_its_images_exist(whole, chosen, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    page = Page(bench_report.write(chosen, whole[1], out))
    for kind in KINDS:
        assert kind.replace("_", " ") in page.text
    for one in chosen:
        assert one.id in page.text
    shown = [found["src"] for found in page.all("img")]
    assert len(shown) == sum(2 * len(one.case.references) + 2 for one in chosen)  # the prompt shows images too
    files = [link for link in page.links() if not link.startswith("#")]
    assert set(shown) <= set(files) and all((out / link).is_file() for link in files)
    assert "6 of its 1664 cases" in page.text
    scores = json.loads((out / "scores.json").read_text("utf-8"))
    assert scores["cases"] == 6 and scores["of"] == 1664 and scores["complete"] is False
    assert scores["settings"]["steps"] == 2 and scores["table"] == bench_report.table(whole[1])


def test_a_report_needs_rows_of_the_given_cases(whole, chosen, tmp_path):
    with pytest.raises(ValueError, match="got no rows"):
        bench_report.write(chosen, [], tmp_path)
    with pytest.raises(ValueError, match=f"1 rows are of no case that was given, such as {chosen[-1].id}"):
        bench_report.write(chosen[:-1], whole[1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_table_sets_means_against_their_bounds():
    table = {(e["kind"], e["split"], e["measure"]): e for e in bench_report.table(ROWS)}
    entry = table["add", "all", "success"]
    assert (entry["n"], entry["of"], entry["copy"]) == (3, 104, 0.0)
    assert entry["vae"] == pytest.approx(2 / 3) and entry["of_vae"] == pytest.approx(1.0)
    assert table["add", "seen", "success"]["of"] == 52 and table["add", "seen", "success"]["of_vae"] == 0.5
    bare = table["one_reference", "unseen", "identity"]
    assert (bare["copy"], bare["vae"], bare["of_vae"]) == (None, 0.0, None)  # a share of nothing is left out
    error = table["add", "all", "l1_outside"]
    assert (error["copy"], error["vae"], error["of_vae"]) == (None, None, None)
    every = table[bench_report.EVERY, "all", "success"]
    assert (every["n"], every["of"], every["mean"]) == (3, 104, entry["mean"])


def test_the_table_for_a_terminal_marks_what_is_not_the_full_benchmark():
    part = [row | {"kind": kind} for row in ROWS for kind in tasks.KINDS]
    text = bench_report.text_table(part)
    assert max(map(len, text.splitlines())) <= 110
    assert "Not the full benchmark: 64 of its 1664 cases" in text and "Left out" not in text
    assert "2 of 52 *" in text.split("\nadd ")[1].splitlines()[0]
    assert "Left out: text_to_image, " in bench_report.text_table(ROWS)


def test_the_table_of_the_full_benchmark_marks_nothing():
    """Also where a measure is left out of some cases, as the L1 of subjects once the only one is removed."""
    scores = {name: 0.01 for name in measures.MEASURES}
    bare = {name: value for name, value in scores.items() if name != "l1_subjects"}
    rows = [
        row(kind, split, bare if kind == "remove" and n < 9 else scores, vae=scores, copy=bare)
        for kind in tasks.KINDS
        for split in ("seen", "unseen")
        for n in range(PER_KIND // 2)
    ]
    text = bench_report.text_table(rows)
    assert "*" not in text and max(map(len, text.splitlines())) <= 110
    of = {(e["kind"], e["measure"]): e["of"] for e in bench_report.table(rows) if e["split"] == "all"}
    assert (of["remove", "l1_subjects"], of["remove", "success"]) == (86, 104)
    assert (of[bench_report.EVERY, "l1_subjects"], of[bench_report.EVERY, "success"]) == (1646, 1664)


def test_cases_are_ranked_from_the_best_to_the_worst():
    worths = [
        {"success": 1.0, "identity": 1.0, "l1_inside": 0.2, "l1_outside": 0.1},
        {"success": 1.0, "identity": 0.0, "l1_inside": 0.0, "l1_outside": 0.01},
        {"success": 1.0, "identity": 0.0, "l1_inside": 0.0, "l1_outside": 0.02},
        {"success": 0.0, "identity": 0.0, "l1_inside": 0.0, "l1_outside": 0.0},
    ]
    rows = [{"id": n, "model": worth} for n, worth in enumerate(worths)]
    assert [row["id"] for row in bench_report.ranked(rows[::-1])] == [0, 1, 2, 3]
    rows = [{"id": n, "model": {"l1_subjects": error}} for n, error in enumerate((0.1, 0.2))]
    assert [row["id"] for row in bench_report.ranked(rows[::-1])] == [0, 1]


@pytest.mark.parametrize("many", range(1, 13))
def test_the_best_median_and_worst_are_different_cases(many):
    groups = bench_report._extremes([{"id": n} for n in range(many)])
    ids = [row["id"] for _, rows in groups for row in rows]
    assert ids == sorted(set(ids)) and ids[0] == 0 and ids[-1] == many - 1
    assert len(ids) == (many if many < 4 else 3 * min(3, many // 3))


def test_a_card_is_a_case_with_its_truth_beside_the_output(whole, chosen):
    folder, rows = whole
    for one, row in zip(chosen, rows, strict=True):
        case = bench_report.Card(one, folder / "images" / f"{one.id}.png", row["model"], "slow").case()
        [(label, truth)] = case.beside
        assert label == "truth" and truth.tobytes() == images.to_pil(image(one.case.target))[0].tobytes()
        assert len(case.inputs) == len(one.case.references) and case.instruction == one.case.prompt
        assert case.detail.endswith("slow") and (case.title, case.task) == (one.id, one.case.task)


# ---- the command -----------------------------------------------------------------------------------------------------


def evaluate(monkeypatch, *arguments: object) -> str | int | None:
    """Run tools/evaluate.py on the mini-bench as a script, in this process; give back what it exits with."""
    try:
        return cli_evaluate.main(["--benchmark", "mini", *map(str, arguments)]) or None
    except SystemExit as done:
        return done.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per-kind", "3"], "--per-kind 3; expected >= 1, >= 1 and an even number >= 2"),
        (["--per-kind", "0"], "--per-kind 0; expected >= 1, >= 1 and an even number >= 2"),
        (["--batch", "0"], "--batch is 0"),
        (["--steps", "-1"], "--steps -1"),
        (["--kinds", "add", "juggle"], "invalid choice: 'juggle' (choose from"),
        (["--guidance", "much"], "invalid float value: 'much'"),
    ],
)
def test_the_command_refuses_bad_arguments(monkeypatch, capsys, tmp_path, arguments, message):
    given = ["--model", "m", "--results", tmp_path / "run", *arguments]
    assert evaluate(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_a_model_that_is_not_there(monkeypatch, tmp_path):
    missing = tmp_path / "missing"
    code = evaluate(monkeypatch, "--model", missing, "--results", tmp_path / "run", "--per-kind", 2)
    assert str(code).startswith("error: ") and str(missing) in str(code)
    assert not (tmp_path / "run").exists()


def test_the_command_measures_a_model_and_refuses_other_settings(monkeypatch, capsys, model, tmp_path):
    given = ["--model", model, "--results", tmp_path / "run", "--per-kind", 2, "--kinds", "add", "--device", "cpu"]
    assert evaluate(monkeypatch, *given, "--steps", 1) is None
    out = capsys.readouterr().out
    assert "success" in out and f"{tmp_path / 'run' / 'report.html'}: the tables and images" in out
    assert len(lines(tmp_path / "run")) == 2 and (tmp_path / "run" / "scores.json").is_file()
    code = evaluate(monkeypatch, *given, "--steps", 2)
    assert str(code).startswith("error: ") and "steps: 1 there, 2 now" in str(code)


def test_a_call_for_one_kind_keeps_the_others_in_the_report(monkeypatch, model, tmp_path):
    given = ["--model", model, "--results", tmp_path / "run", "--device", "cpu", "--steps", 1]
    assert evaluate(monkeypatch, *given, "--per-kind", 4, "--kinds", "add") is None
    assert evaluate(monkeypatch, *given, "--per-kind", 2, "--kinds", "remove") is None
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["cases"] == 6
    assert {e["kind"]: e["n"] for e in scores["table"] if (e["measure"], e["split"]) == ("l1_outside", "all")} == {
        "add": 4, "remove": 2, "every kind": 6}  # fmt: skip
