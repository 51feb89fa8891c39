"""The nodes of tools/comfyui without ComfyUI: small stand-ins for its modules, and its contract on the tiny model."""

import importlib.util
import json
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

PACK = ROOT / "tools" / "comfyui"


class Interrupted(Exception):  # noqa: N818 - as ComfyUI's InterruptProcessingException, which is none either
    pass


class ComfyUI:
    """What the nodes use of ComfyUI: it takes progress and previews, and can be interrupted."""

    def __init__(self, models_dir):
        self.progress, self.interrupt_at, self.unloaded = [], None, 0
        folders = {}

        def check():
            if self.interrupt_at is not None and len(self.progress) >= self.interrupt_at:
                raise Interrupted

        def unload():
            self.unloaded += 1

        class ProgressBar:
            def __init__(bar, total):  # noqa: N805
                bar.total = total

            def update_absolute(bar, value, total=None, preview=None):  # noqa: N805
                assert not torch.is_inference_mode_enabled()  # ComfyUI's; the pipeline is tested without it
                self.progress.append((value, total, preview))

        self.modules = {
            "comfy": types.SimpleNamespace(),
            "comfy.model_management": types.SimpleNamespace(
                throw_exception_if_processing_interrupted=check,
                get_torch_device=lambda: torch.device("cpu"),
                unload_all_models=unload,
            ),
            "comfy.utils": types.SimpleNamespace(ProgressBar=ProgressBar),
            "folder_paths": types.SimpleNamespace(
                models_dir=str(models_dir),
                add_model_folder_path=lambda kind, folder: folders.setdefault(kind, []).append(folder),
                get_folder_paths=lambda kind: folders[kind],
            ),
        }
        self.modules["comfy"].model_management = self.modules["comfy.model_management"]
        self.modules["comfy"].utils = self.modules["comfy.utils"]


@pytest.fixture
def comfyui(lively, tmp_path, monkeypatch):
    (tmp_path / "mige").mkdir()
    (tmp_path / "mige" / "tiny").symlink_to(lively)
    stand_in = ComfyUI(tmp_path)
    for name, module in stand_in.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


@pytest.fixture
def pack(comfyui, monkeypatch):
    """The nodes by name, imported as ComfyUI does it: under the path of the link."""
    name = f"{comfyui.modules['folder_paths'].models_dir}/custom_nodes/mige"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for key in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[key]


def call(pack, node, /, **given):
    """A node's function, as ComfyUI calls it: with what was given, else the defaults that it states."""
    kind = pack.NODE_CLASS_MAPPINGS[node]
    inputs = kind.INPUT_TYPES()
    stated = inputs["required"] | {k: v for k, v in inputs.get("optional", {}).items() if k in given or len(v) > 1}
    own = {k: v[0][0] if isinstance(v[0], list) else v[1].get("default") for k, v in stated.items()
           if (isinstance(v[0], list) and v[0]) or (len(v) > 1 and "default" in v[1])}  # fmt: skip
    with torch.inference_mode():  # as ComfyUI does
        return getattr(kind(), kind.FUNCTION)(**(own | given))


@pytest.fixture
def load(pack):
    return lambda **given: call(pack, "MIGELoadModel", **({"name": "tiny"} | given))[0]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def edit(pack, text="make it red", **given):
    return call(pack, "MIGEInstruction", text=text, task="edit", **given)[0]


def sample(pack, model, instruction, **given):
    return call(pack, "MIGESample", model=model, instruction=instruction, **({"steps": 2} | given))[0]


def test_an_edit_has_the_form_of_comfyuis_images(pack, load, comfyui):
    source = noise(1, 128, 128, 3)
    model, wanted = load(), edit(pack, image_1=source)
    assert not comfyui.unloaded  # nothing is loaded before an image is made
    made = sample(pack, model, wanted, previews=4, steps=4)
    assert comfyui.unloaded == 1
    assert made.shape == (1, 128, 128, 3) and made.dtype == torch.float32 and made.device.type == "cpu"
    assert made.min() >= 0 and made.max() <= 1 and (made - source).abs().mean() > 0.01
    assert [(value, total) for value, total, _ in comfyui.progress] == [(n, 4) for n in (1, 2, 3, 4)]
    kinds = [preview and (preview[0], preview[1].size) for *_, preview in comfyui.progress]
    assert kinds == [("JPEG", (128, 128))] * 3 + [None]
    assert torch.equal(sample(pack, model, wanted, steps=4, previews=0), made)
    assert not torch.equal(sample(pack, model, wanted, steps=4, seed=1), made)
    assert comfyui.unloaded == 1 and all(preview is None for *_, preview in comfyui.progress[4:8])


