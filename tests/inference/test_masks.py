"""Edits held to a mask: outside it the source, bit for bit; inside it an edit."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from PIL import Image, ImageDraw

from mige.diffusion.solver import time_grid
from mige.inference.compositing import SEAM
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.utils import images

CAT, CUP = (ROOT / "example_data" / "images" / f"{name}.jpg" for name in ("cat", "cup_on_black"))
TWO = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


def disc(size, box=None):
    mask = Image.new("L", size)
    width, height = size
    ImageDraw.Draw(mask).ellipse(box or (width // 4, height // 4, width // 2, height * 3 // 4), fill=255)
    return mask


def check(made, source, mask):
    """Outside the mask the source, bit for bit; inside most pixels are others, and the edge is close to the source."""
    got, before, allowed = (np.asarray(image).astype(int) for image in (made, source, mask))
    assert got.shape == before.shape
    changed = np.abs(got - before).max(axis=-1)
    assert not changed[allowed == 0].any()
    assert (changed[allowed > 0] > 0).mean() > 0.8
    inner = allowed > 0
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        inner &= np.roll(allowed, shift, axis) > 0
    edge = (allowed > 0) & ~inner
    assert changed[edge].mean() < 0.5 * changed[inner].mean()


@pytest.fixture(scope="module")
def square():
    return images.center_crop(images.open_image(CAT), 128, 128)


@pytest.mark.parametrize("task", [Task.EDIT, Task.SUBJECT_EDIT])
def test_outside_the_mask_is_the_source(pipe, square, task):
    mask = disc(square.size)
    given = dict(source=square, mask=mask, seed=3, **TWO)
    given |= (dict(prompt="make it red") if task is Task.EDIT else
              dict(prompt="add<imagehere>to<imagehere>", references=[CUP, square]))  # fmt: skip
    made = pipe(**given).images[0]
    check(made, square, mask)
    array = pipe(**given, output_type="np").images[0]
    assert np.array_equal((array * 255).round().astype(np.uint8), np.asarray(made))
    tensor = pipe(**given, output_type="pt").images[0]
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)


def test_pasted_back_at_full_resolution(pipe, tmp_path):
    """A lying photograph with an EXIF tag and a mask of it as it is seen."""
    path, exif = tmp_path / "photo.jpg", Image.Exif()
    exif[0x0112] = 8
    Image.open(CAT).convert("RGB").save(path, exif=exif)
    source = images.open_image(path)
    assert source.size == (300, 451)
    mask = disc(source.size, (40, 100, 200, 300))
    mask.save(tmp_path / "mask.png")
    made = pipe("make it red", source=path, mask=tmp_path / "mask.png", paste_back=True, **TWO).images[0]
    check(made, source, mask)
    square = pipe("make it red", source=path, mask=mask, size="native", paste_back=True, **TWO).images[0]
    check(square, source, mask)
    small = pipe("make it red", source=path, mask=mask, **TWO).images[0]
    check(small, source.resize(small.size, Image.Resampling.BILINEAR),
          mask.resize(small.size, Image.Resampling.BILINEAR).point([0] * 128 + [255] * 128))  # fmt: skip


def test_the_seam_is_blended_inside_the_mask(pipe, square):
    """A half plane: the weight of the result grows by 1 / 9 a pixel from the edge on, and is 1 from the ninth on."""
    mask = Image.new("L", square.size)
    mask.paste(255, (64, 0, 128, 128))
    held = pipe("make it red", source=square, mask=mask, output_type="latent", **TWO).images
    whole = np.asarray(images.to_pil(pipe.decode(held))[0]).astype(float)
    made, before = np.asarray(pipe("make it red", source=square, mask=mask, **TWO).images[0]), np.asarray(square)
    for depth in range(1, 20):
        column = 63 + depth
        weight = min(1.0, depth / (SEAM + 1))
        want = before[:, column] + weight * (whole[:, column] - before[:, column])
        assert np.abs(made[:, column] - want).max() <= 0.51


def test_latents_are_the_source_s_at_every_step(pipe, square):
    """Outside the mask x is alpha source + sigma noise, at each step's own alpha and sigma."""
    given = dict(prompt="make it red", source=square, num_inference_steps=5, output_type="latent", seed=4)
    seen, mask = [], disc(square.size)
    call = pipe.check_inputs(**given)
    noise = pipe._noise(call)
    source = pipe.encode(pipe.prepare(call.samples, noise)).source_BCHW
    pipe(**given, mask=mask, on_step=lambda step, x, x0: seen.append(x))
    grid = time_grid(5, pipe.scheduler.betas)
    free = torch.nn.functional.max_pool2d(torch.from_numpy(np.array(mask)).float()[None, None], 8)[0, 0] > 0
    assert 0.1 < free.float().mean() < 0.5
    for step, x in enumerate(seen, start=1):
        want = grid.alpha[step] * source + grid.sigma[step] * noise[0].latent
        assert (x - want)[..., ~free].abs().max() < 0.01  # alpha is 0.006 at first, and divides
        assert (x - want)[..., free].abs().mean() > 0.1


