import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run_python, start_python
from torch.utils.data import DataLoader

from mige.data.crops import Crop, as_crops
from mige.data.latent_store import extraction
from mige.data.latent_store.encoding import ENOUGH_DB, Encoder, psnr
from mige.data.latent_store.extraction import choose_precision, distinct_crops, extract
from mige.data.latent_store.meta import make_meta
from mige.data.latent_store.part import PartWriter
from mige.data.latent_store.store import NpyFolder, StoreError, create_store, fingerprint, open_store
from mige.data.parsing import read_records
from mige.models.vae import encode
from mige.utils.images import center_crop, open_image, to_levels, to_pixels

SIZE = 32  # pixels; latents are 4 x 4 x 4
ROW = 2 * 4 * 4 * 4 * 4  # bytes
ENTRY = 60


@pytest.fixture(scope="module")
def vae(tiny_model):
    return AutoencoderKL.from_pretrained(tiny_model / "vae").eval()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A CPU's last bits depend on the number of threads: one here and in child processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def draw(path, seed, height=40, width=56):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """Eleven images of several shapes below tmp_path/data/images."""
    folder = tmp_path / "data" / "images"
    return [draw(folder / f"{n % 2}" / f"{n:02d}.png", n, height=30 + 3 * n) for n in range(11)]


def write_records(data, file, extra=()):
    """Every image is a target once; references repeat."""
    paths = [*map(str, data), *map(str, extra)]
    rows = [{"multi_prompt": "a<imagehere>", "entity_path": [paths[0]], "image": path} for path in paths]
    rows[1] |= {"source_path": [paths[0]]}
    file.write_text(json.dumps(rows))
    return file


def made(data, folder, vae, paths=None, dtype="float32", **kwargs):
    """A store of the images, opened anew."""
    root = data[0].parents[2]
    store = create_store(folder, vae=vae, size=SIZE, root=root, dtype=dtype)
    assert extract(store, vae, dict.fromkeys(paths or data, "test"), **kwargs) == []
    return open_store(folder, vae=vae, size=SIZE)


def encoded(vae, paths, size=(SIZE, SIZE)):
    """Moments straight from the pixels, eight at a time as the store makes them."""
    pixels = [to_pixels(center_crop(open_image(path), *size)) for path in paths]
    pixels += [torch.zeros_like(pixels[0])] * (-len(paths) % 8)
    with torch.inference_mode():
        moments = [encode(vae, part) for part in torch.stack(pixels).split(8)]
    return [torch.cat(values)[: len(paths)] for values in zip(*((m.mean, m.std) for m in moments), strict=True)]


