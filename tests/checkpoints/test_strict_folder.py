"""A model folder is checked as what will be read: files, variants, dtypes, classes, tokenizer, scheduler."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.folder import verify
from mige.cli import infer
from mige.inference.pipeline import MIGEPipeline

CAT = ROOT / "example_data" / "images" / "cat.jpg"


@pytest.fixture
def folder(lively, tmp_path):
    return shutil.copytree(lively, tmp_path / "model")


def refused(folder, variant=None) -> str:
    """What opening the folder says; the pipeline and the script say the same."""
    with pytest.raises(CheckpointError) as by_pipeline:
        MIGEPipeline.from_pretrained(folder, variant=variant)
    if variant is None:
        case = ["--prompt", "a<imagehere>", "--reference", str(CAT), "--device", "cpu"]
        with pytest.raises(SystemExit) as by_script:
            infer.main(["--model", str(folder), *case, "--output", str(folder.parent / "out")])
        assert str(by_pipeline.value) in str(by_script.value.code)
    return str(by_pipeline.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_its_vocabulary_a_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "spiece.model"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    assert "tokenizer: expected tokenizer.json or spiece.model" in refused(folder)


def test_a_vocabulary_larger_than_the_embeddings_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    size = json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    first = max([token["id"] for token in data["added_tokens"]] + [len(data["model"]["vocab"])]) + 1
    model = data["added_tokens"][0]
    data["added_tokens"] += [model | {"id": first + n, "content": f"<new_{n}>"} for n in range(size)]
    path.write_text(json.dumps(data))
    assert f"but the text encoder has embeddings of {size}" in refused(folder)


def test_a_tokenizer_that_is_damaged_is_refused(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tokenizer: cannot be loaded" in refused(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta_end": 3.0}, "its betas run from"),
        ({"num_train_timesteps": "many"}, "DPMSolver2M refuses it"),
        ({"prediction_type": "v_prediction"}, "expected linear betas and epsilon prediction"),
        ({"_class_name": "DDIMScheduler"}, "scheduler_config.json is of DDIMScheduler"),
        ({"beta_end": 0.012}, "its noise schedule, 1000 betas from 0.0001 to 0.012, is not the one"),
        ({"num_train_timesteps": 500}, "its noise schedule, 500 betas from 0.0001 to 0.02, is not the one"),
    ],
)
def test_a_scheduler_that_is_none_is_refused(folder, changes, said):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    message = refused(folder)
    assert "scheduler: " in message and said in message


def test_another_scheduler_of_diffusers_may_stand_in_the_folder(lively, tmp_path):
    pipe = MIGEPipeline.from_pretrained(lively)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "other")
    assert type(MIGEPipeline.from_pretrained(tmp_path / "other").scheduler) is UniPCMultistepScheduler


def test_keys_moved_to_a_file_that_nothing_reads_are_missing(folder):
    part = folder / "text_encoder"
    tensors = load_file(part / "model.safetensors")
    moved = {key: tensors.pop(key) for key in list(tensors)[:2]}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    save_file(moved, part / "other.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "text_encoder: other.safetensors is in no index and would not be read" in message
    assert all(f"text_encoder: missing {key}" in message for key in moved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt", "stray.safetensors"])
def test_stray_weight_files_are_errors(folder, name):
    part = folder / "qformer"
    shutil.copy(part / "model.safetensors", part / name)
    assert f"qformer: {name} is in no index and would not be read" in refused(folder)


def test_two_sets_of_the_same_weights_are_refused(folder):
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    keys = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").keys()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "diffusion_pytorch_model.safetensors")}))
    assert "two sets of the same weights" in refused(folder)


def test_an_index_leads_nowhere_else(folder):
    part = folder / "vae"
    keys = load_file(part / "diffusion_pytorch_model.safetensors").keys()
    (part / "diffusion_pytorch_model.safetensors").rename(folder.parent / "out.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "../../out.safetensors")}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected files beside it" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(folder, dtype):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    assert "transformer: proj_out.weight is stored as" in refused(folder)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("transformer", ["diffusers", "UNet2DConditionModel"], "expected ['diffusers', 'PixArtTransformer2DModel']"),
        ("fusion", ["os", "system"], "expected ['mige.models.fusion', 'MIGEFusion']"),
        ("text_encoder", "T5EncoderModel", "expected [library, class]"),
        ("safety_checker", ["diffusers", "X"], "a MIGE model has no such part"),
        ("scheduler", ["diffusers", "AutoencoderKL"], "expected a scheduler of diffusers"),
        ("_class_name", "StableDiffusionPipeline", "expected 'MIGEPipeline'"),
    ],
)
def test_a_wrong_class_is_refused(folder, name, value, said):
    edit(folder / "model_index.json", **{name: value})
    assert said in refused(folder)


def test_a_config_of_another_class_is_refused(folder):
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    assert "vae: config.json is of AutoencoderTiny, expected AutoencoderKL" in refused(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_loads_sharded_or_not(lively, tmp_path, shards):
    pipe = MIGEPipeline.from_pretrained(lively)
    before = pipe.transformer.proj_out.bias.clone()
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    both = shutil.copytree(lively, tmp_path / "both")
    pipe.save_pretrained(both, variant="fp16", **({"max_shard_size": "60KB"} if shards else {}))  # beside the plain
    for variant, want in (("fp16", before + 1), (None, before)):
        assert torch.equal(MIGEPipeline.from_pretrained(both, variant=variant).transformer.proj_out.bias, want)
    assert (both / "text_encoder" / "model.safetensors.index.fp16.json").is_file() == shards


def test_a_variant_that_is_not_there_is_said(folder):
    assert "`variant=fp8`, but no part has weights of it" in refused(folder, variant="fp8")


def test_a_damaged_variant_is_seen_though_the_plain_files_are_whole(folder):
    part = folder / "qformer"
    tensors = load_file(part / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, part / "model.fp16.safetensors", metadata={"format": "pt"})
    assert "qformer: missing" in refused(folder, variant="fp16")
    verify(folder)


def test_a_folder_of_version_0_1_0_loads(folder, lively):
    edit(folder / "model_index.json", fusion=["mige.fusion", "MIGEFusion"], scheduler=["mige.sampler", "DPMSolver2M"])
    old, new = MIGEPipeline.from_pretrained(folder), MIGEPipeline.from_pretrained(lively)
    assert type(old.fusion) is type(new.fusion) and type(old.scheduler) is type(new.scheduler)
    assert all(torch.equal(a, b) for a, b in zip(old.fusion.parameters(), new.fusion.parameters(), strict=True))
    listed = json.loads((lively / "model_index.json").read_text())
    assert listed["fusion"][0] == "mige.models.fusion" and listed["scheduler"][0] == "mige.diffusion.solver"


def test_a_vocabulary_of_another_language_is_refused(folder):
    """The words are read by another class: most become unknown."""
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    edit(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    assert "expected a tokenizer of transformers" in refused(folder)
    edit(folder / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    data = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    data["model"]["vocab"] = [[f"x{n}" if n > 2 else piece, score] for n, (piece, score) in
                              enumerate(data["model"]["vocab"])]  # fmt: skip
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(data))
    assert "its vocabulary is not T5's" in refused(folder)


def test_a_vocabulary_that_lacks_a_word_and_its_letters_is_refused(folder):
    """One plain word unknown is enough: the task's own prefix would be read with a hole."""
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = [[f"?{n}", score] if "j" in piece else [piece, score] for n, (piece, score) in
                              enumerate(vocabulary)]  # fmt: skip
    path.write_text(json.dumps(data))
    message = refused(folder)
    assert "tokenizer: " in message and "are unknown: its vocabulary is not T5's" in message


