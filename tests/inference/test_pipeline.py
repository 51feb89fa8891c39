"""The whole pipeline on the tiny model: batches, encoding, loading, sizes, schedulers and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from PIL import Image
from torch.nn import functional as F

from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.solver import DPMSolver2M
from mige.inference.encoding import encode_references
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, make_sample
from mige.models.instruction import full_text, tokenize
from mige.models.vae import encode
from mige.tasks import TASKS, Task
from mige.utils import images

PHOTOS = Path(__file__).parents[2] / "example_data" / "images"
STEPS = 3


def load(folder, **kwargs) -> MIGEPipeline:
    pipe = MIGEPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(lively):
    return load(lively)


@pytest.fixture(scope="module")
def photos():
    names = ("cat", "coffee", "astronaut", "cup_on_black", "flower_on_black", "rocket", "pagoda")
    return [images.open_image(PHOTOS / f"{name}.jpg") for name in names]


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


def draw(pipe, samples, size=(128, 128), seed=0):
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(samples))]
    return [
        pipe.draw_noise(sample.task, len(sample.references), generator, *size)
        for sample, generator in zip(samples, generators, strict=True)
    ]


def condition_of(pipe, samples, noise) -> Condition:
    return pipe.encode(pipe.prepare(samples, noise))


@torch.no_grad()
def references_of(pipe, samples, noise) -> torch.Tensor:
    """Unscaled latents of all references."""
    return encode_references(pipe.vae, pipe.prepare(samples, noise), torch.device("cpu"))


def five(task, photos) -> list[Sample]:
    """Samples of one task with different lengths and numbers of references."""
    a, b, c, d, e, *_ = photos
    if task is Task.EDIT:
        prompts = ["make it red", "turn<imagehere>into a snowy day", "the photo", "a dog", "add a cup next to the cat"]
        return [make_sample(p, [], source) for p, source in zip(prompts, (a, b, c, d, e), strict=True)]
    if task is Task.SUBJECT:
        rows = [
            ("a<imagehere>in the jungle", [a]),
            ("a<imagehere>and a<imagehere>on a wooden table", [b, c]),
            ("a cat at night", []),
            ("<imagehere><imagehere><imagehere><imagehere>", [a, b, c, d]),
            ("a<imagehere>", [e]),
        ]
        return [make_sample(prompt, references, None) for prompt, references in rows]
    rows = [
        ("replace the cup in<imagehere>with<imagehere>", [a, b], a),
        ("add<imagehere>to<imagehere>", [c, d], d),
        ("add<imagehere>and<imagehere>to<imagehere>in the snow", [c, d, e], e),
        ("<imagehere><imagehere>", [b, a], a),
        ("put the<imagehere>of this<imagehere>on a table in front of a mountain", [e, b], b),
    ]
    return [make_sample(prompt, references, source) for prompt, references, source in rows]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(Task))
def test_no_result_depends_on_its_batch(pipe, photos, task):
    samples = five(task, photos)
    noise = draw(pipe, samples)
    together = pipe.run(samples, noise, steps=STEPS)
    assert together.shape == (5, 4, 16, 16) and together.dtype == torch.float32
    for start, stop in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 2), (2, 4)]:
        got = pipe.run(samples[start:stop], noise[start:stop], steps=STEPS)
        for one, want in zip(got, together[start:stop], strict=True):
            assert distance(one, want) < 1e-5
    order = [3, 0, 4, 2, 1]
    got = pipe.run([samples[n] for n in order], [noise[n] for n in order], steps=STEPS)
    assert all(distance(one, together[n]) < 1e-5 for one, n in zip(got, order, strict=True))
    apart = torch.cdist(together.flatten(1), together.flatten(1)) + torch.eye(5) * 1e9
    assert apart.min() > 1  # the samples do differ


def test_a_short_prompt_is_the_same_beside_one_of_full_length(pipe, photos):
    short = make_sample("a<imagehere>in the jungle", photos[:1], None)
    long = make_sample("zebra quartz " * 80, [], None)
    noise = draw(pipe, [short, long])
    alone, padded = condition_of(pipe, [short], noise[:1]), condition_of(pipe, [short, long], noise)
    most, own = pipe.fusion.config.max_tokens, alone.context_BLC.shape[1]
    assert own < padded.context_BLC.shape[1] == most == padded.mask_BL[1].sum()
    assert distance(padded.context_BLC[:1, :own], alone.context_BLC) < 1e-5
    assert padded.mask_BL[0].sum() == own
    got, want = pipe.run([short, long], noise, steps=STEPS)[0], pipe.run([short], noise[:1], steps=STEPS)[0]
    assert distance(got, want) < 1e-5


def test_nothing_under_the_mask_is_read(pipe):
    random = torch.Generator().manual_seed(0)
    context = torch.randn(1, 20, 40, generator=random)
    source, x = torch.zeros(1, 4, 16, 16), torch.randn(1, 4, 16, 16, generator=random)
    trimmed = Condition(context[:, :12], torch.ones(1, 12, dtype=torch.long), source)
    padded = Condition(context, (torch.arange(20) < 12).long()[None], source)
    with torch.no_grad():
        got, want = (pipe.model.denoise(x, torch.tensor([500.0]), c) for c in (padded, trimmed))
    assert distance(got, want) < 1e-5


# ---- conditions and guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(Task))
def test_encoding_once_equals_encoding_at_each_step_and_all_branches(pipe, photos, task, monkeypatch):
    """The official loop, written out: every branch at every step, the condition made anew each time."""
    samples = five(task, photos)[:2]
    noise = draw(pipe, samples)
    calls, real, inputs = [], pipe.encode, pipe.prepare(samples, noise)
    monkeypatch.setattr(pipe, "encode", lambda *args: calls.append(1) or real(*args))
    got = pipe.run(samples, noise, steps=STEPS, text_guidance=4.0, source_guidance=1.5)
    assert len(calls) == 1

    @torch.no_grad()
    def denoise(x, t):
        full = real(inputs)
        null = pipe.fusion.null_context
        branches = [full.drop(null, text=True, source=True), full.drop(null, text=True), full]
        none, source, text = (pipe.model.denoise(x, t.expand(2), branch)[:, :4] for branch in branches)
        if task is Task.SUBJECT:
            return none + 4.0 * (text - none)
        return none + 1.5 * (source - none) + 4.0 * (text - source)

    want = DPMSolver2M().sample(denoise, torch.stack([n.latent for n in noise]), STEPS)
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("task", list(Task))
def test_scale_one_is_the_conditional_branch_alone(pipe, photos, task, monkeypatch):
    samples = five(task, photos)[:2]
    noise = draw(pipe, samples)
    batches, real = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, **kw: batches.append(len(x)) or real(x, **kw))
    got = pipe.run(samples, noise, steps=STEPS, text_guidance=1.0, source_guidance=1.0)
    assert batches == [2] * STEPS
    full = condition_of(pipe, samples, noise)

    def denoise(x, t):
        return pipe.model.denoise(x, t.expand(2), full)[:, :4]

    assert distance(got, DPMSolver2M().sample(denoise, torch.stack([n.latent for n in noise]), STEPS)) < 1e-5
    batches.clear()
    pipe.run(samples, noise, steps=1)  # the official scales need two branches
    assert batches == [4]


def test_the_settings_default_to_the_official_ones(pipe, photos):
    for task in Task:
        sample = five(task, photos)[:1]
        noise, official = draw(pipe, sample), TASKS[task]
        got = pipe.run(sample, noise, steps=2)
        want = pipe.run(sample, noise, steps=2, text_guidance=official.guidance, source_guidance=1.0)
        other = pipe.run(sample, noise, steps=2, text_guidance=official.guidance + 1)
        assert torch.equal(got, want) and not torch.equal(got, other)
    seen = []
    pipe("a cat", on_step=lambda step, *_: seen.append(step), output_type="latent")
    assert seen == list(range(50))


def test_a_second_mention_reads_an_empty_image(pipe, photos):
    sample = make_sample("make the image like this photo", [], photos[0])
    noise = draw(pipe, [sample])
    got = condition_of(pipe, [sample], noise)
    instruction = tokenize(full_text(Task.EDIT, sample.prompt), pipe.tokenizer)
    assert instruction.num_images == 2
    pixels = images.to_pixels(images.center_crop(photos[0], 128, 128))[None]
    with torch.no_grad():
        latent = encode(pipe.vae, pixels).sample(noise[0].references[0][None])
        vision = images.vision_pixels(photos[0], pipe.image_encoder.config.image_size)[None]

        def encoded(second_vision, second_latent):
            both = torch.cat([vision, second_vision]), torch.cat([latent, second_latent])
            return pipe.model.encode([instruction], *both, latent * pipe.vae.config.scaling_factor)

        want = encoded(torch.zeros_like(vision), torch.zeros_like(latent))
        repeated = encoded(vision, latent)
    assert distance(got.context_BLC, want.context_BLC) < 1e-6
    assert distance(got.source_BCHW, want.source_BCHW) < 1e-6
    assert distance(repeated.context_BLC, want.context_BLC) > 1e-3


def test_what_each_task_reads_as_reference_and_source(pipe, photos):
    """An edit reads one posterior sample twice; a subject edit draws two of one image; a subject has no source."""
    cat, cup = photos[0], photos[3]
    factor = pipe.vae.config.scaling_factor

    def posterior(image, noise, fit=images.center_crop):
        moments = encode(pipe.vae, images.to_pixels(fit(image, 128, 128))[None])
        return moments.mean + moments.std * noise

    edit = make_sample("make it red", [], cat)
    (noise,) = draw(pipe, [edit])
    references = references_of(pipe, [edit], [noise])
    assert distance(references, posterior(cat, noise.references[0])) < 1e-5
    assert torch.equal(condition_of(pipe, [edit], [noise]).source_BCHW, references * factor)

    both = make_sample("add<imagehere>to<imagehere>", [cup, cat], cat)
    (noise,) = draw(pipe, [both])
    references = references_of(pipe, [both], [noise])
    assert distance(references[0], posterior(cup, noise.references[0])[0]) < 1e-5
    assert distance(references[1], posterior(cat, noise.references[1])[0]) < 1e-5
    source = condition_of(pipe, [both], [noise]).source_BCHW
    assert distance(source, posterior(cat, noise.source) * factor) < 1e-5

    subject = make_sample("a<imagehere>", [cat], None)
    (noise,) = draw(pipe, [subject])
    references = references_of(pipe, [subject], [noise])
    assert distance(references, posterior(cat, noise.references[0], images.letterbox)) < 1e-5
    assert not condition_of(pipe, [subject], [noise]).source_BCHW.any()


@pytest.mark.parametrize("many", [5, 6])
def test_more_references_than_trained_on(pipe, photos, many):
    prompt = "<imagehere>and" * many
    got = pipe(prompt, photos[:many], num_inference_steps=2, output_type="latent").images
    changed = [*photos[: many - 1], photos[6]]  # the last one counts too
    other = pipe(prompt, changed, num_inference_steps=2, output_type="latent").images
    assert got.isfinite().all() and distance(other, got) > 1e-5


def test_more_images_than_the_vae_takes_at_once(pipe, photos, monkeypatch):
    sizes, real = [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: sizes.append(len(x)) or real(x))
    monkeypatch.setattr("mige.models.vae._chunk", lambda *_: 8)
    samples = [make_sample("<imagehere>" * 5, photos[:5], None), make_sample("<imagehere>" * 4, photos[2:6], None)]
    noise = draw(pipe, samples)
    together = references_of(pipe, samples, noise)
    assert sizes == [8, 1]
    alone = torch.cat([references_of(pipe, [s], [n]) for s, n in zip(samples, noise, strict=True)])
    assert distance(together, alone) < 1e-5


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(96, 160), (160, 96), (16, 16), (128, 256)])
@pytest.mark.parametrize("task", list(Task))
def test_sizes_on_the_grid(pipe, photos, task, height, width):
    sample = five(task, photos)[1]
    result = pipe(
        sample.prompt, sample.references, sample.source, height=height, width=width, num_inference_steps=1
    ).images[0]
    assert result.size == (width, height)


@pytest.mark.parametrize("height, width", [(100, 128), (128, 120), (0, 128), (128, -16), (8, 128)])
def test_sizes_off_the_grid(pipe, height, width):
    with pytest.raises(ValueError, match=f"multiples of 16 px, got {height} x {width}"):
        pipe("a cat", height=height, width=width, num_inference_steps=1)


def test_the_native_size_is_the_default(pipe):
    assert pipe.native_size == 128
    assert pipe("a cat", width=64, num_inference_steps=1).images[0].size == (64, 128)


@pytest.mark.parametrize("rows, columns", [(6, 10), (8, 8), (1, 16)])
def test_the_position_table_of_other_sizes(pipe, rows, columns):
    """The table is spread over the native grid of 8 x 8 patches, as the released model's is for its own size."""
    embed = pipe.transformer.pos_embed
    x = torch.randn(1, 8, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = embed(x) - embed.proj(x).flatten(2).transpose(1, 2)
    want = get_2d_sincos_pos_embed(64, (rows, columns), base_size=8, interpolation_scale=1.0, output_type="pt")
    torch.testing.assert_close(got[0].double(), want.double(), rtol=0, atol=1e-5)


# ---- the call --------------------------------------------------------------------------------------------------------


def test_output_types_are_one_image(pipe, photos):
    def made(output_type):
        return pipe("a<imagehere>", photos[:1], num_inference_steps=2, output_type=output_type).images

    latent, tensor, pil = made("latent"), made("pt"), made("pil")
    assert latent.shape == (1, 4, 16, 16)
    decoded = pipe.decode(latent)
    assert tensor.shape == (1, 3, 128, 128) and torch.equal(tensor, (decoded / 2 + 0.5).clamp(0, 1))
    assert isinstance(pil[0], Image.Image) and pil[0].tobytes() == images.to_pil(decoded)[0].tobytes()
    array = made("np")
    assert array.shape == (1, 128, 128, 3) and (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    with pytest.raises(ValueError, match="output_type must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"):
        made("jpg")


def test_seeds(pipe, photos):
    def made(prompts, seed):
        rows = [photos[:1]] * len(prompts)
        return pipe(prompts, rows, num_inference_steps=2, seed=seed, output_type="latent").images

    prompt = "a<imagehere>"
    a, b, c = made([prompt] * 3, [5, 6, 5])
    assert distance(c, a) < 1e-5 and distance(b, a) > 0.1
    assert distance(made([prompt], 6)[0], b) < 1e-5
    shared = made([prompt] * 2, 5)
    assert distance(shared[1], shared[0]) < 1e-5 and distance(shared[0], a) < 1e-5
    single = pipe(prompt, photos[:1], num_inference_steps=2, seed=5, output_type="latent").images
    assert distance(single[0], a) < 1e-5
    torch.manual_seed(99)  # the global generator plays no part
    assert distance(made([prompt] * 3, [5, 6, 5])[0], a) < 1e-5


def test_the_order_of_a_sample_s_random_numbers(pipe):
    """Latent, references, source; a reference of an edit has the output's size, others the native one."""
    noise = pipe.draw_noise(Task.SUBJECT_EDIT, 2, torch.Generator().manual_seed(3), 96, 160)
    random = torch.Generator().manual_seed(3)
    shapes = [(4, 12, 20), (4, 16, 16), (4, 16, 16), (4, 12, 20)]
    wanted = [torch.randn(shape, generator=random) for shape in shapes]
    got = [noise.latent, *noise.references, noise.source]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    edit = pipe.draw_noise(Task.EDIT, 1, torch.Generator().manual_seed(3), 96, 160)
    assert edit.references[0].shape == (4, 12, 20)


def test_on_step_sees_the_latents_and_can_stop(pipe, photos):
    seen = []
    result = pipe(
        "make it red",
        source=photos[0],
        num_inference_steps=4,
        output_type="latent",
        on_step=lambda *step: seen.append(step),
    ).images
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], result) and seen[0][2].shape == result.shape

    def stop(step, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", num_inference_steps=4, on_step=stop)


@pytest.mark.parametrize(
    "prompt, references, has_source, found",
    [
        ("a cat", 1, False, "0 <imagehere>, 1 references"),
        ("a<imagehere>and<imagehere>", 1, False, "2 <imagehere>, 1 references"),
        ("a<imagehere>", 2, False, "1 <imagehere>, 2 references"),
        ("a<imagehere>", 0, False, "1 <imagehere>, 0 references"),
        ("replace<imagehere>", 2, True, "1 <imagehere>, 2 references"),
        ("<imagehere>like<imagehere>", 1, True, "2 <imagehere>, 1 references"),
        ("word " * 88, 1, True, "0 <imagehere>, 1 references"),
        ("a<imagehere>" + "word " * 80 + "<imagehere>", 2, False, "1 <imagehere>, 2 references"),
    ],
)
def test_placeholders_that_do_not_match(pipe, photos, prompt, references, has_source, found):
    source = photos[0] if has_source else None
    with pytest.raises(ValueError, match=found):
        pipe(prompt, photos[:references], source, num_inference_steps=1)


def test_what_else_is_refused(pipe, photos):
    cat, cup = photos[:2]
    with pytest.raises(ValueError, match="must be among the references"):
        pipe("add<imagehere>to<imagehere>", [cat, cup], photos[2], num_inference_steps=1)
    with pytest.raises(ValueError, match="must be of one task"):
        pipe(["a<imagehere>", "make it red"], [[cat], []], [None, cup], num_inference_steps=1)
    with pytest.raises(ValueError, match="2 prompts, but references has 1 entries"):
        pipe(["a<imagehere>"] * 2, [[cat]])
    with pytest.raises(ValueError, match="2 prompts, 3 seeds"):
        pipe(["a cat"] * 2, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="at least one text"):
        pipe([])
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipe("a cat", num_inference_steps=0)


def test_a_task_follows_from_the_images(photos):
    cat, cup = photos[:2]
    assert make_sample("x", [], None).task is make_sample("x", [cat], None).task is Task.SUBJECT
    assert make_sample("x", [], cat).task is make_sample("x", [cat], cat).task is Task.EDIT
    assert make_sample("x", [cup, cat], cat).task is Task.SUBJECT_EDIT
    assert make_sample("x", [], cat).references == (cat,)


# ---- schedulers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def swapped(pipe):
    """Exchange the scheduler for one test."""
    ours = pipe.scheduler

    def swap(cls, **changes):
        pipe.scheduler = cls.from_config(ours.config, **changes)
        return pipe

    yield swap
    pipe.scheduler = ours


def test_another_scheduler_agrees_at_many_steps(pipe, photos, swapped):
    def made():
        settings = dict(num_inference_steps=200, guidance_scale=1.0, output_type="latent")
        return pipe("a<imagehere>", photos[:1], **settings).images

    want = made()
    swapped(diffusers.EulerDiscreteScheduler)
    assert 0 < distance(made(), want) < 0.02


def test_a_stochastic_scheduler_belongs_to_the_sample(pipe, photos, swapped):
    swapped(diffusers.DDPMScheduler)
    samples = five(Task.SUBJECT, photos)[:3]
    noise = draw(pipe, samples)
    together = pipe.run(samples, noise, steps=STEPS)
    assert torch.equal(together, pipe.run(samples, noise, steps=STEPS))
    for sample, one, want in zip(samples, noise, together, strict=True):
        assert distance(pipe.run([sample], [one], steps=STEPS)[0], want) < 1e-5
    other = [replace(one, step_seed=one.step_seed + 1) for one in noise]
    assert distance(pipe.run(samples, other, steps=STEPS), together) > 1e-3


def test_v_prediction_is_refused(pipe, swapped):
    swapped(diffusers.EulerDiscreteScheduler, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts epsilon"):
        pipe("a cat", num_inference_steps=1)


# ---- loading and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
def test_saving_and_loading_changes_no_bit(pipe, photos, tmp_path, shards):
    pipe.save_pretrained(tmp_path / "copy", **shards)
    count = len(list((tmp_path / "copy").glob("*/*.safetensors")))
    assert count > 6 if shards else count == 6
    again = load(tmp_path / "copy")
    for name in ("vae", "transformer", "text_encoder", "image_encoder", "qformer", "fusion"):
        want, got = pipe.components[name].state_dict(), again.components[name].state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want), name
    assert again.image_encoder.post_layernorm.eps == 1e-5
    assert isinstance(again.scheduler, DPMSolver2M)

    def made(pipeline):
        return pipeline("a<imagehere>in snow", photos[:1], num_inference_steps=2, output_type="latent").images

    assert torch.equal(made(again), made(pipe))


def dtypes(part):
    return {parameter.dtype for parameter in part.parameters()}


def test_loading_in_bfloat16(lively, photos):
    pipe = load(lively, dtype=torch.bfloat16)
    assert dtypes(pipe.vae) == {torch.float32}
    assert dtypes(pipe.image_encoder) == {torch.float32}  # this model's vision_dtype
    for name in ("transformer", "text_encoder", "qformer", "fusion"):
        assert dtypes(pipe.components[name]) == {torch.bfloat16}, name
    assert pipe.transformer.pos_embed.pos_embed.dtype == torch.bfloat16
    sample = five(Task.EDIT, photos)[:2]
    got = pipe.run(sample, draw(pipe, sample), steps=STEPS)
    exact = load(lively)
    want = exact.run(sample, draw(exact, sample), steps=STEPS)
    assert got.dtype == torch.float32 and 0 < distance(got, want) < 0.1


@pytest.fixture(scope="module")
def half_vision(lively, tmp_path_factory):
    """A checkpoint whose config says that the vision tower was trained in float16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(lively, folder)
    config = folder / "fusion" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vision_dtype": "float16"}))
    return folder


def matrices(tower):
    return {p.dtype for name, p in tower.encoder.named_parameters() if "norm" not in name}


def test_a_tower_trained_in_float16(half_vision, lively, photos):
    pipe, exact = load(half_vision, dtype=torch.bfloat16), load(lively)
    tower = pipe.image_encoder
    assert matrices(tower) == {torch.float16}
    assert dtypes(tower.embeddings) == {torch.float32}
    assert dtypes(pipe.transformer) == {torch.bfloat16} and dtypes(pipe.vae) == {torch.float32}
    pixels = images.vision_pixels(photos[0], 28)[None]
    streams = []
    hook = tower.encoder.layers[0].register_forward_hook(lambda module, args, output: streams.append(output))
    with torch.no_grad():
        got, want = pipe.model.encoder.encode_vision(pixels).float(), exact.model.encoder.encode_vision(pixels)
    hook.remove()
    assert (streams[0][0] if isinstance(streams[0], tuple) else streams[0]).dtype == torch.float32  # the residual
    assert 0 < distance(got, want) < 2e-3  # 11 bits; bfloat16 has 8
    image = pipe("a<imagehere>in the jungle", photos[:1], num_inference_steps=2).images[0]
    assert image.size == (128, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_in_another_half_precision(half_vision, photos, dtype):
    """Chosen part by part it is still run: in the dtype of its own weights."""
    pipe = load(half_vision, dtype={"default": torch.bfloat16, "vae": torch.float32, "image_encoder": dtype})
    assert matrices(pipe.image_encoder) == {dtype}
    image = pipe("a<imagehere>in the jungle", photos[:1], num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_a_saved_half_precision_model_is_the_same(half_vision, photos, tmp_path):
    pipe = load(half_vision, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half", dtype=torch.bfloat16)

    def made(pipeline):
        return pipeline("a<imagehere>", photos[:1], num_inference_steps=2, output_type="latent").images

    assert torch.equal(made(pipe), made(again))


def test_a_model_saved_in_float16_runs_in_float32_unless_told(pipe, lively, photos, tmp_path):
    load(lively, dtype={"default": torch.float16}).save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert {
        p.dtype for part in opened.components.values() if hasattr(part, "parameters") for p in part.parameters()
    } == {torch.float32}
    again = opened("a<imagehere>in the snow", [photos[0]], num_inference_steps=STEPS, output_type="latent").images
    want = pipe("a<imagehere>in the snow", [photos[0]], num_inference_steps=STEPS, output_type="latent").images
    assert distance(again, want) < 0.05  # what rounding the weights to float16 does


def test_patches_are_the_bare_convolution(pipe):
    latent = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = pipe.transformer.pos_embed.proj.weight[:, :4]
    with torch.no_grad():
        want = F.conv2d(latent, weight, pipe.transformer.pos_embed.proj.bias, stride=2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pipe.model.patchify(latent), want, rtol=1e-5, atol=1e-6)


def test_guidance_gets_the_null_context_of_the_checkpoint(pipe, photos):
    sample = five(Task.SUBJECT, photos)[:1]
    noise = draw(pipe, sample)
    condition = condition_of(pipe, sample, noise)
    stacked = guidance.stack(condition, guidance.branches(Task.SUBJECT, 7.0, 1.0), pipe.model.null_context)
    length = condition.context_BLC.shape[1]
    assert torch.equal(stacked.context_BLC[0], pipe.fusion.null_context[:length])
