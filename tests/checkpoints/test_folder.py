"""Checkpoint folders: every error is found before loading, and nothing half-written stays."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, release_arguments
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.folder import verify
from mige.cli import convert_checkpoint
from mige.inference.pipeline import MIGEPipeline
from mige.utils.files import atomic_directory

TOOL = ROOT / "tools" / "convert_checkpoint.py"
PARTS = ("transformer", "text_encoder", "image_encoder", "qformer", "fusion", "vae")


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of the good folder, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def errors(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        verify(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def weights(folder: Path, part: str) -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- verify


def test_a_good_folder_passes_and_is_not_touched(tiny_model):
    before = contents(tiny_model)
    verify(tiny_model)
    assert contents(tiny_model) == before
    index = json.loads((tiny_model / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {*PARTS, "tokenizer", "scheduler"}


@pytest.mark.parametrize("part", [*PARTS, "tokenizer", "scheduler"])
def test_a_missing_part(folder, part):
    shutil.rmtree(folder / part)
    message = errors(folder)
    assert "1 error(s)" in message and f"{part}: missing" in message


def test_all_missing_parts_are_named(folder):
    shutil.rmtree(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    del index["fusion"]
    (folder / "model_index.json").write_text(json.dumps(index))
    message = errors(folder)
    assert "2 error(s)" in message and "vae: missing" in message and "fusion: missing" in message


def test_a_folder_without_index(folder):
    (folder / "model_index.json").unlink()
    assert "model_index.json" in errors(folder) and "convert_checkpoint.py" in errors(folder)
    assert "model_index.json" in errors(folder / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\xff"])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "qformer/config.json"])
def test_damaged_json(folder, file, text):
    (folder / file).write_text(text, encoding="latin-1")
    message = errors(folder)
    assert Path(file).name in message and re.search("not JSON|expected an object", message)


@pytest.mark.parametrize("part", ["image_encoder", "fusion"])
@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(folder, part, size):
    file = weights(folder, part)
    file.write_bytes(file.read_bytes()[:size])
    message = errors(folder)
    assert f"{part}: damaged: {file.name}" in message and "1 error(s)" in message


@pytest.mark.parametrize("part", PARTS)
def test_no_weights(folder, part):
    weights(folder, part).unlink()
    assert f"{part}: expected config.json and *.safetensors" in errors(folder)


def test_every_key_at_fault_is_named_in_one_message(folder):
    wanted = []
    for part in PARTS:
        file = weights(folder, part)
        tensors = load_file(file)
        gone, bent, *_ = [key for key, tensor in tensors.items() if tensor.ndim == 2]
        del tensors[gone]
        shape = list(tensors[bent].shape)
        tensors[bent] = tensors[bent][:-1].contiguous()
        tensors["extra.weight"] = torch.ones(2)
        save_file(tensors, file, metadata={"format": "pt"})
        wanted += [f"{part}: missing {gone}", f"{part}: unexpected extra.weight"]
        wanted += [f"{part}: {bent} is {[shape[0] - 1, shape[1]]}, its config says {shape}"]
    message = errors(folder)
    assert f"{len(wanted)} error(s)" in message
    assert sorted(line.strip() for line in message.splitlines()[1:]) == sorted(wanted)


@pytest.mark.parametrize(
    ("part", "key", "value", "at_fault"),
    [
        ("text_encoder", "d_ff", 64, "wi_0.weight is [56, 40], its config says [64, 40]"),
        ("text_encoder", "num_layers", 4, "missing encoder.block.3"),
        ("transformer", "num_layers", 1, "unexpected transformer_blocks.1"),
        ("image_encoder", "hidden_size", 52, "embeddings.class_embedding is [1, 1, 48], its config says [1, 1, 52]"),
        ("image_encoder", "num_attention_heads", 5, "config.json: Blip2VisionModel refuses it"),
        ("vae", "latent_channels", 16, "decoder.conv_in.weight is [32, 4, 3, 3], its config says [32, 16, 3, 3]"),
        ("fusion", "num_queries", 4, "query_tokens is [1, 3, 32], its config says [1, 4, 32]"),
    ],
)
def test_a_config_of_other_sizes(folder, part, key, value, at_fault):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    message = errors(folder)
    assert at_fault in message
    assert all(line.strip().startswith(f"{part}: ") for line in message.splitlines()[1:])


def test_shards(folder):
    part = folder / "text_encoder"
    encoder = T5EncoderModel.from_pretrained(part)
    weights(folder, "text_encoder").unlink()
    encoder.save_pretrained(part, max_shard_size="60KB")
    verify(folder)
    index = next(part.glob("*.index.json"))
    lost = part / sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    keys = [key for key, file in json.loads(index.read_text())["weight_map"].items() if file == lost.name]
    kept = lost.read_bytes()
    lost.unlink()
    message = errors(folder)
    assert f"missing file {lost.name}" in message and all(f"missing {key}" in message for key in keys)
    lost.write_bytes(kept)
    verify(folder)
    index.write_text("{}")
    assert "expected an object with the key 'weight_map'" in errors(folder)
    index.unlink()
    assert f"text_encoder: {lost.name} is in no index" in errors(folder)


# ---- loading


@torch.no_grad()
def test_the_vision_towers_last_norm_has_its_own_eps(tiny_model):
    """The class would take the blocks' 1e-6; seen in the output, where the input hardly varies."""
    tower = MIGEPipeline.from_pretrained(tiny_model).image_encoder
    norm = tower.post_layernorm
    assert (norm.eps, tower.encoder.layers[0].layer_norm1.eps) == (1e-5, 1e-6)
    x = 1e-3 * torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), want)


