"""Source and target are cropped as one, in training and in the store; a store whose images changed is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_here
from diffusers import AutoencoderKL
from PIL import Image

from mige.utils.images import center_crop, open_image, to_pixels

SIZE = 64
# width and height of source and target: wider, taller, of one ratio, equal, off by the rounding to whole pixels
SHAPES = [((160, 80), (96, 96)), ((70, 120), (128, 96)), ((96, 64), (144, 96)), ((107, 71), (120, 80))]


def draw(path: Path, width: int, height: int) -> None:
    """Red says how far to the right, green how far down, as shares of the whole image."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    levels = np.stack([255 * x, 255 * y, np.full_like(x, 99)], axis=-1)
    Image.fromarray(levels.round().astype(np.uint8)).save(path)


@pytest.fixture
def records(tmp_path) -> Path:
    rows = []
    for number, (source, target) in enumerate(SHAPES):
        draw(tmp_path / f"s{number}.png", *source)
        draw(tmp_path / f"t{number}.png", *target)
        names = {"source_path": [f"s{number}.png"], "image": f"t{number}.png"}
        rows.append(
            {"id": f"r{number}", "multi_prompt": "make<imagehere>blue", "entity_path": [f"s{number}.png"], **names}
        )
    file = tmp_path / "records.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """What goes into a VAE's encoder, batch by batch, [B, 3, H, W]."""
    seen, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: seen.append(x.detach().clone()) or encode(vae, x))
    return seen


def train(model: Path, records: Path, run: Path, *more: str):
    AcceleratorState._reset_state(reset_partial_state=True)
    sets = [{"file": str(records), "weight": 1.0}]
    settings = {"train.pretrained": str(model), "data.sets": sets, "train.steps": 2, "train.batch_size": len(SHAPES)}
    settings |= {"data.size": SIZE, "train.sample_every": 0, "train.log_every": 1, "train.checkpoint_every": 100}
    overrides = [f"{key}={value!r}" for key, value in settings.items()]
    return run_here("train_scripts/train_mige.py", "configs/tiny.py", *overrides, *more, "--output", run)


def extract(model: Path, records: Path, store: Path):
    options = ["--output", store, "--size", SIZE, "--workers", 0, "--device", "cpu"]
    return run_here("tools/extract_features.py", "--records", records, "--model", model, *options)


def metrics(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "loss" in name or "norm" in name} for line in lines]


def as_set(pixels: torch.Tensor) -> set[bytes]:
    return {one.numpy().tobytes() for one in pixels if one.std()}  # all black: what a batch is filled up with


