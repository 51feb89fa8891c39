"""Adapters of every part: trained, resumed, continued, and in the hands of the pipeline, plain PEFT and diffusers."""

import json

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import build

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import check_lora, merge_lora
from mige.inference.pipeline import MIGEPipeline
from mige.training.adapters import TARGETS, parts_of
from mige.training.errors import TrainingError
from mige.training.flops import useful_flops
from mige.utils.settings import ConfigError

EVERY = ("train.trainable=lora", "train.lora_rank=2", "train.lora_alpha=3", f"train.lora_targets={list(TARGETS)}",
         "train.learning_rate=0.05", "train.warmup=0", "train.sample_every=0", "train.max_grad_norm=100")  # fmt: skip
PARTS = {"transformer", "text_encoder", "qformer", "fusion"}


@pytest.fixture(scope="module")
def trained(lively, tmp_path_factory):
    """A trainer after two steps, adapters on all parts, and the folder they are in."""
    run = tmp_path_factory.mktemp("adapters") / "run"
    trainer = build(lively, run, *EVERY, "train.steps=2", "train.checkpoint_every=1")
    trainer.run()
    return trainer, run / "checkpoints" / "step-00000002" / "lora"


def call(pipe):
    cat = torch.linspace(0, 1, 3 * 128 * 128).view(3, 128, 128)
    return pipe("make<imagehere>red", source=cat, num_inference_steps=2, output_type="latent", seed=1).images


def load(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


def test_every_target_learns_and_nothing_else(trained, lively):
    trainer, folder = trained
    files = {path.parent.name: load_file(path) for path in folder.rglob("adapter_model.safetensors")}
    assert files.keys() == PARTS - {"transformer"} | {"lora"}
    for state in files.values():
        assert all(value.any() for name, value in state.items() if "lora_B" in name)
    start = load(lively).model.state_dict()
    now = {name.replace(".base_layer", ""): value for name, value in trainer.plain.state_dict().items()}
    assert all(torch.equal(start[name], now[name]) for name in start)
    assert {name for name in now if "lora_" not in name} == start.keys()


def test_the_pipeline_computes_what_was_trained(trained, lively, tmp_path):
    """All parts together and each way round: loaded, scaled, fused, saved in diffusers' layout, unloaded to the bit."""
    trainer, folder = trained
    pipe = load(lively)
    check_lora(lively, folder)
    before, want = call(pipe), call(MIGEPipeline(**(pipe.components | {
        name: part.eval() for name, part in parts_of(trainer.plain).items()})))  # fmt: skip
    pipe.load_lora_weights(folder, "a")
    assert pipe.get_list_adapters() == {part: ["a"] for part in pipe.get_list_adapters()}
    assert pipe.get_list_adapters().keys() == PARTS
    torch.testing.assert_close(call(pipe), want, atol=1e-3, rtol=1e-3)
    assert (want - before).norm() > 0.01 * before.norm()
    pipe.save_lora_weights(tmp_path / "saved")
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe), before)
    pipe.load_lora_weights(tmp_path / "saved", "b")
    torch.testing.assert_close(call(pipe), want, atol=1e-3, rtol=1e-3)
    pipe.set_adapters("b", 0.0)
    assert torch.equal(call(pipe), before)
    state = load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    assert {key.partition(".")[0] for key in state} == PARTS
    with pytest.raises(CheckpointError, match="has adapters of fusion, qformer, text_encoder too"):
        merge_lora(pipe.transformer, folder)


@pytest.mark.processes  # the compiler's
def test_compiled_the_encoder_s_adapters_are_exchanged_too(trained, lively):
    plain, pipe = load(lively), load(lively)
    pipe.compile()
    call(pipe)
    built = pipe._fast
    for one in (plain, pipe):
        one.load_lora_weights(trained[1])
    assert pipe._fast is built
    torch.testing.assert_close(call(pipe), call(plain), atol=1e-3, rtol=1e-3)


