"""One process a test run that has imported the libraries and starts scripts as its forks; `processes.py` talks to it.

python -P tests/fork_server.py SOCKET PID     # ends with the process PID, and with it all that it has started

A fork has its own pid, environment, folder and streams, and ends as Python does: exit codes, tracebacks and death by
SIGINT included. Unlike a fresh process it has what is read while importing (`READ_ON_IMPORT`), the seed of `hash` and
the peak memory of this one. The Python processes that it starts, torchrun's workers among them, are its own forks, and
os.execve of Python lets it go on as another one. Other programs and fresh processes of Python are started as ever.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import random
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from pathlib import Path

import psutil

READ_ON_IMPORT = ("HF_", "OMP_", "TRITON_", "TORCH_", "PYTHONHASHSEED")  # of the environment
IMPORTED = ("accelerate", "datasets", "diffusers.guiders", "peft", "torch._dynamo", "torch.distributed.run",
            "torch.distributed.fsdp", "torchvision.transforms.v2")  # fmt: skip
LATE = ("mige.web", "mige.cli",  # Gradio is for one script only; mains import by themselves
        "mige.fusion", "mige.pipeline", "mige.sampler")  # warn when imported  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of <sys/prctl.h>
KEPT = 3  # stdin, stdout, stderr; descriptors after them are kept open


def preload() -> None:
    """Import what scripts import. Nothing here may start a thread: a fork of several may hang."""
    import mige

    modules = (module.name for module in pkgutil.walk_packages(mige.__path__, "mige."))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="mige")  # as pyproject.toml has it: pytest's workers are forks
        for name in (*IMPORTED, *(name for name in modules if not name.startswith(LATE))):
            importlib.import_module(name)
    import torch
    from PIL import Image

    Image.init()  # its formats
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the collector writes into no page that forks share


_libc = ctypes.CDLL(None, use_errno=True)


# ---- the server ------------------------------------------------------------------------------------------------------


class Server:
    """Forks when asked and tells how forks have ended. What they leave behind becomes its own and ends with it."""

    def __init__(self, address: str, watched: int):
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.asking = socket.socket(socket.AF_UNIX)
        self.asking.bind(address)
        self.asking.listen(64)
        self.watched = os.pidfd_open(watched)
        self.ended, self.ending = socket.socketpair()
        self.ending.setblocking(False)
        signal.set_wakeup_fd(self.ending.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        self.clients: dict[int, socket.socket] = {}  # by the pid of their fork
        self.loaded = False

    def serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for one in (self.asking, self.watched, self.ended):
                selector.register(one, selectors.EVENT_READ)
            print("listening", flush=True)
            try:
                while True:
                    ready = [key.fileobj for key, _ in selector.select()]
                    if self.watched in ready:
                        return
                    if self.ended in ready:
                        self._report_ends()
                    if self.asking in ready:
                        self._fork(self.asking.accept()[0])
            finally:
                kill_all()

    def _fork(self, client: socket.socket) -> None:
        request, descriptors = _receive(client)
        if not self.loaded and request["program"] is None:  # a run that needs no fork pays nothing
            preload()
            self.loaded = True
        threads = len(list(Path("/proc/self/task").iterdir()))
        assert threads == 1, f"{threads} threads in the fork server: a fork may hang; which import has started one?"
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            with _fatal():
                self._leave(client)
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                assert os.getppid() == server, "the server has ended"
                become(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self.clients[pid] = client
        with contextlib.suppress(BrokenPipeError):  # who started it has ended meanwhile
            client.sendall(struct.pack("i", pid))

    def _leave(self, client: socket.socket) -> None:
        """In a fork: close what is the server's."""
        signal.set_wakeup_fd(-1)
        for one in (self.asking, self.ended, self.ending, client, *self.clients.values()):
            one.close()
        os.close(self.watched)

    def _report_ends(self) -> None:
        """Send the wait status of forks that have ended to who started them; orphans of theirs end unheard."""
        self.ended.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if client := self.clients.pop(end[0], None):
                    with client, contextlib.suppress(BrokenPipeError):  # who started it has ended before
                        client.sendall(struct.pack("i", end[1]))


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(client, 4, 16)
    (length,) = struct.unpack("I", head)
    with client.makefile("rb") as stream:
        return json.loads(stream.read(length)), descriptors


