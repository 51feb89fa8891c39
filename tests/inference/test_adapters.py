"""Adapters on a pipeline, with the names of diffusers' LoRA loaders; their files in PEFT's and diffusers' hands."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, run_here
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import fingerprint, merge_lora
from mige.cli import command, infer
from mige.diffusion.few_step import FewStepSolver
from mige.inference.adapters import Adapters, add_adapters
from mige.inference.pipeline import MIGEPipeline

LATENT = {"num_inference_steps": 2, "output_type": "latent"}
FILE = "pytorch_lora_weights.safetensors"


def load(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def plain(lively):
    """A pipeline that stays as it is."""
    return load(lively)


@pytest.fixture
def pipe(lively):
    return load(lively)


def adapters(model, folder, seed, targets=("to_q", "to_k", "to_v", "to_out.0"), rank=4, alpha=4):
    """A folder that plain PEFT has written, of adapters that change something."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    made, random = get_peft_model(model, config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) / 6)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def a(lively, tmp_path_factory):
    return adapters(load(lively).transformer, tmp_path_factory.mktemp("lora") / "a", 1)


@pytest.fixture(scope="module")
def b(lively, a):
    """Other layers, rank and alpha."""
    return adapters(load(lively).transformer, a.parent / "b", 2, ("to_v", "ff.net.2"), rank=2, alpha=6)


def weights(pipe):
    return {name: value.clone() for name, value in pipe.transformer.named_parameters()}


def changes(pipe, plain):
    """What each parameter gained, those that gained nothing left out."""
    before = weights(plain)
    gained = {name: value - before[name] for name, value in weights(pipe).items()}
    return {name: value for name, value in gained.items() if value.any()}


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4)


def together(*parts):
    """The sum of changes, each with its factor."""
    names = {name for gained, _ in parts for name in gained}
    return {name: sum(factor * gained[name] for gained, factor in parts if name in gained) for name in names}


def test_loading_is_merging_and_unloading_gives_back_every_bit(pipe, plain, a):
    before = weights(pipe)
    pipe.load_lora_weights(a)
    want = merge_lora(load(plain.config._name_or_path).transformer, a)
    assert all(torch.equal(x, y) for x, y in zip(pipe.transformer.parameters(), want.parameters(), strict=True))
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    assert all(torch.equal(before[name], value) for name, value in weights(pipe).items())
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []


def test_several_adapters_with_scales(pipe, plain, a, b):
    pipe.load_lora_weights(a, adapter_name="a")
    of_a = changes(pipe, plain)
    pipe.load_lora_weights(b, adapter_name="b")
    of_b = changes(pipe, plain)
    assert pipe.get_active_adapters() == ["b"] and pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    assert of_a.keys() - of_b.keys() and of_b.keys() - of_a.keys() and of_a.keys() & of_b.keys()
    pipe.set_adapters(["a", "b"], [0.5, -2.0])
    close(changes(pipe, plain), together((of_a, 0.5), (of_b, -2.0)))
    pipe.set_adapters(["a", "b"])
    close(changes(pipe, plain), together((of_a, 1.0), (of_b, 1.0)))
    pipe.disable_lora()
    assert not changes(pipe, plain) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    pipe.delete_adapters("b")
    close(changes(pipe, plain), of_a)
    pipe.set_adapters("a", 0.0)
    assert not changes(pipe, plain)


def test_deleting_leaves_adapters_off_that_are_off(pipe, plain, a, b):
    pipe.load_lora_weights(a, "a")
    of_a = changes(pipe, plain)
    pipe.load_lora_weights(b, "b", beside=1.0)
    pipe.disable_lora()
    pipe.delete_adapters("b")
    assert not changes(pipe, plain) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    close(changes(pipe, plain), of_a)
    assert pipe.get_active_adapters() == ["a"]


def test_adapters_of_the_command_line_are_computed_once_each(pipe, plain, a, b, monkeypatch):
    of_a, of_b = [], []
    for path, kept in ((a, of_a), (b, of_b)):
        pipe.load_lora_weights(path)
        kept.append(changes(pipe, plain))
        pipe.unload_lora_weights()
    computed, own = [], Adapters._apply
    monkeypatch.setattr(Adapters, "_apply", lambda self: computed.append(1) or own(self))
    add_adapters(pipe, a, 0.5)
    add_adapters(pipe, b, -2.0)
    assert len(computed) == 2
    close(changes(pipe, plain), together((of_a[0], 0.5), (of_b[0], -2.0)))