def test_the_pipeline_refuses_a_damaged_folder(folder):
    file = weights(folder, "qformer")
    tensors = load_file(file)
    tensors.pop("layernorm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"qformer: missing layernorm\.weight"):
        MIGEPipeline.from_pretrained(folder)


# ---- atomic_directory


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "run"
    with atomic_directory(target) as folder:
        assert folder.parent == target.parent and not target.exists()
        (folder / "a").write_text("1")
    assert contents(tmp_path) == {"deep/run/a": b"1"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty", "file"])
def test_an_existing_target_is_refused_and_untouched(tmp_path, kind):
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "a").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="run exists"), atomic_directory(target):
        pytest.fail("the body ran")
    assert contents(tmp_path) == before and list(tmp_path.iterdir()) == [target]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(OSError), atomic_directory(target) as folder:
        (folder / "a").write_text("ours")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert contents(tmp_path) == {"run/a": b"theirs"}


@pytest.mark.processes
def test_killed_in_the_middle(tmp_path):
    target, (ready, signal_ready) = tmp_path / "run", os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_directory(target) as folder:
            (folder / "a").write_text("half")
            os.write(signal_ready, b"x")
            signal.pause()
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    os.close(ready)
    os.close(signal_ready)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run.") and left.name.endswith(".part")
    with atomic_directory(target) as folder:  # what is left stands in nobody's way
        (folder / "a").write_text("whole")
    assert contents(target) == {"a": b"whole"}


# ---- the tool's exits


def convert(monkeypatch, *arguments: object) -> object:
    """Run the tool in this process as `python tools/convert_checkpoint.py ...` would; its exit value."""
    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main([*map(str, arguments)])
    return stop.value.code


@pytest.mark.processes
def test_a_full_disk(official_dir, tmp_path):
    """A limit on the size of files stands in for the full disk: the DiT's weights do not fit."""
    limit = 500_000
    assert official_dir.joinpath("vae", "diffusion_pytorch_model.safetensors").stat().st_size > limit
    done = run_python(TOOL, *release_arguments(official_dir, tmp_path / "model"), file_size=limit)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^error: .*File too large", done.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(official_dir, tmp_path, monkeypatch):
    arguments = release_arguments(tmp_path / "not there", tmp_path)
    message = convert(monkeypatch, *arguments)
    assert message == f"error: {tmp_path} exists; name another folder or remove it"


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--model", "no such file"),
        ("--vae", "expected a folder with a config.json"),
        ("--t5", "expected a folder with a config.json"),
        ("--config", "no such config file"),
    ],
)
def test_a_missing_input(official_dir, tmp_path, monkeypatch, option, error):
    arguments = release_arguments(official_dir, tmp_path / "model")
    arguments[arguments.index(option) + 1] = "no/such"
    assert convert(monkeypatch, *arguments) == f"error: no/such: {error}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "garbage", "too large"])
def test_a_tokenizer_that_is_not_t5s(official_dir, tmp_path, monkeypatch, damage):
    """The library makes up a vocabulary when spiece.model is missing or damaged."""
    t5 = Path(shutil.copytree(official_dir / "t5", tmp_path / "t5"))
    arguments = release_arguments(official_dir, tmp_path / "model")
    arguments[arguments.index("--t5") + 1] = t5
    if damage == "missing":
        (t5 / "spiece.model").unlink()
    elif damage == "garbage":
        (t5 / "spiece.model").write_bytes(b"xx")
    else:
        small = tmp_path / "small.py"
        small.write_text(f"_base_ = {str(ROOT / 'configs/tiny.py')!r}\nmodel = dict(text_encoder=dict(vocab_size=100))")
        arguments[arguments.index("--config") + 1] = small
    message = convert(monkeypatch, *arguments)
    assert message.startswith(f"error: {t5}: not T5's tokenizer")
    assert not (tmp_path / "model").exists()


def test_bad_usage(monkeypatch, capsys):
    assert convert(monkeypatch, "release", "--model", "x") == 2
    assert "--vae" in capsys.readouterr().err
