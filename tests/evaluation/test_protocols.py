"""What the protocols differ in: fitting, JPEG, two rules of L1, intervals of clusters, tags of published rows."""

import io
import json
import math
from pathlib import Path

import evaluation_files as files
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mige.evaluation import features, metrics, outputs, scoring, statistics, summary
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.prepared import prepare, read
from mige.evaluation.published import GLOBAL, LOCAL, PUBLISHED
from mige.evaluation.views import View
from mige.utils.images import BadImageError, open_image


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    from mige.evaluation import backbones

    folder = tmp_path_factory.mktemp("weights")
    clip = backbones.Clip("ViT-B/32", str(files.clip(folder / "clip")))
    dino = backbones.Dino("DINO ViT-S/16", str(files.dino(folder / "dino.safetensors")))
    dino.model.blocks = dino.model.blocks[:1]  # random all of them: eleven more would only take time
    return {"clip": clip, "dino": dino}


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_view_is_fitted_as_the_model_is_shown_it(tmp_path):
    files.save(tmp_path / "a.png", 1, (80, 40))
    image = open_image(tmp_path / "a.png")
    assert View(tmp_path / "a.png").open() == image == View(tmp_path / "a.png", (80, 40)).open()
    cropped = View(tmp_path / "a.png", (32, 32)).open()
    scaled = image.resize((64, 32), Image.Resampling.BILINEAR)
    assert cropped == scaled.crop((16, 0, 48, 32))
    whole = np.asarray(View(tmp_path / "a.png", (32, 32), letterboxed=True).open())
    assert not whole[:8].any() and not whole[24:].any()  # black above and below
    assert (whole[8:24] == np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))).all()


def test_a_view_through_jpeg_is_pillows_file_of_quality_75(tmp_path):
    files.save(tmp_path / "a.png", 2, (48, 32))
    open_image(tmp_path / "a.png").save(tmp_path / "a.jpg")  # as the official scripts save it
    plain, saved = open_image(tmp_path / "a.png"), open_image(tmp_path / "a.jpg")
    assert View(tmp_path / "a.png", jpeg=True).open() == saved != plain


def test_views_of_one_file_have_keys_of_their_own(tmp_path):
    files.save(tmp_path / "a.png", 1, (80, 40))
    path = tmp_path / "a.png"
    views = [View(path), View(path, (32, 32)), View(path, (32, 32), True), View(path, jpeg=True), View(path, (16, 32))]
    assert len({view.key() for view in views}) == len(views)
    (tmp_path / "b.png").write_bytes(path.read_bytes())
    assert View(tmp_path / "b.png").key() == View(path).key()


# ---- scores ----------------------------------------------------------------------------------------------------------


def prepared_edits(tmp_path, size=(96, 64)):
    """Emu Edit with sources wider than high, and a model that gives back its source as it is shown it."""
    data = files.emu_edit(tmp_path / "data", size=size)
    prepare("emu_edit", Options(str(data)), tmp_path / "r" / "benchmark")
    prepared = read(tmp_path / "r" / "benchmark")
    (tmp_path / "r" / "images").mkdir()
    for row in prepared.rows:
        View(Path(row["image"]), (64, 64)).open().save(tmp_path / "r" / "images" / f"{row['id']}.png")
    return prepared, outputs.outputs(prepared, tmp_path / "r")


def test_a_perfect_copier_scores_what_the_copy_scores(tmp_path, networks):
    """By our rule L1 is 0; stretched it is not, of images that are not square; the baseline pays the same."""
    prepared, found = prepared_edits(tmp_path)
    for line in scoring.score(prepared, found, networks, tmp_path / "cache").rows:
        assert line["model"] == pytest.approx(line["copy"], abs=1e-6)
        assert line["model"]["L1"] == 0 and line["model"]["L1 (stretched)"] > 0.01 and line["model"]["CLIPim"] < 1
    row = prepared.rows[0]
    source = open_image(Path(row["image"]))
    output = open_image(found[row["id"]]).resize(source.size, Image.Resampling.BICUBIC)
    expected = np.abs(np.asarray(output).astype(float) - np.asarray(source)).mean() / 255
    first = scoring.score(prepared, found, networks, tmp_path / "cache").rows[0]
    assert first["model"]["L1 (stretched)"] == pytest.approx(expected, abs=1e-12)


