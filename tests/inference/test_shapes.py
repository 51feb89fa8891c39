"""Outputs in the shape of their sources: the pipeline, a run of records, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import image_size, run_here
from hypothesis import given as drawn
from hypothesis import strategies
from PIL import Image

from mige.inference.pipeline import MIGEPipeline
from mige.inference.shapes import SizeWish, closest
from mige.inference.sizes import SizeGrid
from mige.models.vae import encode
from mige.utils import images

RELEASED = SizeGrid(channels=4, cell=8, patch=2, native=512)
ONCE = {"num_inference_steps": 1}


def striped(width, height):
    """An image of which every row and column is another, so that a cut shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def pipe(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def portrait(tmp_path_factory):
    """A photograph of 300 x 400 px as a phone stores it: lying, with an EXIF tag."""
    path, exif = tmp_path_factory.mktemp("photos") / "portrait.jpg", Image.Exif()
    exif[0x0112] = 6
    striped(300, 400).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return path


@pytest.fixture(scope="module")
def panorama(portrait):
    striped(600, 200).save(portrait.with_name("panorama.png"))
    return portrait.with_name("panorama.png")


# ---- the choice ------------------------------------------------------------------------------------------------------


@drawn(width=strategies.integers(100, 8000), height=strategies.integers(100, 8000))
def test_the_closest_shape(width, height):
    tall, wide = closest(RELEASED, width, height)
    assert tall % 16 == wide % 16 == 0
    assert closest(RELEASED, height, width) == (wide, tall)
    if 1 / 16 < width / height < 16:
        assert abs(math.log(tall * wide / 512**2)) < 0.2
    if 1 / 4 < width / height < 4:
        assert abs(wide / tall / (width / height) - 1) < 0.04


@pytest.mark.parametrize(
    "ratio, sides",
    [((1, 1), (512, 512)), ((3, 2), (624, 416)), ((3, 4), (432, 576)), ((3, 1), (864, 288)), ((16, 9), (688, 384)),
     ((4000, 3000), (576, 432)), ((1, 5000), (16, 16384))],
)  # fmt: skip
def test_shapes_of_the_released_model(ratio, sides):
    assert closest(RELEASED, *ratio)[::-1] == sides


def test_what_a_wish_means():
    def shape(source=(600, 400), **wish):
        found = SizeWish(**wish).shape(RELEASED, source)
        return found.width, found.height, found.whole

    assert shape() == (624, 416, True)
    assert shape(source=None) == shape(size="native") == (512, 512, False)
    assert shape(size="2:3") == shape(size="2:3", source=None) == (416, 624, False)
    assert shape(size="768x512") == shape(height=512, width=768) == (768, 512, False)
    assert shape(width=256) == (256, 512, False)
    assert shape(long_side=1024) == (1024, 688, True) and shape(long_side=1030) == (1024, 688, True)
    assert shape(size="1:1", long_side=800) == (800, 800, False)
    assert shape(long_side=1024, source=(300, 400)) == (768, 1024, True)


@pytest.mark.parametrize(
    "wish, said",
    [
        ({"size": "large"}, "size is 'large', expected 'source', 'native', an aspect ratio such as '3:2'"),
        ({"size": "0:1"}, "size is '0:1'"),
        ({"size": 512}, "size is 512"),
        ({"size": "native", "long_side": 512}, "long_side is 512, but the size is given too"),
        ({"height": 512, "long_side": 512}, "long_side is 512, but the size is given too"),
        ({"size": "3:2", "height": 512}, "size is '3:2', but height or width is given too"),
        ({"size": "native", "height": 128}, "size is 'native', but height or width is given too"),
        ({"size": "100x128"}, "multiples of 16 px, got 128 x 100"),
        ({"long_side": 8}, "long_side is 8, expected at least 16 px"),
    ],
)
def test_sizes_that_are_refused(pipe, panorama, wish, said):
    with pytest.raises(ValueError, match=said):
        pipe("make it red", source=panorama, **wish, **ONCE)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def test_an_edit_is_as_its_source_and_sees_all_of_it(pipe, portrait, panorama):
    for path, size in ((portrait, (112, 144)), (panorama, (240, 80))):
        assert pipe("make it red", source=path, **ONCE).images[0].size == size
        call = pipe.check_inputs("make it red", source=path)
        noise = pipe._noise(call)
        source = pipe.encode(pipe.prepare(call.samples, noise)).source_BCHW
        whole = images.open_image(path).resize(size, Image.Resampling.BILINEAR)
        with torch.no_grad():
            latent = encode(pipe.vae, images.to_pixels(whole)[None]).sample(noise[0].references[0][None])
        torch.testing.assert_close(source, latent * pipe.vae.config.scaling_factor)


def test_a_subject_edit_is_as_its_source(pipe, portrait, panorama):
    given = dict(prompt="add<imagehere>to<imagehere>", references=[panorama, portrait], source=portrait)
    assert pipe(**given, **ONCE).images[0].size == (112, 144)
    call = pipe.check_inputs(**given)
    noise = pipe._noise(call)
    source = pipe.encode(pipe.prepare(call.samples, noise)).source_BCHW
    whole = images.open_image(portrait).resize((112, 144), Image.Resampling.BILINEAR)
    with torch.no_grad():
        latent = encode(pipe.vae, images.to_pixels(whole)[None]).sample(noise[0].source[None])
    torch.testing.assert_close(source, latent * pipe.vae.config.scaling_factor)


def test_the_official_square_stays(pipe, panorama):
    """The centre of the source, as with the height and width of the native size, whatever the source."""
    square = images.center_crop(images.open_image(panorama), 128, 128)
    given = dict(prompt="make it red", output_type="latent", num_inference_steps=2)
    want = pipe(source=panorama, height=128, width=128, **given).images
    got = pipe(source=panorama, size="native", **given).images
    assert torch.equal(got, want) and got.shape == (1, 4, 16, 16)
    call = pipe.check_inputs("make it red", source=panorama, size="native")
    inputs = pipe.prepare(call.samples, pipe._noise(call))
    assert torch.equal(inputs.references_RHWC[0], torch.from_numpy(np.array(square)))
    assert torch.equal(pipe(source=square, **given).images, pipe(source=square, size="native", **given).images)


def test_a_subject_has_the_native_size_or_a_named_ratio(pipe, panorama):
    assert pipe("a<imagehere>", [panorama], **ONCE).images[0].size == (128, 128)
    assert pipe("a<imagehere>", [panorama], size="3:2", **ONCE).images[0].size == (144, 96)
    assert pipe("a cat", size="1:2", long_side=64, **ONCE).images[0].size == (32, 64)


def test_sources_of_several_shapes(pipe, portrait, panorama):
    given = dict(prompt=["make it red"] * 2, source=[portrait, panorama], **ONCE)
    with pytest.raises(ValueError, match="outputs of 112 x 144 px and 240 x 80 px: give a size such as 'native'"):
        pipe(**given)
    assert [image.size for image in pipe(**given, size="native").images] == [(128, 128)] * 2


def test_pasted_back_at_the_source_s_own_resolution(pipe, portrait, panorama):
    small = pipe("make it red", source=portrait, **ONCE).images[0]
    large = pipe("make it red", source=portrait, paste_back=True, **ONCE).images[0]
    assert large.size == (300, 400) and large == small.resize((300, 400), Image.Resampling.LANCZOS)
    square = pipe("make it red", source=panorama, size="native", **ONCE).images[0]
    pasted = pipe("make it red", source=panorama, size="native", paste_back=True, **ONCE).images[0]
    want = images.open_image(panorama)
    want.paste(square.resize((200, 200), Image.Resampling.LANCZOS), (200, 0))  # the square in its middle
    assert pasted == want
    for given in (dict(prompt="a cat"), dict(prompt="make it red", source=portrait, output_type="pt")):
        with pytest.raises(ValueError, match="paste_back is True, which needs a source and output_type 'pil'"):
            pipe(**given, paste_back=True, **ONCE)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(portrait, panorama):
    rows = [dict(id=name, instruction="make it red", image=path.name)
            for name, path in (("p1", portrait), ("w1", panorama), ("p2", portrait))]  # fmt: skip
    rows.append(dict(id="s", multi_prompt="a<imagehere>", entity_path=[panorama.name]))
    file = portrait.with_name("records.json")
    file.write_text(json.dumps(rows))
    return file


def infer(model, output, *arguments):
    return run_here("infer_scripts/infer.py", "--model", model, "--output", output, "--steps", 1, *arguments)


def test_a_run_of_several_shapes(lively, records, tmp_path):
    def sizes(name, *options):
        ended = infer(lively, tmp_path / name, "--records", records, *options)
        assert ended.returncode == 0, ended.stderr
        return {path.stem: image_size(path) for path in (tmp_path / name / "images").iterdir()}

    own = {"p1": (112, 144), "p2": (112, 144), "w1": (240, 80), "s": (128, 128)}
    assert sizes("own") == own
    assert sizes("square", "--size", "native") == dict.fromkeys(own, (128, 128))
    assert sizes("back", "--paste-back", "--long-side", 64) == own | {
        "p1": (300, 400), "p2": (300, 400), "w1": (600, 200), "s": (64, 64)}  # fmt: skip
    again = infer(lively, tmp_path / "own", "--records", records, "--size", "native")
    assert again.returncode == 1 and "size: source there, native now" in again.stderr


@pytest.mark.parametrize(
    "options, code, said",
    [
        (("--size", "3:2", "--height", 128), 2, "--size is 3:2, but --height or --width is given too"),
        (("--size", "huge"), 1, "size is 'huge', expected 'source'"),
        (("--size", "100x100"), 1, "multiples of 16 px"),
        (("--noise", "official", "--size", "source"), 1, "give --size native"),
    ],
)
def test_a_run_of_a_size_that_is_refused(lively, records, tmp_path, options, code, said):
    ended = infer(lively, tmp_path / "out", "--records", records, *options)
    assert ended.returncode == code and said in ended.stderr and not (tmp_path / "out").exists()