def test_what_is_made_is_what_the_pipeline_makes(pack, load):
    """The same image as the call in docs/inference.md: sources, order of references, settings."""
    model, images = load(), [noise(1, 128, 128, 3, seed=n) for n in (1, 2)]
    wanted = edit(pack, "put image 2 into image 1", image_1=images[0], image_2=images[1], negative="a red sky")
    got = sample(pack, model, wanted, steps=2, guidance=3.0, source_guidance=1.5, seed=7)
    first, second = (Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)) for image in images)
    how = dict(
        num_inference_steps=2, guidance_scale=3.0, source_guidance_scale=1.5, negative_prompt="a red sky", seed=7
    )
    want = model.pipeline()("put<imagehere>into<imagehere>", [second, first], source=first, **how).images[0]
    assert np.array_equal((got[0].numpy() * 255).round(), np.asarray(want))


def test_a_miniature_model_has_its_benchs_settings(pack, load, comfyui):
    model, wanted = load(), edit(pack, image_1=noise(1, 64, 64, 3))
    made = sample(pack, model, wanted, steps=0, size="32x32")
    assert len(comfyui.progress) == comfyui.progress[-1][1] == 20
    assert torch.equal(sample(pack, model, wanted, steps=20, guidance=2.0, source_guidance=1.0, size="32x32"), made)


