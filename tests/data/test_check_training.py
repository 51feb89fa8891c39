"""tools/check_data.py and infer.py on records that look good one by one and would fail, or teach nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mige.cli import check_data, infer
from mige.data.checks import check_images
from mige.data.parsing import read_records

pytestmark = pytest.mark.processes  # check_data decodes in workers, also in one

CASES = Path(__file__).parents[1] / "fixtures" / "images"


def row(name, prompt="make<imagehere>blue", source="wide.png", target="tall.png", references=None):
    return {
        "id": name,
        "multi_prompt": prompt,
        "entity_path": references or [source],
        "source_path": [source],
        "image": target,
    }


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def checked(capsys, file):
    code = check_data.main([str(file), "--root", str(CASES), "--workers", "1"])
    return code, capsys.readouterr().out


@pytest.mark.processes
def test_texts_that_cancel_in_a_batch_are_errors(tmp_path, capsys):
    late = "add<imagehere>to the scene" + " word" * 88 + " in<imagehere>"
    rows = [
        row("twice", "make the photo brighter, then put a frame around the picture"),
        row("late", late, references=["tall.png", "wide.png"]),
        row("fine"),
    ]
    file = write(tmp_path / "x.jsonl", rows)
    code, out = checked(capsys, file)
    assert code == 1 and "2 errors in 2 places, 1 good records" in out
    assert f"{file}, record 1 (id twice): the text it is trained on has 2 <imagehere> for 1 reference" in out
    assert f"{file}, record 2 (id late): the text it is trained on has 1 <imagehere> for 2 references" in out


@pytest.mark.processes
def test_shapes(tmp_path, capsys):
    rows = [row("apart"), row("same", target="wide.png"), row("strip", source="strip.png", target="strip.png")]
    file = write(tmp_path / "x.jsonl", rows)
    code, out = checked(capsys, file)
    assert code == 1 and "1 errors in 1 places, 2 good records" in out
    with Image.open(CASES / "strip.png") as strip:
        size = "{} x {}".format(*strip.size)
    assert f"(id strip): {CASES / 'strip.png'}: image of {size} scaled to cover 512 x 512" in out
    assert "warning: " in out and "(id apart): source is " in out and "ratios differ by more than 2%" in out
    assert "(id same): source and target are the same image" in out


@pytest.mark.parametrize(("width", "noted"), [(100, False), (102, False), (103, True), (99, False), (98, True)])
def test_ratios_beyond_two_percent(tmp_path, width, noted):
    for name, size in (("s.png", (100, 100)), ("t.png", (width, 100))):
        Image.fromarray(np.full((size[1], size[0], 3), size[0] + (name == "s.png"), np.uint8)).save(tmp_path / name)
    file = write(tmp_path / "x.jsonl", [row("a", source="s.png", target="t.png")])
    warnings = check_images(read_records([file]).records, training=True)
    assert bool(warnings) == noted and not any(warning.fatal for warning in warnings)


@pytest.mark.processes
def test_equal_copies_and_shared_targets_are_noted(tmp_path, capsys):
    for name in ("a.png", "b.bmp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    file = write(tmp_path / "x.jsonl", [row(f"r{n}", source="a.png", target="b.bmp") for n in range(5)])
    assert check_data.main([str(file), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("source and target are the same image") == 5
    assert f"warning: {tmp_path / 'b.bmp'}: 5 records have this one image as their target" in out


@pytest.mark.processes
def test_a_target_that_equals_a_reference_is_noted_whatever_its_file(tmp_path, capsys):
    for name, colour in (("a.png", "red"), ("b.bmp", "red"), ("c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    both = {"entity_path": ["a.png", "c.png"]}
    rows = [row("edit", "put<imagehere>in<imagehere>", source="c.png", target="b.bmp") | both,
            {"id": "subject", "multi_prompt": "a<imagehere>", "entity_path": ["b.bmp"], "image": "b.bmp"},
            {"id": "other", "multi_prompt": "a<imagehere>", "entity_path": ["c.png"], "image": "b.bmp"}]  # fmt: skip
    assert check_data.main([str(write(tmp_path / "x.jsonl", rows)), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    for name in ("edit", "subject"):
        assert f"(id {name}): reference 1 and target are the same image ({tmp_path / 'b.bmp'})" in out
    assert out.count("are the same image") == 2


def test_a_target_is_counted_however_its_path_is_spelt(tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    spellings = ["a.png", "./a.png", "x/../a.png", str(tmp_path / "a.png"), f"../{tmp_path.name}/a.png"]
    rows = [{"multi_prompt": "a<imagehere>", "entity_path": ["b.png"], "image": name} for name in spellings]
    check_data.main([str(write(tmp_path / "x.jsonl", rows)), "--no-images"])
    assert f"warning: {tmp_path / 'a.png'}: 5 records have this one image" in capsys.readouterr().out


@pytest.mark.processes
def test_near_markers_come_out_of_check_data(tmp_path, capsys):
    code, out = checked(capsys, write(tmp_path / "x.jsonl", [row("a", "make [imagehere] snowy")]))
    assert code == 0 and "warning: " in out and "(id a): '[imagehere]' looks like the marker" in out


# ---- before a run ----------------------------------------------------------------------------------------------------


def test_infer_refuses_a_strip_and_names_near_markers_before_weights_load(tmp_path, tiny_model, capsys, monkeypatch):
    from mige.inference.pipeline import MIGEPipeline

    monkeypatch.setattr(MIGEPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    Image.new("RGB", (65000, 1)).save(tmp_path / "long.png")
    rows = [row("near", "make <image here> 雪"), row("strip", source=str(tmp_path / "long.png"))]
    file = write(tmp_path / "x.jsonl", rows)
    common = ["--model", str(tiny_model), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert infer.main([*common, "--records", str(file), "--root", str(CASES)]) == 1
    err = capsys.readouterr().err
    assert "record 2 (id strip): " in err and "image of 65000 x 1 scaled to cover" in err
    assert "(id near): '<image here>' looks like the marker" in err and "1 token of the prompt are unknown" not in err
    assert "(id near): " in err and "unknown to the model" in err
    strip = ["--prompt", "a<imagehere>", "--reference", str(tmp_path / "long.png")]
    assert infer.main([*common, *strip]) == 1
    assert "its short side is less than 1 px" in capsys.readouterr().err


def test_ignore_profiles_is_the_image_without_its_profile(tmp_path, tiny_model):
    with Image.open(CASES / "display_p3.png") as image:
        Image.fromarray(np.asarray(image.convert("RGB"))).save(tmp_path / "bare.png")

    def made(name, reference, *options):
        common = ["--model", str(tiny_model), "--device", "cpu", "--steps", "1", "--prompt", "a<imagehere>"]
        assert infer.main([*common, "--reference", str(reference), "--output", str(tmp_path / name), *options]) == 0
        return np.asarray(Image.open(tmp_path / name / "images" / "image.png"))

    bare = made("bare", tmp_path / "bare.png")
    assert np.array_equal(made("ignored", CASES / "display_p3.png", "--ignore-profiles"), bare)
    assert not np.array_equal(made("converted", CASES / "display_p3.png"), bare)
    assert json.loads((tmp_path / "ignored" / "config.json").read_text())["settings"]["ignore_profiles"] is True
