"""Processes for tests: Python's are forks of one that has imported everything (`fork_server.py`), started in .05 s.

`run_python("tools/x.py", ...)` and `start_python(...)` take what the interpreter takes: a script, -m module, -c code;
`run_program` and `start_program` take any command, `sys.executable` for a fresh Python. All are children of the fork
server: they are killed with their test, and with the test run.
"""

import array
import contextlib
import fcntl
import multiprocessing.util
import os
import subprocess
import sys
import termios
from pathlib import Path

import psutil
from fork_client import ADDRESS, WORKER, ask, receive, request

ROOT = Path(__file__).parent.parent
started: list["ServedProcess"] = []  # by the test that runs
allowed = True  # set for every test: whether it is marked as one that starts processes
STARTING = ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")  # audit events
NOT_OURS = ("/sbin/ldconfig", "multiprocessing.resource_tracker")  # started by the standard library, once a process
unmarked: list[str] = []  # what a test without the mark has tried to start


def environment() -> dict[str, str]:
    """This process's environment for a child, with the checkout importable."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def shell_environment() -> dict[str, str]:
    """The same for a shell script: its `python` is a fork."""
    return environment() | {"PATH": os.pathsep.join([os.environ["MIGE_TEST_BIN"], os.environ["PATH"]])}


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: a test without the mark starts no process."""
    if event in STARTING and not allowed and not any(name in str(arguments[:2]) for name in NOT_OURS):
        unmarked.append(f"{event} {arguments[:2]}")
        raise AssertionError(f"a test that starts processes is marked so, @pytest.mark.processes: {unmarked[-1]}")


def spawnv_passfds(path, arguments, kept) -> int:
    """In the place of multiprocessing's, which no audit hook hears of."""
    watch("subprocess.Popen", (path, arguments))
    return _spawnv_passfds(path, arguments, kept)


_spawnv_passfds = multiprocessing.util.spawnv_passfds


def start_server(folder: Path) -> subprocess.Popen:
    """Start the server, which imports when it is first asked; it ends with this process, or is terminated before."""
    address, programs = str(folder / "server"), folder / "bin"
    command = [sys.executable, "-P", str(ROOT / "tests" / "fork_server.py"), address, str(os.getpid())]
    env = environment() | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator starts no thread
    server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listening\n"
    programs.mkdir()
    for name, first in (("python", ""), ("worker", WORKER)):
        client = f"exec '{sys.executable}' -IS '{ROOT / 'tests' / 'fork_client.py'}' {first} \"$@\"\n"
        (programs / name).write_text(f"#!/bin/sh\n{client}")
        (programs / name).chmod(0o755)
    os.environ |= {ADDRESS: address, "MIGE_TEST_BIN": str(programs)}
    return server


class ServedProcess(subprocess.Popen):
    """A Popen whose process is the server's child: the server tells how it has ended.

    More than Popen takes: `program`, to be started with these arguments in the place of a fork; `file_size`, the limit
    on the bytes of a file, which stands in for a full disk.
    """

    def __init__(self, arguments: list[str], *, program: str | None = None, file_size: int | None = None, **options):
        assert allowed, "a test that starts processes is marked so: @pytest.mark.processes"
        self._more = {"program": program, "file_size": file_size}
        super().__init__(arguments, **options)
        started.append(self)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        pipes, start_new_session = others[3:9], others[14]
        assert preexec_fn is None, "not known here"
        more = self._more | {"start_new_session": start_new_session, "group": os.getpgrp()}
        wanted = request(args, env or environment(), cwd=str(cwd or Path.cwd()), **more)
        streams = [given if given != -1 else number for number, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._server, self.pid = ask(wanted, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """(pid, status), or (0, 0) where it runs and os.WNOHANG is given."""
        if self._server.fileno() < 0:  # nobody holds this object any more, nor knows how its process has ended
            return self.pid, 0
        if flags & os.WNOHANG:
            waiting = array.array("i", [0])
            fcntl.ioctl(self._server, termios.FIONREAD, waiting)
            if waiting[0] < 4:
                return 0, 0
        status = receive(self._server)
        self._server.close()
        return self.pid, status

    def _internal_poll(self, *_, **__) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def end_all() -> None:
    """Kill what a test has left, with all below it, and close its streams."""
    while started:
        with started.pop() as process:  # to leave it waits
            if process.poll() is None:
                top = psutil.Process(process.pid)
                for one in (*top.children(recursive=True), top):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()


def start_python(*arguments: object, **options) -> ServedProcess:
    """`python ARGUMENTS`; the options are Popen's, text unless said otherwise. `env`: see `environment`."""
    return ServedProcess([*map(str, arguments)], **{"text": True} | options)


def start_program(program: object, *arguments: object, **options) -> ServedProcess:
    """Any command, in a fresh process; the options as `start_python` takes them."""
    return start_python(*arguments, program=str(program), **options)


def run_python(*arguments: object, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` to its end: exit code, stdout and stderr."""
    with start_python(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_program(program: object, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Any command to its end, in a fresh process."""
    return run_python(*arguments, program=str(program), **options)
