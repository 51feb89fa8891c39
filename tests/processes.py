"""Python processes for tests: forks of one that has imported everything (`fork_server.py`), started in .05 s.

`run_python("tools/x.py", ...)` and `start_python(...)` take what the interpreter takes: a script, -m module, -c code.
"""

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
ADDRESS = "MIGE_FORK_SERVER"  # the environment variable that tells xdist's workers where it listens
started: list["PythonProcess"] = []  # by the test that runs
allowed = True  # set for every test: whether it is marked as one that starts processes


def environment() -> dict[str, str]:
    """This process's environment for a child, with the checkout importable."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def start_server(folder: Path) -> subprocess.Popen:
    """Start the server, which imports when it is first asked; it ends with this process, or is killed before."""
    address = str(folder / "server")
    command = [sys.executable, "-P", str(ROOT / "tests" / "fork_server.py"), address, str(os.getpid())]
    env = environment() | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator starts no thread
    server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listening\n"
    os.environ[ADDRESS] = address
    return server


class PythonProcess(subprocess.Popen):
    """A Popen whose process is the server's child: the server tells how it has ended.

    More than Popen takes: `file_size`, the limit on the bytes of a file, which stands in for a full disk.
    """

    def __init__(self, arguments: list[str], *, file_size: int | None = None, **options):
        assert allowed, "a test that starts processes is marked so: @pytest.mark.processes"
        self._file_size = file_size
        super().__init__(arguments, **options)
        started.append(self)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        pipes, start_new_session = others[3:9], others[14]
        assert preexec_fn is None, "not known here"
        request = {
            "arguments": args,
            "cwd": str(cwd or Path.cwd()),
            "env": env or environment(),
            "start_new_session": start_new_session,
            "group": os.getpgrp(),
            "file_size": self._file_size,
        }
        streams = [given if given != -1 else number for number, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        body = json.dumps(request).encode()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS])
        socket.send_fds(self._server, [struct.pack("I", len(body))], [*streams, *pass_fds])
        self._server.sendall(body)
        self.pid = self._receive()
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _receive(self) -> int:
        answer = self._server.recv(4, socket.MSG_WAITALL)
        if len(answer) < 4:
            raise RuntimeError("the fork server has ended: its message stands on stderr")
        return struct.unpack("i", answer)[0]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """(pid, status), or (0, 0) where it runs and os.WNOHANG is given."""
        if self._server.fileno() < 0:  # nobody holds this object any more, nor knows how its process has ended
            return self.pid, 0
        if flags & os.WNOHANG:
            waiting = array.array("i", [0])
            fcntl.ioctl(self._server, termios.FIONREAD, waiting)
            if waiting[0] < 4:
                return 0, 0
        status = self._receive()
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


def start_python(*arguments: object, **options) -> PythonProcess:
    """`python ARGUMENTS`; the options are Popen's, text unless said otherwise. `env`: see `environment`."""
    return PythonProcess([*map(str, arguments)], **{"text": True} | options)


def run_python(*arguments: object, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` to its end: exit code, stdout and stderr."""
    with start_python(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
