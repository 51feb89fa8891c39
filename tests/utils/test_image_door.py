"""The one door for images: every kind of input, depth, profile and orientation gives the same 8-bit sRGB image."""

import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin
from processes import run_program

from mige.utils.images import BadImageError, as_image, check_shape, image_key, open_image

CASES = Path(__file__).parents[1] / "fixtures" / "images"


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image, path, **params):
    image.save(path, **params)
    return path


def tiff(path, values, *, bits, photometric=1, sample_format=1, samples=1):
    """A little-endian TIFF of one strip, written by hand: Pillow writes few of the kinds that exist."""
    height, width = values.shape[:2]
    if bits in (10, 12, 14):
        string = "".join(f"{value:0{bits}b}" for value in values.ravel())
        data = int(string + "0" * (-len(string) % 8), 2).to_bytes((len(string) + 7) // 8, "big")
    else:
        data = values.tobytes()
    tags = [
        *((256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 200), (277, 3, samples), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + struct.pack("<I", 0)
    path.write_bytes(head.ljust(200, b"\0") + data)
    return path


def profile(name="sRGB"):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def display_p3():
    with Image.open(CASES / "display_p3.png") as image:
        return image.info["icc_profile"]


def test_every_kind_of_input_gives_the_same_image(tmp_path):
    rgb = noise(5, 7)
    path = saved(Image.fromarray(rgb), tmp_path / "a.png")
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    values = [
        *(path, str(path), Image.open(path), Image.fromarray(rgb), rgb, rgb.astype(np.uint16) * 257, rgb / 255),
        *((rgb / 255).astype(np.float32), tensor, tensor[None], tensor / 255, (tensor / 255).double()[None]),
    ]
    images = [as_image(value) for value in values]
    assert all(np.array_equal(image, rgb) and image.mode == "RGB" and image.info == {} for image in images)
    assert len({image_key(image) for image in images}) == 1 and all(image == images[0] for image in images)
    other = rgb.copy()
    other[4, 6, 2] ^= 1
    assert image_key(as_image(other)) != image_key(images[0]) and as_image(other) != images[0]
    assert image_key(as_image(rgb.reshape(7, 5, 3))) != image_key(images[0])


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_one_and_four_channels(kind):
    def given(channels_last):
        return channels_last if kind == "array" else torch.from_numpy(channels_last).permute(2, 0, 1)

    grey = np.array([[[7], [250]]], dtype=np.uint8)
    assert np.asarray(as_image(given(grey))).tolist() == [[[7] * 3, [250] * 3]]
    rgba = np.array([[[255, 0, 0, 255], [255, 255, 255, 0], [255, 255, 0, 128]]], dtype=np.uint8)
    assert np.asarray(as_image(given(rgba))).tolist() == [[[255, 0, 0], [0, 0, 0], [128, 128, 0]]]
    assert np.asarray(as_image(grey[..., 0])).tolist() == [[[7] * 3, [250] * 3]]
    assert np.asarray(as_image((grey[..., 0].astype(">u2") * 257).astype(">u2"))).tolist() == [[[7] * 3, [250] * 3]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \[3, 8, 8\], uint8: .*channels come last"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"expected \[H, W\] or \[H, W, C\] with C of 1, 3 or 4"),
        (np.zeros((8, 8, 2), np.uint8), "C of 1, 3 or 4"),
        (np.zeros((8, 8), np.int64), "int64: expected uint8, uint16 or float"),
        (np.zeros((8, 8), bool), "bool: expected uint8"),
        (np.full((8, 8), -0.5), r"values from -0.5 to -0.5, expected 0 to 1; .*\[-1, 1\] becomes \[0, 1\]"),
        (np.full((8, 8), 255.0), "values from 255 to 255, expected 0 to 1"),
        (np.full((8, 8), np.nan), "values from nan to nan"),
        (np.zeros((0, 8, 3), np.uint8), "8 x 0 pixels, expected at least 1 x 1"),
        (np.zeros((11, 10), np.uint8), "110 pixels, expected at most 100"),
        (np.ma.masked_array(np.zeros((8, 8)), np.eye(8)), "masked values; fill them"),
        (torch.zeros(8, 8, 3), r"tensor of shape \[8, 8, 3\].*expected \[C, H, W\]"),
        (torch.zeros(2, 3, 8, 8), r"expected \[C, H, W\] or \[1, C, H, W\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "torch.int32: expected uint8"),
        (torch.full((3, 8, 8), -1.0), "values from -1 to -1, expected 0 to 1"),
        (torch.zeros(3, 8, 13).bfloat16(), "104 pixels"),
        (torch.zeros(3, 8, 8, device="meta"), r"a tensor without data \(meta\)"),
        (torch.zeros(3, 8, 8).to_sparse(), "a tensor of layout torch.sparse_coo, expected a plain one"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (Image.new("F", (3, 3)), "PIL image of mode F: 32-bit float pixels have no fixed range"),
    ],
)
def test_unusable_values_are_refused_by_name(value, message):
    with pytest.raises(BadImageError, match=message):
        as_image(value, max_pixels=100)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_other_forms_of_the_same_values_are_the_same_image():
    """A matrix crashed the interpreter; the byte order is no part of an image."""
    levels = noise(4, 6, 1)[..., 0]
    want = as_image(levels)
    deep = levels.astype(np.uint16) * 257
    for same in (np.matrix(levels), np.ma.masked_array(levels), deep, deep.astype(">u2"), levels / 255):
        assert as_image(same) == want
    tensor = torch.from_numpy(levels.copy())[None]
    for same in (tensor, torch.nn.Parameter(tensor / 255), (tensor / 255).half()):
        assert as_image(same) == want


def test_a_truncated_image_is_refused_whoever_opened_it(tmp_path, monkeypatch):
    """Another library may have switched Pillow's global on, which turns loss into grey."""
    path = saved(Image.fromarray(noise(40, 40)), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(path) as image, pytest.raises(BadImageError, match=r"PIL image of mode RGB .*cannot be decoded"):
        as_image(image)


def test_what_is_no_image_is_a_type_error():
    for value in (None, 7, b"x", [Image.new("RGB", (2, 2))]):
        with pytest.raises(TypeError, match=f"{type(value).__name__} is no image: expected a path, a PIL image"):
            as_image(value)


def test_exif_through_every_door_and_the_users_image_stays():
    path = CASES / "exif_rotated.jpg"
    with Image.open(path) as image:
        upright = as_image(image)
        assert image.size == (48, 32) and image.getexif()[0x0112] != 1
        assert as_image(image) == upright
    assert upright == as_image(path) and upright.size == (32, 48)
    top, bottom = np.asarray(upright)[4, 16].astype(int), np.asarray(upright)[44, 16].astype(int)
    assert np.abs(top - [255, 220, 0]).max() < 60 and np.abs(top - bottom).max() > 60


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 255, (255, 255, 255)),
        ("L", 9, (9, 9, 9)),
        ("LA", (100, 128), (50, 50, 50)),
        ("La", (50, 128), (50, 50, 50)),
        ("RGBA", (200, 100, 0, 128), (100, 50, 0)),
        ("RGBa", (100, 50, 0, 128), (100, 50, 0)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I", 65535, (255, 255, 255)),
        ("I;16", 257, (1, 1, 1)),
        ("I;16B", 257, (1, 1, 1)),
    ],
)
def test_every_mode_of_pil(mode, pixel, expected):
    image = Image.new(mode, (3, 2))
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (3, 2), struct.pack(">H", pixel) * 6)
    else:
        image.paste(pixel, (0, 0, 3, 2))
    result = np.asarray(as_image(image)).astype(int)
    assert result.shape == (2, 3, 3) and np.abs(result - expected).max() <= 1


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_deep_tiff_is_scaled_by_its_depth(tmp_path, bits, photometric):
    white = 2**bits - 1
    values = np.array([[0, white // 5, white // 2, white]] * 2, dtype="<u2")
    path = tmp_path / "a.tif"
    if (bits, photometric) == (12, 0):  # Pillow does not know it
        with pytest.raises(BadImageError, match="a TIFF of 12 unsigned bits a pixel, which Pillow cannot read"):
            open_image(tiff(path, values, bits=bits, photometric=photometric))
        return
    grey = np.asarray(open_image(tiff(path, values, bits=bits, photometric=photometric)))[..., 1]
    expected = np.array([[0, 51, 127, 255]] * 2)
    assert np.abs(grey.astype(int) - (expected if photometric else 255 - expected)).max() <= 1


def test_the_packed_twelve_bit_ramp():
    ramp = np.asarray(open_image(CASES / "packed12.tif"))[0, :, 0].astype(int)
    assert ramp[0] == 0 and ramp[-1] == 255 and np.abs(ramp - np.linspace(0, 255, len(ramp))).max() <= 1


@pytest.mark.parametrize(
    ("bits", "dtype", "sample_format", "message"),
    [
        (10, "<u2", 1, "a TIFF of 10 unsigned bits a pixel, which Pillow cannot read"),
        (14, "<u2", 1, "a TIFF of 14 unsigned bits a pixel"),
        (32, "<f4", 3, "32-bit float pixels have no fixed range"),
        (64, "<f8", 3, "a TIFF of 64 float bits a pixel"),
        (16, "<f2", 3, "a TIFF of 16 float bits a pixel"),
        (16, "<i2", 2, "signed pixels have no fixed range"),
        (8, "i1", 2, "signed pixels have no fixed range"),
    ],
)
def test_other_depths_of_tiff_are_refused_by_name(tmp_path, bits, dtype, sample_format, message):
    path = tiff(tmp_path / "a.tif", np.ones((4, 4), dtype), bits=bits, sample_format=sample_format)
    with pytest.raises(BadImageError, match=message) as raised:
        open_image(path)
    assert "8 or 16 bits" in str(raised.value)


def test_sixteen_bit_colour_is_scaled(tmp_path):
    values = np.full((2, 2, 3), (0, 257 * 100, 65535), dtype="<u2")
    path = tmp_path / "a.tif"
    tiff(path, values, bits=16, photometric=2, samples=3)
    data = bytearray(path.read_bytes())  # BitsPerSample of three channels stands outside its entry
    entry = data.index(struct.pack("<HHI", 258, 3, 1))
    data[entry : entry + 12] = struct.pack("<HHII", 258, 3, 3, 180)
    data[180:186] = struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(data)
    assert np.abs(np.asarray(open_image(path)).astype(int) - (0, 100, 255)).max() <= 1


def test_display_p3_becomes_srgb_and_can_be_ignored():
    path = CASES / "display_p3.png"
    assert np.abs(np.asarray(open_image(path)).astype(int) - (60, 160, 60)).max() <= 1
    with Image.open(path) as image:
        raw = np.asarray(image.convert("RGB"))
        assert as_image(image) == open_image(path)
        assert np.array_equal(as_image(image, ignore_profiles=True), raw)
    assert np.array_equal(open_image(path, ignore_profiles=True), raw)
    assert np.abs(raw.astype(int) - (60, 160, 60)).max() > 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_profiles_of_other_modes(tmp_path, mode):
    """Green of P3 with alpha, in a palette; grey is grey in every profile of this white."""
    grey = mode in ("L", "LA")
    raw = Image.new("RGBA", (4, 4), (128,) * 3 + (255,) if grey else (89, 158, 73, 255)).convert(mode)
    path = saved(raw, tmp_path / "a.png", icc_profile=display_p3())
    expected = (128,) * 3 if grey else (60, 160, 60)
    assert np.abs(np.asarray(open_image(path)).astype(int) - expected).max() <= 2


def test_a_profile_of_srgb_changes_no_bit(tmp_path):
    path = saved(Image.fromarray(noise(32, 32)), tmp_path / "a.png", icc_profile=profile())
    assert np.array_equal(open_image(path), noise(32, 32))


@pytest.mark.parametrize(
    ("mode", "icc", "message"),
    [
        ("RGB", b"no profile", "cannot be read"),
        ("RGB", profile()[:200], "the colour profile"),
        ("CMYK", profile(), "is for RGB, the pixels are CMYK"),
        ("RGB", profile("LAB"), "is for Lab, the pixels are RGB"),
        ("RGB", profile() + bytes(4 * 2**20), r"has 4,194,\d+ bytes, expected at most 4,194,304"),
    ],
    ids=["no profile", "cut", "of RGB", "of Lab", "large"],
)
def test_a_profile_that_cannot_be_used_is_a_warning(tmp_path, mode, icc, message):
    plain = Image.new("RGB", (4, 4), (200, 40, 90)).convert(mode)
    path = saved(plain, tmp_path / "a.tif", icc_profile=icc)
    with pytest.warns(UserWarning, match=message) as caught:
        image = open_image(path)
    assert np.array_equal(image, plain.convert("RGB")) and str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path, ignore_profiles=True) == image


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", r"a web page \(HTML\).*fetch it again"),
        (b"\xef\xbb\xbf\n <HTML>", r"a web page \(HTML\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of git-lfs.*git lfs pull"),
        (b"\xff\x0a" + b"\x80" * 40, "a JPEG XL image.*convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\x80" * 40, "a JPEG XL image"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document.*save the page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing.*render it"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text.*fetch it again"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"\0\0\0\x20ftypisom\0\0\2\0" + b"\0" * 20, "a video.*one of its frames"),
        (b"\x1aE\xdf\xa3" + b"\x80" * 20, "a video"),
        (b"RIFF\0\0\1\0AVI LIST", "a video"),
        (b"PK\3\4" + b"\x80" * 20, "a ZIP archive"),
        (b"\0" * 100, "zero bytes only.*fetch the image again"),
        ("zuviel Aufrufe, später".encode(), "a text, not an image"),
        (b"\x80\x81\x82" * 30, "not an image of a known format; use one of AVIF.*TIFF: integers"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=message) as raised:
        open_image(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_heic_with_and_without_its_library(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(Image.new("RGB", (64, 32), (200, 40, 90))).save(path, quality=100)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(BadImageError, match=r"a HEIC image.*pip install \"mige\[heif\]\""):
            open_image(path)
    image = np.asarray(open_image(path)).astype(int)
    assert image.shape == (32, 64, 3) and np.abs(image - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sub\\a.jpg", r"backslashes.*write .*sub/a\.jpg"),
        ("x/../sub/a.jpg", r"a folder that does not exist: write .*sub/a\.jpg"),
        ("sub/A.JPG", r"did you mean .*sub/a\.jpg"),
        ("sub/a.jpg ", r"blanks or quotes: write .*sub/a\.jpg"),
        ("sub/%61.jpg", r"written for the web: write .*sub/a\.jpg"),
        ("~/a.jpg", "~ is not expanded"),
        ("https://example.org/a.jpg", r"an address \(https:\): addresses are not fetched"),
        ("file:///tmp/a.jpg", "a file:// address: write the plain path"),
        ("none/a.jpg", r"the folder .*none does not exist"),
        ("dangling.jpg", "it is a link to gone.jpg, which is not there"),
    ],
)
def test_a_path_that_leads_nowhere_gets_the_right_hint(tmp_path, name, message):
    (tmp_path / "sub").mkdir()
    saved(Image.new("RGB", (2, 2)), tmp_path / "sub" / "a.jpg")
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    with pytest.raises(BadImageError, match=f"no such file; .*{message}"):
        open_image(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "height", "width", "letterboxed", "message"),
    [
        ((65000, 1), 512, 512, False, "image of 65000 x 1 scaled to cover 512 x 512"),
        ((12000, 10), 512, 512, False, "image of 12000 x 10 scaled to cover"),
        ((10, 12000), 512, 512, True, "its short side is less than 1 px"),
        ((6000, 10), 512, 512, True, "less than 1 px"),
        ((5120, 10), 512, 512, True, None),
        ((5120, 10), 512, 512, False, None),
        ((512, 512), 512, 512, False, None),
    ],
)
def test_shapes(size, height, width, letterboxed, message):
    if message is None:
        check_shape(size, height, width, letterboxed=letterboxed)
    else:
        with pytest.raises(BadImageError, match=message):
            check_shape(size, height, width, letterboxed=letterboxed)


_PEAK = """
import re, sys
from pathlib import Path
from mige.utils.images import open_image
def peak():  # of this program: getrusage would tell that of the process which it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
image = open_image(Path(sys.argv[1]))
assert image.getpixel((0, 0)) == (100, 100, 100)
print((peak() - before) / (image.width * image.height))
print("torch" in sys.modules)
"""


@pytest.mark.processes
def test_sixteen_bits_take_little_memory_and_no_torch(tmp_path):
    """Two bytes a pixel while it is decoded, five while grey becomes RGB, and the strips; it were twenty."""
    path = saved(Image.fromarray(np.full((4000, 4000), 25700, np.uint16)), tmp_path / "a.png")
    done = run_program(sys.executable, "-c", _PEAK, path)
    assert done.returncode == 0, done.stderr
    peak, torch_loaded = done.stdout.split()
    assert float(peak) < 9 and torch_loaded == "False"


def test_no_more_is_decoded_at_once_than_one_image_may_have(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from mige.utils import images

    path = saved(Image.fromarray(noise(8, 8)), tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 130)
    held = []
    convert = images.to_rgb
    monkeypatch.setattr(
        images, "to_rgb", lambda *args: (time.sleep(0.002), held.append(images._held), convert(*args))[2]
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_image, [path] * 64))
    assert len(held) == 64 and max(held) <= 128 and images._held == 0


def test_sizes_are_read_within_the_same_limit(tmp_path, monkeypatch):
    """A PNG that is not square is decoded for its size, by 16 threads where a folder of .npy files is checked."""
    from concurrent.futures import ThreadPoolExecutor

    from mige.utils import images

    path = saved(Image.fromarray(noise(8, 12)), tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    held, kind = [], PngImagePlugin.PngImageFile
    begin = kind.load_prepare
    slowly = lambda image: (time.sleep(0.002), held.append(images._held), begin(image))[2]  # noqa: E731
    monkeypatch.setattr(kind, "load_prepare", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(images.image_size, [path] * 32)) == {(12, 8)}
    assert len(held) == 32 and {96} <= set(held) <= {96, 192}


P3_PLACES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)  # of PNG's cHRM, x 100000: white, red, green, blue


def png(path, mode, colour, **chunks):
    """A PNG of one colour with these chunks of big-endian numbers."""
    told = PngImagePlugin.PngInfo()
    for name, numbers in chunks.items():
        told.add(name.encode(), b"".join(number.to_bytes(1 if name == "sRGB" else 4, "big") for number in numbers))
    Image.new(mode, (4, 2), colour).save(path, pnginfo=told)
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "chunks", "expected"),
    [
        ("RGB", (89, 158, 73), {"gAMA": [45455], "cHRM": P3_PLACES}, (60, 160, 60)),  # Display P3
        ("RGBA", (89, 158, 73, 255), {"cHRM": P3_PLACES}, (60, 160, 60)),
        ("RGB", (55, 55, 55), {"gAMA": [100000]}, (128, 128, 128)),  # linear
        ("L", 55, {"gAMA": [100000]}, (128, 128, 128)),
        ("RGB", (60, 160, 60), {"gAMA": [45455]}, (60, 160, 60)),
        ("RGB", (60, 160, 60), {"sRGB": [0], "gAMA": [100000]}, (60, 160, 60)),
        ("RGB", (60, 160, 60), {"gAMA": [0], "cHRM": [0] * 8}, (60, 160, 60)),  # of no colours
    ],
)
def test_colours_that_a_png_declares_become_srgb(tmp_path, mode, colour, chunks, expected):
    path = png(tmp_path / "a.png", mode, colour, **chunks)
    got = np.asarray(open_image(path)).astype(int).reshape(-1, 3)
    assert np.abs(got - expected).max() <= (1 if "cHRM" in chunks or 100000 in chunks.get("gAMA", ()) else 0)
    plain = np.asarray(Image.new(mode, (1, 1), colour).convert("RGB")).reshape(3)
    assert (np.asarray(open_image(path, ignore_profiles=True)) == plain).all()


def test_adobe_rgb_of_a_camera_is_told_by_exif(tmp_path):
    """DCF: colour space "uncalibrated", interoperability R03. The formula: Adobe RGB (1998), 4.3.4 and 4.3.5."""
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: 0xFFFF, 0xA005: {1: "R03"}}
    Image.new("RGB", (16, 16), (120, 150, 90)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    linear = (np.array([120, 150, 90]) / 255) ** (563 / 256)
    xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]) @ linear
    rgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]) @ xyz
    expected = 255 * (1.055 * rgb ** (1 / 2.4) - 0.055)
    got = np.asarray(open_image(tmp_path / "a.jpg")).astype(float)
    assert np.abs(got - expected).max() < 2 and np.abs(expected - (120, 150, 90)).max() > 10
