"""Runs into a folder: what an image depends on, skipping, resuming, refusing, and the two kinds of noise."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mige.checkpoints.errors import CheckpointError
from mige.data.parsing import read_records
from mige.inference import results
from mige.inference import run as inference
from mige.inference.folder import write_config
from mige.inference.pipeline import MIGEPipeline
from mige.inference.run import RunError, Settings, record_generator
from mige.tasks import Task

EXAMPLES = Path(__file__).parents[2] / "example_data"
FILES = [EXAMPLES / f"{task}.json" for task in ("subject", "edit", "subject_edit")]
SETTINGS = Settings(model="tiny", dtype="float32", steps=2)


@pytest.fixture(scope="module")
def model(lively):
    return lively


@pytest.fixture(scope="module")
def pipe(model):
    return MIGEPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def records(model):
    report = inference.check(read_records(FILES), model, SETTINGS)
    assert len(report.records) == 7 and not report.errors, report.text()
    (warning,) = report.warnings
    assert "(id flower_in_a_vase)" in warning.where  # the tiny model knows no comma
    assert "1 token of the prompt" in warning.message
    return report.records


@pytest.fixture(scope="module")
def finished(pipe, records, tmp_path_factory):
    """A finished run of all records with the default batch sizes. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    inference.run(records, pipe, SETTINGS, folder)
    return folder


def images(folder):
    return {path.stem: np.array(Image.open(path)).astype(int) for path in (folder / "images").iterdir()}


def assert_same(got, want):
    """Within one grey level: rounding in another batch can tip a value over."""
    assert got.keys() == want.keys()
    for name in got:
        assert np.abs(got[name] - want[name]).max() <= 1, name
        assert (got[name] != want[name]).mean() < 0.01, name


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


class Spy:
    """Stands in for `pipe.run`: keeps what it was called with, and calls it or something else."""

    def __init__(self, monkeypatch, pipe, instead=None):
        self.calls, self.real, self.instead = [], pipe.run, instead
        monkeypatch.setattr(pipe, "run", self)

    def __call__(self, samples, noise, **kwargs):
        self.calls.append((samples, noise))
        return (self.instead or self.real)(samples, noise, **kwargs)

    @property
    def latents(self):
        return [torch.stack([n.latent for n in noise]) for _, noise in self.calls]


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_run_folder(finished, records):
    names = {path.name for path in finished.iterdir()}
    assert names == {".lock", "config.json", "results.jsonl", "images", "contact_sheet.png", "index.html", "inputs"}
    made = images(finished)
    assert made.keys() == {record.id for record in records}
    assert all(image.shape == (128, 128, 3) and image.std() > 5 for image in made.values())
    assert len({image.tobytes() for image in made.values()}) == 7
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["steps"] == 2 and config["settings"]["model"] == "tiny"
    assert config["versions"].keys() == {"mige", "torch", "diffusers", "transformers", "python"}
    by_id = {line["id"]: line for line in lines(finished)}
    for record in records:
        line = by_id[record.id]
        assert line["task"] == record.task and line["image"] == f"images/{record.id}.png"
        assert line["record"]["prompt"] == record.prompt and line["size"] == [128, 128]
        assert (line["seed"], line["steps"], line["source_guidance"]) == (0, 2, 1.0)
        assert line["guidance"] == (7.0 if record.task is Task.SUBJECT else 5.0)
    page = (finished / "index.html").read_text()
    assert all(f"images/{record.id}.png" in page for record in records)


