"""One process a test run that has imported the libraries and starts scripts as its forks; `processes.py` talks to it.

python -P tests/fork_server.py SOCKET PID     # ends with the process PID

A fork has its own pid, environment, folder and streams, and ends as Python does: exit codes, tracebacks and death by
SIGINT included. Unlike a fresh process it has what is read while importing (`READ_ON_IMPORT`), the seed of `hash` and
the peak memory of this one. The Python processes that it starts, torchrun's workers among them, are its own forks.
"""

import atexit
import contextlib
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
import threading
import traceback
import types
import warnings
from pathlib import Path

READ_ON_IMPORT = ("HF_", "OMP_", "TRITON_", "TORCH_", "PYTHONHASHSEED")  # of the environment
IMPORTED = ("accelerate", "datasets", "peft", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp",
            "torchvision.transforms.v2")  # fmt: skip
LATE = ("mige.web", "mige.cli",  # Gradio is for one script only; mains import by themselves
        "mige.fusion", "mige.pipeline", "mige.sampler")  # warn when imported  # fmt: skip
KEPT = 3  # stdin, stdout, stderr; descriptors after them are kept open


def preload() -> None:
    """Import what scripts import. Nothing here may start a thread: a fork of several may hang."""
    import mige

    modules = (module.name for module in pkgutil.walk_packages(mige.__path__, "mige."))
    for name in (*IMPORTED, *(name for name in modules if not name.startswith(LATE))):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the collector writes into no page that forks share


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(address: str, watched: int) -> None:
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        end = os.pidfd_open(watched)
        selector.register(end, selectors.EVENT_READ)
        print("listening", flush=True)
        loaded = False
        while True:
            for key, _ in selector.select():
                if key.fileobj == end:
                    return _kill_all(selector)
                if key.fileobj is not listener:
                    _report_end(selector, key)
                    continue
                client = listener.accept()[0]
                if not loaded:  # a run that starts no process pays nothing
                    preload()
                    loaded = True
                _fork(selector, client)


def _fork(selector: selectors.BaseSelector, client: socket.socket) -> None:
    request, descriptors = _receive(client)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads in the fork server: a fork may hang; which import has started one?"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _leave(selector, client)
        become(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    client.sendall(struct.pack("i", pid))
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(client, 4, 16)
    (length,) = struct.unpack("I", head)
    with client.makefile("rb") as stream:
        return json.loads(stream.read(length)), descriptors


def _leave(selector: selectors.BaseSelector, client: socket.socket) -> None:
    """In a fork: close what is the server's."""
    for key in list(selector.get_map().values()):
        if key.data:
            key.data[1].close()
        key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fileobj)
    selector.close()
    client.close()


def _report_end(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Send the wait status of a fork that has ended to who started it."""
    pid, client = key.data
    status = os.waitpid(pid, 0)[1]
    selector.unregister(key.fileobj)
    os.close(key.fileobj)
    with client, contextlib.suppress(BrokenPipeError):  # who started it has ended before
        client.sendall(struct.pack("i", status))


def _kill_all(selector: selectors.BaseSelector) -> None:
    for key in list(selector.get_map().values()):
        if key.data:
            os.kill(key.data[0], signal.SIGKILL)
            os.waitpid(key.data[0], 0)


# ---- a fork ----------------------------------------------------------------------------------------------------------


def become(request: dict, descriptors: list[int]) -> None:
    """Be the process that was asked for, to its end."""
    with _fatal():
        for number, descriptor in enumerate(descriptors[:KEPT]):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.setsid() if request["start_new_session"] else os.setpgid(0, request["group"])
        if request["file_size"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        os.chdir(request["cwd"])
        env = request["env"]
        other = {name for name in {*env, *os.environ} if env.get(name) != os.environ.get(name)}
        other = [name for name in sorted(other) if name.startswith(READ_ON_IMPORT)]
        assert not other, f"{other} are read on import: this process must be a fresh one"
        run(request["arguments"], env)


@contextlib.contextmanager
def _fatal():
    """What is wrong with this file ends the fork, which must not come back to the server's loop."""
    try:
        yield
    finally:
        traceback.print_exc()
        os._exit(70)


def run(arguments: list[str], env: dict[str, str]) -> None:
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

    random.seed()
    np.random.seed()
    torch.set_num_threads(1)
    subprocess._fork_exec = fork_exec
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
    sys.stdout.flush()
    sys.stderr.flush()
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


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for pytest; this ends when pytest has ended
    serve(sys.argv[1], int(sys.argv[2]))