def test_a_tokenizer_without_its_special_tokens_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    edit(path, eos_token="<nope>")
    assert "the text encoder's is 1" in refused(folder)
    path.unlink()
    edit(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "tokenizer: it has no eos_token_id" in refused(folder)


@pytest.mark.parametrize("place", ["model.safetensors", "tokenizer/model.bin", "vae/old/x.safetensors", "ema/a.ckpt"])
def test_weight_files_where_nothing_reads_are_errors(folder, place):
    (folder / place).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / place)
    assert f"{place}: a weight file that nothing reads" in refused(folder)


@pytest.mark.parametrize(
    "part, changes, said",
    [
        ("text_encoder", {"architectures": 5}, "config.json is of 5, expected T5EncoderModel"),
        ("text_encoder", {"architectures": "BertModel"}, "config.json is of BertModel, expected T5EncoderModel"),
        ("text_encoder", {"model_type": "bert"}, "config.json is of a 'bert' model, expected 't5'"),
        ("text_encoder", {"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
        ("fusion", {"vision_dtype": "int8"}, "vision_dtype 'int8', expected a float dtype"),
        ("scheduler", {"num_train_timesteps": 0}, "its num_train_timesteps is 0, expected at least 2"),
        ("scheduler", {"num_train_timesteps": 1}, "its num_train_timesteps is 1, expected at least 2"),
        ("scheduler", {"beta_start": 0.02, "beta_end": 1e-4}, "its betas fall from 0.02 to 0.0001"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, part, changes, said):
    edit(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    message = refused(folder)
    assert f"{part}: " in message and said in message


def test_a_scheduler_that_cannot_sample_is_refused(folder):
    name = "FlowMatchEulerDiscreteScheduler"
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    assert f"scheduler: MIGE predicts epsilon, {name} expects None" in refused(folder)


def test_the_noise_schedule_of_another_model_is_refused(folder):
    """That of Stable Diffusion, which the library's schedulers have unless they are told."""
    scheduler = UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_config(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    assert "its noise schedule, 1000 betas from 0.00085 to 0.012, is not the one" in refused(folder)


@pytest.mark.parametrize("variant", ["", "../x", 5])
def test_a_variant_is_a_word(folder, variant):
    assert f"variant is {variant!r}, expected a word" in refused(folder, variant=variant)


@pytest.mark.parametrize("name", ["mige-mini", "ablation-base"])
def test_the_folders_that_ship_pass(name):
    """They were saved by version 0.1.0: their model_index.json names mige.fusion and mige.sampler."""
    folder = ROOT / "output" / "pretrained_models" / name
    assert json.loads((folder / "model_index.json").read_text())["fusion"][0] == "mige.fusion"
    verify(folder)


def test_a_run_verifies_once(lively, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("mige.checkpoints.folder.verify", lambda *given: (calls.append(given), verify(*given)))
    case = ["--prompt", "a<imagehere>", "--reference", str(CAT), "--device", "cpu", "--steps", "1"]
    assert infer.main(["--model", str(lively), *case, "--output", str(tmp_path / "out")]) == 0
    assert len(calls) == 1


def split(part, stem, change):
    """The weights of a part in two files with their index; `change` of both files and of the index."""
    state = load_file(part / f"{stem}.safetensors")
    keys = sorted(state)
    first, second = ({key: state[key] for key in some} for some in (keys[::2], keys[1::2]))
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    change(keys[0], first, second, index)
    (part / f"{stem}.safetensors").unlink()
    for name, tensors in (("a", first), ("b", second)):
        save_file(tensors, part / f"{name}.safetensors", metadata={"format": "pt"})
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda key, a, b, index: b.update({key: torch.zeros_like(a[key])}),
            "is in a.safetensors and in b.safetensors",
        ),
        (lambda key, a, b, index: index.pop(key), "is in a.safetensors, .* says nothing of it"),
        (lambda key, a, b, index: index.update({key: "b.safetensors"}), "is in a.safetensors, .* says b.safetensors"),
        (lambda key, a, b, index: index.update(more="a.safetensors"), "more is not in a.safetensors, as .* says"),
    ],
    ids=["twice", "unnamed", "misplaced", "absent"],
)
@pytest.mark.parametrize("part, stem", [("fusion", "diffusion_pytorch_model"), ("qformer", "model")])
def test_an_index_that_disagrees_with_its_files_is_refused(folder, part, stem, change, said):
    split(folder / part, stem, change)
    with pytest.raises(CheckpointError, match=f"{part}: .*{said}"):
        MIGEPipeline.from_pretrained(folder)


def test_an_index_without_metadata_is_refused(folder):
    """Both libraries end with a KeyError at one."""
    split(folder / "fusion", "diffusion_pytorch_model", lambda *_: None)
    index = folder / "fusion" / "diffusion_pytorch_model.safetensors.index.json"
    MIGEPipeline.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(CheckpointError, match=r"index.json: expected an object with the key .metadata."):
        MIGEPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(shift_factor=0.1), "shift_factor 0.1, but MIGE's latents are scaled only"),
        (dict(latents_mean=[0.1] * 4), "latents_mean"),
        (dict(scaling_factor=float("nan")), "scaling_factor nan, expected a number above 0"),
        (dict(scaling_factor=None), "scaling_factor None"),
    ],
    ids=str,
)
def test_a_vae_whose_latents_are_made_otherwise_is_refused(folder, change, said):
    edit(folder / "vae" / "config.json", **change)
    with pytest.raises(CheckpointError, match=f"vae: config.json has {said}"):
        verify(folder)