def test_what_is_fused_stays(pipe, plain, a, b):
    pipe.load_lora_weights(a, "a")
    of_a = changes(pipe, plain)
    pipe.fuse_lora(lora_scale=0.5)
    close(changes(pipe, plain), together((of_a, 0.5)))
    for change in (lambda: pipe.set_adapters("a"), lambda: pipe.load_lora_weights(b), pipe.disable_lora):
        with pytest.raises(ValueError, match="adapters are fused"):
            change()
    pipe.unfuse_lora()
    pipe.set_adapters("a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    close(changes(pipe, plain), of_a)
    pipe.load_lora_weights(b)
    pipe.unload_lora_weights()
    close(changes(pipe, plain), of_a)


def test_names_and_scales_that_are_refused(pipe, a):
    with pytest.raises(ValueError, match="no adapters are loaded"):
        pipe.set_adapters("a")
    pipe.load_lora_weights(a, "a")
    for given, said in ((("b",), "'b' is not loaded; loaded are a"), ((["a"], [1.0, 2.0]), "1 adapters, 2 weights"),
                        (("a", float("nan")), "is nan, expected a number"), (("a", "1"), "is '1'")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            pipe.set_adapters(*given)
    with pytest.raises(ValueError, match="'a', which is loaded"):
        pipe.load_lora_weights(a, "a")
    with pytest.raises(CheckpointError, match="no such folder"):
        pipe.load_lora_weights(a / "nowhere")
    with pytest.raises(TypeError, match="unknown option 'weigth_name'"):
        pipe.load_lora_weights(a, weigth_name="x")
    assert pipe.get_active_adapters() == ["a"]


def test_a_state_dict_and_a_quantised_layer(pipe, plain, a, tmp_path):
    pipe.load_lora_weights(a, "a")
    pipe.save_lora_weights(tmp_path)
    want = changes(pipe, plain)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(load_file(tmp_path / FILE))
    close(changes(pipe, plain), want)
    pipe.unload_lora_weights()
    pipe.transformer.transformer_blocks[1].attn2.to_k = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match="to_k is a Sequential, quantised or off-loaded"):
        pipe.load_lora_weights(a)
    own, name = plain.transformer.get_parameter, "transformer_blocks.0.attn1.to_q.weight"
    assert pipe.get_list_adapters() == {} and torch.equal(pipe.transformer.get_parameter(name), own(name))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_saved_adapters_are_loaded_by_plain_peft_and_by_diffusers(lively, pipe, plain, a, b, tmp_path):
    pipe.load_lora_weights(a, "a")
    pipe.load_lora_weights(b, "b")
    want, state = changes(pipe, plain), None
    pipe.save_lora_weights(tmp_path / "b", "b")
    file = tmp_path / "b" / FILE
    state = load_file(file)
    assert all(key.startswith("transformer.") for key in state)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    told = json.loads(metadata["lora_adapter_metadata"])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (2, 6)
    again = load(lively)
    again.load_lora_weights(tmp_path / "b")
    close(changes(again, plain), want)

    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in told.items()})
    by_peft = get_peft_model(load(lively).transformer, config)
    found = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in state.items()}
    assert not set_peft_model_state_dict(by_peft, found).unexpected_keys
    assert isinstance(by_peft, PeftModel)
    merged = by_peft.merge_and_unload()
    close(changes(type("Pipe", (), {"transformer": merged}), plain), want)

    transformer = load(lively).transformer  # diffusers' own loader is a part of other models' classes
    cls = type("WithAdapters", (PeftAdapterMixin, type(transformer)), {})
    transformer.__class__ = cls
    transformer.load_lora_adapter(tmp_path / "b", weight_name=FILE, prefix="transformer", adapter_name="b")
    x, t = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    context = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(1))
    ask = lambda model: model(x, encoder_hidden_states=context, timestep=t, return_dict=False)[0]  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(ask(transformer), ask(again.transformer), atol=1e-4, rtol=1e-4)
        assert (ask(transformer) - ask(plain.transformer)).abs().max() > 1e-2


