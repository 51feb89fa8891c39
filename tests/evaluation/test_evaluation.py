"""The four benchmarks: formulas, transforms, files, the whole chain on random networks."""

import json
import math
import shutil
from hashlib import sha256
from pathlib import Path

import evaluation_files as files
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, shell_environment
from PIL import Image
from processes import run_program
from safetensors.torch import save
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mige.cli import evaluate as cli_evaluate
from mige.data.parsing import read_records
from mige.evaluation import backbones, metrics, outputs, page, scoring, statistics, summary
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.prepared import Prepared, prepare, read
from mige.evaluation.benchmarks.table import BENCHMARKS
from mige.evaluation.features import Features, compute_images, compute_texts
from mige.evaluation.published import PUBLISHED
from mige.evaluation.views import View

torch.set_num_threads(1)

# ---- formulas --------------------------------------------------------------------------------------------------------


def test_cosine():
    assert metrics.cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25, abs=1e-15)
    assert metrics.cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])) == -1
    assert math.isnan(metrics.cosine(torch.zeros(2), torch.ones(2)))


def test_direction_is_of_normalised_features():
    """By hand: images move from (1, 0) to (0, 1) whatever their lengths, captions from (0, 1) to (1, 0)."""
    edited, source = torch.tensor([0.0, 7.0]), torch.tensor([3.0, 0.0])
    caption, source_caption = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 2.0])
    assert metrics.direction(edited, source, caption, source_caption) == pytest.approx(-1, abs=1e-15)
    assert metrics.direction(edited, source, source_caption, caption) == pytest.approx(1, abs=1e-15)
    half = metrics.direction(torch.tensor([1.0, 1.0]), source, torch.tensor([0.0, 9.0]), caption)
    moved = np.array([1, 1]) / math.sqrt(2) - np.array([1, 0])
    assert half == pytest.approx(moved @ [-1, 1] / np.linalg.norm(moved) / math.sqrt(2), abs=1e-12)
    assert math.isnan(metrics.direction(source, source, caption, source_caption))


def test_nan_features_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.cosine(torch.tensor([math.nan, 1.0]), torch.ones(2))


def test_pixel_errors():
    black, other = Image.new("RGB", (2, 1)), Image.new("RGB", (2, 1))
    other.putpixel((0, 0), (255, 0, 51))
    assert metrics.l1(other, black) == pytest.approx((1 + 0.2) / 6, abs=1e-15)
    assert metrics.l2(other, black) == pytest.approx((1 + 0.04) / 6, abs=1e-15)
    assert metrics.l1(black, black) == metrics.l2(black, black) == 0
    with pytest.raises(ValueError, match="one size"):
        metrics.l1(black, Image.new("RGB", (1, 1)))


def test_another_size():
    big, small = files.image(0, (64, 48)), files.image(1, (32, 32))
    made, true = metrics.to_target(small, big)
    assert made.size == true.size == (64, 48) and true is big
    made, true = metrics.to_output(small, big)
    assert made is small and true.size == (32, 32)
    wide = np.asarray(big.resize((42, 32), Image.Resampling.BILINEAR))[:, 5:37]
    assert np.abs(np.asarray(true).astype(int) - wide).max() <= 2


def test_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = statistics.bootstrap(values)
    error = values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    assert statistics.bootstrap(values) == (mean, low, high)
    assert statistics.bootstrap([2.0]) == (2, None, None)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            statistics.bootstrap(bad)


def features(network, *images: Image.Image) -> torch.Tensor:
    return network.encode(torch.stack([network.transform.levels(image) for image in images]))


def pixels(transform: backbones.Transform, image: Image.Image) -> torch.Tensor:
    return transform.pixels(transform.levels(image)[None])[0]


# ---- backbones -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {"clip": files.clip(folder / "clip"), "dino": files.dino(folder / "dino.safetensors")}


@pytest.fixture(scope="module")
def networks(weights):
    """A CLIP and a DINO."""
    clip = backbones.Clip("ViT-B/32", str(weights["clip"]))
    dino = backbones.Dino("DINO ViT-S/16", str(weights["dino"]))
    dino.model.blocks = dino.model.blocks[:1]  # random all of them: eleven more would only take time
    return {"clip": clip, "dino": dino}


