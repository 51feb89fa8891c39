"""Sets that a layout describes: the presets in their real layouts, tar archives, layouts of one's own, damaged rows."""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from mige.cli import prepare_data
from mige.data.checks import check_images
from mige.data.parsing import read_records
from mige.data.prepare.layout import LayoutError, preset_names, read_layout
from mige.data.prepare.readers import Settings, SourceError
from mige.data.prepare.run import prepare
from mige.tasks import Task

IMAGE, TEXT = datasets.Image(), Value("string")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(colour, size=(24, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def cell(colour):
    return {"bytes": encoded(colour), "path": None}


def photo(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour))
    return path


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def run(out, *arguments):
    assert prepare_data.main(["layout", "--output", str(out), *map(str, arguments)]) == 0
    records = read_records([out / "records.jsonl"]).raise_if_errors()
    assert not [issue for issue in check_images(records) if issue.fatal]
    return records


def skipped(out):
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def colour(path):
    return Image.open(path).convert("RGB").getpixel((0, 0))


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_omniedit(tmp_path):
    names = {"omni_edit_id": TEXT, "task": TEXT, "src_img": IMAGE, "edited_img": IMAGE, "o_score": Value("float64")}
    row = {"omni_edit_id": "a1", "task": "swap", "src_img": cell("red"), "edited_img": cell("blue"), "o_score": 9.5,
           "edited_prompt_list": ["make it blue", "a blue one"]}  # fmt: skip
    features = Features(names | {"edited_prompt_list": datasets.Sequence(TEXT)})
    rows = [row, row | {"o_score": float("nan")}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    record, without_score = run(tmp_path / "out", "--layout", "omniedit", "--input", tmp_path)
    assert (record.id, record.task, record.prompt) == (
        "omniedit-train-0000000",
        Task.EDIT,
        "make it blue in<imagehere>",
    )
    assert colour(record.source) == (255, 0, 0) and colour(record.target) == (0, 0, 255)
    assert record.extra["columns"] == {"omni_edit_id": "a1", "task": "swap", "o_score": 9.5}
    assert without_score.extra["columns"]["o_score"] == "nan"  # NaN itself is no JSON
    assert record.extra["origin"] == "omniedit/train"


def test_ultraedit_has_masks_and_a_split_of_its_own(tmp_path):
    names = {"edit_prompt": TEXT, "source_image": IMAGE, "edited_image": IMAGE, "mask_image": IMAGE}
    row = {"edit_prompt": "add a hat", "source_image": cell("red"), "edited_image": cell("blue")}
    captions = {"source_caption": "a man", "target_caption": "a man with a hat"}
    rows = [row | captions | {"mask_image": mask} for mask in (cell("white"), None)]
    features = Features(names | dict.fromkeys(captions, TEXT))
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "RegionBase-00000-of-00001.parquet")
    first, second = run(
        tmp_path / "out",
        "--layout",
        "ultraedit",
        "--input",
        f"file://{tmp_path}/data/RegionBase-00000-of-00001.parquet",
    )
    assert colour(first.mask) == (255, 255, 255) and second.mask is None
    assert first.extra["columns"]["target_caption"] == "a man with a hat"
    assert len(run(tmp_path / "folder", "--layout", "ultraedit", "--input", tmp_path / "data")) == 2


def test_imgedit_names_extracted_images(tmp_path):
    folder = "results_remove_laion_part5/00094_00030_000304748"
    photo(tmp_path / "images" / folder / "original.png"), photo(tmp_path / "images" / folder / "result.png", "blue")
    row = {
        "input_images": [f"{folder}/original.png"],
        "output_images": [f"{folder}/result.png"],
        "prompt": "Remove it.",
    }
    rows = [row, row | {"input_images": [f"{folder}/original.png"] * 2}, row | {"output_images": ["../x.png"]},
            row | {"output_images": [f"{folder}/gone.png"]}]  # fmt: skip
    file = tmp_path / "remove_part5.parquet"
    Dataset.from_list(rows).to_parquet(file)
    out = tmp_path / "out"
    [record] = run(out, "--layout", "imgedit", "--input", file, "--images", tmp_path / "images")
    assert os.path.realpath(record.source) == str(tmp_path / "images" / folder / "original.png")
    reasons = ["input_images has not one value", "path out of the images' folder", "missing image"]
    assert [line["reason"] for line in skipped(out)] == reasons and not (out / "images").exists()
    with pytest.raises(SourceError, match=r"input_images names images by path .*--images"):
        prepare(Settings("layout", (str(file),), layout=read_layout("imgedit")), tmp_path / "no", progress=False)


def test_uno_pairs_become_subjects(tmp_path):
    for number in (1, 2):
        photo(tmp_path / f"images/split1/food_{number}.png")
    row = {
        "img_path1": "split1/food_1.png", "img_path2": "split1/food_2.png",
        "caption": {"img_path1": "A stew.", "img_path2": "A bowl of Beef Stew on a table.", "subject": ["beef stew"]},
        "vlm_filter_cot": {"score_part": {"Beef": 4.0}, "score_final": 3.5},
    }  # fmt: skip
    low = row | {"vlm_filter_cot": {"score_part": {"Other": 1}, "score_final": 3.0}}
    none = row | {"vlm_filter_cot": {}}
    two = row | {"caption": row["caption"] | {"subject": ["beef", "stew"]}}
    file = written(tmp_path / "labels/split1.json", json.dumps([row, low, none, two, "text"]))
    out = tmp_path / "out"
    [record] = run(out, "--layout", "uno_1m", "--input", file)
    assert (record.task, record.prompt) == (Task.SUBJECT, "A bowl of<imagehere>on a table.")
    assert os.path.realpath(record.references[0]) == str(tmp_path / "images/split1/food_1.png")
    assert os.path.realpath(record.target) == str(tmp_path / "images/split1/food_2.png")
    reasons = ["vlm_filter_cot.score_final below 3.5", "no vlm_filter_cot.score_final"]
    assert [line["reason"] for line in skipped(out)] == [*reasons, "caption.subject has not one value", "no object"]
    assert skipped(out)[0]["detail"].startswith("split1.json, record 2: ")


@pytest.mark.parametrize(
    ("preset", "file", "images", "fields"),
    [
        ("pico_banana_400k", "sft.jsonl", ".", ("local_input_image", "output_image", "text")),
        ("gpt_image_edit", "add/metadata/ultraedit_add.json", "add", ("input", "output", "instruction")),
    ],
)  # fmt: skip
def test_json_beside_its_images(tmp_path, preset, file, images, fields):
    photo(tmp_path / images / "input/1.png"), photo(tmp_path / images / "output/1.png", "blue")
    row = dict(zip(fields, ("input/1.png", "output/1.png", "Add a red flag."), strict=True)) | {"edit_type": "Add"}
    text = json.dumps(row) + "\n{broken\n" if file.endswith("l") else json.dumps([row])
    [record] = run(tmp_path / "out", "--layout", preset, "--input", written(tmp_path / file, text))
    assert record.prompt == "Add a red flag in<imagehere>"
    assert colour(record.source) == (255, 0, 0) and colour(record.target) == (0, 0, 255)
    assert [line["reason"] for line in skipped(tmp_path / "out")] == ["malformed JSON"] * file.endswith("l")


def test_presets_are_all_tried_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(preset_names()) == 6 and all(f'"{name}"' in text for name in preset_names())
    assert [read_layout(name).name for name in preset_names()] == preset_names()


# ---- layouts of one's own --------------------------------------------------------------------------------------------

TAR = """
format: webdataset
source: source.png
subjects: [subject.png, source.png]
target: target.png
instruction: json.text
"""


def test_tar_archives_of_subject_edits_and_resuming(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(40):
            files = {"source.png": encoded("red"), "subject.png": encoded("lime"), "target.png": encoded("blue")}
            files["json"] = json.dumps({"text": f"add <imagehere> to <imagehere> {number}"}).encode()
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    layout = written(tmp_path / "mine.yaml", TAR)
    out, once = tmp_path / "out", tmp_path / "once"
    arguments = ["--layout", layout, "--input", tmp_path / "train-0.tar"]
    assert len(run(out, *arguments, "--limit", 33)) == 33
    records = run(out, *arguments)
    assert [record.prompt for record in records] == [f"add <imagehere> to <imagehere> {n}" for n in range(40)]
    assert records[0].task == Task.SUBJECT_EDIT and records[0].id == "mine-train-0000000"
    assert [colour(path) for path in records[39].references] == [(0, 255, 0), (255, 0, 0)]
    run(once, *arguments)
    assert (once / "records.jsonl").read_bytes() == (out / "records.jsonl").read_bytes()
    with pytest.raises(SourceError, match="layout"):
        other = read_layout(str(written(tmp_path / "mine2.yaml", TAR)))
        prepare(Settings("layout", (str(tmp_path / "train-0.tar"),), layout=other), out, progress=False)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    settings = Settings("layout", (str(tmp_path),), layout=read_layout(str(written(tmp_path / "mine.yaml", TAR))))
    with pytest.raises(SourceError, match="train-0.tar|" + str(tmp_path)):
        prepare(settings, tmp_path / "out", progress=False)


def test_a_missing_column_stops_and_is_named_with_what_is_there(tmp_path):
    Dataset.from_list([{"src_img": "a"}]).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(SourceError, match="no column edited_prompt_list; the rows have src_img"):
        prepare(Settings("layout", (str(tmp_path),), layout=read_layout("omniedit")), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: [", "no YAML"),
        ("- a", "holds list"),
        ("format: json\ninstruction: a", "no target"),
        ("format: csv\ntarget: a\ninstruction: b\nsource: c", "format 'csv', expected one of parquet"),
        ("format: json\ntarget: a\ninstruction: b\nsauce: c", "unknown key sauce"),
        ("format: json\ntarget: a\ninstruction: 7\nsource: c", "instruction is 7, expected a text"),
        ("format: json\ntarget: a\ninstruction: b\nsubjects: c", "subjects is 'c', expected a list"),
        ("format: json\ntarget: a\ninstruction: b\nsource: c\nleast: {x: high}", "expected a number a column"),
        ("format: json\ntarget: a\ninstruction: b", "neither source nor subjects"),
    ],
)
def test_layouts_that_say_too_little_or_too_much(tmp_path, text, message):
    with pytest.raises(LayoutError, match=message) as error:
        read_layout(str(written(tmp_path / "mine.yaml", text)))
    assert "mine.yaml" in str(error.value)


def test_errors_of_the_call(tmp_path):
    with pytest.raises(LayoutError, match=r"gone: cannot be read.*omniedit"):
        read_layout("gone")

    def refused(**settings):
        with pytest.raises(SourceError) as error:
            prepare(Settings(**{"source": "layout", "inputs": ("x",)} | settings), tmp_path / "out", progress=False)
        return str(error.value)

    assert "needs --layout" in refused()
    assert "--layout and --images belong to" in refused(source="magicbrush", layout=read_layout("omniedit"))
    assert "imgedit cannot be streamed" in refused(inputs=(), layout=read_layout("imgedit"))