def test_jpeg_is_of_outputs_and_copies_and_named_in_the_protocol(tmp_path, networks):
    prepared, found = prepared_edits(tmp_path, (64, 64))
    plain, through = (
        scoring.score(prepared, found, networks, tmp_path / "cache", jpeg=jpeg).rows[0] for jpeg in (False, True)
    )
    encoded = io.BytesIO()
    source = open_image(Path(prepared.rows[0]["image"]))
    source.save(encoded, "JPEG")
    expected = metrics.l1(Image.open(encoded), source)
    assert plain["model"]["L1"] == plain["copy"]["L1"] == 0
    assert through["model"]["L1"] == through["copy"]["L1"] == pytest.approx(expected) and expected > 0
    protocols = [summary.protocol(prepared, networks, jpeg=jpeg)["outputs"] for jpeg in (False, True)]
    assert protocols == ["as saved", "through JPEG of quality 75, as the official scripts save"]


def test_a_subjects_copy_is_letterboxed(tmp_path, networks):
    data = files.dreambench(tmp_path / "data")
    prepare("dreambench", Options(str(data)), tmp_path / "r" / "benchmark")
    prepared = read(tmp_path / "r" / "benchmark")
    few = type(prepared)(prepared.name, prepared.options, prepared.rows[:1], prepared.folder)
    given = Path(few.rows[0]["entity_path"][0])
    (tmp_path / "r" / "images").mkdir()
    View(given, (32, 32), letterboxed=True).open().save(tmp_path / "r" / "images" / f"{few.rows[0]['id']}.png")
    (line,) = scoring.score(few, outputs.outputs(few, tmp_path / "r"), networks, tmp_path / "cache").rows
    assert line["copy"] == pytest.approx(line["model"], abs=1e-6) and line["copy"]["DINO"] < 1
    assert line["cluster"] == "backpack"


@pytest.mark.parametrize("name, make, expected", [
    ("emu_edit", files.emu_edit, 6),
    ("magicbrush", files.magicbrush, 2),
    ("migebench", files.migebench, 6),
])  # fmt: skip
def test_rows_say_what_goes_together(tmp_path, name, make, expected):
    prepare(name, Options(str(make(tmp_path / "data"))), tmp_path / "out")
    rows = read(tmp_path / "out").rows
    assert len({row["score"]["cluster"] for row in rows}) == expected


def test_a_folder_prepared_before_clusters_is_refused(tmp_path, networks):
    prepare("magicbrush", Options(str(files.magicbrush(tmp_path / "data"))), tmp_path / "r" / "benchmark")
    path = tmp_path / "r" / "benchmark" / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[1]["score"]["cluster"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = read(tmp_path / "r" / "benchmark")
    with pytest.raises(BenchmarkError, match="older version; prepare it again"):
        scoring.score(prepared, {}, networks, tmp_path / "cache")


# ---- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_processes_open_images_as_this_one_does(tmp_path, networks, monkeypatch):
    """Two processes, a batch of several chunks, backbones that want different images: the same features."""
    paths = [tmp_path / f"{n}.png" for n in range(21)]
    for n, path in enumerate(paths):
        files.save(path, n, (50 + n, 40))
    found = {}
    for processes in (0, 2):
        monkeypatch.setattr(features, "_PER_PROCESS", 8 if processes else 1000)
        monkeypatch.setattr(features, "_CHUNK", 2)
        monkeypatch.setattr(features.os, "cpu_count", lambda: 2)
        stores = {name: features.Features(network, tmp_path / str(processes)) for name, network in networks.items()}
        some = {"clip": [View(path) for path in paths], "dino": [View(path) for path in paths[::3]]}
        features.compute_images({stores[name]: views for name, views in some.items()}, 8)
        assert [len(store.known) for store in stores.values()] == [21, 7]
        found[processes] = [stores[name][view] for name, views in some.items() for view in views]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], found[2], strict=True))
    paths[5].write_bytes(paths[5].read_bytes()[:60])
    with pytest.raises(BadImageError, match=r"5\.png"):
        features.compute_images({features.Features(networks["clip"], tmp_path / "c"): map(View, paths)}, 8)