def test_the_defaults_are_the_official_batches(pipe, records, tmp_path, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    many = [replace(records[0], id=f"r{n}") for n in range(6)] + [r for r in records if r.task is not Task.SUBJECT]
    inference.run(many, pipe, replace(SETTINGS, steps=1), tmp_path)
    assert [len(samples) for samples, _ in spy.calls] == [5, 1, 3, 2]  # 5 subjects, 25 edits, a task at a time


# ---- what an image depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_not_on_the_batch_size(pipe, records, finished, tmp_path, batch_size):
    inference.run(records, pipe, SETTINGS, tmp_path, batch_size=batch_size)
    assert_same(images(tmp_path), images(finished))


def test_not_on_order_nor_on_the_other_records(pipe, records, finished, tmp_path):
    want = images(finished)
    inference.run(records[::-1], pipe, SETTINGS, tmp_path / "reversed", batch_size=2)
    assert_same(images(tmp_path / "reversed"), want)
    inference.run(records[1::2], pipe, SETTINGS, tmp_path / "some", batch_size=2)
    assert_same(images(tmp_path / "some"), {record.id: want[record.id] for record in records[1::2]})


def test_on_the_seed_and_the_id(pipe, records, finished, tmp_path):
    want = images(finished)[records[0].id]
    inference.run(records[:1], pipe, replace(SETTINGS, seed=1), tmp_path / "seed")
    inference.run([replace(records[0], id="other")], pipe, SETTINGS, tmp_path / "id")
    for folder in ("seed", "id"):
        (got,) = images(tmp_path / folder).values()
        assert np.abs(got - want).mean() > 1


def test_generators_of_records():
    first = torch.randn(3, generator=record_generator(0, "cat"))
    assert torch.equal(first, torch.randn(3, generator=record_generator(0, "cat")))
    for other in ((1, "cat"), (0, "dog")):
        assert not torch.equal(first, torch.randn(3, generator=record_generator(*other)))
    # a released number: it must not change from version to version
    assert record_generator(0, "cat").initial_seed() == 8534018142825387843


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_but_the_missing(pipe, records, finished, tmp_path, monkeypatch):
    inference.run(records, pipe, SETTINGS, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    log = (tmp_path / "results.jsonl").read_bytes()
    spy = Spy(monkeypatch, pipe)
    inference.run(records, pipe, SETTINGS, tmp_path)
    assert spy.calls == [] and (tmp_path / "results.jsonl").read_bytes() == log
    lost = tmp_path / "images" / f"{records[3].id}.png"
    lost.unlink()
    inference.run(records, pipe, SETTINGS, tmp_path)
    assert [len(samples) for samples, _ in spy.calls] == [1] and len(lines(tmp_path)) == 7
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {lost.name}
    assert_same(images(tmp_path), images(finished))


@pytest.mark.parametrize("cut", [1, 30, "inside a character"])
def test_a_half_written_last_line_runs_again(pipe, records, tmp_path, monkeypatch, cut):
    two = [replace(records[0], id="a"), replace(records[0], id="b", prompt="a<imagehere>beside a<imagehere>, été")]
    inference.run(two, pipe, SETTINGS, tmp_path, batch_size=1)
    log = tmp_path / "results.jsonl"
    whole = log.read_bytes()
    end = whole.rindex("é".encode()) + 1 if cut == "inside a character" else len(whole) - cut
    log.write_bytes(whole[:end])
    spy = Spy(monkeypatch, pipe)
    inference.run(two, pipe, SETTINGS, tmp_path, batch_size=1)
    assert [samples[0].prompt for samples, _ in spy.calls] == [two[1].prompt]
    assert [line["id"] for line in lines(tmp_path)] == ["a", "b"]


def test_an_interrupted_run_keeps_what_was_finished(pipe, records, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spy = Spy(patch, pipe)

        def stop_at_the_third(*args, **kwargs):
            if len(spy.calls) == 3:
                raise KeyboardInterrupt
            return spy.real(*args, **kwargs)

        spy.instead = stop_at_the_third
        with pytest.raises(KeyboardInterrupt):
            inference.run(records, pipe, SETTINGS, tmp_path, batch_size=1)
    assert len(lines(tmp_path)) == 2 and not (tmp_path / "index.html").exists()
    inference.run(records, pipe, SETTINGS, tmp_path, batch_size=1)
    assert len(lines(tmp_path)) == 7
    assert_same(images(tmp_path), images(finished))


def test_a_folder_takes_more_records_later(pipe, records, tmp_path):
    inference.run(records[:2], pipe, SETTINGS, tmp_path)
    inference.run(records[2:4], pipe, SETTINGS, tmp_path)
    assert len(lines(tmp_path)) == 4


# ---- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"steps": 3}, {"guidance": 2.0}, {"source_guidance": 2.0}, {"height": 64}, {"noise": "official"}],
)
def test_other_settings_in_the_same_folder(pipe, records, finished, change):
    before = (finished / "config.json").read_bytes()
    (key,) = change
    with pytest.raises(RunError, match=f"other settings \\({key}: .* there, {change[key]} now\\): use another"):
        inference.run(records, pipe, replace(SETTINGS, **change), finished)
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["model", "lora"])
def test_one_folder_however_it_is_written(tmp_path, name):
    """`--model x/` resumes a run of `--model x`; another folder does not."""
    write_config(tmp_path, replace(SETTINGS, **{name: "models/x"}))
    for spelling in ("models/x", "models/x/", "./models/x", "models//x/."):
        inference.check_folder(tmp_path, replace(SETTINGS, **{name: spelling}), [])
    for other in ("models/y", "/models/x", "x", "models/x/x"):
        with pytest.raises(RunError, match=f"{name}: models/x there, {other} now"):
            inference.check_folder(tmp_path, replace(SETTINGS, **{name: other}), [])


@pytest.mark.parametrize("change", [{"prompt": "another<imagehere>"}, {"references": ()}, {"edit_type": "global"}])
def test_another_record_of_the_same_id(pipe, records, finished, change):
    edit = next(record for record in records if record.task is Task.EDIT)
    with pytest.raises(RunError, match=f"finished '{edit.id}' with another prompt or other images"):
        inference.run([replace(edit, **change)], pipe, SETTINGS, finished)


def test_a_foreign_config_is_not_taken_for_ours(pipe, records, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(RunError, match="holds a run with other settings"):
        inference.run(records, pipe, SETTINGS, tmp_path)


def test_a_bad_size_does_not_claim_the_folder(pipe, records, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="multiples of 16 px, got 100 x 128"):
        inference.run(records, pipe, replace(SETTINGS, height=100), folder)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        inference.run(records, pipe, SETTINGS, folder, batch_size=-1)
    assert not folder.exists()
    inference.run(records[:1], pipe, replace(SETTINGS, height=64), folder)
    assert images(folder)[records[0].id].shape == (64, 128, 3)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="noise must be 'record' or 'official', got 'x'"):
        Settings("m", "float32", noise="x")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Settings("m", "float32", steps=0)


def test_out_of_memory_names_the_records(pipe, records, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    Spy(monkeypatch, pipe, fail)
    with pytest.raises(RunError) as caught:
        inference.run(records[:2], pipe, SETTINGS, tmp_path)
    message = str(caught.value)
    assert f"out of memory on {records[0].id}, {records[1].id} (2 at a time, up to 2 references each)" in message
    assert "--batch-size" in message
    assert lines(tmp_path) == [] and list((tmp_path / "images").iterdir()) == []


def test_an_image_of_nan_names_the_records(pipe, records, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe, "denoise", lambda _, noise, *__, **___: torch.full((len(noise), 4, 16, 16), float("nan")))
    with pytest.raises(RunError, match=f"{records[0].id}: .*NaN"):
        inference.run(records[:1], pipe, SETTINGS, tmp_path)
    assert lines(tmp_path) == []


def test_check_finds_everything_without_stopping(model, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((EXAMPLES / "images" / "cat.jpg").read_bytes()[:2000])
    cat = str(EXAMPLES / "images" / "cat.jpg")
    rows = [
        {"multi_prompt": "a<imagehere>", "entity_path": [str(broken)]},
        {"multi_prompt": "a<imagehere>" + " word" * 90 + "<imagehere>", "entity_path": [cat, cat]},
        {"multi_prompt": "a<imagehere>", "entity_path": [str(tmp_path / "missing.jpg")]},
        {"multi_prompt": "a<imagehere>", "entity_path": [cat], "image": "no_target_is_needed.jpg"},
        {"multi_prompt": "a<imagehere>" + " wonderful" * 60, "entity_path": [cat]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    report = inference.check(read_records([tmp_path / "x.json"]), model, SETTINGS)
    assert [record.id for record in report.records] == ["00004", "00005"]
    assert sorted(error.where.split("record ")[1][0] for error in report.errors) == ["1", "2", "3"]
    (warning,) = [warning for warning in report.warnings if "record 5" in warning.where]
    assert "are cut (limit 128)" in warning.message
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        inference.check(report, tmp_path, SETTINGS)


def test_images_are_opened_while_the_chunk_before_is_computed(records):
    opened = []
    known = SimpleNamespace(sample=lambda record: opened.append(record.id) or record.id)
    with ThreadPoolExecutor(1) as reader:
        chunks = inference._opened_ahead(((records[n : n + 2], None) for n in (0, 2, 4)), reader, known)
        for start in (0, 2, 4):
            chunk, _, samples = next(chunks)
            assert samples.result() == [record.id for record in chunk] == [r.id for r in records[start : start + 2]]
            reader.submit(int).result()  # everything asked for is done
            assert len(opened) == min(start + 4, 6)
        assert list(chunks) == []


def test_images_of_a_chunk_are_saved_together_and_their_lines_in_order(pipe, records, tmp_path, monkeypatch):
    """The first image is saved only when the second one has been."""
    chunk = [record for record in records if record.task is Task.EDIT][:2]
    save, second = results.images.save_image, threading.Event()

    def together(image, path, **options):
        if path == tmp_path / f"images/{chunk[0].id}.png":
            assert second.wait(20)
        save(image, path, **options)
        if path == tmp_path / f"images/{chunk[1].id}.png":
            second.set()

    monkeypatch.setattr(results.images, "save_image", together)
    inference.run(chunk, pipe, SETTINGS, tmp_path)
    assert [line["id"] for line in lines(tmp_path)] == [record.id for record in chunk]


def test_a_folder_of_before_a_setting_was_there_goes_on(pipe, records, tmp_path):
    inference.run(records[:1], pipe, SETTINGS, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["reuse"], config["settings"]["vae_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inference.check_folder(tmp_path, SETTINGS, records[:1])
    with pytest.raises(RunError, match="vae_dtype: float32 there, bfloat16 now"):
        inference.check_folder(tmp_path, replace(SETTINGS, vae_dtype="bfloat16"), records[:1])


# ---- the released noise ----------------------------------------------------------------------------------------------


def test_the_official_noise_is_drawn_a_chunk_at_a_time(pipe, records, tmp_path, monkeypatch):
    edits = [record for record in records if record.task is Task.EDIT]
    official, whole, part = (replace(SETTINGS, noise="official", seed=5), tmp_path / "whole", tmp_path / "part")
    spy = Spy(monkeypatch, pipe)
    inference.run(edits, pipe, official, whole, batch_size=2)
    random = torch.Generator().manual_seed(5)
    wanted = [torch.randn(many, 4, 16, 16, generator=random) for many in (2, 1)]
    assert all(torch.equal(got, want) for got, want in zip(spy.latents, wanted, strict=True))
    references = [n.references[0] for _, noise in spy.calls for n in noise]

    spy.calls.clear()  # resume after the first record of the first chunk, and after the whole first chunk
    inference.run(edits, pipe, official, part, batch_size=2)
    for lost in (edits[1:], edits[2:]):
        for record in lost:
            (part / "images" / f"{record.id}.png").unlink()
        spy.calls.clear()
        inference.run(edits, pipe, official, part, batch_size=2)
        got = torch.cat(spy.latents)
        assert torch.equal(got, torch.cat(wanted)[-len(lost) :])
        again = [n.references[0] for _, noise in spy.calls for n in noise]
        assert all(torch.equal(a, b) for a, b in zip(again, references[-len(lost) :], strict=True))
    assert_same(images(part), images(whole))


def test_the_official_noise_depends_on_the_chunk_as_it_did_there(pipe, records, tmp_path, monkeypatch):
    subjects = [record for record in records if record.task is Task.SUBJECT]
    spy = Spy(monkeypatch, pipe)
    inference.run(subjects[::-1], pipe, replace(SETTINGS, noise="official"), tmp_path)
    want = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spy.latents[0], want)  # by place, whatever the ids
