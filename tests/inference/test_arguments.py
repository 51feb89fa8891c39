"""What a call and `from_pretrained` take, and what they refuse before anything runs."""

import inspect
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from mige.checkpoints.errors import CheckpointError
from mige.inference import arguments, loading
from mige.inference.pipeline import MIGEPipeline

CAT = ROOT / "example_data" / "images" / "cat.jpg"
CUP = ROOT / "example_data" / "images" / "cup_on_black.jpg"
ONCE = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected a whole number of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, expected a number of at least 0"),
        ({"guidance_scale": torch.tensor(float("inf"))}, "guidance_scale is"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"source_guidance_scale": -1}, "source_guidance_scale is -1"),
        ({"height": 128.5}, "height is 128.5, expected a whole number"),
        ({"width": 100}, "multiples of"),
        ({"height": float("nan")}, "height is nan"),
        ({"reuse": 0}, "reuse is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": 2**64}, "below 2"),
        ({"seed": [1, 2]}, "1 prompts, 2 seeds"),
        ({"seed": 10**400}, r"seed is 10+\.\.\.0+, expected"),
        ({"guidance_scale": 10**400}, r"guidance_scale is 10+\.\.\.0+, expected"),
        ({"height": 16 * 10**9}, "height x width is 16000000000 x 128, expected at most 178,956,970 pixels"),
        ({"prompt": "a \ud800<imagehere>"}, r"prompt holds '\\ud800', which is no character of a text"),
        ({"prompt": "a \0<imagehere>"}, r"prompt holds '\\x00'"),
        ({"prompt": "very " * 70 + "<imagehere>"}, r"the instruction takes .* with them a whole image"),
        ({"references": [Image.new("RGB", (65000, 1))]}, "image of 65000 x 1: fitted into 128 x 128 its short side"),
        ({"prompt": ""}, "prompt is '', expected a text"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [None]}, "prompt is None"),
        ({"prompt": ["a<imagehere>", "b<imagehere>"]}, "2 prompts, but references has 1"),
        ({"references": 5}, "references is int, expected a list"),
        ({"output_type": "np32"}, "output_type must be"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(pipe, monkeypatch, changes, said):
    monkeypatch.setattr(type(pipe), "encode", lambda *_: pytest.fail("it ran"))
    given = {"prompt": "a<imagehere>", "references": [CAT], **ONCE} | changes
    with pytest.raises(ValueError, match=said):
        pipe(**given)


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a<imagehere> and <image here>", "'<image here>' looks like the marker and is read as words"),
        ("\u96ea\u4e2d<imagehere>", "1 token of the prompt are unknown"),
        ("a </s><imagehere>", "</s> in the prompt are special tokens of the model, read as text here"),
        ("a<imagehere>" + " very" * 150, r"the instruction takes \d+ tokens, the last \d+ are cut"),
    ],
)
def test_what_is_not_read_as_written_is_a_warning(pipe, prompt, said):
    """As infer.py tells it of records, and the page of what is typed; where the pipeline was called."""
    with pytest.warns(UserWarning, match=f"prompt .*: {said}") as told:
        pipe(prompt, [CAT], num_images_per_prompt=2, **ONCE)
    assert {warning.filename for warning in told} == {__file__}
    assert len({str(warning.message) for warning in told}) == len(told)


def test_latents_that_are_not_finite_are_an_error(pipe):
    with pytest.raises(ValueError, match=r"samples \[0\] of 1 came out as NaN or infinite"):
        pipe("a<imagehere>", [CAT], guidance_scale=1e30, num_inference_steps=2, output_type="latent")


def test_numbers_of_numpy_and_torch_are_taken(pipe):
    plain = pipe("a<imagehere>", [CAT], seed=3, guidance_scale=2.0, height=128, width=64, **ONCE).images
    given = dict(seed=np.int64(3), guidance_scale=torch.tensor(2.0), height=np.float32(128), width=torch.tensor(64))
    assert torch.equal(pipe("a<imagehere>", [CAT], **given, **ONCE).images, plain)
    assert torch.equal(pipe("a<imagehere>", [CAT], **given | {"seed": np.array([3])}, **ONCE).images, plain)


