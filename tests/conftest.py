"""Folders that many tests read, made once a run of all workers; the order of tests; the fork server of their processes.

Don't write into the folders: copy. Whoever does fails the run.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported: more only wait for each other at these sizes
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "True"  # as Gradio sets it later: the fork server must have the same

import contextlib
import gc
import io
import multiprocessing.util
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
from filelock import FileLock
from PIL import Image
from processes import ROOT, environment, run_python, shell_environment

__all__ = ["ROOT", "environment", "image_size", "lively", "official_dir", "release_arguments", "run_here",
           "run_script", "run_tool", "shell_environment", "tiny_model"]  # fmt: skip

RUN = "MIGE_TEST_RUN"  # the environment variable that names the folder of a run, for xdist's workers too
# A file's tests run in one worker. Those that measure memory or drive a browser are all in one, never at the same time.
TOGETHER = ("test_peak_memory", "test_memory_stays_flat", "test_web_browser.py", "test_web_flows.py")
FIRST = ("test_many_processes.py", "test_trainer.py", "test_ablation.py", "test_resuming.py", "test_overfit.py",
         "test_web_browser.py", "test_infer_cli.py")  # fmt: skip  # the longest, or a worker ends alone


# ---- a run -----------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(processes.watch)
    multiprocessing.util.spawnv_passfds = processes.spawnv_passfds
    if not hasattr(config, "workerinput"):  # not in xdist's workers
        folder = Path(tempfile.mkdtemp(prefix="mige-tests-"))
        os.environ[RUN] = str(folder)
        os.environ["HF_HOME"] = str(folder / "huggingface")
        server = processes.start_server(folder)
        worker = Path(os.environ["MIGE_TEST_BIN"]) / "worker"
        config.option.tx = [f"popen//python={worker}" for _ in getattr(config.option, "tx", [])]

        def finish() -> None:
            server.terminate()
            server.wait()
            shutil.rmtree(folder)

        config.add_cleanup(finish)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        together = item.name in TOGETHER or item.path.name in TOGETHER
        item.add_marker(pytest.mark.xdist_group("measured" if together else item.path.stem))
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the libraries stay: no later collection need look at their objects again


def pytest_runtest_setup(item: pytest.Item) -> None:
    processes.allowed = any(item.get_closest_marker(name) for name in ("processes", "browser"))
    processes.unmarked.clear()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    yield
    assert not processes.unmarked, f"a test without @pytest.mark.processes has started {processes.unmarked}"


def pytest_runtest_teardown() -> None:
    processes.end_all()


# ---- scripts ---------------------------------------------------------------------------------------------------------


def run_tool(name: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a script of tools/ as a user would, in a process, and give back its exit code, stdout and stderr."""
    return run_python(ROOT / "tools" / name, *arguments, **options)


def run_script(script: str, *arguments: object) -> None:
    """Run a script in this process, which has the libraries loaded; ends it with a failure, SystemExit is raised."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.syspath_prepend((ROOT / script).parent)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise
        finally:
            signal.signal(signal.SIGTERM, before)


def run_here(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """The same, with its exit code, stdout and stderr. What would end it with a traceback is raised."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_script(script, *arguments)
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # as the interpreter does it
        code, err = 1, io.StringIO(f"{err.getvalue()}{code}\n")
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, of a file that is closed again."""
    with Image.open(path) as image:
        return image.size


# ---- folders of the whole run ----------------------------------------------------------------------------------------


def made_once(name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A folder that the first worker to need it makes; in the end it must be as it was made."""
    folder = Path(os.environ[RUN]) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            beside = folder.with_suffix(".part")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                make(beside)
            beside.rename(folder)
    before = _files(folder)
    yield folder
    assert _files(folder) == before, f"a test has written into {folder}, which all tests share: copy it first"


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


@pytest.fixture(scope="session")
def official_dir() -> Iterator[Path]:
    """A tiny model in the official layout: model.pth, vae/, t5/."""
    yield from made_once("official", lambda folder: run_script("tools/make_tiny_checkpoint.py", folder))


@pytest.fixture(scope="session")
def verified_once() -> Iterator[None]:
    """These folders stay as they are: in a worker the first who loads one checks its files, for all who follow."""
    from mige.checkpoints import folder as checkpoint

    verify, seen = checkpoint.verify, set()

    def once(folder: Path, variant: str | None = None) -> None:
        if (folder, variant) not in seen:
            verify(folder, variant)
        if Path(folder).parent == Path(os.environ[RUN]):
            seen.add((folder, variant))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "verify", once)
        yield


@pytest.fixture(scope="session")
def tiny_model(official_dir, verified_once) -> Iterator[Path]:
    """The checkpoint folder converted from `official_dir`."""
    convert = "tools/convert_checkpoint.py"
    yield from made_once("tiny", lambda folder: run_script(convert, *release_arguments(official_dir, folder)))


@pytest.fixture(scope="session")
def lively(tiny_model) -> Iterator[Path]:
    """`tiny_model` with weights of which every part does something."""
    from lively import nontrivial_checkpoint

    yield from made_once("model", lambda folder: nontrivial_checkpoint(tiny_model, folder))


def release_arguments(official: Path, output: Path, config: Path = ROOT / "configs" / "tiny.py") -> list[object]:
    """Arguments of tools/convert_checkpoint.py for the folder that tools/make_tiny_checkpoint.py makes."""
    files = ["--model", official / "model.pth", "--vae", official / "vae", "--t5", official / "t5"]
    return ["release", *files, "--output", output, "--config", config]
