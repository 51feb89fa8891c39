"""The fast forward pass against the library's, and what stands around it: captured shapes, off-loading, savings."""

import copy
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import diffusers
import pytest
import torch
from golden import golden_model

from mige.checkpoints.lora import add_lora
from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.inference.encoding import encode_references
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import make_sample
from mige.models.fast_dit import MAX_CAPTURED, FastDenoiser
from mige.tasks import Task
from mige.utils import images

PHOTOS = Path(__file__).parents[2] / "example_data" / "images"
TIMES = torch.tensor([999.0, 513.3, 7.25])


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture
def uncompiled():
    """The same arithmetic without the compiler, which takes seconds for every new shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder(lively):
    return lively


@pytest.fixture(scope="module")
def photos():
    return [images.open_image(PHOTOS / f"{name}.jpg") for name in ("cat", "coffee", "cup_on_black")]


def load(folder, **kwargs) -> MIGEPipeline:
    pipe = MIGEPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


def conditions(model, lengths, size, seed=0) -> Condition:
    """Random contexts of these valid lengths, padded to the longest, and sources."""
    random = torch.Generator().manual_seed(seed)
    context = torch.randn(len(lengths), max(lengths), model.transformer.config.caption_channels, generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Condition(context, mask, torch.randn(len(lengths), 4, *size, generator=random))


def stacked(model, lengths, size, chosen, seed=0) -> Condition:
    null = torch.randn(400, model.transformer.config.caption_channels, generator=torch.Generator().manual_seed(9))
    return guidance.stack(conditions(model, lengths, size, seed), chosen, null)


@torch.no_grad()
def plain(model, condition, chosen, x, t):
    repeated = x.repeat(len(chosen), 1, 1, 1)
    return guidance.combine(model.denoise(repeated, t.expand(len(repeated)), condition)[:, :4], chosen)


EVERY = guidance.branches(Task.EDIT, 4.0, 1.5)


@pytest.mark.parametrize(
    "lengths, size, chosen",
    [
        ((24, 24), (8, 8), EVERY),  # padded to 32, all alike
        ((32, 32), (8, 8), EVERY),  # no mask at all
        ((32, 5), (8, 8), EVERY),
        ((20,), (12, 8), guidance.branches(Task.EDIT, 4.0, 1.0)),  # position table of another size
        ((9, 1, 70), (4, 16), guidance.branches(Task.SUBJECT, 1.0, 1.0)),
        ((300,), (8, 8), EVERY),  # beyond the fixed lengths
    ],
)
def test_it_equals_the_library_s_forward_pass(model, uncompiled, lengths, size, chosen):
    condition = stacked(model, lengths, size, chosen)
    denoise = FastDenoiser(model.transformer, model.timestep_dtype).start(condition, chosen, TIMES)
    random = torch.Generator().manual_seed(1)
    for t in TIMES:
        x = torch.randn(len(lengths), 4, *size, generator=random)
        got = denoise(x, t)
        assert got.shape == x.shape and got.dtype == torch.float32
        assert distance(got, plain(model, condition, chosen, x, t)) < 1e-5


def test_a_shape_seen_before_is_not_prepared_again(model, uncompiled):
    fast = FastDenoiser(model.transformer, model.timestep_dtype)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for lengths in [(20, 9), (32, 31), (5, 30)]:
        condition = stacked(model, lengths, (8, 8), EVERY, seed=sum(lengths))
        got = fast.start(condition, EVERY, TIMES)(x, TIMES[1])  # nothing of the prompt before is left
        assert distance(got, plain(model, condition, EVERY, x, TIMES[1])) < 1e-5
    assert len(fast.steps) == 1
    for length in range(10, 10 + 64 * MAX_CAPTURED, 64):
        fast.start(stacked(model, (length, 3), (8, 8), EVERY), EVERY, TIMES)
    assert len(fast.steps) == MAX_CAPTURED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_change_a_bit(model, uncompiled, dtype):
    """Neither what stands in it, nor what its values would be: its weight in the softmax is exactly zero."""
    random = torch.Generator().manual_seed(1)
    transformer, x = copy.deepcopy(model.transformer).to(dtype), torch.randn(2, 4, 8, 8, generator=random)
    alone, clean = guidance.branches(Task.SUBJECT, 1.0, 1.0), conditions(model, (20, 9), (8, 8))
    fast = FastDenoiser(transformer, model.timestep_dtype)
    want = fast.start(clean, alone, TIMES)(x, TIMES[1])
    assert want.isfinite().all()
    padding_BL1 = clean.mask_BL[..., None] == 0
    for garbage in (1e3 * torch.randn(clean.context_BLC.shape, generator=random), torch.tensor(float("nan"))):
        dirty = replace(clean, context_BLC=torch.where(padding_BL1, garbage, clean.context_BLC))
        denoise = fast.start(dirty, alone, TIMES)
        assert torch.equal(denoise(x, TIMES[1]), want)
    denoise.step.inputs.kv_K2BLHD[:, 1, 1, 9:] = 1e3
    assert torch.equal(denoise(x, TIMES[1]), want)
    denoise.step.inputs.kv_K2BLHD[:, 1, 1, 8] = 1e3  # a valid position: this one would be seen
    assert not torch.equal(denoise(x, TIMES[1]), want)


def test_a_sample_is_the_same_alone_and_beside_a_longer_one(model, uncompiled):
    """Alone it fills its context, and has no padding; beside others it has some, of one length or of another."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = conditions(model, (70, 32), (8, 8))
    alone, fast = guidance.branches(Task.SUBJECT, 1.0, 1.0), FastDenoiser(model.transformer, model.timestep_dtype)
    short = Condition(whole.context_BLC[1:, :32], None, whole.source_BCHW[1:])
    want = fast.start(short, alone, TIMES)(x[1:], TIMES[1])
    for length in (33, 70):
        context, mask = whole.context_BLC[:, :length], whole.mask_BL[:, :length]
        got = fast.start(Condition(context, mask, whole.source_BCHW), alone, TIMES)(x, TIMES[1])[1:]
        assert distance(got, want) < 1e-5
    assert [key[3] for key in fast.steps] == [False, True, True]  # has padding