@pytest.mark.parametrize("size", [(300, 200), (224, 224), (97, 333)])
def test_clips_transform_is_its_processors(size):
    image = files.image(3, size)
    reference = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    difference = (pixels(backbones.clip_transform(224), image) - reference).abs()
    assert difference.shape == (3, 224, 224)
    assert difference.max() < 0.02  # one level of 256 over the deviation


def test_dinos_transform_by_hand():
    image = files.image(4, (512, 300))
    resized = image.resize((int(256 * 512 / 300), 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    cut = np.asarray(resized.crop((left, 16, left + 224, 240))) / 255
    expected = (cut - np.array(backbones.IMAGENET_MEAN)) / np.array(backbones.IMAGENET_STD)
    assert np.abs(pixels(backbones.dino_transform(), image).permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_clips_features_are_the_models(networks, weights):
    model = CLIPModel.from_pretrained(weights["clip"]).eval()
    image, text = files.image(5), "a red dog."
    tokens = networks["clip"].tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels(networks["clip"].transform, image)[None])
    ours = features(networks["clip"], image)[0], networks["clip"].texts([text])[0]
    for own, theirs in zip(ours, (out.image_embeds[0], out.text_embeds[0]), strict=True):
        assert torch.allclose(own / own.norm(), theirs, atol=1e-6)


def test_long_captions_are_cut(networks):
    long = "a dog and " * 60
    assert torch.equal(networks["clip"].texts([long]), networks["clip"].texts([long + "a cat"]))


def test_dinos_feature_is_the_class_token(networks):
    with torch.no_grad():
        tokens = networks["dino"].model.forward_features(pixels(networks["dino"].transform, files.image(6))[None])
    assert torch.allclose(features(networks["dino"], files.image(6))[0], tokens[0, 0], atol=1e-6)
    assert tokens.shape == (1, 197, 384)


def test_the_fingerprint_is_of_the_weights(networks, weights):
    assert backbones.Clip("ViT-B/32", str(weights["clip"])).fingerprint == networks["clip"].fingerprint
    changed = CLIPModel.from_pretrained(weights["clip"])
    with torch.no_grad():
        changed.logit_scale += 1
    assert backbones.fingerprint(changed) != networks["clip"].fingerprint


# ---- files -----------------------------------------------------------------------------------------------------------


def test_dreambench_rows(tmp_path):
    prepare("dreambench", Options(str(files.dreambench(tmp_path / "data"))), tmp_path / "out")
    rows = read(tmp_path / "out").rows
    assert len(rows) == 750
    assert rows[0]["id"] == "backpack-00" and rows[0]["multi_prompt"] == "a<imagehere>in the jungle"
    assert rows[0]["entity_path"][0].endswith("backpack/02.jpg")
    assert rows[0]["score"]["caption"] == "a vase in the jungle" and rows[0]["score"]["group"] == "object"
    assert rows[24]["multi_prompt"] == "a wet<imagehere>"
    assert [row["score"]["group"] for row in rows if row["id"] == "dog-00"] == ["live"]
    report = read_records([tmp_path / "out" / "records.jsonl"])
    assert not report.issues and {record.task for record in report.records} == {"subject"}


def test_dreambench_with_four_images_a_prompt_against_all(tmp_path):
    data = files.dreambench(tmp_path / "data")
    prepare("dreambench", Options(str(data), samples=4, against="all"), tmp_path / "out")
    rows = read(tmp_path / "out").rows
    assert len(rows) == 3000 and rows[1]["id"] == "backpack-00-1"
    assert [Path(path).name for path in rows[0]["score"]["references"]] == ["00.jpg", "01.jpg", "02.jpg"]
    assert [Path(path).name for path in rows[0]["score"]["others"]] == ["00.jpg", "01.jpg"]


def test_dreambench_that_is_not_whole(tmp_path):
    data = files.dreambench(tmp_path / "data")
    (data / "dataset" / "teapot" / "04.jpg").unlink()
    with pytest.raises(BenchmarkError, match=r"teapot/04.jpg: no such file"):
        prepare("dreambench", Options(str(data)), tmp_path / "out")
    (data / "dataset" / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\ncan,can\n")
    with pytest.raises(BenchmarkError, match=r"1 subjects .* expected the 30 subjects"):
        prepare("dreambench", Options(str(data)), tmp_path / "out")


def test_emu_edit_rows(tmp_path):
    prepare("emu_edit", Options(str(files.emu_edit(tmp_path / "data"))), tmp_path / "out")
    rows = read(tmp_path / "out").rows
    assert [row["score"]["clean"] for row in rows] == [True] * 5 + [False]
    assert np.array_equal(np.asarray(Image.open(rows[2]["image"])), np.asarray(files.image(2, (64, 64))))
    report = read_records([tmp_path / "out" / "records.jsonl"])
    assert not report.issues
    assert (report.records[1].edit_type, report.records[1].task, report.records[1].source) == (
        "add",
        "edit",
        Path(rows[1]["image"]),
    )


def test_magicbrush_rows(tmp_path):
    data = files.magicbrush(tmp_path / "data")
    prepare("magicbrush", Options(str(data)), tmp_path / "out")
    rows = {row["id"]: row for row in read(tmp_path / "out").rows}
    assert list(rows) == ["139-1", "139-2", "30-1"]
    assert rows["139-2"]["source_path"] == [str(data / "images" / "139" / "139-output1.png")]
    assert rows["139-2"]["score"]["caption"] == "a scene 2"
    assert not read_records([tmp_path / "out" / "records.jsonl"]).issues


def test_magicbrush_turn_by_turn(tmp_path):
    data, out = files.magicbrush(tmp_path / "data"), tmp_path / "results"
    written = prepare("magicbrush", Options(str(data), iterative=str(out)), out / "benchmark")
    assert [path.name for path in written] == ["turn_1.jsonl", "turn_2.jsonl"]
    prepared = read(out / "benchmark")
    second = next(row for row in prepared.rows if row["id"] == "139-2")
    assert second["entity_path"] == second["source_path"] == [str(out / "images" / "139-1.png")]
    assert second["score"]["source"].endswith("139-input.png")  # what a copy of the session's input scores
    assert {row["id"] for row in prepared.scored} == {"139-2", "30-1"}


def test_magicbrush_has_a_measure_for_each_kind_of_caption(tmp_path, networks):
    data, out = files.magicbrush(tmp_path / "data"), tmp_path / "results"
    captions = json.loads((data / "global_descriptions.json").read_text())
    local = {image: {name: f"only {text}" for name, text in of.items()} for image, of in captions.items()}
    (data / "local_descriptions.json").write_text(json.dumps(local))
    prepare("magicbrush", Options(str(data)), out / "benchmark")
    prepared = read(out / "benchmark")
    found = outputs.outputs(prepared, results(prepared, out))
    row = scoring.score(prepared, found, networks, tmp_path / "cache").rows[0]["model"]
    clip = networks["clip"]
    output = features(clip, Image.open(found["139-1"]))[0]
    for kind, text in (("local", "only a scene 1"), ("global", "a scene 1")):
        expected = metrics.cosine(output, clip.texts([text])[0])
        assert row[f"CLIP-T ({kind} captions)"] == pytest.approx(expected, abs=1e-6)
    assert "CLIP-T" not in row
    of = {one.method: one.scores.keys() for one in PUBLISHED if one.benchmark == "magicbrush"}
    assert "CLIP-T (local captions)" in of["InstructPix2Pix"] and "CLIP-T (global captions)" in of["UIP2P"]


def test_the_folder_of_another_benchmark_is_left_alone(tmp_path):
    out = tmp_path / "out"
    prepare("magicbrush", Options(str(files.magicbrush(tmp_path / "magicbrush"))), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = Options(str(files.migebench(tmp_path / "migebench")))
    with pytest.raises(BenchmarkError, match="out holds magicbrush, expected migebench or nothing; give another"):
        prepare("migebench", other, out)
    with pytest.raises(BenchmarkError, match=r"with other options \(iterative: None there, r now\)"):
        prepare("magicbrush", Options(str(tmp_path / "magicbrush"), iterative="r"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare("magicbrush", Options(str(tmp_path / "magicbrush")), out)  # its own may be prepared again
    for name, text in (("train.jsonl", "{}\n"), ("benchmark.json", '{"bench')):
        foreign = tmp_path / name
        foreign.mkdir()
        (foreign / name).write_text(text)
        with pytest.raises(BenchmarkError, match=f"{name}.*(not ours|no JSON)"):
            prepare("migebench", other, foreign)
        assert [path.name for path in foreign.iterdir()] == [name]


@pytest.mark.parametrize("line", ["", "[]", '{"multi_prompt": "x"}', '{"id": "a"'])
def test_a_damaged_prepared_folder_names_the_line(tmp_path, line):
    prepare("magicbrush", Options(str(files.magicbrush(tmp_path / "data"))), tmp_path / "out")
    path = tmp_path / "out" / "records.jsonl"
    path.write_text(path.read_text().split("\n")[0] + f"\n{line}\n")
    with pytest.raises(BenchmarkError, match=r"records\.jsonl, line 2: .*prepare it again"):
        read(tmp_path / "out")


def test_magicbrush_without_a_caption(tmp_path):
    data = files.magicbrush(tmp_path / "data")
    captions = json.loads((data / "global_descriptions.json").read_text())
    captions["30"]["30-output1.png"] = " "
    (data / "global_descriptions.json").write_text(json.dumps(captions))
    with pytest.raises(BenchmarkError, match=r"MagicBrush, 30, turn 1: the caption of 30-output1.png is ' '"):
        prepare("magicbrush", Options(str(data)), tmp_path / "out")


def test_migebench_rows(tmp_path):
    data = files.migebench(tmp_path / "data")
    prepare("migebench", Options(str(data)), tmp_path / "out")
    rows = {row["id"]: row for row in read(tmp_path / "out").rows}
    assert len(rows) == 6
    assert rows["add-1"]["score"]["entity"] == str(data / "add_entity" / "1.png")
    assert rows["replace-1"]["entity_path"][0] == rows["replace-1"]["source_path"][0]
    assert rows["replace-1"]["score"]["entity"] == str(data / "replace_entity" / "1.png")
    assert {record.task for record in read_records([tmp_path / "out" / "records.jsonl"]).raise_if_errors()} == {
        "subject_edit"
    }


def test_migebench_elsewhere(tmp_path):
    data = files.migebench(tmp_path / "data")
    for folder in list(data.glob("*_*")):
        if folder.is_dir():
            shutil.move(folder, tmp_path / "images" / folder.name)
    with pytest.raises(BenchmarkError, match=r"add_bench.json, record 1: no file .* correct --root"):
        prepare("migebench", Options(str(data)), tmp_path / "out")
    prepare("migebench", Options(str(data), root=str(tmp_path / "images")), tmp_path / "out")
    assert read(tmp_path / "out").rows[0]["image"] == str(tmp_path / "images" / "add_target" / "0.png")


def test_duplicate_ids(tmp_path):
    data = files.migebench(tmp_path / "data")
    lines = json.loads((data / "add_bench.json").read_text())
    lines[2]["idx"] = 0
    (data / "add_bench.json").write_text(json.dumps(lines))
    with pytest.raises(BenchmarkError, match="1 ids appear twice, the first is add-0"):
        prepare("migebench", Options(str(data)), tmp_path / "out")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(BenchmarkError, match=r"benchmark.json: no such file"):
        read(tmp_path)


# ---- scores ----------------------------------------------------------------------------------------------------------


def results(prepared: Prepared, folder: Path) -> Path:
    """An image for every record."""
    for n, row in enumerate(prepared.rows):
        files.save(folder / "images" / f"{row['id']}.png", 1000 + n, (64, 64))
    return folder


@pytest.fixture(scope="module")
def migebench(tmp_path_factory) -> tuple[Prepared, Path]:
    folder = tmp_path_factory.mktemp("migebench")
    prepare("migebench", Options(str(files.migebench(folder / "data"))), folder / "results" / "benchmark")
    prepared = read(folder / "results" / "benchmark")
    return prepared, results(prepared, folder / "results")


def test_scores_are_the_formulas_on_the_files(migebench, networks, tmp_path):
    prepared, folder = migebench
    found = outputs.outputs(prepared, folder)
    scores = scoring.score(prepared, found, networks, tmp_path)
    row, line = prepared.rows[4], scores.rows[4]
    output, target = Image.open(found[row["id"]]), Image.open(row["score"]["target"])
    clip, dino = networks.values()

    def expected(a, b) -> float:
        a, b = (x.double().numpy() for x in (a, b))
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    assert line["id"] == row["id"] and line["group"] == "replace"
    assert line["model"]["DINO"] == pytest.approx(expected(*features(dino, output, target)), abs=1e-6)
    assert line["model"]["CLIP-I"] == pytest.approx(expected(*features(clip, output, target)), abs=1e-6)
    caption = clip.texts([row["score"]["caption"]])[0]
    assert line["model"]["CLIP-T"] == pytest.approx(expected(features(clip, output)[0], caption), abs=1e-6)
    resized = np.asarray(output.resize(target.size, Image.Resampling.BICUBIC)).astype(float)
    assert line["model"]["L1"] == pytest.approx(np.abs(resized - np.asarray(target)).mean() / 255, abs=1e-12)
    assert line["target"]["DINO"] == pytest.approx(1) and line["target"]["L1"] == 0
    assert "entity DINO" not in line["model"]
    assert scores.notes["of another size than the image compared with"] == 6


def test_scores_do_not_depend_on_the_batch_and_are_kept(migebench, networks, tmp_path, monkeypatch):
    prepared, folder = migebench
    found = outputs.outputs(prepared, folder)
    one = scoring.score(prepared, found, networks, tmp_path / "a", batch=1)
    many = scoring.score(prepared, found, networks, tmp_path / "b", batch=64)
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a["model"] == pytest.approx(b["model"], abs=1e-5)

    def never(*_):
        raise AssertionError("a kept feature was computed again")

    for network in networks.values():
        monkeypatch.setattr(network, "encode", never)
    monkeypatch.setattr(networks["clip"], "texts", never)
    assert scoring.score(prepared, found, networks, tmp_path / "a").rows == one.rows


def test_a_changed_image_is_scored_anew(migebench, networks, tmp_path):
    prepared, folder = migebench
    copied = tmp_path / "results"
    shutil.copytree(folder / "images", copied / "images")
    before = scoring.score(prepared, outputs.outputs(prepared, copied), networks, tmp_path / "cache")
    row = prepared.rows[0]
    shutil.copy(row["score"]["target"], copied / "images" / f"{row['id']}.png")
    after = scoring.score(prepared, outputs.outputs(prepared, copied), networks, tmp_path / "cache")
    assert after.rows[0]["model"]["DINO"] == pytest.approx(1) and before.rows[0]["model"]["DINO"] < 0.999
    assert after.rows[1:] == before.rows[1:]


def test_features_of_version_0_1_0_are_read(networks, tmp_path, monkeypatch):
    """A cache names its entries as it always has: images by "picture" and their hash, captions by "text"."""
    path = tmp_path / "a.png"
    files.save(path, 1)
    kept_in = Features(networks["clip"], tmp_path / "cache").path
    keys = {f"picture {sha256(path.read_bytes()).hexdigest()}": 1.0, f"text {sha256(b'a dog').hexdigest()}": 2.0}
    kept_in.parent.mkdir()
    kept_in.write_bytes(save({key: torch.full((4,), value) for key, value in keys.items()}))
    kept = Features(networks["clip"], tmp_path / "cache")
    monkeypatch.setattr(networks["clip"], "encode", None)  # nothing is computed
    compute(kept, path, "a dog")
    assert (kept[View(path)][0], kept["a dog"][0]) == (1, 2)


def test_missing_extra_and_double_results_are_listed(migebench, tmp_path):
    prepared, folder = migebench
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "add-0.png").rename(tmp_path / "images" / "strange.png")
    files.save(tmp_path / "images" / "add-1.jpg", 0)
    with pytest.raises(
        BenchmarkError, match=r"1 missing \(add-0\); 1 of no record \(strange\); 1 with two files \(add-1"
    ):
        outputs.outputs(prepared, tmp_path)


def test_grey_and_transparent_results_are_counted(migebench, networks, tmp_path):
    prepared, folder = migebench
    shutil.copytree(folder / "images", tmp_path / "images")
    path = tmp_path / "images" / "add-0.png"
    Image.open(path).convert("L").save(path)
    path = tmp_path / "images" / "add-1.png"
    Image.open(path).convert("RGBA").save(path)
    scores = scoring.score(prepared, outputs.outputs(prepared, tmp_path), networks, tmp_path / "cache")
    assert scores.notes["not RGB"] == 2


def test_nan_features_name_the_image(migebench, networks, tmp_path, monkeypatch):
    prepared, folder = migebench
    monkeypatch.setattr(networks["dino"], "encode", lambda pixels: torch.full((len(pixels), 384), math.nan))
    with pytest.raises(BenchmarkError, match=r"\.png: DINO ViT-S/16 gives NaN features"):
        scoring.score(prepared, outputs.outputs(prepared, folder), networks, tmp_path)


def compute(features: Features, path: Path, text: str) -> None:
    compute_images({features: [View(path)]}, 4)
    compute_texts(features, [text], 4)


@pytest.mark.parametrize("damage", ["cut", "foreign", "other tensors", "NaN"])
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, networks, capsys, damage):
    features = Features(networks["clip"], tmp_path)
    image = files.save(tmp_path / "a.png", 1, (64, 64)) or tmp_path / "a.png"
    compute(features, image, "a dog")
    want, path = features[View(image)], features.path
    key = next(iter(features.known))
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-40],
            "foreign": b"no safetensors",
            "other tensors": save({"transformer.weight": torch.zeros(3)}),
            "NaN": save({key: torch.full((8,), math.nan)}),
        }[damage]
    )
    again = Features(networks["clip"], tmp_path)
    assert str(path) in capsys.readouterr().err and again.known == {}
    compute(again, image, "a dog")
    assert torch.equal(again[View(image)], want)
    assert torch.equal(Features(networks["clip"], tmp_path).known[key], features.known[key])


def test_emu_edit_all_and_clean(tmp_path, networks):
    prepare("emu_edit", Options(str(files.emu_edit(tmp_path / "data"))), tmp_path / "r" / "benchmark")
    prepared = read(tmp_path / "r" / "benchmark")
    found = outputs.outputs(prepared, results(prepared, tmp_path / "r"))
    rows = scoring.score(prepared, found, networks, tmp_path / "cache").rows
    assert rows[5]["model"]["CLIPdir"] == 0 and rows[0]["model"]["CLIPdir"] != 0
    assert rows[0]["copy"]["CLIPim"] == pytest.approx(1) and rows[0]["copy"]["L1"] == 0
    table = summary.table(prepared, rows)
    mean = {(e["version"], e["subset"]): e for e in table if e["measure"] == "CLIPdir"}
    assert mean["model", "all"]["n"] == 6 and mean["model", "clean"]["n"] == 5
    assert mean["model", "all"]["mean"] == pytest.approx(mean["model", "clean"]["mean"] * 5 / 6)
    assert mean["model", "all"]["of"] == 3589 and mean["model", "add"]["n"] == 3


def test_dreambench_against_all_is_the_mean_over_images(tmp_path, networks):
    data = files.dreambench(tmp_path / "data")
    lines = {}
    for against in ("input", "all"):
        folder = tmp_path / against / "benchmark"
        prepare("dreambench", Options(str(data), against=against), folder)
        prepared = read(folder)
        few = Prepared(prepared.name, prepared.options, prepared.rows[:2], folder)
        found = outputs.outputs(few, results(few, tmp_path / against))
        lines[against] = scoring.score(few, found, networks, tmp_path / "cache").rows[0]
    dino = networks["dino"]
    paths = [found[few.rows[0]["id"]], *few.rows[0]["score"]["references"]]
    output, *others = features(dino, *map(Image.open, paths))
    cosines = [metrics.cosine(output, other) for other in others]
    assert lines["all"]["model"]["DINO"] == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert lines["input"]["model"]["DINO"] == pytest.approx(cosines[2], abs=1e-6)  # 02.jpg
    shown = View(
        Path(few.rows[0]["entity_path"][0]), (64, 64), letterboxed=True
    ).open()  # as a copier would give it back
    copied = [metrics.cosine(features(dino, shown)[0], other) for other in others]
    assert lines["input"]["copy"]["DINO"] == pytest.approx(copied[2], abs=1e-6)
    assert lines["input"]["real"].keys() == {"DINO", "CLIP-I"}
    # 02.jpg was given: of 00 and 01 each is compared with the others alone, and the copy is of 02, not of the first.
    apart = [metrics.cosine(others[a], others[b]) for a, b in ((0, 1), (0, 2), (1, 0), (1, 2))]
    assert lines["all"]["real"]["DINO"] == pytest.approx(sum(apart) / 4, abs=1e-6)
    assert lines["all"]["copy"]["DINO"] == pytest.approx(sum(copied) / 3, abs=1e-6)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_two_protocols_are_refused(migebench, networks):
    prepared, _ = migebench
    facts = {"protocol": summary.protocol(prepared, networks)}
    entry = {
        "version": "model",
        "subset": "all",
        "measure": "DINO",
        "mean": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 1,
        "of": 1,
    }
    other = {"label": "theirs", "protocol": dict(facts["protocol"]), "table": [entry, entry | {"version": "copy"}]}
    assert summary.beside(facts, [other]) == [entry | {"version": "theirs"}]
    other["protocol"]["CLIP"] = "CLIP ViT-L/14, weights 0"
    with pytest.raises(BenchmarkError, match=r"report of theirs follows another protocol \(CLIP: CLIP ViT-L/14"):
        summary.beside(facts, [other])


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "blank"),
        ('{"label": ', "no JSON"),
        ("[]", "JSON of type list"),
        ('{"model_type": "t5"}', "label is None"),
        ('{"label": "x", "protocol": {}, "table": [{"version": "model"}]}', "entry 1 of its table has the subset None"),
        (None, "No such file"),
    ],
)
def test_a_report_to_compare_with_is_read_before_anything_is_computed(tmp_path, evaluate, monkeypatch, text, said):
    out = tmp_path / "results"
    prepare("magicbrush", Options(str(files.magicbrush(tmp_path / "data"))), out / "benchmark")
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("scored before the report was read"))
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    code, _ = evaluate("--benchmark", "magicbrush", "--results", out, "--compare", tmp_path / "other.json")
    assert f"error: {tmp_path / 'other.json'}" in code and said in code and "give a report.json" in code


