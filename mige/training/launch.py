"""Starts train_scripts/train_mige.py: alone, or on every GPU of one or several machines by torchrun.

    python -m mige.training.launch configs/mige_512.py --output output/runs/mine [section.key=value ...]

train_scripts/train_mige.sh calls it. One process takes the place of this one, so signals and exit code are its own.
Several are children of torchrun, which ends them by SIGKILL or makes orphans of them if it is told to stop twice; so it
is never told: it has a session of its own, and a stop goes to the trainings themselves.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # accelerate brings it; by hand: pip install 'mige[launch]'

from mige.training.signals import OUTCOME, PREEMPTED
from mige.utils.errors import UserError

SCRIPT = "train_scripts/train_mige.py"
INTERRUPTED = 130
"""Exit code after a second Ctrl-C: nothing more is saved."""

_SHUTDOWN_SECONDS = 3600  # torchrun's patience, 30 s by itself: a checkpoint of the whole model takes minutes


class LaunchError(UserError, ValueError):
    """What is asked for cannot be launched; the message names the variable."""


@dataclass(frozen=True)
class Launch:
    """How a training is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    several: bool  # by torchrun, whose children the trainings are


def plan(arguments: Sequence[str], environment: Mapping[str, str], gpus: int) -> Launch:
    """What starts the training on this machine.

    Args:
        arguments: of train_mige.py.
        environment: LAUNCH (cpu, one_gpu, ddp, fsdp2, zero2), PROCESSES of this machine (default: its GPUs, 1 without
            one), MACHINES (1), RANK of this machine (0), MAIN_ADDRESS (127.0.0.1), MAIN_PORT (29500).
        gpus: of this machine.

    Raises LaunchError naming the variable that does not fit.
    """
    machines, rank = _number(environment, "MACHINES", 1, 1), _number(environment, "RANK", 0, 0)
    processes = _number(environment, "PROCESSES", max(gpus, 1), 1)
    if rank >= machines:
        raise LaunchError(f"RANK is {rank}, expected 0 to {machines - 1}: it counts the {machines} MACHINES from 0")
    several = processes * machines > 1
    how = environment.get("LAUNCH") or ("cpu" if gpus == 0 else "ddp" if several else "one_gpu")
    known = ("cpu", "one_gpu", "ddp", "fsdp2", "zero2")
    if how not in known:
        raise LaunchError(f"LAUNCH is {how!r}, expected one of {', '.join(known)}")
    if how == "one_gpu" and several:
        raise LaunchError(f"LAUNCH is 'one_gpu', but there are {processes} x {machines} processes: use ddp")
    own = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS)}
    if how in ("cpu", "one_gpu") and not several:
        return Launch((sys.executable, SCRIPT, *arguments), own | _accelerate(how), False)
    port = _number(environment, "MAIN_PORT", 29500, 1)
    address = environment.get("MAIN_ADDRESS") or "127.0.0.1"
    if how == "cpu":
        meeting = ["--master_addr", address, "--master_port", str(port)] if machines > 1 else ["--standalone"]
        starter = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                   "--nnodes", str(machines), "--node_rank", str(rank), *meeting]  # fmt: skip
        return Launch((*starter, SCRIPT, *arguments), own | _accelerate(how), True)
    file = "accelerate_config.yaml" if how == "zero2" else f"configs/accelerate/{how}.yaml"
    starter = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", file,
               "--num_processes", str(processes * machines), "--num_machines", str(machines),
               "--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", str(port)]  # fmt: skip
    return Launch((*starter, SCRIPT, *arguments), own, True)


def _accelerate(how: str) -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": "true"} if how == "cpu" else {}


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name} is {text!r}, expected a whole number from {least}")
    return int(text)


class Supervisor:
    """Waits for a launcher and hands signals to the trainings below it."""

    def __init__(self, launch: Launch):
        self.launch, self.process = launch, None
        self.stopping, self.interrupts = False, 0

    def run(self) -> int:
        """Start, wait; the trainings' own exit code."""
        with tempfile.TemporaryDirectory() as folder:
            outcome = Path(folder) / "outcome"
            environment = os.environ | self.launch.environment | {OUTCOME: str(outcome)}
            for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(name, self._take)
            self.process = subprocess.Popen(self.launch.command, env=environment, start_new_session=True)
            if self.stopping:
                self._stop()
            code = self.process.wait()
            said = outcome.read_text() if outcome.exists() else ""
        if self.interrupts > 1:
            return INTERRUPTED
        if said == str(PREEMPTED) or (self.stopping and not said):  # asked before there was anything to save
            return PREEMPTED
        return code if code >= 0 else 128 - code

    def _take(self, number: int, _) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            self._kill()
        elif not self.stopping:
            self.stopping = True
            if self.process is not None:
                self._stop()

    def _stop(self) -> None:
        """SIGTERM to the trainings, or to the launcher where it has not started any."""
        launcher = psutil.Process(self.process.pid)
        for one in launcher.children() or [launcher]:
            _send(one, signal.SIGTERM)

    def _kill(self) -> None:
        launcher = psutil.Process(self.process.pid)
        for one in [launcher, *launcher.children(recursive=True)]:
            _send(one, signal.SIGKILL)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself meanwhile: what was to be reached
        process.send_signal(number)


def main() -> int:
    """The exit code of the training: 0, 75 after a stop, 130 after a second Ctrl-C, 1 after an error."""
    import torch  # takes seconds; `plan` needs none of it

    try:
        launch = plan(sys.argv[1:], os.environ, torch.cuda.device_count())
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if launch.several:
        return Supervisor(launch).run()
    os.execve(launch.command[0], launch.command, os.environ | launch.environment)


if __name__ == "__main__":
    sys.exit(main())
