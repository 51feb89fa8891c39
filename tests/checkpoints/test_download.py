"""tools/download_weights.py against a hub of our own: what it fetches, that it resumes, that it looks at every byte."""

import filecmp

import pytest
import torch
from conftest import ROOT, run_here
from hub_server import Hub, serving
from huggingface_hub import constants, file_download

from mige.checkpoints.download import NEEDS, choose
from mige.checkpoints.errors import CheckpointError
from mige.inference.pipeline import MIGEPipeline

REPOSITORY = "authors/weights"


@pytest.fixture
def hub(official_dir, monkeypatch):
    files = Hub.of_folders(REPOSITORY, **{"sd-vae-ft-ema": official_dir / "vae", "t5-v1_1-xxl": official_dir / "t5"})
    files.files["model.pth"] = (official_dir / "model.pth").read_bytes()
    files.files |= {"README.md": b"read", "eva_vit_g.pth": b"of training", "bert-base-uncased/config.json": b"{}",
                    "sd-vae-ft-ema/diffusion_pytorch_model.bin": b"older", "model_old.pth": b"no"}  # fmt: skip
    with serving(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # between the library's tries
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it writes at a time: 10 MB
        yield server


def run(folder, *more):
    options = ["--repository", REPOSITORY, "--config", ROOT / "configs" / "tiny.py", "--files", folder / "official"]
    return run_here("tools/download_weights.py", *options, "--output", folder / "model", *more)


def test_from_nothing_to_a_model_in_one_command(hub, tiny_model, tmp_path):
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    fetched = {path for path, _ in hub.asked}
    assert {"model.pth", "sd-vae-ft-ema/config.json", "sd-vae-ft-ema/diffusion_pytorch_model.safetensors"} <= fetched
    assert not fetched & {"README.md", "eva_vit_g.pth", "bert-base-uncased/config.json", "model_old.pth",
                          "sd-vae-ft-ema/diffusion_pytorch_model.bin"}  # fmt: skip
    ours, expected = MIGEPipeline.from_pretrained(tmp_path / "model"), MIGEPipeline.from_pretrained(tiny_model)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    hub.asked.clear()
    again = run(tmp_path, "--output", tmp_path / "again")
    assert again.returncode == 0 and not hub.asked  # all of it was there


def test_cut_off_in_the_middle_it_resumes_from_there(hub, official_dir, tmp_path):
    hub.cut["model.pth"] = 10_000
    result = run(tmp_path)
    assert result.returncode == 1 and "model.pth: not downloaded" in result.stderr and "resumes" in result.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / "official" / "model.pth").exists()
    hub.cut.clear()
    hub.asked.clear()
    assert run(tmp_path).returncode == 0
    (span,) = [span for path, span in hub.asked if path == "model.pth"]
    assert 9_000 <= int(span.removeprefix("bytes=").removesuffix("-")) <= 10_000
    assert filecmp.cmp(tmp_path / "official" / "model.pth", official_dir / "model.pth", shallow=False)


@pytest.mark.parametrize("path", ["model.pth", "t5-v1_1-xxl/config.json"])
def test_a_file_that_is_not_the_hubs_is_named_and_fetched_anew(hub, tmp_path, path):
    hub.damaged.add(path)
    result = run(tmp_path)
    assert result.returncode == 1 and path in result.stderr and "is removed" in result.stderr
    assert not (tmp_path / "official" / path).exists() and not (tmp_path / "model").exists()
    hub.damaged.clear()
    assert run(tmp_path).returncode == 0


def test_a_file_of_the_users_own_is_not_overwritten(hub, tmp_path):
    own = tmp_path / "official" / "model.pth"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    result = run(tmp_path)
    assert result.returncode == 1 and "model.pth: 4 bytes" in result.stderr and own.read_bytes() == b"mine"


def test_what_the_hub_does_not_have_is_said(hub, tmp_path):
    assert "no such revision" in run(tmp_path, "--revision", "nope").stderr
    assert "no such repository" in run(tmp_path, "--repository", "nobody/nothing").stderr
    del hub.files["model.pth"]
    assert "the trained model (model\\.pth)" in run(tmp_path).stderr


def test_a_hub_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    result = run(tmp_path)
    assert result.returncode == 1 and "authors/weights: not downloaded" in result.stderr


def test_what_training_starts_from():
    listed = ["PixArt-XL-2-512x512.pth", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "model.pth",
              "sd-vae-ft-ema/config.json", "sd-vae-ft-ema/diffusion_pytorch_model.bin", "t5-v1_1-xxl/config.json",
              "t5-v1_1-xxl/spiece.model", "t5-v1_1-xxl/pytorch_model-00001-of-00002.bin",
              "t5-v1_1-xxl/pytorch_model-00002-of-00002.bin", "t5-v1_1-xxl/pytorch_model.bin.index.json"]  # fmt: skip
    chosen = choose(listed, "training", "here")
    assert sorted({path for paths in chosen.values() for path in paths}) == sorted(set(listed) - {"model.pth"})
    with pytest.raises(CheckpointError, match=r"(?s)EVA-ViT-g.*BLIP-2"):
        choose([path for path in listed if "eva" not in path and "blip2" not in path], "training", "here")
    assert all(need.patterns for needs in NEEDS.values() for need in needs)