def test_published_rows_stand_only_beside_their_own_protocol():
    uno = next(one for one in PUBLISHED if one.method == "UNO")
    assert uno.fits(Options("x"), "ViT-B/32")
    assert not uno.fits(Options("x"), "ViT-L/14")
    assert not uno.fits(Options("x", samples=4), "ViT-B/32")
    assert not uno.fits(Options("x", against="all"), "ViT-B/32")
    final = next(one for one in PUBLISHED if one.iterative)
    assert final.fits(Options("x", iterative="r"), "ViT-B/32") and not final.fits(Options("x"), "ViT-B/32")
    assert not any(one.fits(Options("x"), "ViT-B/32") for one in PUBLISHED if one.method == "MIGE")


def test_published_rows_use_known_names():
    for one in PUBLISHED:
        assert one.scores.keys() <= {metric.name for metric in BENCHMARKS[one.benchmark].metrics}


def test_histogram_counts_every_sample():
    svg = page.histogram([0.0, 0.0, 0.5, 1.0], "DINO")
    counts = [int(bar.split(": ")[1].split("<")[0]) for bar in svg.split("<title>")[1:]]
    assert len(counts) == 24 and sum(counts) == 4 and counts[0] == 2 and counts[-1] == 1
    assert "<svg" in page.histogram([0.3, 0.3], "of one value")


