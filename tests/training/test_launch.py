"""train_mige.sh as a user or a scheduler has it: signals, exit codes, what is left, several "machines"."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from processes import ServedProcess, environment, start_program, start_python
from test_trainer import ROOT, command, losses, metrics

from mige.training.checkpointing import list_checkpoints
from mige.training.launch import LaunchError, plan

ENDLESS = ("train.steps=100000", "train.checkpoint_every=100000")


@pytest.fixture
def launch(tiny_model, tmp_path):
    """Starts on the CPU what train_mige.sh goes on as."""

    def start(run: Path, *more: str, **variables: str) -> ServedProcess:
        given = command(tiny_model, run, *more)[1:]
        env, log = environment() | {"LAUNCH": "cpu", **variables}, tmp_path / f"{run.name}.log"
        with log.open("a") as err:  # a file: who reads a pipe to its end waits for orphans too
            process = start_python("-m", "mige.training.launch", *given, cwd=ROOT, env=env, start_new_session=True,
                                   stdout=err, stderr=err)  # fmt: skip
        process.log = log
        return process

    return start


def ends(process: ServedProcess, seconds: float, code: int) -> None:
    assert process.wait(seconds) == code, process.log.read_text()


@pytest.mark.processes
def test_the_script_becomes_the_launcher(tmp_path):
    """From any folder; it is the same process, so that signals and the exit code are the launcher's."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$$" "$PWD" "$PYTHONPATH" "$@"\nexit 75\n')
    (tmp_path / "python").chmod(0o755)
    env = environment() | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "mine"}
    script = ROOT / "train_scripts" / "train_mige.sh"
    for given, passed in (
        ([], ["configs/mige_512.py", "--output", "output/runs/mige_512"]),
        (["configs/tiny.py"], ["configs/tiny.py", "--output", "output/runs/tiny"]),
        (
            ["c.py", "my run", "train.seed=1", "a.b=[1, 2]"],
            ["c.py", "--output", "my run", "train.seed=1", "a.b=[1, 2]"],
        ),
    ):
        process = start_program("sh", script, *given, cwd=tmp_path, env=env, stdout=-1)
        said = process.communicate()[0].splitlines()
        assert process.returncode == 75
        assert said == [str(process.pid), str(ROOT), f"{ROOT}:mine", "-m", "mige.training.launch", *passed]


def family(process: ServedProcess) -> list[psutil.Process]:
    """A launcher, where it still runs, and all below it."""
    if process.poll() is not None:
        return []
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def until_steps(run: Path, process: ServedProcess, steps: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 120
    while len(metrics(run)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.02)
    return family(process)


def none_left(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "size", "stops"),
    [
        ("1", "train.batch_size=2", [lambda shell: shell.send_signal(signal.SIGTERM)]),  # the shell alone
        (
            "2",
            "train.batch_size=1",
            [
                lambda shell: os.killpg(shell.pid, signal.SIGINT),  # as a terminal sends Ctrl-C
                lambda shell: os.killpg(shell.pid, signal.SIGTERM),
            ],
        ),
    ],
)
def test_a_stopped_training_is_saved_and_resumes_with_the_same_losses(launch, tmp_path, processes, size, stops):
    """Stopped in each of the ways in turn, it goes on to its end."""
    run, saved = tmp_path / "run", 0
    for stop in stops:
        process = launch(run, *ENDLESS, size, PROCESSES=processes)
        all_of_them = until_steps(run, process, saved + 2)
        stop(process)
        ends(process, 60, 75)
        assert none_left(all_of_them)
        assert int(list_checkpoints(run)[-1].name[5:]) == metrics(run)[-1]["step"] >= saved + 2
        saved = metrics(run)[-1]["step"]
    for name in ("run", "whole"):
        process = launch(tmp_path / name, f"train.steps={saved + 2}", size, PROCESSES=processes)
        ends(process, 120, 0)
    assert len(losses(run)) == saved + 2 and losses(run) == losses(tmp_path / "whole")


@pytest.mark.processes
def test_a_second_ctrl_c_ends_at_once(launch, tmp_path):
    process = launch(tmp_path / "run", *ENDLESS, "train.batch_size=1", PROCESSES="2")
    all_of_them = until_steps(tmp_path / "run", process, 1)
    for one in process, process:
        one.send_signal(signal.SIGINT)
        time.sleep(0.05)  # two signals at once are one
    ends(process, 30, 130)
    assert none_left(all_of_them) and not list_checkpoints(tmp_path / "run")


@pytest.mark.processes
def test_two_machines_are_one_training(launch, tmp_path):
    """Two launchers with one process each, on this machine, against one process with the double batch."""
    steps = ("train.steps=4", "train.checkpoint_every=4", "train.eps=1e-2")
    port = str(20000 + os.getpid() % 20000)
    several = [
        launch(tmp_path / "two", *steps, "train.batch_size=1", MACHINES="2", RANK=rank, MAIN_PORT=port)
        for rank in ("0", "1")
    ]
    for process in several:
        ends(process, 120, 0)
    ends(launch(tmp_path / "one", *steps, "train.batch_size=2"), 120, 0)
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [line["samples"] for line in two] == [2, 4, 6, 8]  # one training: every step once
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "gpus", "file", "several"),
    [
        ({}, 0, None, False),
        ({}, 1, None, False),
        ({}, 2, "configs/accelerate/ddp.yaml", True),
        ({"MACHINES": "2", "RANK": "1"}, 1, "configs/accelerate/ddp.yaml", True),  # by GPUs x machines, not by GPUs
        ({"MACHINES": "2"}, 0, None, True),
        ({"LAUNCH": "zero2"}, 1, "accelerate_config.yaml", True),
        ({"LAUNCH": "fsdp2", "MACHINES": "4", "RANK": "3"}, 8, "configs/accelerate/fsdp2.yaml", True),
        ({"LAUNCH": "ddp", "PROCESSES": "2"}, 8, "configs/accelerate/ddp.yaml", True),
    ],
)
def test_gpus_and_machines_choose_the_launch_file(environment, gpus, file, several):
    made = plan(["c.py"], environment, gpus)
    command = list(made.command)
    assert made.several is several and (file in command if file else "--config_file" not in command)
    assert float(made.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600
    if file:
        processes = int(environment.get("PROCESSES", gpus)) * int(environment.get("MACHINES", 1))
        assert command[command.index("--num_processes") + 1] == str(processes)
        assert command[command.index("--machine_rank") + 1] == environment.get("RANK", "0")
        assert (ROOT / file).is_file()


def test_zero2_on_several_machines_needs_no_pdsh():
    assert "deepspeed_multinode_launcher: standard" in (ROOT / "accelerate_config.yaml").read_text()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MACHINES": "two"}, "MACHINES is 'two', expected a whole number from 1"),
        ({"MACHINES": "0"}, "MACHINES is '0', expected a whole number from 1"),
        ({"MACHINES": "2", "RANK": "2"}, "RANK is 2, expected 0 to 1"),
        ({"RANK": "1"}, "RANK is 1, expected 0 to 0"),
        ({"LAUNCH": "fsdp"}, "LAUNCH is 'fsdp', expected one of cpu, one_gpu, ddp, fsdp2, zero2"),
        ({"LAUNCH": "one_gpu", "MACHINES": "2"}, "LAUNCH is 'one_gpu', but there are 1 x 2 processes"),
    ],
)
def test_what_cannot_be_launched_is_named(environment, said):
    with pytest.raises(LaunchError, match=said):
        plan(["c.py"], environment, 1)
