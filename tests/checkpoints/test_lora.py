"""Adapters: both layouts are read, whatever does not match is refused by name."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import add_lora, check_lora, merge_lora, save_lora
from mige.cli import infer, model_options
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


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda value: value.to(torch.int8), "is stored as torch.int8, expected a float dtype"),
        (lambda value: value * float("nan"), "has values that are not finite"),
    ],
)
def test_tensors_that_are_no_adapters_are_refused(base, adapter, change, said):
    state = load_file(adapter / PEFT)
    key = next(iter(state))
    save_file(state | {key: change(state[key])}, adapter / PEFT)
    assert f"{adapter / PEFT}: {key} {said}" in refused(base, adapter)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "nowhere"]}, "names the target 'nowhere'"),
        ({"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_out"]}, "missing base_model.model.proj_out"),
        ({"target_modules": None}, "these adapters do not fit the model"),
        ({"lora_alpha": 0}, "expected a number above 0"),
        ({"lora_alpha": -4}, "expected a number above 0"),
    ],
)
def test_a_config_that_says_another_thing_is_refused(base, adapter, changes, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert said in refused(base, adapter)


def test_diffusers_metadata_is_read_whole(base, adapter, tmp_path):
    """An alpha of one module, and targets that have no keys."""
    file, key = as_diffusers(adapter, tmp_path / "other", None, False) / DIFFUSERS, "transformer_blocks.0.attn1.to_q"
    state = load_file(file)
    told = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {key: 12}}
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(told)})
    got, want = merge_lora(copy.deepcopy(base), file), merge_lora(copy.deepcopy(base), adapter)
    for name, factor in ((key, 3), ("transformer_blocks.0.attn1.to_k", 1)):
        a, b, before = (model.get_submodule(name).weight for model in (got, want, base))
        torch.testing.assert_close(a - before, factor * (b - before), atol=1e-6, rtol=1e-4)
    told["transformer.target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
    some = {name: value for name, value in state.items() if "blocks.0" in name}
    save_file(some, file, metadata={"lora_adapter_metadata": json.dumps(told)})
    assert "missing base_model.model.transformer_blocks.1" in refused(base, file)


@pytest.mark.parametrize(
    "rename, said",
    [
        (lambda key: key.removeprefix("transformer."), "without a prefix, or diffusers' of before PEFT"),
        (lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"), "no key ends in .lora_A.weight"),
        (lambda key: f"lycoris_{key}", "LyCORIS'"),
    ],
)
def test_older_layouts_are_refused_by_name(base, adapter, tmp_path, rename, said):
    file = as_diffusers(adapter, tmp_path / "other", None, False) / DIFFUSERS
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    assert said in refused(base, file)


def test_an_alpha_is_one_number(base, adapter, tmp_path):
    file = as_diffusers(adapter, tmp_path / "other", 2, True) / DIFFUSERS
    state = load_file(file)
    key = next(name for name in state if name.endswith(".alpha"))
    save_file(state | {key: torch.ones(2)}, file)
    assert f"{key.removeprefix('transformer.')} has the shape [2], expected one number" in refused(base, file)


def test_two_layouts_in_one_folder_are_refused(base, adapter, tmp_path):
    other = as_diffusers(adapter, tmp_path / "other", None, False)
    (other / DIFFUSERS).rename(adapter / DIFFUSERS)
    assert f"holds both {PEFT} and {DIFFUSERS}" in refused(base, adapter)
    merge_lora(copy.deepcopy(base), str(adapter / DIFFUSERS))  # named, and as text


@pytest.mark.parametrize("fault", ["layout", "base"])
def test_the_script_refuses_adapters_before_weights_load(lively, base, adapter, tmp_path, monkeypatch, fault):
    if fault == "layout":
        save_file({"lora_unet_a.lora_down.weight": torch.ones(4, 4)}, adapter / PEFT)
    else:
        save_file(load_file(adapter / PEFT), adapter / PEFT, metadata={"format": "pt", "base": "0" * 64})
    monkeypatch.setattr(MIGEPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    case = ["--prompt", "a cat", "--device", "cpu", "--lora", str(adapter), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as by_script:
        infer.main(["--model", str(lively), *case])
    assert refused(base, adapter) in str(by_script.value.code)


def test_the_script_adds_good_adapters(lively, base, adapter, tmp_path):
    args = infer.parse(["--model", str(lively), "--prompt", "a cat", "--output", str(tmp_path / "out"), "--device",
                        "cpu", "--lora", str(adapter)])  # fmt: skip
    args.dtype = "float32"
    check_lora(lively, adapter)
    got = model_options.load(args, lively, "cpu", verified=True).transformer
    want = merge_lora(copy.deepcopy(base), adapter)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            dict(init_lora_weights="pissa"),
            "init_lora_weights is 'pissa', with which PEFT changes the model's own weights",
        ),
        (dict(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
        (dict(auto_mapping={"base_model_class": "UNet2DConditionModel"}), "adapters of a UNet2DConditionModel"),
    ],
    ids=str,
)
def test_a_config_under_which_other_weights_would_change_is_refused(base, adapter, change, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"{path}: {said}" in refused(base, adapter)


@pytest.mark.parametrize("half", ["A", "B"])
def test_adapters_that_change_nothing_are_refused(base, adapter, half):
    state = load_file(adapter / PEFT)
    save_file({k: v * (f"lora_{half}" not in k) for k, v in state.items()}, adapter / PEFT)
    assert "every lora_A or lora_B is zero, so it would change nothing" in refused(base, adapter)


@pytest.mark.parametrize("module", ["transformer_blocks.0.attn1.to_q", "foo"])
def test_an_alpha_that_nothing_would_read_is_refused(base, adapter, tmp_path, module):
    state = load_file(adapter / PEFT)
    save_file(state | {f"base_model.model.{module}.alpha": torch.ones(())}, adapter / PEFT)
    assert f"unexpected {module}.alpha" in refused(base, adapter)
    save_file(state, adapter / PEFT)
    other = as_diffusers(adapter, tmp_path / "other", None, False) / DIFFUSERS
    save_file(load_file(other) | {"transformer.foo.alpha": torch.ones(())}, other)
    assert "unexpected foo.alpha, without foo.lora_A.weight" in refused(base, other)


@pytest.mark.parametrize(
    "told, said",
    [({"unet.lora_alpha": 64}, "its metadata is of another part"), ({"transformer.use_dora": True}, "says use_dora")],
)
def test_metadata_that_says_another_thing_is_refused(base, adapter, tmp_path, told, said):
    other = as_diffusers(adapter, tmp_path / "other", None, False) / DIFFUSERS
    save_file(load_file(other), other, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    assert said in refused(base, other)