def assert_same(store, data, expected):
    moments = store.read(data)
    assert moments.mean.dtype == moments.std.dtype == torch.float32
    assert torch.equal(moments.mean, expected[0]) and torch.equal(moments.std, expected[1])


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_store_equals_encoding_bit_for_bit(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    assert len(store) == 11
    assert store.missing(data) == store.changed(data) == []
    backwards = data[::-1]
    assert_same(store, backwards, [part.flip(0) for part in encoded(vae, data)])
    twice = store.read([data[3], data[3]])
    assert torch.equal(twice.mean[0], twice.mean[1])
    assert store.read([]).mean.shape == (0, 4, 4, 4)
    assert store.bytes_on_disk == 11 * (ROW + ENTRY) + (tmp_path / "store" / "meta.json").stat().st_size


def test_oblong_images(vae, data, tmp_path):
    store = create_store(tmp_path / "store", vae=vae, size=(48, 32), root=tmp_path)
    extract(store, vae, dict.fromkeys(data, "test"))
    store = open_store(tmp_path / "store", vae=vae, size=(48, 32))
    assert store.read(data).mean.shape == (11, 4, 6, 4)
    assert_same(store, data, encoded(vae, data, (48, 32)))


def test_float16_is_the_rounded_float32(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae, dtype="float16")
    exact = encoded(vae, data)
    assert_same(store, data, [part.half().float() for part in exact])
    moments = store.read(data)
    for stored, part in zip((moments.mean, moments.std), exact, strict=True):
        assert ((stored - part).abs() <= part.abs() * 2**-11 + 2**-25).all()
    assert sum(file.stat().st_size for file in store.folder.glob("*.rows")) == 11 * ROW // 2


def test_same_bits_whatever_was_done_before_and_the_batch_size(vae, data, tmp_path):
    whole = made(data, tmp_path / "whole", vae, batch_size=16).read(data)
    assert_same(made(data, tmp_path / "odd", vae, batch_size=9), data, (whole.mean, whole.std))
    for some in (data[4:7], data[::3]):
        made(data, tmp_path / "pieces", vae, some)
    assert_same(made(data, tmp_path / "pieces", vae), data, (whole.mean, whole.std))


def test_bfloat16_is_the_vae_in_bfloat16_and_cannot_be_mixed(vae, data, tmp_path):
    store = create_store(tmp_path / "store", vae=vae, size=SIZE, root=tmp_path, precision="bfloat16")
    assert extract(store, vae, dict.fromkeys(data, "test")) == []
    assert vae.dtype is torch.float32, "the caller's VAE stays as it is"
    rounded = AutoencoderKL.from_config(vae.config)
    rounded.load_state_dict(vae.state_dict())
    expected = [part.float() for part in encoded(rounded.bfloat16(), data)]
    assert not torch.equal(expected[0], encoded(vae, data)[0])
    assert_same(open_store(store.folder, vae=vae, size=SIZE), data, expected)
    with pytest.raises(StoreError, match="precision bfloat16 there, float32 expected"):
        create_store(store.folder, vae=vae, size=SIZE, root=tmp_path)


def test_a_store_from_before_precisions_is_one_of_float32(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    meta = store.folder / "meta.json"
    values = json.loads(meta.read_text())
    assert values.pop("precision") == "float32"
    meta.write_text(json.dumps(values))
    assert_same(made(data, tmp_path / "store", vae), data, encoded(vae, data))


def test_psnr_is_that_of_the_samples_that_training_draws(vae, data):
    """Against the definition: the error of mean + std * noise, measured on many draws of the noise."""
    levels = torch.stack([to_levels(center_crop(open_image(path), SIZE, SIZE)) for path in data[:8]])
    assert psnr(vae, levels, "float32") == np.inf
    exact, other = (Encoder(vae, precision).moments(levels) for precision in ("float32", "bfloat16"))
    noise = torch.randn(400, *exact.mean.shape, generator=torch.Generator().manual_seed(0))
    error = (other.sample(noise) - exact.sample(noise)).square().mean().sqrt()
    drawn = 20 * torch.log10((exact.mean.max() - exact.mean.min()) / error)
    assert psnr(vae, levels, "bfloat16") == pytest.approx(float(drawn), abs=0.05)


def test_precision_is_what_the_first_images_say(vae, data, tmp_path, monkeypatch):
    """On a stand-in for a GPU; the first file is no image and is passed by."""
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    named, meta = dict.fromkeys([bad, *data], "test"), make_meta(vae, SIZE)
    assert choose_precision(vae, named, meta) == ("float32", None)
    monkeypatch.setattr(AutoencoderKL, "device", torch.device("meta"))
    for found, precision in ((ENOUGH_DB, "bfloat16"), (ENOUGH_DB - 1, "float32")):
        monkeypatch.setattr(extraction, "psnr", lambda vae, levels, precision, found=found: found + len(levels) - 7)
        assert choose_precision(vae, named, meta) == (precision, found)
    assert choose_precision(vae, [bad], meta) == ("float32", None)


def test_every_image_is_extracted_once(vae, data, tmp_path):
    records = read_records([write_records(data, tmp_path / "data" / "records.json")]).raise_if_errors()
    images = distinct_crops(records)
    assert {crop.path for crop in images} == set(data)
    assert [crop for crop in images if crop.like] == [Crop(data[0], like=data[1])]
    roundabout = {data[0].parent / ".." / path.parent.name / path.name for path in data}
    store = made(data, tmp_path / "store", vae, paths=images)
    made(data, tmp_path / "store", vae, paths=images)
    assert store.missing(roundabout) == []
    assert sum(file.stat().st_size for file in store.folder.glob("*.rows")) == 12 * ROW
    assert len(list(store.folder.glob("*.rows"))) == 2, "nothing to do leaves no file"


def test_shares_of_processes_are_disjoint_and_complete(vae, data, tmp_path):
    folder, images = tmp_path / "store", dict.fromkeys(data, "test")
    for process in range(3):
        store = create_store(folder, vae=vae, size=SIZE, root=tmp_path)
        assert extract(store, vae, images, process=process, processes=3) == []
    assert sorted(file.stat().st_size // ENTRY for file in folder.glob("*.index")) == [3, 4, 4]
    assert_same(open_store(folder, vae=vae, size=SIZE), data, encoded(vae, data))


def test_duplicates_of_two_writers_are_harmless(vae, data, tmp_path):
    folder = tmp_path / "store"
    early = [create_store(folder, vae=vae, size=SIZE, root=tmp_path) for _ in range(2)]
    for store in early:  # neither sees what the other writes
        extract(store, vae, dict.fromkeys(data, "test"))
    assert len(list(folder.glob("*.rows"))) == 2
    store = open_store(folder, vae=vae, size=SIZE)
    assert len(store) == 11
    assert_same(store, data, encoded(vae, data))


def test_parts_of_two_machines_are_copied_together(vae, data, tmp_path):
    one, other = (made(data, tmp_path / name, vae, some) for name, some in (("a", data[:5]), ("b", data[5:])))
    for file in [*other.folder.glob("*.rows"), *other.folder.glob("*.index")]:
        shutil.copy(file, one.folder)
    assert_same(open_store(one.folder, vae=vae, size=SIZE), data, encoded(vae, data))


@pytest.mark.processes
def test_data_loader_workers_read(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    expected = encoded(vae, data)
    store.read(data)  # used before the fork
    got = torch.cat(list(DataLoader(_Rows(store, data), batch_size=4, num_workers=2)))
    assert torch.equal(got, torch.stack(expected, dim=1))


class _Rows(torch.utils.data.Dataset):
    def __init__(self, store, paths):
        self.store, self.paths = store, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        moments = self.store.read([self.paths[index]])
        return torch.cat([moments.mean, moments.std])


def test_pickled_store_reads(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    assert_same(pickle.loads(pickle.dumps(store)), data, encoded(vae, data))


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_missing_images_are_listed(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae, data[:9])
    assert store.missing(data) == data[9:]
    with pytest.raises(StoreError, match=r"lacks 2 of 3 images, the first .*09\.png \('images/1/09\.png' from"):
        store.read(data[8:])
    empty = create_store(tmp_path / "empty", vae=vae, size=SIZE, root=tmp_path)
    assert (len(empty), empty.missing(data), empty.changed(data)) == (0, data, [])


def test_moved_data(vae, data, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    create_store(folder, vae=vae, size=SIZE, root=tmp_path / "data")
    made(data, folder, vae)
    expected = encoded(vae, data)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [tmp_path / "moved" / path.relative_to(tmp_path / "data") for path in data]
    with pytest.raises(StoreError, match=r"its images lay below .*data, which is gone; if they moved"):
        open_store(folder, vae=vae, size=SIZE)
    store = open_store(folder, vae=vae, size=SIZE, root=tmp_path / "moved")
    assert store.changed(moved) == []
    assert_same(store, moved, expected)
    monkeypatch.chdir(tmp_path)
    assert_same(store, [path.relative_to(tmp_path) for path in moved], expected)


def test_images_outside_the_root(vae, data, tmp_path):
    outside = draw(tmp_path / "elsewhere" / "00.png", 99)
    store = create_store(tmp_path / "store", vae=vae, size=SIZE, root=data[0].parent)
    assert data[0].name == outside.name
    extract(store, vae, {data[0]: "test", outside: "test"})
    store = open_store(tmp_path / "store", vae=vae, size=SIZE)
    assert_same(store, [data[0], outside], encoded(vae, [data[0], outside]))


def test_changed_images_are_extracted_again(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    draw(data[2], 1234, height=36)
    status = data[5].stat()
    os.utime(data[5], ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # copied: another time, the same content
    bmp = draw(tmp_path / "a.bmp", 1)
    assert store.changed([*data, bmp]) == [data[2]]
    store = made(data, tmp_path / "store", vae)
    assert store.changed(data) == []
    assert (len(store), store.bytes_on_disk // (ROW + ENTRY)) == (11, 12)
    assert_same(store, data, encoded(vae, data))
    data[7].unlink()
    assert store.changed(data) == [data[7]]


def test_same_size_another_content(vae, data, tmp_path):
    path = draw(tmp_path / "a.bmp", 1)
    store = made(data, tmp_path / "store", vae, [path])
    size = path.stat().st_size
    draw(path, 2)
    assert path.stat().st_size == size
    assert store.changed([path]) == [path]


# ---- other settings --------------------------------------------------------------------------------------------------


def test_another_size_vae_fit_or_dtype_is_refused(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    with pytest.raises(StoreError, match="height 32 there, 64 expected; width 32 there, 64 expected"):
        open_store(store.folder, vae=vae, size=64)
    other = AutoencoderKL.from_config(vae.config)
    pattern = f"vae {fingerprint(vae)} there, {fingerprint(other)} expected; use the size and the VAE of the store"
    with pytest.raises(StoreError, match=pattern):
        open_store(store.folder, vae=other, size=SIZE)
    with pytest.raises(StoreError, match="dtype float32 there, float16 expected"):
        create_store(store.folder, vae=vae, size=SIZE, root=tmp_path, dtype="float16")
    with pytest.raises(StoreError, match="30 x 30 pixels, expected multiples of 8"):
        open_store(store.folder, vae=vae, size=30)
    meta = store.folder / "meta.json"
    meta.write_text(meta.read_text().replace("center_crop", "letterbox"))
    with pytest.raises(StoreError, match="fit letterbox there, center_crop expected"):
        open_store(store.folder, vae=vae, size=SIZE)


def test_fingerprint_is_of_the_encoder_alone(vae):
    twin = AutoencoderKL.from_config(vae.config)
    twin.load_state_dict(vae.state_dict())
    assert fingerprint(twin) == fingerprint(vae)
    with torch.no_grad():
        twin.decoder.conv_in.weight += 1
        assert fingerprint(twin) == fingerprint(vae)
        twin.quant_conv.bias[0] += 1e-6
        assert fingerprint(twin) != fingerprint(vae)
    rounded = AutoencoderKL.from_config(vae.config)
    rounded.load_state_dict(vae.state_dict())
    assert fingerprint(rounded.bfloat16()) != fingerprint(vae)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"version": 9}', "version 9, expected 2; run tools/extract_features"),
        ('{"version": 1, "fit": "center_crop"}', "version 1, expected 2 .it holds sources cropped by their own shape"),
        ('{"version": 2}', "damaged"),
        ('{"version": 2, "more": 2}', "damaged"),
    ],
)
def test_damaged_meta(vae, tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(StoreError, match=rf"meta\.json: {message}"):
        open_store(tmp_path, vae=vae, size=SIZE)


def test_no_store(vae, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match=r"so no store; make one with tools/extract_features\.py"):
            open_store(folder, vae=vae, size=SIZE)


# ---- errors ----------------------------------------------------------------------------------------------------------


def cut(file, size):
    with file.open("r+b") as opened:
        opened.truncate(size)


@pytest.mark.parametrize("cut_rows", [0, 1, ROW - 1, 4 * ROW, 7 * ROW + 5])
@pytest.mark.parametrize("cut_index", [0, 1, ENTRY * 3, ENTRY * 6 + 51])
def test_what_is_not_whole_is_extracted_again(vae, data, tmp_path, cut_rows, cut_index):
    store = made(data, tmp_path / "store", vae)
    [rows], [index] = store.folder.glob("*.rows"), store.folder.glob("*.index")
    cut(rows, rows.stat().st_size - cut_rows)
    cut(index, index.stat().st_size - cut_index)
    lost = max(-(-cut_rows // ROW), -(-cut_index // ENTRY))
    store = open_store(store.folder, vae=vae, size=SIZE)
    assert store.missing(data) == data[len(data) - lost :]
    whole = data[: len(data) - lost]
    assert_same(store, whole, [part[: len(whole)] for part in encoded(vae, data)])
    assert_same(made(data, tmp_path / "store", vae), data, encoded(vae, data))


def test_index_without_rows(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    next(store.folder.glob("*.rows")).unlink()
    assert open_store(store.folder, vae=vae, size=SIZE).missing(data) == data
    assert_same(made(data, tmp_path / "store", vae), data, encoded(vae, data))


def test_damaged_row_is_refused_and_can_be_mended_as_the_message_says(vae, data, tmp_path):
    made(data, tmp_path / "store", vae, data[:6])
    store = made(data, tmp_path / "store", vae)
    rows, _ = sorted(store.folder.glob("*.rows"))
    with rows.open("r+b") as file:
        file.seek(2 * ROW + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match=rf"{rows.name}, row 2, of image .*02\.png: damaged; delete this file"):
        store.read(data)
    assert store.read(data[3:]).mean.shape[0] == 8
    rows.unlink()
    rows.with_suffix(".index").unlink()
    assert_same(made(data, tmp_path / "store", vae), data, encoded(vae, data))


def test_row_cut_off_while_the_store_is_open(vae, data, tmp_path):
    store = made(data, tmp_path / "store", vae)
    cut(next(store.folder.glob("*.rows")), 5 * ROW + 7)
    with pytest.raises(StoreError, match=r"row 5, of image .*05\.png: damaged"):
        store.read(data)


@pytest.mark.processes
def test_bad_images_are_findings_and_the_rest_is_done(vae, data, tmp_path):
    bad = [tmp_path / name for name in ("none.png", "empty.png", "text.png", "long.png", "pipe.png")]
    bad[1].touch()
    bad[2].write_text("no image")
    draw(bad[3], 0, height=1, width=60000)
    os.mkfifo(bad[4])
    store = create_store(tmp_path / "store", vae=vae, size=4096, root=tmp_path)
    images = {path: f"train.json, record {n}" for n, path in enumerate([*bad], 1)}
    issues = extract(store, vae, images, workers=2)
    assert len(issues) == 5
    assert str(issues[0]).startswith(f"train.json, record 1: {bad[0]}: cannot be read (No such file or directory); ")
    for issue, problem in zip(issues[1:], ("0 bytes", "known format", "pixels, expected", "regular"), strict=True):
        assert problem in issue.message
    assert list(store.folder.glob("*.rows")) == []
    store = create_store(tmp_path / "small", vae=vae, size=SIZE, root=tmp_path)
    assert len(extract(store, vae, dict.fromkeys([bad[0], *data, bad[1]], "test"), batch_size=3)) == 2
    assert open_store(tmp_path / "small", vae=vae, size=SIZE).missing(data) == []


def test_moments_that_are_not_finite_are_findings(vae, data, tmp_path):
    broken = AutoencoderKL.from_config(vae.config)
    broken.load_state_dict(vae.state_dict())
    with torch.no_grad():
        broken.quant_conv.bias[0] = 1e6  # fits float32, not float16
    store = create_store(tmp_path / "store", vae=broken, size=SIZE, root=tmp_path, dtype="float16")
    issues = extract(store, broken, dict.fromkeys(data, "test"))
    assert len(issues) == 11
    assert issues[0].message == "its moments are not finite in float16"
    assert len(open_store(tmp_path / "store", vae=broken, size=SIZE)) == 0


@contextmanager
def largest_file(size):
    """A disk that is full after `size` bytes of a file: the real error, from the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [ROW // 2, 8 * ROW + 100, 9 * ROW])
def test_full_disk_keeps_the_batches_before(vae, data, tmp_path, room):
    store = create_store(tmp_path / "store", vae=vae, size=SIZE, root=tmp_path)
    with largest_file(room), pytest.raises(OSError, match=r"cannot write moments: File too large: '.*\.rows'"):
        extract(store, vae, dict.fromkeys(data, "test"))
    kept = data[: room // (8 * ROW) * 8]
    store = open_store(tmp_path / "store", vae=vae, size=SIZE)
    assert store.missing(data) == data[len(kept) :]
    assert_same(made(data, tmp_path / "store", vae), data, encoded(vae, data))


def test_after_a_failed_write_nothing_more_is_written(vae, data, tmp_path):
    """What came behind half a row would lie at another's place: batches on their way are not written either."""
    row = np.zeros((1, 2, 4, 4, 4), np.float32)
    with PartWriter(tmp_path, 0) as part:
        with largest_file(ROW // 2), pytest.raises(OSError, match="cannot write moments"):
            part.add(np.zeros(1, "V60"), row)
        with pytest.raises(OSError, match="cannot write moments"):
            part.add(np.zeros(1, "V60"), row)
    assert [file.stat().st_size for file in sorted(tmp_path.glob("*.[ri]*"))] == [0, ROW // 2]


# ---- the official layout ---------------------------------------------------------------------------------------------


@pytest.fixture
def npy(vae, data, tmp_path):
    folder = tmp_path / "npy"
    folder.mkdir()
    for path, mean, std in zip(data, *encoded(vae, data), strict=True):
        np.save(folder / f"{path.stem}.npy", torch.cat([mean, std]).numpy())
    return folder


def test_official_layout_is_read(vae, data, npy, tmp_path):
    store = open_store(npy, vae=vae, size=SIZE)
    assert isinstance(store, NpyFolder)
    assert_same(store, data, encoded(vae, data))
    assert store.read([]).std.shape == (0, 4, 4, 4)
    more = [*data, tmp_path / "99.png"]
    assert store.missing(more) == more[-1:]
    with pytest.raises(StoreError, match=r"99\.npy: no such file, for image .*99\.png"):
        store.read(more)


def test_official_layout_with_one_stem_twice(vae, data, npy, tmp_path):
    twin = tmp_path / "other" / "03.jpg"
    for ask in ("read", "missing"):
        store = open_store(npy, vae=vae, size=SIZE)
        with pytest.raises(StoreError, match=r"images/1/03\.png and .*other/03\.jpg would share 03\.npy"):
            getattr(store, ask)([*data, twin])
    store.missing(data)
    with pytest.raises(StoreError, match="would share"):
        pickle.loads(pickle.dumps(store)).read([twin])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((8, 8, 8), np.float32), r"float32 \[8, 8, 8\], expected float32 \[8, 4, 4\]"),
        (np.zeros((8, 4, 4), np.float16), r"float16 \[8, 4, 4\], expected float32"),
        (np.array([{"a": 1}], dtype=object), "damaged .*allow_pickle"),
        (b"\x93NUMPY\x01", "damaged"),
        (b"", "damaged"),
        (b"\x80\x04N.", "damaged"),
    ],
)
def test_bad_npy(vae, data, npy, content, message):
    file = npy / f"{data[0].stem}.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(StoreError, match=rf"{file.name}, of image {data[0]}: {message}"):
        open_store(npy, vae=vae, size=SIZE).read(data[:1])


def test_cut_npy(vae, data, npy):
    file = npy / f"{data[0].stem}.npy"
    cut(file, file.stat().st_size - 1)
    with pytest.raises(StoreError, match="damaged"):
        open_store(npy, vae=vae, size=SIZE).read(data[:1])


# ---- the tool --------------------------------------------------------------------------------------------------------


def arguments(records, model, output, *more):
    return ["--records", records, "--model", model, "--output", output, "--size", SIZE, "--workers", 0, *more]


def launch(count, *args):
    """On CPUs `accelerate launch` starts one process only; torch's launcher, which it uses for GPUs, starts `count`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    return run_python(*torchrun, ROOT / "tools" / "extract_features.py", *args)


def test_tool_lists_bad_images_and_exits_with_3(vae, data, tmp_path, tiny_model):
    bad = tmp_path / "data" / "bad.png"
    bad.write_text("no image")
    records = write_records(data, tmp_path / "data" / "records.json", [bad])
    done = run_here("tools/extract_features.py", *arguments(records, tiny_model, tmp_path / "store", "--device", "cpu"))
    assert done.returncode == 3, done.stderr
    assert "12 of 13 images, 12 in all" in done.stdout
    [failure] = (tmp_path / "store" / "failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["where"] == f"{records}, record 12 (id 00012): {bad}"
    assert "failures.jsonl" in done.stderr and "12/12" in done.stderr
    assert_same(open_store(tmp_path / "store", vae=vae, size=SIZE), data, encoded(vae, data))
    draw(bad, 5)
    done = run_here("tools/extract_features.py", *arguments(records, tiny_model, tmp_path / "store", "--device", "cpu"))
    assert done.returncode == 0, done.stderr
    assert "13 of 13 images" in done.stdout
    assert not (tmp_path / "store" / "failures.jsonl").exists()


def test_tool_extends_a_store_in_its_own_precision(vae, data, tmp_path, tiny_model):
    records = write_records(data, tmp_path / "data" / "records.json")
    run = arguments(records, tiny_model, tmp_path / "store", "--device", "cpu")
    assert run_here("tools/extract_features.py", *run, "--precision", "bfloat16").returncode == 0
    data.append(draw(tmp_path / "data" / "more.png", 77))
    write_records(data, records)
    done = run_here("tools/extract_features.py", *run)
    assert done.returncode == 0 and "13 of 13 images" in done.stdout, done.stderr
    rounded = AutoencoderKL.from_pretrained(tiny_model / "vae", dtype=torch.bfloat16).eval()
    expected = [part.float() for part in encoded(rounded, data)]
    assert_same(open_store(tmp_path / "store", vae=vae, size=SIZE), data, expected)
    done = run_here("tools/extract_features.py", *run, "--precision", "float32")
    assert done.returncode == 1 and "precision bfloat16 there, float32 expected" in done.stderr


@pytest.mark.processes
def test_killed_resumed_with_two_processes(vae, tmp_path, tiny_model):
    data = [draw(tmp_path / "data" / f"{n:03d}.png", n) for n in range(300)]
    records = write_records(data, tmp_path / "data" / "records.json")
    args = arguments(records, tiny_model, tmp_path / "store")
    tool = ROOT / "tools" / "extract_features.py"
    process = start_python(tool, *args, "--device", "cpu", stderr=subprocess.DEVNULL)
    while len(finished := list((tmp_path / "store").glob("*.index"))) == 0 or finished[0].stat().st_size < 5 * ENTRY:
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    [index] = (tmp_path / "store").glob("*.index")
    kept = index.stat().st_size // ENTRY
    assert 5 <= kept < 300
    with index.with_suffix(".rows").open("ab") as file:
        file.write(b"half a row")
    done = launch(2, *args)
    assert done.returncode == 0, done.stderr
    assert "301 of 301 images, 301 in all" in done.stdout  # one is a source, too
    sizes = [file.stat().st_size // ENTRY for file in sorted((tmp_path / "store").glob("*.index"))]
    assert len(sizes) in (3, 4) and sum(sizes) == 301
    store = open_store(tmp_path / "store", vae=vae, size=SIZE)
    assert_same(store, data, encoded(vae, data))


@pytest.mark.processes
def test_two_processes_list_the_failures_of_both(vae, data, tmp_path, tiny_model):
    bad = [tmp_path / "data" / f"bad{n}.png" for n in range(3)]
    records = write_records(data, tmp_path / "data" / "records.json", bad)
    done = launch(2, *arguments(records, tiny_model, tmp_path / "store"))
    assert done.returncode != 0
    failures = (tmp_path / "store" / "failures.jsonl").read_text().splitlines()
    assert {json.loads(line)["where"].split(": ")[1] for line in failures} == set(map(str, bad))
    assert "12 of 15 images" in done.stdout
    assert_same(open_store(tmp_path / "store", vae=vae, size=SIZE), data, encoded(vae, data))


def test_tool_refuses_bad_records_and_other_settings(data, tmp_path, tiny_model):
    records = tmp_path / "records.json"
    records.write_text("[{]")
    done = run_here("tools/extract_features.py", *arguments(records, tiny_model, tmp_path / "store"))
    assert done.returncode == 1 and "malformed JSON" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


# ---- garbage ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def small_store(vae, tmp_path_factory):
    """A store of two images in one part, and its files' bytes."""
    folder = tmp_path_factory.mktemp("garbage")
    paths = [draw(folder / f"{n}.png", n) for n in range(2)]
    store = create_store(folder / "store", vae=vae, size=SIZE, root=folder)
    assert extract(store, vae, {path: "test" for path in paths} | {Crop(paths[0], like=paths[1]): "test"}) == []
    return folder / "store", paths, {file.name: file.read_bytes() for file in (folder / "store").iterdir()}


def assert_read_right_or_refused(vae, small_store):
    """What is read is what was written, or a StoreError names the folder's file or image and what to do."""
    folder, paths, _ = small_store
    crops = [*paths, Crop(paths[0], like=paths[1])]
    try:
        store = open_store(folder, vae=vae, size=SIZE, root=folder.parent)
        kept = [crop for crop in crops if crop not in store.missing(crops)]
        got = store.read(kept)
    except StoreError as error:
        assert (str(folder) in str(error) and ";" in str(error)) or "run tools/extract_features.py" in str(error)
        return
    like = (56, 40)  # of every image that `draw` makes
    pixels = [to_pixels(center_crop(open_image(path), SIZE, SIZE, like=like)) for path, _ in as_crops(kept)]
    pixels += [torch.zeros(3, SIZE, SIZE)] * (8 - len(pixels))
    with torch.inference_mode():
        expected = encode(vae, torch.stack(pixels))
    assert torch.equal(got.mean, expected.mean[: len(kept)]) and torch.equal(got.std, expected.std[: len(kept)])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_changed_anywhere_are_missing_or_refused(vae, small_store, data):
    folder, _, files = small_store
    for name, content in files.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(name for name in files if name != "meta.json")))
    place = data.draw(st.integers(0, len(files[name]) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=70))
    (folder / name).write_bytes(files[name][:place] + junk + files[name][place + len(junk) :])
    assert_read_right_or_refused(vae, small_store)


@settings(max_examples=60, deadline=None)
@given(field=st.sampled_from(["version", "height", "width", "fit", "vae", "shape", "dtype", "root"]), value=JSON)
def test_any_meta_is_read_or_refused(vae, small_store, field, value):
    folder, _, files = small_store
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "meta.json").write_text(json.dumps(json.loads(files["meta.json"]) | {field: value}))
    assert_read_right_or_refused(vae, small_store)
    (folder / "meta.json").write_text(json.dumps(value))
    with pytest.raises(StoreError, match=r"meta\.json: damaged"):
        open_store(folder, vae=vae, size=SIZE)