def test_what_it_does_not_know_is_refused():
    model = golden_model()
    add_lora(model.transformer, 2)
    with pytest.raises(ValueError, match=r"compile: .*adapters or quantised layers"):
        FastDenoiser(model.transformer, model.timestep_dtype)
    other = diffusers.PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8, cross_attention_dim=16,
        caption_channels=8, activation_fn="geglu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="activation_fn is 'geglu'"):
        FastDenoiser(other, torch.float32)


@pytest.mark.processes  # of the compiler
@pytest.mark.parametrize("task", list(Task))
def test_compiled_images_are_the_plain_ones(folder, photos, task):
    """With the compiler itself, on batches of different lengths and sizes, with our solver and another."""
    cat, coffee, cup = photos
    prompts, references, sources = {
        Task.SUBJECT: (["a<imagehere>", "a<imagehere>and a<imagehere>at night"], [[cat], [cup, coffee]], None),
        Task.EDIT: (["make it red", "turn the cat in this photo into a dog with a hat"], None, [cat, coffee]),
        Task.SUBJECT_EDIT: (["add<imagehere>to<imagehere>"] * 2, [[cup, cat], [cup, coffee]], [cat, coffee]),
    }[task]
    pipe, fast = load(folder), load(folder, compile=True)
    for settings in (dict(), dict(width=96), dict(source_guidance_scale=1.5)):
        settings |= dict(num_inference_steps=3, output_type="latent", seed=5)
        want = pipe(prompts, references, sources, **settings).images
        assert distance(fast(prompts, references, sources, **settings).images, want) < 1e-5
    for one in (pipe, fast):
        one.scheduler = diffusers.HeunDiscreteScheduler.from_config(one.scheduler.config)
    want, got = (
        one(prompts, references, sources, num_inference_steps=3, output_type="pt").images for one in (pipe, fast)
    )
    assert distance(got, want) < 1e-5


