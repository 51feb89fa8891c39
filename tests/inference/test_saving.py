"""Saved folders in diffusers' hands, and models of the hub."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import environment
from diffusers import DiffusionPipeline
from processes import run_program

from mige.checkpoints.folder import verify
from mige.inference import saving
from mige.inference.pipeline import MIGEPipeline

GIVEN = {"prompt": "a cat on a table", "num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(lively):
    made = MIGEPipeline.from_pretrained(lively)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save_pretrained(folder)
    return folder


OPEN = """
import sys, torch, diffusers
assert not any(name.split(".")[0] == "mige" for name in sys.modules)
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pipe).__name__ == "MIGEPipeline", type(pipe)
torch.save(pipe("a cat on a table", num_inference_steps=1, output_type="latent").images, sys.argv[2])
"""


def test_weights_are_never_pickled_nor_in_a_format_that_is_not_read(pipe, saved, tmp_path):
    with pytest.warns(UserWarning, match=r"safe_serialization is False, but only \*\.safetensors are read"):
        pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*")} == {
        path.relative_to(saved) for path in saved.rglob("*")
    }
    verify(tmp_path / "model")
    with pytest.raises(ValueError, match="use_flashpack is True, but only"):
        pipe.save_pretrained(tmp_path / "flash", use_flashpack=True)
    assert not (tmp_path / "flash").exists()


@pytest.mark.processes
def test_diffusers_opens_a_folder_where_mige_was_never_imported(pipe, saved, tmp_path):
    how = environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    ended = run_program(sys.executable, "-c", OPEN, saved, tmp_path / "latents.pt", env=how)
    assert ended.returncode == 0, ended.stderr
    torch.testing.assert_close(torch.load(tmp_path / "latents.pt"), pipe(**GIVEN).images)


def test_the_folder_s_code_runs_only_where_it_is_trusted(pipe, saved, tmp_path):
    """Not in the process that has the class: what lies beside the weights could be anybody's."""
    verify(saved)
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "pipeline.py").write_text("raise RuntimeError('it ran')")
    opened = MIGEPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(opened(**GIVEN).images, pipe(**GIVEN).images)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    opened.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "MIGEPipeline",
    ]
    assert (tmp_path / "again" / "pipeline.py").read_text() == (saved / "pipeline.py").read_text()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What is asked of the hub's client; the files that are uploaded lie in tmp_path / "hub"."""
    asked = []

    def upload_folder(**how):
        shutil.copytree(how["folder_path"], tmp_path / "hub")
        asked.append(how)
        return "https://hub/commit/1"

    monkeypatch.setattr(saving, "create_repo", lambda name, **how: asked.append((name, how)) or SimpleNamespace(
        repo_id=f"owner/{name}"))  # fmt: skip
    monkeypatch.setattr(saving, "upload_folder", upload_folder)
    return asked


def test_a_model_is_pushed_with_its_card(pipe, hub, tmp_path):
    assert pipe.push_to_hub("tiny", private=True, token="secret", commit_message="First") == "https://hub/commit/1"
    (name, made), uploaded = hub
    assert (name, made["private"], made["token"]) == ("tiny", True, "secret")
    assert (uploaded["repo_id"], uploaded["commit_message"], uploaded["token"]) == ("owner/tiny", "First", "secret")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'MIGEPipeline.from_pretrained("owner/tiny")' in card and "Trained at 128 x 128 px" in card
    assert card.startswith("---\nlibrary_name: diffusers\n") and "secret" not in card
    verify(tmp_path / "hub")
    with pytest.raises(TypeError, match="unknown option 'branch'"):
        pipe.push_to_hub("tiny", branch="x")


def test_saving_may_push(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path / "own", push_to_hub=True, private=False)
    assert hub[0] == ("own", {"private": False, "token": None, "exist_ok": True})
    verify(tmp_path / "hub")
    assert (tmp_path / "own" / "README.md").is_file()


def test_a_model_of_the_hub_s_cache_without_a_network(pipe, saved, tmp_path):
    place, commit = tmp_path / "models--owner--tiny", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "v1").write_text(commit)
    (place / "snapshots").mkdir()
    (place / "snapshots" / commit).symlink_to(saved)
    how = {"cache_dir": tmp_path, "revision": "v1", "token": "secret", "local_files_only": True}
    for cls, more in ((MIGEPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        opened = cls.from_pretrained("owner/tiny", **how, **more)
        opened.set_progress_bar_config(disable=True)
        assert torch.equal(opened(**GIVEN).images, pipe(**GIVEN).images)
