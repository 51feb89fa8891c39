"""The compiled ends of a call: encoders replayed for shapes met before, the VAE, what makes recordings stale.

Without a GPU a recording here is the plain function over the recording's own inputs, which is what a graph computes.
"""

from pathlib import Path

import pytest
import torch

from mige.inference import compiled
from mige.inference.compiled import MAX_RECORDED, Recording, Replayed
from mige.inference.pipeline import MIGEPipeline
from mige.utils import images

PHOTOS = Path(__file__).parents[2] / "example_data" / "images"


@pytest.fixture(scope="module")
def photos():
    return [images.open_image(PHOTOS / f"{name}.jpg") for name in ("cat", "coffee", "cup_on_black")]


@pytest.fixture
def recorded(monkeypatch):
    """The inputs of every recording made; recordings compute plainly, and nothing goes through the compiler."""
    made, nested = [], []

    def record(function, inputs, pool):
        assert not nested, "recorded while another is recorded, which CUDA refuses"
        own = tuple(value.clone() for value in inputs)
        made.append(own)
        nested.append(True)
        output = function(*own)
        nested.clear()

        def replay():
            return output.copy_(function(*own))

        return Recording(own, replay)

    monkeypatch.setattr(compiled, "record", record)
    monkeypatch.setattr(compiled, "_has_graphs", lambda device: True)
    with torch.compiler.set_stance("force_eager"):
        yield made


def load(folder, **options) -> MIGEPipeline:
    pipe = MIGEPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def test_a_shape_met_again_is_recorded_and_outputs_are_the_caller_s(recorded):
    double = Replayed(lambda x, y: 2 * x + y, None)
    x = torch.arange(3.0)
    first, again = double(x, x), double(x + 1, x)
    assert len(recorded) == 1 and first.tolist() == [0, 3, 6] and again.tolist() == [2, 5, 8]
    third = double(torch.full((3,), 5.0), x)
    assert third.tolist() == [10, 11, 12] and again.tolist() == [2, 5, 8] and len(recorded) == 1
    double(x[:2], x[:2])
    double(x.double(), x.double())
    assert len(recorded) == 1  # another shape, another dtype: each met once
    double(x[:2], x[:2])
    assert len(recorded) == 2
    with torch.autocast("cpu", torch.bfloat16):
        double(x, x)
        double(x, x)
    assert len(recorded) == 3


def test_the_latest_recordings_are_kept(recorded):
    same = Replayed(lambda x: x + 0, None)
    for size in range(1, MAX_RECORDED + 1):
        for _ in range(2):
            same(torch.ones(size))
    same(torch.ones(1))
    same(torch.ones(MAX_RECORDED + 1))  # drops the one of two, the longest unused
    assert len(recorded) == MAX_RECORDED == len(same.recordings)
    same(torch.ones(1))
    assert len(recorded) == MAX_RECORDED
    assert same(torch.ones(2)).tolist() == [1, 1] and len(recorded) == MAX_RECORDED


def test_a_compiled_pipeline_makes_the_same_images(lively, photos, recorded):
    """Batches of other sizes, prompts of other lengths, references or none, each met several times."""
    cat, coffee, cup = photos
    calls = [
        (["make it red", "turn the cat in this photo into a dog with a hat and red shoes"], None, [cat, coffee]),
        (["make the sky night"], None, [cup]),
        (["a<imagehere>", "a<imagehere>and a<imagehere>at night"], [[cat], [cup, coffee]], None),
        (["a cat on a table"], None, None),
        (["add<imagehere>to<imagehere>"], [[cup, cat]], [cat]),
    ]
    pipe, fast = load(lively), load(lively, compile=True)
    for seed in range(3):
        for prompts, references, sources in calls:
            how = dict(num_inference_steps=2, output_type="latent", seed=seed)
            want = pipe(prompts, references, sources, **how).images
            assert distance(fast(prompts, references, sources, **how).images, want) < 1e-5
    widths = {inputs[0].shape[1] for inputs in recorded if inputs[0].ndim == 3}
    assert all(width % compiled.WIDTH == 0 for width in widths)
    assert len(recorded) <= 2 * len(calls) - 1  # one for each shape, and none for images that are not there