# ---- intervals -------------------------------------------------------------------------------------------------------


def nested(rng, num: int, of_each: int, between: float = 1.0) -> tuple[list[float], list[str]]:
    """Values of normal clusters around 1, standard deviation `between` between them and 0.3 inside."""
    middle = rng.normal(1, between, num)
    values = (middle[:, None] + rng.normal(0, 0.3, (num, of_each))).ravel()
    return values.tolist(), [str(n) for n in range(num) for _ in range(of_each)]


@pytest.mark.parametrize("num", [30, 60])  # Student's t, and the bootstrap
def test_intervals_of_clusters_hold_the_mean_as_often_as_they_say(num):
    """Resampling samples, 25 of each cluster, would hold it in less than half."""
    rng, held, naive = np.random.default_rng(num), 0, 0
    for _ in range(300):
        values, clusters = nested(rng, num, 25)
        _, low, high = statistics.interval(values, clusters)
        held += low <= 1 <= high
        low, high = statistics.t_interval(values)
        naive += low <= 1 <= high
    assert 0.91 * 300 <= held <= 0.985 * 300 and naive < 0.5 * 300


def test_clusters_of_one_size_are_as_their_means():
    """The ratio's error is then the standard error of the cluster means, so the interval is scipy's of these."""
    values, clusters = nested(np.random.default_rng(3), 12, 5)
    means = np.reshape(values, (12, 5)).mean(axis=1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert statistics.t_interval(values, clusters) == pytest.approx(tuple(expected), rel=1e-12)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.9)
    assert statistics.t_interval(values, clusters, level=0.9) == pytest.approx(tuple(expected), rel=1e-12)


def test_the_bootstrap_draws_whole_clusters():
    """By hand: resample clusters of unequal size, each with all of its values."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, 80)
    groups = [rng.normal(rng.normal(0, 2), 0.1, size) for size in sizes]
    values, clusters = np.concatenate(groups), [str(n) for n, size in enumerate(sizes) for _ in range(size)]
    drawn = [np.concatenate([groups[i] for i in rng.integers(0, 80, 80)]).mean() for _ in range(4000)]
    mean, low, high = statistics.bootstrap(values, clusters)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.08)


def test_one_cluster_has_no_interval():
    assert statistics.interval([1.0, 2.0, 3.0], ["a"] * 3) == (2.0, None, None)


def test_the_table_takes_intervals_of_clusters(tmp_path, networks):
    data = files.magicbrush(tmp_path / "data")
    prepare("magicbrush", Options(str(data)), tmp_path / "r" / "benchmark")
    prepared = read(tmp_path / "r" / "benchmark")
    values = {"139-1": 1.0, "139-2": 1.1, "30-1": 3.0}
    rows = [
        {"id": row["id"], "group": "all turns", "cluster": row["score"]["cluster"], "model": {"L1": values[row["id"]]}}
        for row in prepared.rows
    ]
    (entry,) = [one for one in summary.table(prepared, rows) if one["subset"] == "all"]
    assert (entry["low"], entry["high"]) == statistics.t_interval(list(values.values()), ["139", "139", "30"])
    assert "of editing sessions:" in summary.protocol(prepared, networks)["intervals"]


# ---- published rows --------------------------------------------------------------------------------------------------


def test_a_row_that_lacks_a_tag_is_never_beside_ours():
    for one in PUBLISHED:
        fits = [one.fits(Options("x", iterative=turns), "ViT-B/32") for turns in (None, "r")]
        stated = one.clip is not None and one.dino is not None and one.count is not None
        assert any(fits) == stated, one
        assert ("not stated" in one.protocol) == (not stated or one.by_figure), one.protocol


def test_figures_agree_with_their_captions():
    """The true image has .2826 (.2855) with local captions; no local figure lies above it, every global one does."""
    for one in PUBLISHED:
        assert one.scores.get(LOCAL, 0) <= 0.2855 and one.scores.get(GLOBAL, math.inf) > 0.2855
        if one.scores.keys() & {LOCAL, GLOBAL}:
            assert one.captions == ("local" if LOCAL in one.scores else "global")
            assert f"{one.captions} captions" in one.protocol
