import os
import resource
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import transforms as T

from mige.data.checks import check_images
from mige.data.parsing import read_records
from mige.data.records import Record
from mige.tasks import Task
from mige.utils.images import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_PIXELS,
    BadImageError,
    center_crop,
    letterbox,
    open_image,
    save_image,
    to_pil,
    to_pixels,
    vision_pixels,
)

EXAMPLES = Path(__file__).parents[2] / "example_data"


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image, path, **params):
    image.save(path, **params)
    return path


def pixels(image):
    """Rows of RGB triples."""
    assert image.mode == "RGB"
    return [[tuple(value) for value in row] for row in np.asarray(image).tolist()]


def grey16(values, path):
    return saved(Image.fromarray(np.array(values, dtype=np.uint16)), path)


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_transparency_goes_on_black(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 255, 255, 0), (255, 255, 0, 128)])
    assert pixels(open_image(saved(rgba, tmp_path / "a.png"))) == [[(255, 0, 0), (0, 0, 0), (128, 128, 0)]]
    la = Image.new("LA", (2, 1))
    la.putdata([(200, 255), (255, 0)])
    assert pixels(open_image(saved(la, tmp_path / "b.png"))) == [[(200, 200, 200), (0, 0, 0)]]


def test_palette(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert pixels(open_image(saved(image, tmp_path / "a.png"))) == [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    path = saved(image, tmp_path / "b.png", transparency=1)
    assert pixels(open_image(path)) == [[(255, 0, 0), (0, 0, 0), (0, 0, 255)]]
    path = saved(image, tmp_path / "c.png", transparency=bytes([255, 255, 0]))
    assert pixels(open_image(path)) == [[(255, 0, 0), (0, 255, 0), (0, 0, 0)]]


def test_grey_and_one_bit(tmp_path):
    grey = Image.new("L", (2, 1))
    grey.putdata([7, 250])
    assert pixels(open_image(saved(grey, tmp_path / "a.png"))) == [[(7,) * 3, (250,) * 3]]
    assert pixels(open_image(saved(grey, tmp_path / "b.png", transparency=250))) == [[(7,) * 3, (0,) * 3]]
    bit = Image.new("1", (2, 1))
    bit.putdata([0, 255])
    assert pixels(open_image(saved(bit, tmp_path / "c.png"))) == [[(0,) * 3, (255,) * 3]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    expected = [[(0,) * 3, (1,) * 3, (128,) * 3, (254,) * 3, (255,) * 3]]
    values = [[0, 257, 32768, 254 * 257 + 100, 65535]]
    assert pixels(open_image(grey16(values, tmp_path / "a.png"))) == expected
    assert pixels(open_image(grey16(values, tmp_path / "a.tif"))) == expected
    big_endian = Image.frombytes("I;16B", (5, 1), np.array(values, dtype=">u2").tobytes())
    assert pixels(open_image(saved(big_endian, tmp_path / "b.tif"))) == expected
    integers = Image.fromarray(np.array(values, dtype=np.int32))
    assert integers.mode == "I"
    assert pixels(open_image(saved(integers, tmp_path / "c.tif"))) == expected


def test_sixteen_bits_with_a_transparent_grey(tmp_path):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HH", 65535, 25700)))
    path = tmp_path / "a.png"
    clear = png_chunk(b"tRNS", struct.pack(">H", 65535))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + clear + data + png_chunk(b"IEND", b""))
    assert pixels(open_image(path)) == [[(0,) * 3, (100,) * 3]]


def test_pixels_without_a_fixed_range_are_refused(tmp_path):
    deep = saved(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)), tmp_path / "a.tif")
    with pytest.raises(BadImageError, match="pixels from -1 to 70000, expected 0 to 65535"):
        open_image(deep)
    real = saved(Image.fromarray(np.ones((1, 1), dtype=np.float32)), tmp_path / "b.tif")
    with pytest.raises(BadImageError, match="32-bit float pixels have no fixed range"):
        open_image(real)


def test_cmyk(tmp_path):
    red = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert pixels(open_image(saved(red, tmp_path / "a.tif"))) == [[(255, 0, 0)]]
    [[(r, g, b)]] = pixels(open_image(saved(red, tmp_path / "a.jpg", quality=100)))
    assert r >= 253 and g <= 2 and b <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    params = {"lossless": True} if suffix == "webp" else {}
    path = saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **params)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert {value for row in pixels(open_image(path)) for value in row} == {(255, 0, 0)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])  # a TIFF is turned by Pillow itself while it is decoded
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (2, 1))
    upright.putdata([(255, 0, 0), (0, 0, 255)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(upright, tmp_path / f"a.{suffix}", exif=exif))
    red, blue = (255, 0, 0), (0, 0, 255)
    row, column = [[red, blue]], [[red], [blue]]
    expected = [row, [row[0][::-1]], [row[0][::-1]], row, column, column, column[::-1], column[::-1]]
    assert pixels(opened) == expected[orientation - 1]
    assert 0x0112 not in opened.getexif() and opened.info == {}


def test_rotated_jpeg_and_mpo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (30, 20), "red")
    assert open_image(saved(image, tmp_path / "a.jpg", exif=exif)).size == (20, 30)
    second = Image.new("RGB", (30, 20), "blue")
    path = saved(image, tmp_path / "a.mpo", save_all=True, append_images=[second], exif=exif)
    with Image.open(path) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
    opened = open_image(path)
    assert opened.size == (20, 30) and opened.getpixel((0, 0)) == (254, 0, 0)


