"""Adapters: both layouts are read, whatever does not match is refused by name."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import add_lora, merge_lora, save_lora
from mige.inference.pipeline import MIGEPipeline

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(lively):
    return MIGEPipeline.from_pretrained(lively).transformer


@pytest.fixture
def adapter(base, tmp_path):
    """A folder of adapters that change something."""
    transformer = copy.deepcopy(base)
    add_lora(transformer, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    save_lora(transformer, tmp_path / "lora")
    return tmp_path / "lora"


def refused(base, path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        merge_lora(copy.deepcopy(base), path)
    return str(refusal.value)


def as_diffusers(adapter, folder, alpha, as_tensors):
    """The same adapters in diffusers' layout."""
    folder.mkdir()
    state = {key.replace("base_model.model.", "transformer."): v for key, v in load_file(adapter / PEFT).items()}
    metadata = {"format": "pt"}
    if alpha is not None and as_tensors:
        modules = {key.rsplit(".lora_", 1)[0] for key in state}
        state |= {f"{module}.alpha": torch.tensor(float(alpha)) for module in modules}
    elif alpha is not None:
        metadata["lora_adapter_metadata"] = json.dumps({"transformer.r": 4, "transformer.lora_alpha": alpha})
    save_file(state, folder / DIFFUSERS, metadata=metadata)
    return folder


def test_merged_weights_are_the_closed_form(base, adapter):
    merged, state = merge_lora(copy.deepcopy(base), adapter), load_file(adapter / PEFT)
    key = "transformer_blocks.0.attn1.to_q"
    low, up = (state[f"base_model.model.{key}.lora_{half}.weight"] for half in "AB")
    got = merged.get_submodule(key).weight - base.get_submodule(key).weight
    torch.testing.assert_close(got, up @ low, atol=1e-6, rtol=1e-4)
    assert (up @ low).abs().max() > 1e-2


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("alpha", [None, 2])
def test_diffusers_layout_is_the_same_adapter(base, adapter, tmp_path, alpha, as_tensors):
    want = merge_lora(copy.deepcopy(base), adapter)
    folder = as_diffusers(adapter, tmp_path / "other", alpha, as_tensors)
    share = 1 if alpha is None else alpha / 4
    for path in (folder, folder / DIFFUSERS):
        got = merge_lora(copy.deepcopy(base), path)
        for a, b, before in zip(got.parameters(), want.parameters(), base.parameters(), strict=True):
            torch.testing.assert_close(a - before, share * (b - before), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("prefix, said", [("lora_unet_", "kohya's"), ("unet.", "of a U-Net"), ("x.", "an unknown one")])
def test_other_layouts_are_refused_by_name(base, adapter, prefix, said):
    save_file({f"{prefix}a.lora_down.weight": torch.ones(4, 4)}, adapter / PEFT)
    message = refused(base, adapter)
    assert "its layout is" in message and said in message


def test_an_empty_file_is_refused(base, adapter):
    save_file({}, adapter / PEFT)
    assert "holds no tensor, so it would change nothing" in refused(base, adapter)


def test_keys_are_compared_in_both_directions(base, adapter):
    whole = load_file(adapter / PEFT)
    first = next(iter(whole))
    module = first.rsplit(".lora_", 1)[0]
    save_file({k: v for k, v in whole.items() if k != first}, adapter / PEFT)
    assert "has only" in refused(base, adapter)
    save_file({k: v for k, v in whole.items() if not k.startswith(f"{module}.")}, adapter / PEFT)
    assert f"missing {module}" in refused(base, adapter)
    save_file(whole | {"base_model.model.nowhere.lora_A.weight": torch.ones(4, 4)}, adapter / PEFT)
    assert "the model has no layer 'nowhere'" in refused(base, adapter)
    save_file(whole | {first: torch.ones(4, 3)}, adapter / PEFT)
    assert f"{first} is [4, 3], the model needs" in refused(base, adapter)


def test_another_base_is_refused(base, adapter):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.proj_out.weight.mul_(1.1)
    assert "trained on another base model" in refused(other, adapter)
    merge_lora(copy.deepcopy(base).bfloat16(), adapter)  # the same one, in another precision


def test_a_cut_file_is_refused(base, adapter):
    data = (adapter / PEFT).read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        (adapter / PEFT).write_bytes(data[:length])
        assert "damaged or cut off" in refused(base, adapter)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not JSON"),
        ("[1]", "expected an object"),
        ("{}", '"peft_type" is None, expected "LORA"'),
        ('{"peft_type": "IA3"}', "\"peft_type\" is 'IA3'"),
        ('{"peft_type": 3}', '"peft_type" is 3'),
        ('{"peft_type": "LORA", "r": "many", "target_modules": ["to_q"]}', "these adapters do not fit"),
    ],
)
def test_a_bad_config_is_refused(base, adapter, text, said):
    (adapter / "adapter_config.json").write_text(text)
    message = refused(base, adapter)
    assert str(adapter) in message and said in message


def test_a_folder_without_adapters_is_said(base, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "it holds notes.txt" in refused(base, tmp_path)
    assert "no such folder" in refused(base, tmp_path / "nowhere")