def test_source_and_target_show_the_same_part(lively, records, seen, tmp_path):
    done = train(lively, records, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    pixels = seen[0]
    assert pixels.shape == (2 * len(SHAPES), 3, SIZE, SIZE)
    by_target = {}
    for target, source in pixels.reshape(len(SHAPES), 2, 3, SIZE, SIZE):
        by_target[target.numpy().tobytes()] = (target, source)
    for number, (source_size, target_size) in enumerate(SHAPES):
        own = {name: to_pixels(center_crop(open_image(tmp_path / name), SIZE, SIZE))
               for name in (f"s{number}.png", f"t{number}.png")}  # fmt: skip
        target, source = by_target[own[f"t{number}.png"].numpy().tobytes()]  # targets: the official crop, bit for bit
        # Both show, at every pixel, one place of the whole image; the edges of a filter apart, to a level or two.
        inner = (slice(None), slice(4, -4), slice(4, -4))
        assert (source - target)[inner].abs().max() < 4 / 127.5, (source_size, target_size)
        if source_size[0] * target_size[1] == source_size[1] * target_size[0]:
            assert torch.equal(source, own[f"s{number}.png"])


def test_training_from_the_store_is_training_from_images(lively, records, seen, tmp_path):
    """The same pixels enter the VAE; as batches have one shape here, losses and gradients are equal, bit for bit."""
    assert train(lively, records, tmp_path / "images").returncode == 0
    shown = as_set(torch.cat(seen))
    seen.clear()
    done = extract(lively, records, tmp_path / "store")
    assert done.returncode == 0 and "8 of 8 images, 8 in all" in done.stdout, done.stderr
    assert as_set(torch.cat(seen)) == shown
    seen.clear()
    done = train(lively, records, tmp_path / "stored", f"data.features={str(tmp_path / 'store')!r}")
    assert done.returncode == 0 and seen == []
    assert metrics(tmp_path / "stored") == metrics(tmp_path / "images") and len(metrics(tmp_path / "images")) == 2


def test_a_target_of_another_shape_gives_its_source_another_row(lively, records, seen, tmp_path):
    store = tmp_path / "store"
    assert extract(lively, records, store).returncode == 0
    draw(tmp_path / "t0.png", 60, 120)
    done = train(lively, records, tmp_path / "run", f"data.features={str(store)!r}")
    message = (
        f"{store}: 1 of 8 images changed or gone since, the first {tmp_path / 't0.png'} of {records}, record 1 (id r0)"
    )
    assert done.returncode == 1 and message in done.stderr and "run tools/extract_features.py" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    seen.clear()
    done = extract(lively, records, store)
    assert done.returncode == 0 and "8 of 8 images, 9 in all" in done.stdout
    source, target = open_image(tmp_path / "s0.png"), open_image(tmp_path / "t0.png")
    anew = [center_crop(source, SIZE, SIZE, like=(60, 120)), center_crop(target, SIZE, SIZE)]
    assert as_set(torch.cat(seen)) == as_set(torch.stack([*map(to_pixels, anew)]))
    assert train(lively, records, tmp_path / "run", f"data.features={str(store)!r}").returncode == 0


@pytest.mark.parametrize("how", ["replaced", "gone"])
def test_a_source_that_changed_after_extraction_is_noticed_before_step_1(lively, records, tmp_path, how):
    store = tmp_path / "store"
    assert extract(lively, records, store).returncode == 0
    if how == "replaced":
        draw(tmp_path / "s2.png", 48, 32)  # of one ratio: the crop stays, the content does not
    else:
        (tmp_path / "s2.png").unlink()
    options = [f"data.features={str(store)!r}", "data.check_images=False"]
    done = train(lively, records, tmp_path / "run", *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = f"{store}: 1 of 8 images changed or gone since, the first {tmp_path / 's2.png'} (cropped like "
    assert message in done.stderr and f"{records}, record 3 (id r2): run tools/extract_features.py" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert (
        train(lively, records, tmp_path / "run", *options, "data.skip_bad=True", "train.batch_size=3").returncode == 0
    )


def test_official_layout_is_refused_for_pairs_of_two_shapes(lively, records, tmp_path):
    folder = tmp_path / "npy"
    folder.mkdir()
    for image in tmp_path.glob("*.png"):
        np.save(folder / f"{image.stem}.npy", np.zeros((8, SIZE // 8, SIZE // 8), np.float32))
    done = train(lively, records, tmp_path / "run", f"data.features={str(folder)!r}")
    message = f"{tmp_path / 's0.png'} is 160 x 80 and is to be cropped like its target {tmp_path / 't0.png'}, 96 x 96"
    assert done.returncode == 1 and message in done.stderr and "extract into a store" in done.stderr


def test_a_store_of_version_1_is_refused_by_name(lively, records, tmp_path):
    store = tmp_path / "store"
    assert extract(lively, records, store).returncode == 0
    meta = store / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 1}))
    for done in (
        train(lively, records, tmp_path / "run", f"data.features={str(store)!r}"),
        extract(lively, records, store),
    ):
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{meta}: version 1, expected 2 (it holds sources cropped by their own shape" in done.stderr
        assert "run tools/extract_features.py on the same records again, with another --output" in done.stderr