def kill_all() -> None:
    """Kill all that this process has started, and what that has left."""
    while below := psutil.Process().children(recursive=True):
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        os.waitpid(-1, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# ---- a fork ----------------------------------------------------------------------------------------------------------


def become(request: dict, descriptors: list[int]) -> None:
    """Be the process that was asked for, to its end."""
    for number, descriptor in enumerate(descriptors[:KEPT]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.setsid() if request["start_new_session"] else os.setpgid(0, request["group"])
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    os.chdir(request["cwd"])
    env = request["env"]
    if request["program"]:
        for name in (signal.SIGINT, signal.SIGPIPE):
            signal.signal(name, signal.SIG_DFL)
        for descriptor in descriptors[KEPT:]:
            os.set_inheritable(descriptor, True)
        os.execvpe(request["program"], [request["program"], *request["arguments"]], env)
    other = {name for name in {*env, *os.environ} if env.get(name) != os.environ.get(name)}
    other = [name for name in sorted(other) if name.startswith(READ_ON_IMPORT)]
    assert not other, f"{other} are read on import: this process must be a fresh one"
    run(request["arguments"], env, request["forks"])


@contextlib.contextmanager
def _fatal():
    """What is wrong with this file ends the fork, which must not come back to the server's loop."""
    try:
        yield
    finally:
        traceback.print_exc()
        os._exit(70)


def run(arguments: list[str], env: dict[str, str], forks: bool = True) -> None:
    """`python ARGUMENTS` in this process, to its end."""
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    first = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    import numpy as np
    import torch

    tempfile.tempdir = None  # TMPDIR may be another one
    random.seed()
    np.random.seed()
    torch.set_num_threads(1)
    if forks:
        subprocess._fork_exec = fork_exec
        os.execve, multiprocessing.util.spawnv_passfds = execve, spawnv_passfds
    end(call(*command([argument for argument in arguments if argument != "-u"])))


def command(arguments: list[str]) -> tuple:
    """What `python ARGUMENTS` calls: a function and its arguments."""
    kind, arguments = (arguments[0], arguments[1:]) if arguments[0] in ("-c", "-m") else (None, arguments)
    target = arguments[0]
    sys.argv[:] = [kind or target, *arguments[1:]]
    if kind == "-m":
        sys.path.insert(0, str(Path.cwd()))
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # so it is
        return runpy.run_module, target, None, "__main__", True
    if kind == "-c":
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        return exec, compile(target, "<string>", "exec"), main.__dict__
    sys.path.insert(0, str(Path(target).resolve().parent))
    return runpy.run_path, target, None, "__main__"


def call(function, *arguments: object) -> int:
    """The exit code that Python would end with."""
    try:
        function(*arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(code: int) -> None:
    """What Python does at exit, short of taking the libraries apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    multiprocessing.util._exit_function()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code)


# ---- what a fork starts itself ---------------------------------------------------------------------------------------

_fork_exec = subprocess._fork_exec


def fork_exec(args, executables, close, keep, cwd, env, *others) -> int:
    """In the place of subprocess's own: Python processes are forked, all else is started as ever."""
    arguments = [os.fsdecode(argument) for argument in args]
    if arguments[0] != sys.executable:
        return _fork_exec(args, executables, close, keep, cwd, env, *others)
    ends, (_, new_session, group, *_), preexec = others[:8], others[8:], others[15]
    assert preexec is None and group in (-1, None), "not known here"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    with _fatal():
        atexit._clear()  # what this process's parent has to do at its exit
        stdin, to_child, from_child, stdout, from_errors, stderr, failed, failing = ends
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            if descriptor not in (-1, number):
                os.dup2(descriptor, number)
        for descriptor in {stdin, to_child, from_child, stdout, from_errors, stderr, failed, failing}:
            if descriptor >= KEPT:
                os.close(descriptor)
        if new_session:
            os.setsid()
        if cwd is not None:
            os.chdir(cwd)
        pairs = os.environ.items() if env is None else (os.fsdecode(pair).split("=", 1) for pair in env)
        run(arguments[1:], dict(pairs))


def spawnv_passfds(path, arguments, kept) -> int:
    """In the place of multiprocessing's, which starts the server that its workers are forked from."""
    pid = os.fork()
    if pid == 0:
        with _fatal():
            atexit._clear()
            for name in [path.name for path in Path("/proc/self/fd").iterdir()]:
                if int(name) >= KEPT and int(name) not in kept:
                    with contextlib.suppress(OSError):  # that of the listing itself
                        os.close(int(name))
            run([os.fsdecode(argument) for argument in arguments[arguments.index("-c") :]], {**os.environ})
    return pid


_execve = os.execve


def execve(path, arguments, env) -> None:
    """In the place of os.execve: this process goes on as that Python one."""
    if os.fsdecode(path) != sys.executable:
        _execve(path, arguments, env)
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._clear()
    with _fatal():
        run([*arguments[1:]], {**env})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for pytest; this ends when pytest has ended
    Server(sys.argv[1], int(sys.argv[2])).serve()