def test_a_transformer_exchanged_after_the_first_image_is_noticed(folder, uncompiled):
    def made(pipe):
        return pipe("a cat", num_inference_steps=2, output_type="latent").images

    pipe, fast = load(folder), load(folder, compile=True)
    before = made(fast)
    for one in (pipe, fast):
        one.transformer = load(folder).transformer
        torch.nn.init.constant_(one.transformer.proj_out.bias, 0.3)
    assert distance(made(fast), before) > 1e-3 and distance(made(fast), made(pipe)) < 1e-5


def test_off_loaded_encoders_change_nothing(folder, photos):
    def made(pipe):
        return pipe("a<imagehere>", photos[:1], num_inference_steps=2, output_type="latent").images

    pipe = load(folder)
    want, visited = made(pipe), []
    pipe.offload_encoders("cpu")
    blocks = pipe.model.blocks(("text_encoder", "image_encoder", "qformer"))
    hosted = {name: p.data_ptr() for name, p in pipe.text_encoder.named_parameters()}
    for block in blocks:
        block.register_forward_hook(lambda block, *_: visited.append(block))
    assert torch.equal(made(pipe), want) and torch.equal(made(pipe), want)
    assert len(visited) == 2 * len(blocks)
    assert hosted == {name: p.data_ptr() for name, p in pipe.text_encoder.named_parameters()}


def test_empty_slots_need_not_be_encoded(folder, photos):
    """The released code encodes four slots a sample, zeros in the empty ones; only the filled ones are read."""
    pipe = load(folder)
    samples = [make_sample("a<imagehere>", photos[:1], None), make_sample("<imagehere>on<imagehere>", photos[1:], None)]
    noise = [pipe.draw_noise(s.task, len(s.references), torch.Generator().manual_seed(0), 128, 128) for s in samples]
    inputs = pipe.prepare(samples, noise)
    got = pipe.encode(inputs)
    used, encoder = [0, 4, 5], pipe.model.encoder
    with torch.no_grad():
        filled = images.vision_pixels_of(inputs.vision_RHWC), encode_references(pipe.vae, inputs, torch.device("cpu"))
        vision, references = (values.new_zeros(8, *values.shape[1:]) for values in filled)
        vision[used], references[used] = filled
        embeddings = encoder.encode_images(vision, pipe.model.patchify(references))
        assert embeddings[1].norm() > 0  # an empty slot does give an embedding
        embeds, mask = encoder.interleave(inputs.instructions, embeddings[used])
        context = encoder.text_encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert torch.equal(mask, got.mask_BL) and distance(got.context_BLC, context) < 1e-5


def test_a_mask_that_masks_nothing_is_dropped(model):
    even, uneven = conditions(model, (7, 7), (8, 8)), conditions(model, (7, 3), (8, 8))
    assert uneven.drop_full_mask().mask_BL is uneven.mask_BL
    bare = even.drop_full_mask()
    assert bare.mask_BL is None
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), TIMES[1].expand(2)
    with torch.no_grad():
        assert distance(model.denoise(x, t, bare), model.denoise(x, t, even)) < 1e-6


# ---- approximations --------------------------------------------------------------------------------------------------


