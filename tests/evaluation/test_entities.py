"""Entities cut out of images: the rule by hand, the two networks at small size, a run that is stopped."""

import json
import threading

import evaluation_files as files
import numpy as np
import pytest
import torch
from conftest import image_size, run_here
from PIL import Image

from mige.evaluation import entities, outputs, scoring
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.prepared import prepare, read
from mige.evaluation.entities import Entity, EntityFinder, best_box, caption, extract
from mige.utils.files import folder_lock

torch.set_num_threads(1)


def test_captions_end_with_a_stop():
    assert caption(" Red Dog ") == caption("red dog.") == "red dog."


def test_the_box_of_the_highest_score():
    assert best_box([[0, 0, 1, 1], [2, 2, 3, 3]], [0.4, 0.6]) == ((2, 2, 3, 3), 0.6)
    assert best_box([], []) is None


def test_crop_by_hand():
    """The object on black, the box's last row and column with it."""
    image = Image.fromarray(np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3))
    mask = np.zeros((5, 6), dtype=bool)
    mask[1, 2] = mask[3, 4] = True
    crop = np.asarray(Entity((1.7, 1.2, 4.9, 3.5), 0.9, mask).crop(image))
    expected = np.where(mask[..., None], np.asarray(image), 0)[1:4, 1:5]
    assert np.array_equal(crop, expected)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finder")
    return files.grounding_dino(folder / "detector"), files.sam(folder / "segmenter")


def test_small_networks(weights, monkeypatch):
    finder = EntityFinder(*map(str, weights))
    images = [files.image(1, (48, 40)), files.image(2, (48, 40))]
    monkeypatch.setattr(entities, "BOX_THRESHOLD", 0.0)  # random weights give scores of any height
    found = finder.find(images, ["dog", "a cat"])
    for entity, image in zip(found, images, strict=True):
        assert entity.mask.shape == (40, 48) and entity.mask.dtype == bool
        assert 0 < entity.score <= 1 and len(entity.box) == 4
        assert entity.crop(image).mode == "RGB" and entity.drawn(image).size == image.size
    alone = finder.find(images[1:], ["a cat"])[0]
    assert alone.box == pytest.approx(found[1].box, abs=1e-2) and alone.score == pytest.approx(found[1].score, abs=1e-4)
    monkeypatch.setattr(entities, "BOX_THRESHOLD", 1.0)
    assert finder.find(images, ["dog", "a cat"]) == [None, None]