def test_saved_metadata_does_not_travel(tmp_path):
    keyed = saved(noise(4, 4), tmp_path / "a.png", transparency=(1, 2, 3), dpi=(72, 72))
    assert open_image(keyed).info == {}


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.9, 0.5])
@pytest.mark.parametrize("tolerant", [False, True])
def test_truncated_files_are_refused(tmp_path, monkeypatch, suffix, kept, tolerant):
    path = saved(noise(64, 64), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some libraries do on import
    with pytest.raises(BadImageError, match=f"a.{suffix}"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "avif", "ppm"])
def test_damaged_files_raise_nothing_else(tmp_path, suffix):
    path = saved(noise(24, 24), tmp_path / f"a.{suffix}")
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(0, min(len(whole), 400), 4):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except BadImageError:
            refused += 1
    assert refused


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("GET /image.png 404")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in [
        ("none.png", "no such file"),
        ("", "is a folder"),
        ("empty.png", r"the file is empty \(0 bytes\)"),
        ("text.png", "a text, not an image of a known format; use one of AVIF, BMP"),
        ("page.eps", "a PostScript drawing, not an image of a known format; render it to PNG"),
        ("pipe.png", "is no regular file"),
        ("a\0.png", "cannot be opened"),
        ("text.png/a.png", "cannot be opened"),
    ]:
        with pytest.raises(BadImageError, match=message) as raised:
            open_image(tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path))


def test_unreadable_file():
    with TemporaryDirectory() as folder:  # not tmp_path: other users may not look into its parents
        Path(folder).chmod(0o755)
        path = saved(noise(2, 2), Path(folder) / "a.png")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(BadImageError, match="permission denied; make the file readable"):
                open_image(path)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("side", [13_378, 60_000])  # just over our limit, far over Pillow's
def test_bombs_are_refused_before_decoding(tmp_path, side):
    assert side * side > MAX_PIXELS
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))
    with pytest.raises(BadImageError, match=r"pixels.*make it smaller"):
        open_image(path)


def test_our_limit_does_not_lean_on_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    test_bombs_are_refused_before_decoding(tmp_path, 60_000)


def test_check_images_decodes_each_file_once(tmp_path, monkeypatch):
    good = saved(noise(4, 4), tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    gone = tmp_path / "gone.png"
    opened = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kw: (opened.append(path), decode(path, **kw))[1])
    make = dict(task=Task.EDIT, prompt="x", edit_type=None)
    records = [
        Record("1", references=(good, bad), source=bad, target=gone, where="x.json, record 1", **make),
        Record("2", references=(good,), source=good, target=None, where="x.json, record 2", **make),
        Record("3", references=(bad,), source=bad, target=None, where="x.json, record 3", **make),
    ]
    issues = check_images(records)
    assert sorted(opened) == [bad, good]
    assert [(issue.where[-1], issue.message) for issue in issues] == [
        ("1", f"{bad}: a text, not an image of a known format"),
        ("1", f"{gone}: no such file"),
        ("3", f"{bad}: a text, not an image of a known format"),
    ]
    assert all(issue.fatal and issue.hint for issue in issues)
    assert check_images([]) == []


@pytest.mark.parametrize(("height", "width"), [(40, 40), (37, 90), (211, 83), (20, 31), (64, 65), (33, 500)])
@pytest.mark.parametrize("size", [32, 37])
def test_center_crop_is_resize_and_center_crop(height, width, size):
    image = noise(height, width)
    expected = T.Compose([T.Resize(size, T.InterpolationMode.BILINEAR, antialias=True), T.CenterCrop(size)])(image)
    assert np.array_equal(center_crop(image, size, size), expected)


def test_center_crop_to_a_rectangle():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    assert pixels(center_crop(image, 20, 20)) == [[(0, 0, 255)] * 20] * 20
    assert center_crop(image, 48, 16).size == (16, 48)
    assert np.array_equal(center_crop(image, 20, 40), image)


def test_center_crop_refuses_to_blow_up_a_thread():
    with pytest.raises(BadImageError, match="image of 1 x 10000 scaled to cover 512 x 512: 2,621,440,000 pixels"):
        center_crop(Image.new("RGB", (1, 10000)), 512, 512)