def test_every_form_of_an_image_gives_the_same_latents(pipe):
    want = pipe("a<imagehere>", [Image.open(CAT)], **ONCE).images
    image = Image.open(CAT).convert("RGB")
    forms = (CAT, str(CAT), image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()).movedim(2, 0))
    for form in forms:
        assert torch.equal(pipe("a<imagehere>", form, **ONCE).images, want)  # not in a list, too
        assert torch.equal(pipe("a<imagehere>", [form], **ONCE).images, want)


def test_a_source_opened_twice_is_its_reference(pipe):
    """P5: equal images are equal, though they are two objects."""
    prompt = "add the<imagehere>to<imagehere>"
    cat = Image.open(CAT)
    want = pipe(prompt, [Image.open(CUP), cat], source=cat, **ONCE).images
    assert torch.equal(pipe(prompt, [CUP, CAT], source=CAT, **ONCE).images, want)
    assert torch.equal(pipe(prompt, [CUP, str(CAT)], source=Image.open(CAT), **ONCE).images, want)
    with pytest.raises(ValueError, match="source must be among the references"):
        pipe("a<imagehere>", [CUP], source=CAT, **ONCE)


def test_exif_turns_an_image_that_the_user_opened(pipe, tmp_path):
    upright = Image.open(CAT).convert("RGB").resize((60, 40))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    want = pipe("a<imagehere>", [upright], **ONCE).images
    assert torch.equal(pipe("a<imagehere>", [Image.open(tmp_path / "turned.png")], **ONCE).images, want)


# ---- from_pretrained -------------------------------------------------------------------------------------------------


def test_torch_dtype_is_another_name_of_dtype(lively):
    assert MIGEPipeline.from_pretrained(lively, torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="they are one option"):
        MIGEPipeline.from_pretrained(lively, dtype=torch.float32, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "dtype",
    [
        {"transformer": torch.bfloat16},
        {"fusion": torch.bfloat16},
        {"text_encoder": torch.bfloat16},
        {"default": torch.bfloat16, "fusion": torch.float32},
        {"qformer": torch.bfloat16, "image_encoder": torch.bfloat16},
    ],
    ids=str,
)
def test_a_dtype_for_each_part(pipe, lively, dtype):
    mixed = MIGEPipeline.from_pretrained(lively, dtype=dtype)
    mixed.set_progress_bar_config(disable=True)
    for name, wanted in dtype.items():
        # the tower's first layers are float32 whatever is asked for
        assert name in ("default", "image_encoder") or getattr(mixed, name).dtype == wanted
    how = dict(source=CAT, seed=1, **ONCE)
    got, want = mixed("make it night in<imagehere>", **how).images, pipe("make it night in<imagehere>", **how).images
    assert 0 < (got - want).norm() / want.norm() < 0.1


def test_what_the_hub_is_asked_arrives_there(lively, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lively, tmp_path / "cache" / "inner")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(MIGEPipeline, "download", download)
    hub = dict(revision="v2", cache_dir=tmp_path / "c", token="t", local_files_only=True, force_download=True)
    MIGEPipeline.from_pretrained("someone/mige", subfolder="inner", proxies={"http": "x"}, **hub)
    assert asked == {"name": "someone/mige", "proxies": {"http": "x"}, **hub}
    assert set(loading.HUB) == {*hub, "proxies"}


def test_an_option_that_would_be_dropped_is_refused(lively):
    with pytest.raises(TypeError, match=r"unknown option\(s\) revison; did you mean 'revision'"):
        MIGEPipeline.from_pretrained(lively, revison="v2")


