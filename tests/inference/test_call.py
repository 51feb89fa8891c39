"""The call as diffusers' own pipelines take it: names, generators, latents, embeds, callbacks, outputs."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers.callbacks import PipelineCallback
from diffusers.image_processor import VaeImageProcessor

from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import tokenize
from mige.tasks import TASKS, Task
from mige.utils.images import as_image, center_crop

PHOTOS = ROOT / "example_data" / "images"
LATENT = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def cat():
    return center_crop(as_image(PHOTOS / "cat.jpg"), 160, 160)


@pytest.fixture(scope="module")
def cup():
    return center_crop(as_image(PHOTOS / "cup_on_black.jpg"), 160, 160)


def calls(cat, cup):
    """The arguments of a call of each task."""
    return {
        Task.SUBJECT: dict(prompt="a<imagehere>in the snow", references=[cat]),
        Task.EDIT: dict(prompt="make it red", source=cat),
        Task.SUBJECT_EDIT: dict(prompt="add<imagehere>to<imagehere>", references=[cup, cat], source=cat),
    }


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_names_of_instruct_pix2pix(pipe, cat):
    want = pipe("make it red", source=cat, source_guidance_scale=1.5, **LATENT).images
    got = pipe("make it red", image=cat, image_guidance_scale=1.5, **LATENT).images
    assert torch.equal(got, want)
    for twice in ({"source": cat, "image": cat}, {"source_guidance_scale": 1, "image_guidance_scale": 1}):
        with pytest.raises(ValueError, match="two names of one argument"):
            pipe("make it red", **{"image": cat} | twice, **LATENT)


def test_a_batch_of_sources_as_one_tensor_or_array(pipe, cat, cup):
    want = pipe(["make it red"] * 2, source=[cat, cup], **LATENT).images
    array = np.stack([np.asarray(cat), np.asarray(cup)])
    assert torch.equal(pipe(["make it red"] * 2, image=array, **LATENT).images, want)
    assert torch.equal(pipe(["make it red"] * 2, image=torch.from_numpy(array).movedim(3, 1), **LATENT).images, want)


def test_what_a_call_has_not_is_refused_by_name(pipe):
    with pytest.raises(TypeError, match="a call has no argument 'strength'"):
        pipe.check_inputs("a cat", strength=0.5)
    with pytest.raises(ValueError, match="prompt is None: give a text"):
        pipe(**LATENT)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"seed": 1, "generator": torch.Generator()}, "both seed and generator"),
        ({"generator": [torch.Generator()] * 2}, "1 images, 2 generators"),
        ({"generator": [3]}, "generator is 3, expected a torch.Generator"),
        ({"latents": torch.zeros(1, 4, 16, 12), "width": 128}, r"latents is a tensor \[1, 4, 16, 12\], expected .*16"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"expected standard normal noise \[1, 4, 16, 16\]"),
        ({"prompt_embeds": torch.zeros(1, 3, 40)}, "both prompt and prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 41)}, r"expected a tensor \[prompts, up to 128, 40\]"),
        ({"prompt_attention_mask": torch.ones(1, 3)}, "is given without prompt_embeds"),
        ({"negative_prompt": "dark", "guidance_scale": 1}, "no branch without the prompt is evaluated"),
        ({"negative_prompt": "a<imagehere>"}, "a negative prompt has no images"),
        ({"negative_prompt": ["a", "b"]}, "expected a text, or a list of 1"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has 'noise', expected names of latents"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_before_anything_runs(pipe, monkeypatch, changes, said):
    monkeypatch.setattr(type(pipe), "encode", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=said):
        pipe(**{"prompt": "a cat"} | LATENT | changes)


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_a_generator_is_a_seed(pipe, cat, cup):
    for given in calls(cat, cup).values():
        want = pipe(**given, seed=5, **LATENT).images
        assert torch.equal(pipe(**given, generator=torch.Generator().manual_seed(5), **LATENT).images, want)
        assert torch.equal(pipe(**given, generator=[torch.Generator().manual_seed(5)], **LATENT).images, want)
    one = torch.Generator().manual_seed(5)
    first, second = (pipe("a cat", generator=one, **LATENT).images for _ in range(2))
    together = pipe(["a cat"] * 2, generator=torch.Generator().manual_seed(5), **LATENT).images
    assert distance(together[0], first[0]) < 1e-5 and distance(together[1], second[0]) < 1e-5
    assert distance(second, first) > 0.1


def test_images_per_prompt(pipe, cat):
    """The images of a prompt stand together, and take the seeds after its own."""
    rows = ["a<imagehere>", "two<imagehere>in the snow"], [[cat], [cat]]
    got = pipe(*rows, num_images_per_prompt=2, seed=[5, 9], **LATENT).images
    every = [prompt for prompt in rows[0] for _ in range(2)]
    want = pipe(every, [[cat]] * 4, seed=[5, 6, 9, 10], **LATENT).images
    assert torch.equal(got, want) and distance(got[1], got[0]) > 0.1
    assert torch.equal(pipe(*rows, num_images_per_prompt=2, seed=[5, 6, 9, 10], **LATENT).images, want)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 9, 10)]
    assert torch.equal(pipe(*rows, num_images_per_prompt=2, generator=generators, **LATENT).images, want)


def test_latents_are_the_noise_that_denoising_starts_from(pipe, cat):
    given = dict(prompt="make it red", source=cat, seed=5)
    own = pipe.draw_noise(Task.EDIT, 1, torch.Generator().manual_seed(5), 128, 128).latent[None]
    want = pipe(**given, **LATENT).images
    assert torch.equal(pipe(**given, latents=own, **LATENT).images, want)
    assert distance(pipe(**given, latents=own.flip(-1), **LATENT).images, want) > 0.1
    wide = pipe("a cat", latents=torch.randn(1, 4, 8, 12), num_inference_steps=1).images[0]
    assert wide.size == (96, 64)  # where no size is given


# ---- the prompt ------------------------------------------------------------------------------------------------------


def test_the_context_of_encode_prompt_gives_the_same_image(pipe, cat, cup):
    for given in calls(cat, cup).values():
        images = {name: value for name, value in given.items() if name != "prompt"}
        want = pipe(**given, seed=5, **LATENT).images
        context, mask, negative, negative_mask = pipe.encode_prompt(**given, seed=5)
        embeds = dict(prompt_embeds=context, prompt_attention_mask=mask)
        assert torch.equal(pipe(**images, **embeds, seed=5, **LATENT).images, want)
        embeds |= dict(negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask)
        assert torch.equal(pipe(**images, **embeds, seed=5, **LATENT).images, want)
        changed = embeds | dict(prompt_embeds=-context)
        assert distance(pipe(**images, **changed, seed=5, **LATENT).images, want) > 1e-3


def test_contexts_of_several_prompts_and_images(pipe, cat):
    given = dict(prompt=["a<imagehere>", "a long haired<imagehere>on a table"], references=[[cat]] * 2, seed=[1, 7])
    want = pipe(**given, num_images_per_prompt=2, **LATENT).images
    context, mask, *_ = pipe.encode_prompt(**given, num_images_per_prompt=2)
    assert len(context) == 4 and mask[0].sum() < mask.shape[1] == mask[2].sum()
    embeds = dict(references=[[cat]] * 4, prompt_embeds=context, prompt_attention_mask=mask, seed=[1, 2, 7, 8])
    assert torch.equal(pipe(**embeds, **LATENT).images, want)
    twice = pipe("a cat", seed=[3], num_images_per_prompt=2, **LATENT).images
    context, mask, *_ = pipe.encode_prompt("a cat")
    embeds = dict(prompt_embeds=context, prompt_attention_mask=mask)
    assert distance(pipe(**embeds, seed=3, num_images_per_prompt=2, **LATENT).images, twice) < 1e-5


@pytest.mark.parametrize("negative", ["blurry", "dark and blurry and of a quality that nobody would look at twice"])
@pytest.mark.parametrize("task", [Task.SUBJECT, Task.EDIT])
def test_a_negative_prompt_is_read_in_place_of_the_null_context(pipe, cat, cup, task, negative):
    """The guidance written out: negative + scale (full - negative), one branch at a time and unpadded."""
    given = calls(cat, cup)[task]
    got = pipe(**given, negative_prompt=negative, guidance_scale=4.0, **LATENT).images
    call = pipe.check_inputs(**given)
    noise = pipe._noise(call)
    full = pipe.encode(pipe.prepare(call.samples, noise))
    instruction = tokenize(TASKS[task].prefix.lower().replace(":", " ").replace("\n", "").strip() + " " + negative
                           if task is Task.SUBJECT else TASKS[task].prefix + negative, pipe.tokenizer)  # fmt: skip
    nothing = torch.zeros(0, 4, 16, 16)
    with torch.no_grad():
        read = pipe.model.encode([instruction], torch.zeros(0, 3, 28, 28), nothing, full.source_BCHW)

        def denoise(x, t):
            without, whole = (pipe.model.denoise(x, t[None], one)[:, :4] for one in (read, full))
            return without + 4.0 * (whole - without)

        want = DPMSolver2M().sample(denoise, noise[0].latent[None], 2)
    assert distance(got, want) < 1e-5
    assert distance(pipe(**given, guidance_scale=4.0, **LATENT).images, want) > 1e-3
    *_, embeds, mask = pipe.encode_prompt(**given, negative_prompt=negative)
    again = dict(negative_prompt_embeds=embeds, negative_prompt_attention_mask=mask)
    assert torch.equal(pipe(**given, **again, guidance_scale=4.0, **LATENT).images, got)


# ---- callbacks -------------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step(pipe, cat):
    seen = []

    def look(given, step, time, tensors):
        seen.append((given, step, float(time), {name: tensor.shape for name, tensor in tensors.items()}))

    names = pipe._callback_tensor_inputs
    given = dict(prompt="make it red", source=cat, num_inference_steps=4, output_type="latent")
    got = pipe(**given, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names).images
    assert torch.equal(got, pipe(**given).images)
    assert [step for _, step, *_ in seen] == [0, 1, 2, 3]
    assert [time for _, _, time, _ in seen] == pytest.approx([999.0, 749.25, 499.5, 249.75])
    assert all(one is pipe for one, *_ in seen) and pipe.num_timesteps == 4
    shapes = seen[0][3]
    assert list(shapes) == names == ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"]
    assert shapes["latents"] == shapes["image_latents"] == (1, 4, 16, 16)
    assert shapes["prompt_embeds"] == shapes["negative_prompt_embeds"]


@pytest.mark.parametrize(
    "in_place, compiled", [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.processes)]
)
def test_what_a_callback_changes_counts_from_the_next_step_on(pipe, cat, in_place, compiled):
    """Context, source, scale and latents, each at a step of its own, against the solver with all of it written out."""
    given = dict(prompt="make it red", source=cat, num_inference_steps=5, output_type="latent", guidance_scale=5.0)

    def put(tensor, value):
        return tensor.copy_(value) if in_place else value

    def change(pipeline, step, time, tensors):
        if step == 0:
            tensors["prompt_embeds"] = put(tensors["prompt_embeds"], -tensors["prompt_embeds"])
        if step == 1:
            tensors["image_latents"] = put(tensors["image_latents"], -tensors["image_latents"])
        if step == 2:
            pipeline._guidance_scale = 2.0
            tensors["negative_prompt_embeds"] = put(tensors["negative_prompt_embeds"], tensors["prompt_embeds"] / 2)
        if step == 3:
            tensors["latents"] = put(tensors["latents"], tensors["latents"] / 2)
        return tensors

    call = pipe.check_inputs(**given)
    noise = pipe._noise(call)
    full = pipe.encode(pipe.prepare(call.samples, noise))
    context, source, steps = full.context_BLC, full.source_BCHW, []
    null = pipe.fusion.null_context[None, : context.shape[1]]

    @torch.no_grad()
    def denoise(x, t):
        step = len(steps)
        steps.append(t)
        text = context if step < 1 else -context
        image = source if step < 2 else -source
        without, scale = (null, 5.0) if step < 3 else (text / 2, 2.0)
        ask = lambda words: pipe.model.denoise(x, t[None], type(full)(words, full.mask_BL, image))[:, :4]  # noqa: E731
        return ask(without) + scale * (ask(text) - ask(without))

    want = DPMSolver2M().sample(denoise, noise[0].latent[None], 5, lambda step, x, x0: x / 2 if step == 3 else None)
    pipe.is_compiled = compiled
    try:
        names = pipe._callback_tensor_inputs
        got = pipe(**given, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names).images
    finally:
        pipe.is_compiled = False
    assert distance(got, want) < 1e-4
    assert pipe.guidance_scale == 2.0
    assert distance(got, pipe(**given).images) > 1e-2  # and the model's own null context is as it was
    assert torch.equal(pipe.fusion.null_context[None, : context.shape[1]], null)


def test_what_a_callback_may_not_return(pipe):
    for returned, said in (({"noise": 1}, "returned 'noise', but was given latents"),
                           ({"latents": torch.zeros(1)}, r"latents of \[1\], expected the shape \[1, 4, 16, 16\]"),
                           ({"latents": None}, "latents of NoneType")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            pipe("a cat", callback_on_step_end=lambda *_, returned=returned: returned, **LATENT)


def test_an_interrupted_call_returns_its_latents(pipe):
    steps = []

    def stop(pipeline, step, time, tensors):
        steps.append(tensors["latents"])
        pipeline._interrupt = step == 1

    got = pipe("a cat", num_inference_steps=9, output_type="latent", callback_on_step_end=stop).images
    assert len(steps) == 2 and torch.equal(got, steps[1]) and pipe.interrupt
    assert len(pipe("a cat", num_inference_steps=1).images) == 1 and not pipe.interrupt


def test_a_callback_object_brings_the_names_of_its_tensors(pipe):
    class Last(PipelineCallback):
        tensor_inputs = ("latents", "prompt_embeds")

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == ["latents", "prompt_embeds"]
            if step_index == pipeline.num_timesteps - 1:
                callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
            return callback_kwargs

    callback = Last(cutoff_step_ratio=1.0)
    assert not pipe("a cat", callback_on_step_end=callback, **LATENT).images.any()


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs(pipe):
    given = dict(prompt=["a cat", "a dog"], num_inference_steps=1)
    tensor, array = (pipe(**given, output_type=kind).images for kind in ("pt", "np"))
    assert array.shape == (2, 128, 128, 3) and np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    made = pipe(**given, return_dict=False)
    assert type(made) is tuple and len(made) == 1 and len(made[0]) == 2
    levels = np.stack([np.asarray(image) for image in made[0]]).astype(int)
    assert np.abs(levels - (array * 255).round()).max() <= 1
    assert pipe.vae_scale_factor == 8 and isinstance(pipe.image_processor, VaeImageProcessor)


def test_tiles_and_slices_of_the_vae(pipe):
    given = dict(prompt=["a cat", "a dog"], num_inference_steps=1, output_type="pt", height=256, width=256)
    whole = pipe(**given).images
    parts, real = [], pipe.vae.decoder.forward
    pipe.vae.decoder.forward = lambda x, *rest: parts.append(tuple(x.shape)) or real(x, *rest)
    try:
        pipe.enable_vae_slicing()
        assert distance(pipe(**given).images, whole) < 1e-5 and [shape[0] for shape in parts] == [1, 1]
        pipe.disable_vae_slicing()
        parts.clear()
        pipe.enable_vae_tiling()
        tiled = pipe(**given).images
        assert max(shape[3] for shape in parts) == 16 and 0 < distance(tiled, whole) < 0.2
    finally:
        pipe.disable_vae_tiling()
        pipe.vae.decoder.forward = real