def test_comfyuis_image_files_get_every_level_back(pack):
    """ComfyUI cuts 255 x off, and does not round it: no level may become the one below."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, -1))
    nodes = sys.modules[f"{pack.__name__}.images"]
    got = nodes.to_tensor([image])
    assert np.array_equal((255.0 * got[0].numpy()).clip(0, 255).astype(np.uint8), np.asarray(image))
    assert np.array_equal(np.asarray(nodes.to_images("image_1", got)[0]), np.asarray(image))


def test_batches(pack, load):
    """B images and N each: B N results, image by image; an input of one image is for all."""
    model, several, one = load(), noise(2, 64, 64, 3), noise(1, 64, 64, 3, seed=5)
    wanted = edit(pack, "put image 2 into image 1", image_1=several, image_2=one)
    made = sample(pack, model, wanted, batch_size=2, size="64x64")
    assert made.shape == (4, 64, 64, 3)
    second = edit(pack, "put image 2 into image 1", image_1=several[1:], image_2=one)
    alone = sample(pack, model, second, batch_size=2, size="64x64")
    assert (made[2:] - alone).abs().max() <= 2 / 255 and (made[0] - made[1]).abs().mean() > 0.01


@pytest.mark.parametrize(("size", "shape"), [("source", (96, 176)), ("native", (128, 128)), ("64x96", (96, 64)),
                                             ("1:1", (128, 128))])  # fmt: skip
def test_sizes(pack, load, size, shape):
    made = sample(pack, load(), edit(pack, image_1=noise(1, 48, 88, 3)), size=size, steps=1)
    assert made.shape[1:3] == shape


def test_subjects_are_generated_and_need_no_image(pack, load):
    model, subject = load(), noise(1, 40, 60, 3)
    wanted = call(pack, "MIGEInstruction", text="a<imagehere>on grass", task="generate", image_1=subject)[0]
    assert wanted.sources is None and sample(pack, model, wanted).shape == (1, 128, 128, 3)
    words = call(pack, "MIGEInstruction", text="grass", task="generate")[0]
    assert sample(pack, model, words, size="64x64").shape == (1, 64, 64, 3)


def test_a_mask_keeps_what_is_black(pack, load):
    model, source = load(), (noise(1, 128, 128, 3) * 255).round() / 255
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 48:80] = 1
    wanted = edit(pack, image_1=source)
    made = sample(pack, model, wanted, mask=mask)
    changed = (made != source).any(-1)
    assert not changed[mask == 0].any() and changed[mask == 1].float().mean() > 0.5
    assert torch.equal(sample(pack, model, wanted, mask=mask[0]), made)  # [H, W], as some nodes have it


def test_paste_back_has_the_sources_own_size(pack, load):
    made = sample(pack, load(), edit(pack, image_1=noise(1, 70, 90, 3)), paste_back=True, size="64x64", steps=1)
    assert made.shape == (1, 70, 90, 3)


def test_an_interruption_stops_at_the_next_step(pack, load, comfyui):
    model, wanted = load(), edit(pack, image_1=noise(1, 64, 64, 3))
    comfyui.interrupt_at = 3
    with pytest.raises(Interrupted):
        sample(pack, model, wanted, steps=9)
    assert len(comfyui.progress) == 3
    comfyui.interrupt_at = 0
    with pytest.raises(Interrupted):
        sample(pack, load(), wanted)
    assert comfyui.unloaded == 1  # the second was not even loaded
    comfyui.interrupt_at = None
    assert sample(pack, model, wanted).shape == (1, 128, 128, 3)


@pytest.fixture
def adapter(lively, comfyui, tmp_path):
    """Adapters of the DiT, in models/mige under the name "strong"."""
    from safetensors.torch import save_file

    from mige import MIGEPipeline

    layer = MIGEPipeline.from_pretrained(lively).transformer.proj_out
    state = {"transformer.proj_out.lora_A.weight": noise(2, layer.in_features),
             "transformer.proj_out.lora_B.weight": noise(layer.out_features, 2, seed=1)}  # fmt: skip
    (tmp_path / "mige" / "strong").mkdir()
    save_file(state, tmp_path / "mige" / "strong" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("mode", [{}, {"offload": True, "t5_bits": "8"}], ids=["plain", "small"])
def test_adapters_belong_to_the_models_behind_their_node(pack, load, adapter, mode, comfyui):
    model, wanted = load(**mode), edit(pack, image_1=noise(1, 64, 64, 3))
    assert {"strong", "mige-mini-turbo"} <= set(pack.NODE_CLASS_MAPPINGS["MIGEAddAdapter"].INPUT_TYPES()
                                                ["required"]["name"][0])  # fmt: skip
    plain = sample(pack, model, wanted)
    adapted = [call(pack, "MIGEAddAdapter", model=model, name="strong", scale=scale)[0] for scale in (1.0, 0.5, 0.0)]
    made = [sample(pack, one, wanted) for one in adapted]
    assert (made[0] - plain).abs().mean() > 0.01 and (made[0] - made[1]).abs().mean() > 0.001
    assert torch.equal(made[2], plain) and torch.equal(sample(pack, model, wanted), plain)
    [twice] = call(pack, "MIGEAddAdapter", model=adapted[1], name="strong", scale=0.5)
    assert (sample(pack, twice, wanted) - made[0]).abs().max() <= 2 / 255  # one with 1 is two with a half each
    assert comfyui.unloaded == (6 if mode else 1)  # loaded anew only where adapters cannot be exchanged


def test_memory_goes_with_the_model(pack, load):
    model = load()
    sample(pack, model, edit(pack, image_1=noise(1, 64, 64, 3)), steps=1)
    gone = weakref.ref(model.pipeline().transformer)
    del model
    import gc

    gc.collect()
    assert gone() is None


def test_modes_reach_the_pipeline(pack, load):
    pipeline = load(dtype="bfloat16", vae_dtype="bfloat16", t5_bits="4", compile=True, vae_tiling=True).pipeline()
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
    assert pipeline.is_compiled and pipeline.vae.use_tiling and load().pipeline().transformer.dtype == torch.float32


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../tiny", "/etc", "", "mige-mini-turbo", "mini2-vae"])
def test_names_are_those_on_offer_and_no_paths(pack, load, name):
    offered = pack.NODE_CLASS_MAPPINGS["MIGELoadModel"].INPUT_TYPES()["required"]["name"][0]
    assert {"tiny", "mige-mini"} <= set(offered) and name not in offered
    with pytest.raises(ValueError, match=r"there is no model .*there are: .*mige-mini, tiny"):
        load(name=name)
    with pytest.raises(ValueError, match="there is no adapter"):
        call(pack, "MIGEAddAdapter", model=load(), name="../tiny")


def test_of_two_of_one_name_comfyuis_own_counts(pack, lively, tmp_path):
    (tmp_path / "mige" / "mige-mini").symlink_to(lively)
    model = call(pack, "MIGELoadModel", name="mige-mini")[0]
    assert model.weights.folder == tmp_path / "mige" / "mige-mini"


def test_a_damaged_model_is_refused_where_it_is_loaded(pack, load, comfyui, tmp_path):
    (tmp_path / "mige" / "broken").mkdir()
    (tmp_path / "mige" / "broken" / "model_index.json").write_text("{}")
    with pytest.raises(Exception, match="broken"):
        load(name="broken")


ONE = torch.full((1, 64, 64, 3), 0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to edit"),
        ({"image_2": ONE}, "image_2 is there, but the input before it is empty"),
        ({"image_1": ONE, "text": "  "}, "prompt is empty"),
        ({"image_1": ONE, "image_2": ONE, "text": "swap<imagehere>"}, "1 times <imagehere> for 2 images"),
        ({"image_1": ONE, "image_2": ONE, "text": "swap image 3"}, "names image 3, but 2 came"),
        ({"image_1": ONE[0]}, r"image_1 is a tensor \[64, 64, 3\]"),
        ({"image_1": ONE.movedim(3, 1)}, "image_1 has 64 channels"),
        ({"image_1": (ONE * 255).to(torch.uint8)}, "torch.uint8, expected floats"),
        ({"image_1": ONE.log() * torch.inf}, "image_1 holds values that are not finite"),
        ({"image_1": ONE.numpy()}, "image_1 is ndarray"),
        ({"image_1": ONE.repeat(3, 1, 1, 1), "image_2": ONE.repeat(2, 1, 1, 1), "text": "<imagehere><imagehere>"},
         "image_2 has 2 images, another input 3"),
    ],
)  # fmt: skip
def test_instructions_that_cannot_be_read(pack, given, said):
    with pytest.raises(ValueError, match=said):
        edit(pack, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask": torch.zeros(1, 64, 64)}, "mask is black"),
        ({"mask": torch.ones(1, 32, 64)}, "its source has 64 x 64 px"),
        ({"mask": torch.ones(1, 64, 64, 1)}, r"mask is a tensor \[1, 64, 64, 1\]"),
        ({"size": "large"}, "size is 'large'"),
        ({"size": "65x64"}, "65"),
    ],
)
def test_samples_that_cannot_be_made(pack, load, comfyui, given, said):
    with pytest.raises(ValueError, match=said):
        sample(pack, load(), edit(pack, image_1=ONE), **given)
    assert not comfyui.progress


def test_overshooting_images_are_clipped(pack):
    [image] = edit(pack, image_1=torch.tensor([[[[-0.2, 0.5, 1.3]]]])).sources
    assert image.getpixel((0, 0)) == (0, 128, 255)


# ---- the examples ----------------------------------------------------------------------------------------------------


def test_the_examples_fit_the_nodes(pack):
    """Both forms of the example name nodes, inputs and values that there are, and mean the same."""
    graph = json.loads((PACK / "mini_api.json").read_text())
    page = json.loads((PACK / "example_workflows" / "mini.json").read_text())
    assert {str(one["id"]): one["type"] for one in page["nodes"]} == {k: v["class_type"] for k, v in graph.items()}
    for key, node in graph.items():
        if kind := pack.NODE_CLASS_MAPPINGS.get(node["class_type"]):
            inputs = kind.INPUT_TYPES()
            every = inputs["required"] | inputs.get("optional", {})
            assert inputs["required"].keys() <= node["inputs"].keys() <= every.keys()
            chosen = {k: v for k, v in node["inputs"].items() if isinstance(every[k][0], list)}
            assert all(value in every[k][0] for k, value in chosen.items())
            [drawn] = [one for one in page["nodes"] if str(one["id"]) == key]
            shown = [value for value in drawn.get("widgets_values", []) if value not in ("fixed", "randomize")]
            assert shown == [v for k, v in node["inputs"].items() if not isinstance(v, list)]