def test_a_hub_that_does_not_answer_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def download(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(MIGEPipeline, "download", download)
    with pytest.raises(CheckpointError, match="no such folder here, and the hub did not give it: offline"):
        MIGEPipeline.from_pretrained("someone/mige")


def test_a_part_may_be_given(lively, pipe):
    given = MIGEPipeline.from_pretrained(lively, vae=pipe.vae)
    assert given.vae is pipe.vae


def test_options_of_the_call_are_documented():
    text = inspect.getdoc(MIGEPipeline.__call__)
    for name in inspect.signature(MIGEPipeline.__call__).parameters:
        assert name == "self" or name in text


@pytest.mark.parametrize("value, plain", [(5.0, 5), (np.int8(5), 5), (torch.tensor([5]), 5), (np.array(5.0), 5)])
def test_whole_numbers(value, plain):
    got = arguments.number("n", value, whole=True)
    assert got == plain and type(got) is int


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"on_step": 3}, "on_step is 3, expected a function"),
        ({"reuse": 2}, "reuse must be 1, or more with compile=True, got 2"),
    ],
)
def test_how_it_runs_is_checked_before_it_runs(pipe, monkeypatch, changes, said):
    monkeypatch.setattr(type(pipe), "encode", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=said):
        pipe("a<imagehere>", [CAT], **ONCE | changes)


@pytest.mark.parametrize(
    "name, said",
    [
        ("FlowMatchEulerDiscreteScheduler", "has no scale_model_input"),
        ("RePaintScheduler", "step also asks for original_image, mask"),
        ("KarrasVeScheduler", "step also asks for"),
    ],
)
def test_a_scheduler_that_cannot_sample_is_named_before_it_runs(pipe, monkeypatch, name, said):
    monkeypatch.setattr(type(pipe), "encode", lambda *_: pytest.fail("it ran"))
    config = pipe.scheduler.config
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, name).from_config(config))
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        pipe("a<imagehere>", [CAT], **ONCE)


@pytest.mark.parametrize(
    "own, said",
    [
        ({"beta_end": 0.012}, "1000 betas from 0.0001 to 0.012, is not the one that MIGE models are trained on"),
        ({"num_train_timesteps": 500}, "500 betas"),
        ({"rescale_betas_zero_snr": True}, "its betas run from"),
        ({"clip_sample": True}, "DDIMScheduler has clip_sample, which clips latents as if they were pixels"),
        ({"thresholding": True}, "DDIMScheduler has thresholding"),
    ],
    ids=str,
)
def test_a_scheduler_of_another_model_is_refused(pipe, monkeypatch, own, said):
    """As in a checkpoint folder: with another schedule every image would be noise, and nothing would say so."""
    scheduler = diffusers.DDIMScheduler.from_config({**pipe.scheduler.config, **own})
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with pytest.raises(ValueError, match=said):
        pipe("a<imagehere>", [CAT], **ONCE)


@pytest.mark.parametrize(
    "dtype, said",
    [
        ("float16", "dtype is 'float16', expected a float dtype"),
        ("auto", "dtype is 'auto'"),
        (torch.int8, "dtype is torch.int8"),
        (torch.float8_e4m3fn, "dtype is torch.float8_e4m3fn"),
        (torch.complex64, "dtype is torch.complex64"),
        ({"transformer": "bfloat16"}, r"dtype\['transformer'\] is 'bfloat16'"),
        ({"unet": torch.bfloat16}, "dtype names 'unet', expected 'default' or one of"),
    ],
    ids=str,
)
def test_a_dtype_that_would_be_dropped_is_refused(lively, dtype, said):
    with pytest.raises(TypeError, match=said):
        MIGEPipeline.from_pretrained(lively, torch_dtype=dtype)


@pytest.mark.parametrize("options", [{"use_safetensors": False}, {"vae": None}], ids=str)
def test_an_option_that_leaves_no_model_is_refused(lively, options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        MIGEPipeline.from_pretrained(lively, **options)


def test_the_hub_itself_is_asked_with_these(tmp_path, monkeypatch):
    """Through diffusers' own download, to the one call that reaches out."""
    monkeypatch.chdir(tmp_path)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        raise OSError("offline")

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="the hub did not give it: offline"):
        hub = dict(revision="v2", cache_dir=tmp_path / "c", token="t", local_files_only=True)
        MIGEPipeline.from_pretrained("someone/mige", **hub)
    assert asked["name"] == "someone/mige" and hub.items() <= asked.items()