def test_reuse_computes_the_middle_blocks_only_every_so_often(model, uncompiled):
    """Without blocks in the middle it is exact; with them a step on its own is, and the next ones are near."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = stacked(model, (20, 9), (8, 8), EVERY)
    denoise = FastDenoiser(model.transformer, model.timestep_dtype).start(condition, EVERY, TIMES, reuse=2)
    for t in TIMES:
        assert distance(denoise(x, t), plain(model, condition, EVERY, x, t)) < 1e-5
    deep = golden_model()
    block = deep.transformer.transformer_blocks[0]
    deep.transformer.transformer_blocks.extend([copy.deepcopy(block) for _ in range(2)])
    denoise = FastDenoiser(deep.transformer, deep.timestep_dtype).start(condition, EVERY, TIMES, reuse=2)
    errors = [distance(denoise(x, t), plain(deep, condition, EVERY, x, t)) for t in TIMES]
    assert errors[0] < 1e-5 and errors[1] > 1e-4 and errors[2] < 1e-5
    denoise = FastDenoiser(deep.transformer, deep.timestep_dtype).start(condition, EVERY, TIMES, reuse=2)
    once, again = denoise(x, TIMES[0]), denoise(x, TIMES[0])  # the change of the first full step is held, and right
    assert distance(again, once) < 1e-6
    denoise.step.inputs.change_2MC.fill_(float("nan"))  # of an earlier run that went wrong
    denoise = denoise.denoiser.start(condition, EVERY, TIMES, reuse=2)
    assert torch.equal(denoise(x, TIMES[0]), once) and torch.equal(denoise(x, TIMES[0]), again)


def test_a_reused_change_goes_on_as_between_the_last_two(model, uncompiled):
    deep = golden_model()
    deep.transformer.transformer_blocks.extend([copy.deepcopy(deep.transformer.transformer_blocks[0])] * 2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    fast = FastDenoiser(deep.transformer, deep.timestep_dtype)
    denoise = fast.start(stacked(model, (20, 9), (8, 8), EVERY), EVERY, TIMES, reuse=3)
    inputs, aheads = denoise.step.inputs, []
    for t in (TIMES[0], *[TIMES[1]] * 3, *[TIMES[2]] * 2):
        got = denoise(x, t)
        aheads.append(inputs.extrapolation.item())
    assert aheads == [0, 0, 0, 0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    last, earlier = inputs.change_2MC.clone()
    assert distance(last, earlier) > 1e-4
    inputs.change_2MC[0], inputs.extrapolation[0] = last + 2 / 3 * (last - earlier), 0
    assert distance(got, fast.forward(inputs, EVERY, skip_middle=True)) < 1e-6


SCHEDULERS = (
    "CMStochasticIterative", "CogVideoXDDIM", "DDIMInverse", "DDIMParallel", "DDIM", "DDPMParallel", "DDPM",
    "DEISMultistep", "DPMSolverMultistepInverse", "DPMSolverMultistep", "DPMSolverSinglestep",
    "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "IPNDM",
    "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
)  # fmt: skip


@pytest.fixture(scope="module")
def both(folder):
    return load(folder), load(folder, compile=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_any_scheduler_compiled_is_plain_and_times_are_set_once(both, photos, uncompiled, name, monkeypatch):
    """Schedulers with a memory are destroyed by `set_timesteps` while they sample."""
    made, events = [], []
    for pipe in both:
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        for method in ("set_timesteps", "step"):
            plain = getattr(scheduler, method)
            noted = wraps(plain)(partial(_noted, events, method, plain))  # the pipeline asks for its arguments
            monkeypatch.setattr(scheduler, method, noted)
        how = dict(num_inference_steps=4, output_type="latent", guidance_scale=4.0)
        made.append(pipe("a<imagehere>", photos[:1], **how).images)
        first = events.index("step")
        assert "set_timesteps" not in events[first:] and len(events) - first >= 4
        events.clear()
    assert made[0].isfinite().all() and distance(made[1], made[0]) < 1e-4


def _noted(events, name, method, *args, **kwargs):
    events.append(name)
    return method(*args, **kwargs)


def test_reuse_needs_the_fast_denoiser(folder):
    with pytest.raises(ValueError, match="reuse must be 1, or more with compile=True, got 2"):
        load(folder)("a cat", num_inference_steps=1, reuse=2)