def test_weights_that_change_their_place_are_noticed(lively, photos, recorded):
    """New weights in every part, then T5 in 8 bits."""
    how = dict(num_inference_steps=2, output_type="latent")
    pipe, fast = load(lively), load(lively, compile=True)

    def made(one):
        return one("make it red", None, photos[0], **how).images

    before = [made(fast) for _ in range(3)][-1]
    first = fast._replayed
    for one in (pipe, fast):
        for part in (one.image_encoder, one.qformer, one.fusion, one.text_encoder, one.transformer):
            part.load_state_dict({key: 0.9 * value for key, value in part.state_dict().items()}, assign=True)
    assert distance(made(pipe), before) > 1e-3
    for _ in range(3):
        assert distance(made(fast), made(pipe)) < 1e-5
    second = fast._replayed
    for one in (pipe, fast):
        one.quantise_text_encoder(8)
    for _ in range(3):
        assert distance(made(fast), made(pipe)) < 1e-5
    assert (
        len({id(encoder) for encoder in (first, second, fast._replayed)}) == 3
    )  # a graph reads weights where they were


def test_off_loaded_encoders_are_not_recorded(lively, photos, recorded, monkeypatch):
    monkeypatch.setattr(compiled, "_has_graphs", lambda device: device.type == "meta")
    fast = load(lively, compile=True)
    for part in (fast.image_encoder, fast.qformer, fast.fusion):
        part.to("meta")  # where there are graphs; T5 is elsewhere
    assert type(fast._compile_ends(fast.model).encoder) is type(fast.model.encoder)


@pytest.mark.parametrize("change", [lambda pipe: None, lambda pipe: pipe.compile()])
def test_off_a_gpu_the_encoders_and_the_vae_are_the_plain_ones(lively, change):
    pipe = load(lively)
    change(pipe)
    pipe.vae_to_bfloat16()
    model = pipe._compile_ends(pipe.model)
    assert type(model.encoder) is type(pipe.model.encoder) and model.encoder.pad_to == 1
    assert pipe._compiled_vae is None and pipe.vae.encoder._compiled_call_impl is None


@pytest.mark.gpu
@pytest.mark.processes  # the compiler's own
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_latents_are_within_rounding(lively, photos, dtype):
    """Real graphs and a compiled VAE; weights that went to the CPU and came back; bits of images made floats there."""
    pipe, fast = load(lively, dtype=dtype).to("cuda"), load(lively, dtype=dtype, compile=True).to("cuda")
    bound = 1e-4 if dtype is torch.float32 else 5e-2  # 3e-2 on an H100: weights are drawn large
    for number in range(5):
        if number == 3:  # each shape is met twice after it
            fast.to("cpu").to("cuda")
        for batch in (1, 3, 1):
            args = (
                ["make it red", "make the sky in this photo as dark as night", "add a cup"][:batch],
                None,
                photos[:batch],
            )
            want, got = (
                one(*args, num_inference_steps=2, output_type="latent", size="native").images for one in (pipe, fast)
            )
            assert distance(got, want) < bound
    assert all(recording is not None for recording in fast._replayed._text.recordings.values())
    fast.vae_to_bfloat16()
    args = "make it red", None, photos[0]
    want, got = (one(*args, num_inference_steps=2, output_type="latent", size="native").images for one in (pipe, fast))
    assert distance(got, want) < 5e-2 and fast._compiled_vae is fast.vae
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    for convert in (images.pixels_of, images.vision_pixels_of):
        assert torch.equal(convert(levels.cuda()).cpu(), convert(levels))