class Finder:
    """Finds the left half of an image, but nothing in those whose object is in `unseen`."""

    def __init__(self, *unseen: str, fail_at: int | None = None):
        self.unseen, self.calls, self.fail_at = unseen, 0, fail_at

    def find(self, images, names):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [None if name in self.unseen else self._half(image) for image, name in zip(images, names, strict=True)]

    def _half(self, image):
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[:, : image.width // 2] = True
        return Entity((0, 0, image.width // 2 - 1, image.height - 1), 0.5, mask)


@pytest.fixture
def results(tmp_path):
    prepare("migebench", Options(str(files.migebench(tmp_path / "data"))), tmp_path / "r" / "benchmark")
    prepared = read(tmp_path / "r" / "benchmark")
    for n, row in enumerate(prepared.rows):
        files.save(tmp_path / "r" / "images" / f"{row['id']}.png", 500 + n, (64, 64))
    prepared.rows[4]["score"]["object"] = "Ghost"
    return prepared, outputs.outputs(prepared, tmp_path / "r")


def test_a_run_that_is_stopped_goes_on(results, tmp_path):
    prepared, images = results
    with pytest.raises(KeyboardInterrupt):
        extract(prepared.rows, images, Finder("Ghost", fail_at=3), tmp_path / "e", batch=2)
    with (tmp_path / "e" / "entities.jsonl").open("a") as file:
        file.write('{"id": "repl')  # cut by a kill
    finder = Finder("Ghost")
    assert extract(prepared.rows, images, finder, tmp_path / "e", batch=2) == (5, 6)
    assert finder.calls == 1
    lines = [json.loads(line) for line in (tmp_path / "e" / "entities.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in prepared.rows]
    assert lines[4]["crop"] is None and lines[4]["score"] is None
    assert image_size(tmp_path / "e" / lines[0]["crop"]) == (32, 64)
    html = (tmp_path / "e" / "index.html").read_text()
    assert "Nothing was found in 1 of 6 images (16.7%)" in html and "Not found" in html


def test_entity_scores_count_failures_in_three_ways(results, tmp_path):
    from mige.evaluation import backbones, page, summary

    prepared, images = results
    extract(prepared.rows, images, Finder("Ghost"), tmp_path / "e")
    clip = backbones.Clip("ViT-B/32", str(files.clip(tmp_path / "clip")))
    dino = backbones.Dino("DINO ViT-S/16", str(files.dino(tmp_path / "dino.safetensors")))
    dino.model.blocks = dino.model.blocks[:1]  # random all of them: eleven more would only take time
    crops = outputs.crops(prepared, tmp_path / "e")
    networks = {"clip": clip, "dino": dino}
    scores = scoring.score(prepared, images, networks, tmp_path / "cache", entities=crops)
    first, missed = scores.rows[0], scores.rows[4]
    pair = [Image.open(crops[first["id"]]), Image.open(prepared.rows[0]["score"]["entity"])]
    whole, ways = (
        Image.open(images[missed["id"]]),
        ("entity DINO (not found: whole image)", "entity DINO (not found: 0)"),
    )

    def cosine(*pair: Image.Image) -> float:
        a, b = dino.encode(torch.stack(list(map(dino.transform.levels, pair)))).double()
        return float(a @ b / (a.norm() * b.norm()))

    for name in ("entity DINO", *ways):  # of what was found they are the same
        assert first["model"][name] == pytest.approx(cosine(*pair), abs=1e-6)
    assert missed["entity_found"] is False and "entity DINO" not in missed["model"] and "DINO" in missed["model"]
    expected = cosine(whole, Image.open(prepared.rows[4]["score"]["entity"]))
    assert missed["model"][ways[0]] == pytest.approx(expected, abs=1e-6) and missed["model"][ways[1]] == 0
    table = summary.table(prepared, scores.rows)
    counts = {
        entry["measure"]: entry["n"] for entry in table if (entry["version"], entry["subset"]) == ("model", "all")
    }
    assert counts["DINO"] == 6 and counts["entity DINO"] == counts["entity CLIP-I"] == 5
    assert {counts[f"entity {of} (not found: {how})"] for of in ("DINO", "CLIP-I") for how in ("whole image", "0")} == {
        6
    }
    assert "No entity was found in 1 outputs (16.7%)" in page.note(table, scores.notes, scores.rows)


def test_an_unfinished_extraction_is_refused(results, tmp_path):
    prepared, images = results
    with pytest.raises(KeyboardInterrupt):
        extract(prepared.rows, images, Finder(fail_at=2), tmp_path / "e", batch=4)
    with pytest.raises(BenchmarkError, match=r"2 ids missing \(replace-1, replace-2\)"):
        outputs.crops(prepared, tmp_path / "e")
    with pytest.raises(BenchmarkError, match=r"run tools/extract_entities\.py first"):
        outputs.crops(prepared, tmp_path / "nowhere")


def test_the_tool(results, tmp_path, weights):
    arguments = ("--detector", weights[0], "--segmenter", weights[1], "--device", "cpu")
    done = run_here("tools/extract_entities.py", "--results", tmp_path / "r", *arguments)
    assert done.returncode == 0, done.stderr
    assert "of 6 objects found" in done.stdout
    assert len((tmp_path / "r" / "entities" / "entities.jsonl").read_text().splitlines()) == 6
    prepare("magicbrush", Options(str(files.magicbrush(tmp_path / "mb"))), tmp_path / "b" / "benchmark")
    done = run_here("tools/extract_entities.py", "--results", tmp_path / "b", *arguments)
    assert done.returncode == 1 and "magicbrush names no objects" in done.stderr


def test_the_tool_refuses_a_folder_that_another_run_writes(results, tmp_path, weights):
    out = tmp_path / "r" / "entities"
    out.mkdir()
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock(out):
            held.set()
            end.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    arguments = ("--detector", weights[0], "--segmenter", weights[1], "--device", "cpu")
    try:
        done = run_here("tools/extract_entities.py", "--results", tmp_path / "r", *arguments)
    finally:
        end.set()
        other.join()
    assert done.returncode == 1 and f"{out}: another run writes here; wait for it to end" in done.stderr
    assert not (out / "entities.jsonl").exists() and not list((out / "crops").iterdir())
