"""The public sources: small files in their real layouts, through the script; damaged rows; kills; a full disk."""

import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image
from processes import start_python

from mige.cli import prepare_data
from mige.data.checks import check_images
from mige.data.parsing import read_records
from mige.data.prepare import run as preparing
from mige.data.prepare import sources
from mige.data.prepare.run import prepare
from mige.data.prepare.sources import Settings, SkippedSample, SourceError, edit_prompt, subject_prompt
from mige.tasks import Task
from mige.utils.files import FolderInUseError, folder_lock
from mige.utils.images import open_image

SCRIPT = Path(__file__).parents[2] / "tools" / "prepare_data.py"
IMAGE, TEXT = datasets.Image(), Value("string")
IP2P = Features(
    {
        "original_prompt": TEXT,
        "original_image": IMAGE,
        "edit_prompt": TEXT,
        "edited_prompt": TEXT,
        "edited_image": IMAGE,
    }
)
MAGICBRUSH = Features(
    {
        "img_id": TEXT,
        "turn_index": Value("int32"),
        "source_img": IMAGE,
        "mask_img": IMAGE,
        "instruction": TEXT,
        "target_img": IMAGE,
    }
)
SUBJECTS = Features(
    {
        "image": IMAGE,
        "collection": TEXT,
        "quality_assessment": {name: Value("int64") for name in sources.QUALITY},
        "description": {
            **dict.fromkeys(("item", "description_0", "description_1", "category"), TEXT),
            "description_valid": Value("bool"),
        },
    }
)


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(colour, size=(24, 16), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def cell(data):
    return {"bytes": data, "path": None}


def parquet(path, rows, features):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def ip2p_row(number, **changes):
    row = {
        "original_prompt": "a hill",
        "original_image": cell(encoded((number % 256, 0, 0))),
        "edit_prompt": f"make it number {number}",
        "edited_prompt": "a number",
        "edited_image": cell(encoded((0, number % 256, 0))),
    }
    return row | changes


def script(monkeypatch, *arguments):
    """Run tools/prepare_data.py in this process."""
    assert prepare_data.main([*map(str, arguments)]) == 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def sound(folder):
    """The folder's records, read as training reads them: no error, every image opens, every record has a target."""
    records = read_records([folder / "records.jsonl"]).raise_if_errors()
    assert not [issue for issue in check_images(records) if issue.fatal]
    assert all(record.target for record in records)
    return records


def contents(folder):
    """Every file of a prepared folder by relative path, less the reader's position."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    files["summary.json"] = {k: v for k, v in json.loads(files["summary.json"]).items() if k != "position"}
    return files


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "prompt"),
    [
        ("make it snow.", "make it snow in<imagehere>"),
        ("Turn the photo into a sketch", "Turn <imagehere> into a sketch"),
        ("make this picture\n old, the image must fade", "make <imagehere> old, the image must fade"),
        ("replace the photographer", "replace the photographer in<imagehere>"),
        ("hide the photographer in The Image", "hide the photographer in <imagehere>"),
        ("edit <imagehere> now", "edit <imagehere> now"),
    ],
)
def test_edit_prompt(instruction, prompt):
    assert edit_prompt(instruction) == prompt


@pytest.mark.parametrize(
    ("description", "item", "prompt"),
    [
        ("The Eames Lounge Chair is in a room.", "Eames Lounge Chair", "The<imagehere>is in a room."),
        ("Next to a red  MUG, the red mug's twin", "A red mug.", "Next to a<imagehere>, the red mug's twin"),
        ("The mug's handle", "mug", "The<imagehere>'s handle"),
        ("A C++ (2nd) book lies open", "C++ (2nd) book", "A<imagehere>lies open"),
    ],
)
def test_subject_prompt(description, item, prompt):
    assert subject_prompt(description, item) == prompt


@pytest.mark.parametrize(
    ("make", "arguments", "reason"),
    [
        (edit_prompt, (None,), "empty instruction"),
        (edit_prompt, ("  \n",), "empty instruction"),
        (edit_prompt, (7,), "instruction is no text"),
        (edit_prompt, ("word " * 88,), "<imagehere> is not within the first 88 words"),
        (subject_prompt, ("two mugs on mugshots", "mug"), "description does not mention its item"),
        (subject_prompt, ("a thing", "the "), "description does not mention its item"),
        (subject_prompt, ("a mug", None), "empty subject name"),
        (subject_prompt, ("", "mug"), "empty description"),
    ],
)
def test_prompts_that_cannot_be_made(make, arguments, reason):
    with pytest.raises(SkippedSample) as skipped:
        make(*arguments)
    assert skipped.value.reason == reason


# ---- the four sources ------------------------------------------------------------------------------------------------


def test_instructpix2pix(tmp_path, monkeypatch, capsys):
    jpeg = encoded("blue", (32, 24), "JPEG")
    rows = [
        ip2p_row(0, original_image=cell(jpeg), edit_prompt="as if the photo were old"),
        ip2p_row(1, edit_prompt=" "),
        ip2p_row(2, edited_image=cell(encoded("red")[:60])),
        ip2p_row(3, original_image=cell(b"<html>not found</html>")),
        ip2p_row(4, original_image=None),
    ]
    data = tmp_path / "hub" / "data"
    parquet(data / "train-00000-of-00002-57cebf95b4a9170c.parquet", rows, IP2P)
    parquet(
        data / "train-00001-of-00002-f83a5c837b1853c5.parquet",
        [ip2p_row(5, edited_image=cell(encoded("red", (9, 5), "BMP")))],
        IP2P,
    )
    out = tmp_path / "out"
    script(monkeypatch, "instructpix2pix", "--input", data.parent, "--output", out)
    first, last = sound(out)
    assert first.task is Task.EDIT and first.source == first.references[0]
    row = lines(out / "records.jsonl")[0]
    stem = "images/0000/instructpix2pix-train-0000000"
    assert row == {
        "id": "instructpix2pix-train-0000000",
        "row": 0,
        "image": f"{stem}_target.png",
        "width": 24,
        "height": 16,
        "entity_path": [f"{stem}_source.jpg"],
        "source_path": [f"{stem}_source.jpg"],
        "multi_prompt": "as if <imagehere> were old",
        "task": "edit",
        "original_instruction": "as if the photo were old",
        "input_caption": "a hill",
        "output_caption": "a number",
        "origin": "instructpix2pix/train",
    }
    assert first.source.read_bytes() == jpeg, "kept bit for bit"
    assert last.id.endswith("0000005") and last.target.suffix == ".png" and open_image(last.target).size == (9, 5)
    assert [(line["row"], line["reason"]) for line in lines(out / "skipped.jsonl")] == [
        (1, "empty instruction"),
        (2, "damaged image"),
        (3, "damaged image"),
        (4, "missing image"),
    ]
    found = summary(out)
    assert (found["finished"], found["rows"], found["written"]) == (True, 6, 2)
    assert found["skipped"] == {"damaged image": 2, "empty instruction": 1, "missing image": 1}
    assert "6 rows read, 2 records written, 4 samples skipped (finished)" in capsys.readouterr().out
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.raw"))


def test_magicbrush_turns_and_splits(tmp_path, monkeypatch):
    images = [encoded(colour, (20, 20)) for colour in ("red", "green", "blue")]
    rows = [
        {
            "img_id": "326242",
            "turn_index": turn,
            "source_img": cell(images[turn - 1]),
            "mask_img": cell(b"a mask is not read"),
            "instruction": f"turn {turn}",
            "target_img": cell(images[turn]),
        }
        for turn in (1, 2)
    ]
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, MAGICBRUSH)
    parquet(tmp_path / "data" / "dev-00000-of-00001.parquet", rows[:1], MAGICBRUSH)
    for split, turns in (("train", [1, 2]), ("dev", [1])):
        out = tmp_path / split
        script(monkeypatch, "magicbrush", "--input", tmp_path / "data", "--split", split, "--output", out)
        records = sound(out)
        assert [record.extra["turn_index"] for record in records] == turns
        assert {record.extra["img_id"] for record in records} == {"326242"}
        assert [record.target.read_bytes() for record in records] == [images[turn] for turn in turns]
    both = read_records([tmp_path / "train" / "records.jsonl", tmp_path / "dev" / "records.jsonl"])
    assert len(both.raise_if_errors()) == 3 and not both.warnings, "ids of different splits do not collide"


def composite(size, boxes, kind="PNG"):
    """Views as two filled squares of 512 px on a green ground: any green in a view shows a wrong cut."""
    image = Image.new("RGB", size, (0, 255, 0))
    for box, colour in zip(boxes, ((255, 0, 0), (0, 0, 255)), strict=True):
        image.paste(colour, (*box, box[0] + 512, box[1] + 512))
    file = io.BytesIO()
    image.save(file, kind)
    return cell(file.getvalue())


def subject_row(image, item="red mug", texts=("A red mug on a desk", "In snow, the Red Mug"), score=5, **changes):
    description = {"item": item, "description_0": texts[0], "description_1": texts[1], "category": "x"}
    return {
        "image": image,
        "collection": "collection_2",
        "quality_assessment": dict.fromkeys(sources.QUALITY, score),
        "description": description | {"description_valid": True},
    } | changes


@pytest.mark.parametrize(
    ("size", "boxes"),
    [((1056, 528), [(8, 8), (536, 8)]), ((1072, 544), [(16, 16), (544, 16)]), ((1024, 512), [(0, 0), (512, 0)])],
)
def test_subjects200k_views_are_cut_exactly(tmp_path, size, boxes):
    file = parquet(tmp_path / "train-0.parquet", [subject_row(composite(size, boxes))], SUBJECTS)
    prepare(Settings("subjects200k", (str(file),)), tmp_path / "out", progress=False)
    first, second = sound(tmp_path / "out")
    for record, colour, other in ((first, (255, 0, 0), (0, 0, 255)), (second, (0, 0, 255), (255, 0, 0))):
        for path, expected in ((record.target, colour), (record.references[0], other)):
            pixels = np.asarray(open_image(path), dtype=int)
            assert pixels.shape == (512, 512, 3)
            assert abs(pixels - expected).max() <= 2, "JPEG of a flat colour"


def test_subjects200k(tmp_path, monkeypatch):
    good = composite((1056, 528), [(8, 8), (536, 8)], "JPEG")
    rows = [
        subject_row(good),
        subject_row(good, texts=("A cup on a desk", "The red mug in snow")),
        subject_row(good, texts=("A cup", "A pot")),
        subject_row(good, score=4),
        subject_row(good, quality_assessment=None),
        subject_row(good, description=subject_row(good)["description"] | {"description_valid": False}),
        subject_row(cell(encoded("red", (640, 480)))),
        subject_row(cell(encoded("red", (1056, 528))[:90])),
        subject_row(good, item=None),
    ]
    file = parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, SUBJECTS)
    out = tmp_path / "out"
    script(monkeypatch, "subjects200k", "--input", file, "--output", out)
    records = sound(out)
    assert [(r.id[-9:], r.prompt, r.task) for r in records] == [
        ("0000000-0", "A<imagehere>on a desk", Task.SUBJECT),
        ("0000000-1", "In snow, the<imagehere>", Task.SUBJECT),
        ("0000001-1", "The<imagehere>in snow", Task.SUBJECT),
    ]
    assert records[0].target == records[1].references[0] and records[1].target == records[0].references[0]
    assert summary(out)["skipped"] == {
        "composite of unexpected size": 1,
        "damaged image": 1,
        "description does not mention its item": 3,
        "description marked as not valid": 1,
        "empty subject name": 2,
        "no quality scores": 1,
        "quality below 5": 1,
    }
    lenient = tmp_path / "lenient"
    script(monkeypatch, "subjects200k", "--input", file, "--output", lenient, "--min-quality", 4, "--name", "again")
    assert summary(lenient)["written"] == 5
    both = read_records([out / "records.jsonl", lenient / "records.jsonl"])
    assert len(both.raise_if_errors()) == 8 and not both.warnings, "two sets of one source, told apart by --name"


def seed_folder(root):
    """SEED-Data-Edit as extracted: single edits of parts 1 and 2, sessions of part 3."""
    single = {"source_image": "source_images/a.jpg", "target_image": "target_images/a.jpg"}
    session = {
        "source_image": "d/0.png",
        "instruction_1": "red",
        "edit_image_1": "d/1.png",
        "inverse_instruction_1": "x",
    }
    session |= {"instruction_2": "blue", "edit_image_2": "d/2.png", "inverse_instruction_2": "y"}
    parts = {
        "auto_editing/openimages": [single | {"instruction": "Erase the car."}, single | {"instruction": None}],
        "real_editing": [
            single | {"instruction": "fix", "target_image": "target_images/gone.jpg"},
            "{half a line",
            '{"a":' * 5000 + "1" + "}" * 5000,
            {"source_image": "a.jpg"},
            single | {"instruction": "fix", "source_image": "broken.jpg"},
        ],
        "multi_turn_editing": [session, session | {"edit_image_3": "d/0.png"}],
    }
    for part, rows in parts.items():
        annotations = root / part / "annotations"
        annotations.mkdir(parents=True)
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (annotations / "split_0001.jsonl").write_text(text + "\n\n")
        for name in ("source_images/a.jpg", "target_images/a.jpg", "d/0.png", "d/1.png", "d/2.png"):
            image = root / part / "images" / name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(encoded("red", (12, 10)))
        (root / part / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return root


def test_seed_data_edit(tmp_path, monkeypatch):
    root, out = seed_folder(tmp_path / "SEED"), tmp_path / "out"
    script(monkeypatch, "seed_data_edit", "--input", root, "--output", out)
    records = sound(out)
    images = root / "multi_turn_editing" / "images" / "d"
    steps = [(r.prompt, r.source.resolve().name, r.target.resolve().name) for r in records]
    chain = [("red in<imagehere>", "0.png", "1.png"), ("blue in<imagehere>", "1.png", "2.png")]
    assert steps == [("Erase the car in<imagehere>", "a.jpg", "a.jpg"), *chain, *chain]
    assert records[1].source.resolve() == (images / "0.png").resolve(), "images stay where they are"
    assert not (out / "images").exists()
    assert [record.extra["turn_index"] for record in records] == [1, 1, 2, 1, 2]
    skipped = lines(out / "skipped.jsonl")
    assert sorted(line["reason"] for line in skipped) == [
        "damaged image",
        "empty instruction",
        "empty instruction",
        "malformed JSON",
        "malformed JSON",
        "missing image",
        "neither instruction nor instruction_1",
    ]
    assert "real_editing/split_0001.jsonl, line 2" in next(
        x["detail"] for x in skipped if x["reason"] == "malformed JSON"
    )


# ---- what cannot start -----------------------------------------------------------------------------------------------


def test_missing_column_is_named_with_what_is_there(tmp_path, monkeypatch):
    file = parquet(tmp_path / "x.parquet", [{"input_image": None, "edit_prompt": "x"}], None)
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "instructpix2pix", "--input", file, "--output", tmp_path / "out")
    message = str(stopped.value)
    assert "no column original_prompt, original_image, edited_prompt, edited_image" in message
    assert "it has input_image, edit_prompt" in message


def test_errors_of_the_call(tmp_path):
    def refused(source, *inputs, split="train", folder="out"):
        with pytest.raises(SourceError) as error:
            prepare(Settings(source, tuple(map(str, inputs)), split), tmp_path / folder, progress=False)
        return str(error.value)

    parquet(tmp_path / "d" / "dev-0.parquet", [ip2p_row(0)], IP2P)
    assert "unknown source 'coco'; use one of instructpix2pix" in refused("coco", "x")
    assert "no split 'test'; use one of train, dev" in refused("magicbrush", "x", split="test")
    assert "no train-*.parquet in it, but dev-0.parquet" in refused("magicbrush", tmp_path / "d")
    assert "no such file or folder" in refused("magicbrush", tmp_path / "gone")
    assert "no annotations/*.jsonl" in refused("seed_data_edit", tmp_path / "d")
    assert "give its extracted files" in refused("seed_data_edit")
    with pytest.raises(SourceError, match="'a b' is unfit for ids"):
        prepare(Settings("magicbrush", ("x",), name="a b"), tmp_path / "out")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet" in refused("magicbrush", tmp_path / "bad.parquet")
    (tmp_path / "s" / "annotations").mkdir(parents=True)
    (tmp_path / "s" / "annotations" / "a.jsonl").write_text("{}")
    assert "which is no folder" in refused("seed_data_edit", tmp_path / "s")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "records.jsonl").write_text("{}")
    assert "not ours" in refused("instructpix2pix", tmp_path / "d" / "dev-0.parquet", folder="foreign")


def test_other_settings_lost_records_and_a_second_writer_are_refused(tmp_path):
    file = parquet(tmp_path / "train-0.parquet", [ip2p_row(0)], IP2P)
    settings, out = Settings("instructpix2pix", (str(file),)), tmp_path / "out"
    prepare(settings, out, progress=False)
    with pytest.raises(SourceError, match="min_quality: 5 there, 3 now"):
        prepare(Settings("instructpix2pix", (str(file),), min_quality=3), out)
    with folder_lock(out), ThreadPoolExecutor(1) as other, pytest.raises(FolderInUseError, match="another run writes"):
        other.submit(prepare, settings, out).result()
    os.truncate(out / "records.jsonl", 5)
    with pytest.raises(SourceError, match=r"records.jsonl has 5 bytes, summary.json speaks of \d+"):
        prepare(settings, out)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_files(tmp_path):
    """110 rows in three files, every seventh left out."""
    rows = [ip2p_row(n, **({"edit_prompt": ""} if n % 7 == 3 else {})) for n in range(110)]
    for number, part in enumerate((rows[:40], rows[40:41], rows[41:])):
        parquet(tmp_path / "data" / f"train-{number}.parquet", part, IP2P)
    return Settings("instructpix2pix", (str(tmp_path / "data"),))


@pytest.mark.processes
def test_limits_add_up_and_a_finished_set_is_left_alone(tmp_path, three_files):
    once, parts = tmp_path / "once", tmp_path / "parts"
    prepare(three_files, once, progress=False)
    for limit in (1, 40, 40, 75, None):
        found = prepare(three_files, parts, limit=limit, progress=False, workers=2)
        assert found.rows == (limit or 110) and found.finished is (limit is None)
    assert contents(parts) == contents(once)
    assert [r.id for r in sound(parts)] == [f"instructpix2pix-train-{n:07d}" for n in range(110) if n % 7 != 3]
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*.*") if path.name != ".lock"}
    prepare(three_files, parts, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_version_of_datasets_resumes_by_counting(tmp_path, three_files):
    out = tmp_path / "out"
    prepare(three_files, out, limit=45, progress=False)
    state = summary(out)
    state["position"] |= {"datasets": "0.0.1", "state": {"of": "another version"}}
    (out / "summary.json").write_text(json.dumps(state))
    prepare(three_files, out, progress=False)
    assert [line["row"] for line in lines(out / "records.jsonl")] == [n for n in range(110) if n % 7 != 3]


def test_a_folder_of_version_0_1_0_resumes(tmp_path, three_files):
    """Its summary.json counts what was skipped under another key, calls images pictures, and knows fewer settings."""
    once, out = tmp_path / "once", tmp_path / "out"
    prepare(three_files, once, progress=False)
    prepare(three_files, out, limit=45, progress=False)
    state = summary(out)
    state["left_out"] = state.pop("skipped") | {"missing picture": 2}
    del state["settings"]["roots"]  # not known to it
    (out / "summary.json").write_text(json.dumps(state))
    assert prepare(three_files, out, progress=False).skipped == summary(once)["skipped"] | {"missing image": 2}


def _die_at(count, settings, folder):
    """Run until the `count`-th flush to disk, which is death."""
    fsync = os.fsync

    def deadly(descriptor):
        nonlocal count
        count -= 1
        if count <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = deadly
    prepare(settings, folder, workers=1, progress=False)


@pytest.mark.processes
def test_killed_at_any_commit_nothing_is_lost_or_repeated(tmp_path, three_files):
    once, out = tmp_path / "once", tmp_path / "out"
    prepare(three_files, once, progress=False)
    images = 2 * sum(n % 7 != 3 for n in range(32))
    deaths = 0
    # In the first batch: an image, records, skipped, summary; then the same places batch by batch.
    for count in (1, 5, images + 2, images + 2, images + 3, 70, 150, 40, 10_000):
        child = multiprocessing.get_context("fork").Process(target=_die_at, args=(count, three_files, out))
        child.start()
        child.join()
        deaths += child.exitcode == -signal.SIGKILL
    assert deaths >= 6 and child.exitcode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_commit", None)  # nothing is left to do
        prepare(three_files, out, progress=False)
    leftover = {name for name in contents(out) if name.endswith(".part")}
    assert {k: v for k, v in contents(out).items() if k not in leftover} == contents(once)
    assert leftover == set(), "a part file of a kill is overwritten and renamed when its row is made again"


@pytest.mark.processes
def test_kill_9_of_the_script(tmp_path, monkeypatch, capsys):
    rows = [ip2p_row(n, original_image=cell(encoded("red", (256, 256)))) for n in range(400)]
    file, out = parquet(tmp_path / "train-0.parquet", rows, IP2P), tmp_path / "out"
    arguments = ["instructpix2pix", "--input", file, "--output", out, "--workers", "1"]
    running = start_python(SCRIPT, *arguments, stderr=subprocess.DEVNULL)
    while running.poll() is None and not ((out / "records.jsonl").exists() and summary(out)["rows"] >= 32):
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    with (out / "records.jsonl").open("a") as file_:
        file_.write('{"id": "half a li')
    script(monkeypatch, *arguments)
    assert "400 rows read, 400 records written, 0 samples skipped (finished)" in capsys.readouterr().out
    assert [line["row"] for line in lines(out / "records.jsonl")] == list(range(400))


def test_a_full_disk_stops_the_run_which_then_goes_on(tmp_path, three_files, monkeypatch):
    once, out = tmp_path / "once", tmp_path / "out"
    prepare(three_files, once, progress=False)
    settings = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (once / "records.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, settings[1]))  # the kernel refuses in the second batch
    try:
        with pytest.raises(SystemExit, match=r"cannot write: .*records.jsonl"):
            script(monkeypatch, "instructpix2pix", "--input", *three_files.inputs, "--output", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, settings)
    assert 0 < summary(out)["rows"] < 110
    prepare(three_files, out, progress=False)
    assert contents(out) == contents(once)


def test_a_full_disk_under_an_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    file_ = io.BytesIO()
    Image.fromarray(noise).save(file_, "PNG")
    file = parquet(tmp_path / "train-0.parquet", [ip2p_row(0, edited_image=cell(file_.getvalue()))], IP2P)
    settings, limits = Settings("instructpix2pix", (str(file),)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write: .*_target\.png"):
            prepare(settings, tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.part"))
    assert prepare(settings, tmp_path / "out", progress=False).written == 1
    sound(tmp_path / "out")