def test_letterbox():
    image = noise(20, 40)
    boxed = np.asarray(letterbox(image, 64, 64))
    assert np.array_equal(boxed[16:48], image.resize((64, 32), Image.Resampling.BICUBIC))
    assert not boxed[:16].any() and not boxed[48:].any()
    tall = np.asarray(letterbox(noise(40, 20), 64, 64))
    assert not tall[:, :16].any() and not tall[:, 48:].any() and tall[:, 16:48].any(axis=(1, 2)).all()
    assert np.array_equal(letterbox(image, 20, 40), image)
    assert letterbox(image, 30, 90).size == (90, 30)
    line = np.asarray(letterbox(Image.new("RGB", (1, 64), "white"), 64, 64))
    assert (line[:, 31] == 255).all() and line.sum() == 64 * 3 * 255
    with pytest.raises(BadImageError, match="image of 1 x 65: fitted into 64 x 64 its short side is less than 1 px"):
        letterbox(Image.new("RGB", (1, 65)), 64, 64)


def test_pixels_there_and_back():
    image = noise(5, 7)
    tensor = to_pixels(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 5, 7)
    expected = T.Compose([T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])(image)
    assert torch.equal(tensor, expected)
    assert np.array_equal(to_pil(tensor[None])[0], image)
    every_level = torch.arange(256).div(255).mul(2).sub(1).expand(1, 3, 1, 256)
    assert np.array_equal(np.asarray(to_pil(every_level)[0])[0, :, 0], np.arange(256))


def test_to_pil_rounds_clamps_and_refuses():
    row = torch.tensor([-7.0, -1.0, 0.0, 0.499 / 127.5, 0.501 / 127.5, 1.0, 3.0]).expand(2, 3, 1, 7)
    first, second = to_pil(row)
    assert [value[0] for value in pixels(first)[0]] == [0, 0, 128, 128, 128, 255, 255] and pixels(second) == pixels(
        first
    )
    assert len(to_pil(row.bfloat16())) == 2
    for value in (float("nan"), float("inf")):
        bad = torch.zeros(3, 3, 2, 2)
        bad[1, 2, 0, 1] = value
        with pytest.raises(ValueError, match=r"images \[1\] of 3 hold NaN or infinite"):
            to_pil(bad)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\), expected \[B, 3, H, W\]"):
        to_pil(torch.zeros(3, 4, 4))


def test_vision_pixels():
    image = noise(30, 50)
    expected = T.Compose(
        [T.Resize((24, 24), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    )(image)
    assert torch.equal(vision_pixels(image, 24), expected)
    assert np.allclose(vision_pixels(Image.new("RGB", (9, 5)), 4)[:, 0, 0], -np.divide(CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize("convert", [to_pixels, lambda i: vision_pixels(i, 8), lambda i: letterbox(i, 8, 8)])
def test_other_modes_are_refused(convert):
    with pytest.raises(ValueError, match="image of mode RGBA, expected RGB"):
        convert(Image.new("RGBA", (8, 8)))


@contextmanager
def largest_file(size):
    """A disk that is full after `size` bytes of a file: the real error, from the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_image(tmp_path):
    image = noise(9, 9)
    save_image(image, tmp_path / "a.png")
    assert np.array_equal(open_image(tmp_path / "a.png"), image)
    save_image(image, tmp_path / "a.JPG", quality=10)
    small = (tmp_path / "a.JPG").stat().st_size
    save_image(image, tmp_path / "a.JPG", quality=95)
    assert (tmp_path / "a.JPG").stat().st_size > small
    reference = saved(image, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_mode == reference.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JPG", "a.png", "b.png"]


@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_keeps_the_old_image(tmp_path, existing):
    path = tmp_path / "a.png"
    old = noise(2, 2)
    if existing:
        save_image(old, path)
    with largest_file(1000), pytest.raises(OSError, match=r"cannot write: .*a\.png"):
        save_image(noise(64, 64, seed=1), path)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert np.array_equal(open_image(path), old)


def test_save_image_errors(tmp_path):
    with pytest.raises(ValueError, match=r"a.xyz: unknown suffix '.xyz'"):
        save_image(noise(2, 2), tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError, match=r"cannot write: .*none/a\.png"):
        save_image(noise(2, 2), tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.png"):
        save_image(noise(2, 2), tmp_path / "folder.png")
    with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"):
        save_image(Image.new("RGBA", (2, 2)), tmp_path / "a.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_example_images():
    report = read_records([*(EXAMPLES / f"{task}.json" for task in Task), EXAMPLES / "train.jsonl"])
    assert check_images(report.raise_if_errors()) == []
    images = list((EXAMPLES / "images").iterdir())
    used = {file for record in report.records for file in (*record.references, record.source, record.target) if file}
    assert set(images) == used
    assert all(max(open_image(path).size) <= 640 for path in images)
    assert sum(path.stat().st_size for path in images) < 1_500_000