@pytest.fixture
def evaluate(weights, monkeypatch, capsys):
    """tools/evaluate.py in this process, which has its libraries loaded: (exit code, stdout)."""

    def run(*arguments: object) -> tuple[object, str]:
        backbone = ("--clip-weights", weights["clip"], "--dino-weights", weights["dino"], "--device", "cpu")
        try:
            code = cli_evaluate.main([*map(str, [*backbone, *arguments])])
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini", "--model", "m", "--jpeg"], "--jpeg is for dreambench, "),
        (["mini2", "--model", "m", "--label", "ours"], "--label is for dreambench, "),
        (["emu_edit", "--lora", "x"], "--lora is for mini, mini2; --benchmark emu_edit does not read it"),
        (["emu_edit", "--per-kind", "2"], "--per-kind is for mini, mini2"),
        (["mini", "--model", "m", "--test"], "--test is for mini2; --benchmark mini does not read it"),
    ],
)
def test_an_option_of_another_benchmark_is_refused(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit):
        cli_evaluate.parse(["--results", str(tmp_path / "results"), "--benchmark", *arguments])
    assert words in capsys.readouterr().err


def test_the_tools_end_to_end(tmp_path, evaluate):
    data, out = files.magicbrush(tmp_path / "data"), tmp_path / "results"
    done = run_here("tools/prepare_benchmark.py", "magicbrush", "--data", data, "--output", out / "benchmark")
    assert done.returncode == 0, done.stderr
    results(read(out / "benchmark"), out)
    code, printed = evaluate("--benchmark", "magicbrush", "--results", out, "--label", "mine")
    assert code == 0 and "3 of 1053 *" in printed and "copy of the input" in printed
    report = json.loads((out / "evaluation" / "report.json").read_text())
    assert report["label"] == "mine" and report["samples"] == 3
    assert report["protocol"]["turns"] == "each on its own" and "torch" in report["versions"]
    lines = (out / "evaluation" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["139-1", "139-2", "30-1"]
    html = (out / "evaluation" / "report.html").read_text()
    for text in (
        "InstructPix2Pix (published)",
        "setting not stated",
        "Best by L1",
        "Worst by L1",
        "histogram of CLIP-T",
    ):
        assert text in html, text
    for link in {part.split('"')[0] for part in html.split('src="')[1:]}:
        assert (out / "evaluation" / link).is_file(), link
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report | {"label": "theirs"}))
    code, printed = evaluate("--benchmark", "magicbrush", "--results", out, "--compare", other)
    assert code == 0 and "theirs" in printed
    code, _ = evaluate("--benchmark", "emu_edit", "--results", out)
    assert "is magicbrush, expected emu_edit" in code
    code, _ = evaluate("--benchmark", "magicbrush", "--results", out, "--clip-weights", "./no")
    assert "--clip-weights ./no: no such file" in code


@pytest.mark.processes
def test_the_script_edits_turn_by_turn(tmp_path, tiny_model):
    """magicbrush.sh, iterative: the second turn starts from the image that the first made."""
    data, out = files.magicbrush(tmp_path / "data"), tmp_path / "results"
    script = ROOT / "infer_scripts" / "magicbrush.sh"
    done = run_program("sh", script, data, tiny_model, out, "iterative", env=shell_environment())
    assert done.returncode == 0, done.stderr
    prepared = read(out / "benchmark")
    assert outputs.outputs(prepared, out).keys() == {"139-1", "139-2", "30-1"}
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    second = next(line for line in lines if line["id"] == "139-2")
    assert second["record"]["source"] == str(out / "images" / "139-1.png") and second["steps"] == 60