def test_another_scheduler_holds_too(pipe, square):
    ours, mask = pipe.scheduler, disc(square.size)
    try:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(ours.config)
        check(pipe("make it red", source=square, mask=mask, **TWO).images[0], square, mask)
    finally:
        pipe.scheduler = ours


def test_forms_of_a_mask(pipe, square):
    mask = disc(square.size)
    allowed = np.asarray(mask) > 0
    given = dict(prompt="make it red", source=square, **TWO)
    want = pipe(**given, mask=mask).images[0]
    forms = (mask.convert("1"), mask.convert("RGB"), allowed, torch.from_numpy(allowed), allowed.astype(np.float32))
    for form in forms:
        assert pipe(**given, mask=form).images[0] == want
    several = dict(prompt=["make it red"] * 2, source=square, seed=0, **TWO)
    other = disc(square.size, (60, 60, 120, 120))
    for made, one in zip(pipe(**several, mask=[mask, other]).images, (mask, other), strict=True):
        check(made, square, one)
    all_of_it = Image.new("L", square.size, 255)
    free = pipe(**given, output_type="latent").images
    assert torch.equal(pipe(**given, mask=all_of_it, output_type="latent").images, free)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mask": Image.new("L", (64, 64), 255)}, "mask: 64 x 64 px, but its source has 128 x 128 px"),
        ({"mask": Image.new("L", (128, 128), 100)}, "has no white pixel, so nothing may change"),
        ({"mask": [Image.new("L", (128, 128), 255)] * 2}, "1 prompts, but mask has 2 entries"),
        ({"mask": Image.new("L", (128, 128), 255), "source": None}, "mask is given without a source"),
        ({"mask": CUP}, "cup_on_black.jpg"),
    ],
)
def test_masks_that_are_refused(pipe, square, changes, said):
    with pytest.raises(ValueError, match=said):
        pipe(**{"prompt": "make it red", "source": square} | changes, **TWO)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, square):
    """A source, two masks of it, one of another size, and records."""
    folder = tmp_path_factory.mktemp("masks")
    square.save(folder / "source.png")
    disc(square.size).save(folder / "left.png")
    disc(square.size, (64, 20, 120, 100)).save(folder / "right.png")
    disc((64, 64)).save(folder / "small.png")
    return folder


def infer(model, folder, rows, output, *options):
    (folder / "records.json").write_text(json.dumps(rows))
    how = ("--model", model, "--records", folder / "records.json", "--output", output, "--steps", 1, *options)
    return run_here("infer_scripts/infer.py", *how)


def test_a_run_with_masks(lively, folder, square, tmp_path):
    rows = [dict(id="a", instruction="make it red", image="source.png", mask_path="left.png")]
    rows.append(dict(id="b", multi_prompt="make<imagehere>red", source_path=["source.png"], mask_path="right.png"))
    ended = infer(lively, folder, rows, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    for name, mask in (("a", "left"), ("b", "right")):
        check(Image.open(tmp_path / "out" / "images" / f"{name}.png"), square, Image.open(folder / f"{mask}.png"))
    rows[0]["mask_path"] = "right.png"
    ended = infer(lively, folder, rows, tmp_path / "out")
    assert ended.returncode == 1 and "has a finished 'a' with another prompt or other images" in ended.stderr
    one = ("--prompt", "make it red", "--source", folder / "source.png", "--mask", folder / "left.png", "--steps", 1)
    ended = run_here("infer_scripts/infer.py", "--model", lively, "--output", tmp_path / "one", *one)
    assert ended.returncode == 0, ended.stderr
    check(Image.open(tmp_path / "one" / "images" / "image.png"), square, Image.open(folder / "left.png"))


@pytest.mark.parametrize(
    "row, said",
    [
        (dict(source_path=["source.png"], mask_path="small.png"), "64 x 64 px, but its source has 128 x 128 px"),
        (dict(source_path=["source.png"], mask_path="none.png"), "none.png: no such file"),
        (dict(source_path=["source.png"], mask_path=5), '"mask_path" is'),
        (dict(entity_path=["source.png"], mask_path="left.png"), '"mask_path" is given without a source'),
    ],
)
def test_a_run_with_a_mask_that_is_refused(lively, folder, tmp_path, row, said):
    ended = infer(lively, folder, [dict(multi_prompt="make<imagehere>red", **row)], tmp_path / "out")
    assert ended.returncode == 1 and said in ended.stderr and "record 1" in ended.stderr
    assert not (tmp_path / "out").exists()
