"""Training from the feature store: the same loss as from pixels, and no step on a store that does not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL

from mige import config
from mige.data.batch import collate
from mige.data.crops import Crop
from mige.data.latent_store.extraction import distinct_crops, extract
from mige.data.latent_store.store import StoreError, create_store
from mige.data.parsing import read_records
from mige.models.vae import Moments
from mige.tasks import Task
from mige.training.checkpointing import TrainingError
from mige.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "example_data" / "train.jsonl"
SIZE = 64
SAMPLES = range(12, 24)  # two epochs: every record at two times, none so noisy that a source would not count


@pytest.fixture(scope="module")
def model(lively) -> Path:
    return lively


@pytest.fixture(scope="module")
def vae(model) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model / "vae").eval()


@pytest.fixture(scope="module")
def images() -> dict[Crop, str]:
    return distinct_crops(read_records([RECORDS]).raise_if_errors())


def make_store(folder: Path, vae: AutoencoderKL, images: dict[Crop, str], **kwargs) -> Path:
    store = create_store(folder, **{"vae": vae, "size": SIZE, "root": RECORDS.parent, **kwargs})
    assert extract(store, vae, images) == []
    return folder


@pytest.fixture(scope="module")
def store(vae, images, tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "features", vae, images)


def build(model: Path, run: Path, features: Path | None) -> Trainer:
    """A trainer that drops text and source often enough for every kind of dropout to be among `SAMPLES`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sets = [{"file": str(RECORDS), "weight": 1.0}]
    settings = {
        "train.pretrained": str(model),
        "train.sample_every": 0,
        "data.sets": sets,
        "data.size": SIZE,
        "data.features": None if features is None else str(features),
        "data.drop_text": 0.25,
        "data.drop_source": 0.25,
        "data.drop_both": 0.2,
    }
    overrides = [f"{key}={value!r}" for key, value in settings.items()]
    return Trainer(config.load(ROOT / "configs" / "tiny.py", overrides), run)


def losses(trainer: Trainer, change=lambda batch: batch) -> torch.Tensor:
    """Both terms of the hybrid loss of `SAMPLES`, through everything the trainer does: [2, samples]."""
    batch = change(collate([trainer.dataset[index] for index in SAMPLES]))
    assert (batch.pixels_PCHW is None) == (trainer.config.data.features is not None)
    trainer._seed_dropout(0)
    with torch.no_grad():
        loss = trainer._loss(batch).loss
    return torch.stack([loss.mse, loss.vb])


def moved(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """By how much of itself each sample's loss differs."""
    return ((got - want).abs() / want).amax(0)


def shuffled(batch):
    """The moments of every image given to its neighbour."""
    return replace(batch, moments=Moments(batch.moments.mean.roll(1, 0), batch.moments.std.roll(1, 0)))


def without_sources(batch):
    return replace(batch, source_B=torch.full_like(batch.source_B, -1))


# ---- the same loss ---------------------------------------------------------------------------------------------------


def test_the_loss_from_the_store_is_the_loss_from_pixels(model, store, tmp_path):
    from_store, from_pixels = build(model, tmp_path / "a", store), build(model, tmp_path / "b", None)
    records = [from_store.dataset.record(index) for index in SAMPLES]
    assert records == [from_pixels.dataset.record(index) for index in SAMPLES]
    assert {record.task for record in records} == set(Task)
    kinds = {(s.drop_text, s.drop_source) for s in map(from_store.dataset.__getitem__, SAMPLES)}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}

    want = losses(from_pixels)
    assert moved(losses(from_store), want).max() < 1e-5
    by_moments = moved(losses(from_store, shuffled), want)
    for task in Task:
        assert max(by for by, record in zip(by_moments, records, strict=True) if record.task is task) > 1e-4
    by_source = moved(losses(from_store, without_sources), want) > 1e-3
    samples = [from_store.dataset[index] for index in SAMPLES]
    kept = [r.source is not None and not s.drop_source for r, s in zip(records, samples, strict=True)]
    assert by_source.tolist() == kept, "a source counts where there is one that is not dropped, and there only"


def test_float16_moments_move_the_loss_by_their_rounding(model, store, vae, images, tmp_path):
    half = losses(build(model, tmp_path / "a", make_store(tmp_path / "half", vae, images, dtype="float16")))
    by = moved(half, losses(build(model, tmp_path / "b", store)))
    assert 1e-7 < by.max() < 1e-4


# ---- stores that do not fit ------------------------------------------------------------------------------------------


def assert_refused(model: Path, run: Path, features: Path, error: type[Exception], message: str) -> None:
    """Building the trainer fails, so that no step can have been made."""
    with pytest.raises(error, match=message):
        build(model, run, features)
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def test_a_store_of_another_vae(model, vae, images, tmp_path):
    other = AutoencoderKL.from_config(vae.config).eval()
    folder = make_store(tmp_path / "other", other, images)
    message = r"other: made with other settings: vae \w{64} there, \w{64} expected; use the size and the VAE of"
    assert_refused(model, tmp_path / "run", folder, StoreError, message)


def test_a_store_of_another_size(model, vae, images, tmp_path):
    folder = make_store(tmp_path / "small", vae, images, size=SIZE // 2)
    message = f"small: made with other settings: height {SIZE // 2} there, {SIZE} expected; width"
    assert_refused(model, tmp_path / "run", folder, StoreError, message)


@pytest.mark.parametrize("name", ["cat.jpg", "pagoda_mirrored.jpg", "flower_on_saucer.jpg"])
def test_a_store_that_lacks_one_image(model, vae, images, tmp_path, name):
    """A reference, an edit's target, the target of a subject-driven edit."""
    some = {crop: where for crop, where in images.items() if crop.path.name != name}
    lost = sum(name in str(crop) for crop in images)  # a source that is to be cropped like it, too
    message = f"some: {lost} of {len(images)} images not in it, the first .*{name} of .*, record .*: run tools/ext"
    assert_refused(model, tmp_path / "run", make_store(tmp_path / "some", vae, some), TrainingError, message)


def test_an_official_folder_of_another_size(model, images, tmp_path):
    """Its files have no fingerprint, but a shape."""
    folder = tmp_path / "npy"
    folder.mkdir()
    for path, _ in images:
        np.save(folder / f"{path.stem}.npy", np.zeros((8, 4, 4), np.float32))
    message = r"\.npy, of image .*: float32 \[8, 4, 4\], expected float32 \[8, 8, 8\] .*use the size and the VAE"
    assert_refused(model, tmp_path / "run", folder, StoreError, message)


def test_a_folder_without_a_store(model, tmp_path):
    message = r"none: no meta\.json and no \.npy file, so no store; make one with tools/extract_features"
    assert_refused(model, tmp_path / "run", tmp_path / "none", StoreError, message)