def test_plain_peft_and_diffusers_read_what_training_writes(trained, lively, tmp_path):
    """Each loads the DiT's from the trained folder, and diffusers from the saved file too, but for other parts."""
    trainer, folder = trained
    x, t = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    context = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(1))

    def ask(model):
        with torch.no_grad():
            return model.eval()(x, encoder_hidden_states=context, timestep=t, return_dict=False)[0]

    want, plain = ask(trainer.plain.transformer), ask(load(lively).transformer)
    assert (want - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(ask(PeftModel.from_pretrained(load(lively).transformer, folder)), want)
    text = PeftModel.from_pretrained(load(lively).text_encoder, folder / "text_encoder")
    own = parts_of(trainer.plain)["text_encoder"].eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(input_ids=ids).last_hidden_state, own(input_ids=ids).last_hidden_state)
    pipe = load(lively)
    pipe.load_lora_weights(folder)
    pipe.save_lora_weights(tmp_path)
    for where, name, prefix in ((folder, "adapter_model.safetensors", "base_model.model"),
                                (tmp_path, "pytorch_lora_weights.safetensors", "transformer")):  # fmt: skip
        transformer = load(lively).transformer  # diffusers' own loader is a part of other models' classes
        transformer.__class__ = type("WithAdapters", (PeftAdapterMixin, type(transformer)), {})
        transformer.load_lora_adapter(where, weight_name=name, prefix=prefix, adapter_name="a")
        torch.testing.assert_close(ask(transformer), want, atol=1e-4, rtol=1e-4)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["base_model.model.r"], told["base_model.model.lora_alpha"]) == (2, 3)


def test_training_goes_on_from_adapters(trained, lively, tmp_path):
    """From both layouts: the first step's start is what the file holds; others than the run's are refused."""
    trainer, folder = trained
    pipe = load(lively)
    pipe.load_lora_weights(folder)
    pipe.save_lora_weights(tmp_path / "saved")
    for number, path in enumerate((folder, tmp_path / "saved")):
        again = build(lively, tmp_path / f"run{number}", *EVERY, "train.steps=1", f"train.lora={path}")
        want = {name: p for name, p in trainer.plain.named_parameters() if "lora_" in name}
        got = {name: p for name, p in again.plain.named_parameters() if p.requires_grad}
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for change, said in (("train.lora_rank=4", "set train.lora_rank=2 train.lora_alpha=3"),
                         ("train.lora_alpha=2", "set train.lora_rank=2 train.lora_alpha=3"),
                         ("train.lora_targets=['t5']", "has adapters in the file alone")):  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            build(lively, tmp_path / "no", *EVERY, change, f"train.lora={folder}")
    with pytest.raises(CheckpointError, match="no such folder"):
        build(lively, tmp_path / "no", *EVERY, f"train.lora={tmp_path / 'nowhere'}")


def test_what_adapters_have_must_stay_on_resume(trained, lively):
    run = trained[1].parents[2]
    for change, said in (("train.lora_alpha=2", "lora_alpha: 3.0 there, None now"),
                         ("train.lora_targets=['t5']", r"lora_targets: .*'t5'\] there, \['t5'\] now")):  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            build(lively, run, *EVERY, "train.steps=3", change).run()


@pytest.mark.parametrize(
    "changes, said",
    [
        (("train.lora_targets=['vae']",), "train.lora_targets is 'vae', expected one of dit_attention"),
        (("train.lora_targets=[]",), "train.lora_targets is empty"),
        (("train.lora_alpha=0",), "train.lora_alpha"),
        (("train.trainable=full", "train.lora=x"), "train.lora=x needs train.trainable='lora'"),
    ],
)
def test_settings_that_are_refused(lively, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        build(lively, tmp_path, *EVERY, *changes)


@pytest.mark.parametrize(
    "adapted, flops",  # 1 + 10 + 100 + 1000 + 10000, twice each where gradients pass through
    [({"transformer"}, 21111), ({"text_encoder"}, 22111), ({"fusion", "transformer"}, 22211), ({"qformer"}, 22221)],
)
def test_gradients_pass_from_the_dit_down_to_the_first_adapters(adapted, flops):
    forward = {"image_encoder": 1, "qformer": 10, "fusion": 100, "text_encoder": 1000, "transformer": 10000}
    assert useful_flops(forward, "lora", adapted) == flops