def test_the_base_is_told_and_compared(lively, a, pipe, tmp_path):
    """Adapters of a training run know their base; so do the files they are saved to, whatever is merged just now."""
    state = load_file(a / "adapter_model.safetensors")
    for name, base in (("own", fingerprint(pipe.transformer)), ("other", "0" * 64)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text((a / "adapter_config.json").read_text())
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt", "base": base})
    pipe.load_lora_weights(tmp_path / "own", "own")
    pipe.save_lora_weights(tmp_path / "saved")
    pipe.load_lora_weights(tmp_path / "saved", "saved")
    with pytest.raises(CheckpointError, match="trained on another base model"):
        pipe.load_lora_weights(tmp_path / "other", "other")
    assert pipe.get_active_adapters() == ["saved"]


def test_a_student_s_adapters_bring_their_sampler(pipe, a, tmp_path):
    ours = pipe.scheduler
    pipe.load_lora_weights(a, "a")
    pipe.save_lora_weights(tmp_path / "student")
    FewStepSolver(num_inference_steps=3).save_config(tmp_path / "student")
    steps = []
    pipe.load_lora_weights(tmp_path / "student", "student")
    pipe("a cat", output_type="latent", on_step=lambda step, *_: steps.append(step))
    assert isinstance(pipe.scheduler, FewStepSolver) and steps == [0, 1, 2]
    pipe.save_lora_weights(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler_config.json").is_file()
    pipe.set_adapters("a")
    assert pipe.scheduler is ours
    pipe.set_adapters("student")
    pipe.unload_lora_weights()
    assert pipe.scheduler is ours


def test_a_student_beside_another_is_refused_and_not_loaded(pipe, a, b, tmp_path):
    for number, adapter in enumerate((a, b), start=2):
        shutil.copytree(adapter, tmp_path / str(number))
        FewStepSolver(num_inference_steps=number).save_config(tmp_path / str(number))
    pipe.load_lora_weights(tmp_path / "2", "two")
    with pytest.raises(ValueError, match="two, three bring different samplers"):
        pipe.load_lora_weights(tmp_path / "3", "three", beside=0.5)
    assert pipe.get_list_adapters() == {"transformer": ["two"]} and pipe.get_active_adapters() == ["two"]
    pipe.load_lora_weights(tmp_path / "3", "three")
    assert pipe.get_active_adapters() == ["three"] and pipe.scheduler.config.num_inference_steps == 3


@pytest.mark.processes  # the compiler's
def test_compiled_adapters_are_exchanged_without_a_rebuild(pipe, plain, a, b):
    given = dict(prompt="a cat on a table", **LATENT)
    pipe.compile()
    pipe(**given)
    built = pipe._fast
    pipe.load_lora_weights(a, "a")
    pipe.load_lora_weights(b, "b")
    for names, scales in ((["a"], [1.0]), (["a", "b"], [0.5, 1.0]), (["b"], [0.0])):
        pipe.set_adapters(names, scales)
        got = pipe(**given).images
        pipe.is_compiled = False
        want = pipe(**given).images
        pipe.is_compiled = True
        assert ((got - want).norm() / want.norm()) < 1e-4
        other = (plain(**given).images - want).norm() / want.norm()
        assert other > 1e-2 or scales == [0.0]
    assert pipe._fast is built


# ---- scripts ---------------------------------------------------------------------------------------------------------


def test_the_option(a):
    assert command.lora("x/lora") == ("x/lora", 1.0)
    assert command.lora("x/lora:0.5") == ("x/lora", 0.5) and command.lora("x:-1") == ("x", -1.0)
    assert command.lora("C:/x") == ("C:/x", 1.0)
    args = infer.parse(["--model", "m", "--prompt", "p", "--lora", "x:0.5", "--lora", "y"])
    assert args.lora == [("x", 0.5), ("y", 1.0)]


def test_the_script_takes_several_adapters(lively, plain, a, b, tmp_path):
    source = ROOT / "example_data" / "images" / "cat.jpg"
    case = ["--model", lively, "--prompt", "make it red", "--source", source, "--device", "cpu", "--steps", 1]

    def run(name, *options):
        return run_here("infer_scripts/infer.py", *case, "--output", tmp_path / name, *options)

    ended = run("both", "--lora", f"{a}:0.5", "--lora", b)
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "both" / "config.json").read_text())["settings"]
    assert config["lora"] is None and config["loras"] == [[str(a), 0.5], [str(b), 1.0]]
    refused = run("both", "--lora", a)
    assert refused.returncode == 1 and "loras: " in refused.stderr
    refused = run("none", "--lora", f"{ROOT / 'docs'}:0.5")
    assert refused.returncode == 1 and "expected adapter_model.safetensors" in refused.stderr
    assert not (tmp_path / "none").exists()
