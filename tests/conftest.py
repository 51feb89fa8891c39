"""Folders that many tests read, made once a session by the scripts themselves. Don't write into them: copy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_tool(name: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of tools/ as a user would, and give back its exit code, stdout and stderr."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, **kwargs)


def environment() -> dict[str, str]:
    """This process's environment for a child: the checkout importable, the network unused."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def official_dir(tmp_path_factory) -> Path:
    """A tiny model in the official layout: model.pth, vae/, t5/."""
    folder = tmp_path_factory.mktemp("official") / "files"
    done = run_tool("make_tiny_checkpoint.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_model(official_dir, tmp_path_factory) -> Path:
    """The checkpoint folder converted from `official_dir`."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    done = run_tool("convert_checkpoint.py", *release_arguments(official_dir, folder))
    assert done.returncode == 0, done.stderr
    return folder


def release_arguments(official: Path, output: Path, config: Path = ROOT / "configs" / "tiny.py") -> list[object]:
    """Arguments of tools/convert_checkpoint.py for the folder that tools/make_tiny_checkpoint.py makes."""
    files = ["--model", official / "model.pth", "--vae", official / "vae", "--t5", official / "t5"]
    return ["release", *files, "--output", output, "--config", config]
