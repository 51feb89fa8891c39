"""`python ARGUMENTS` for shell scripts, or for a worker of pytest: a fork of the fork server, with this one's streams.

Signals are handed on, and this process ends as the fork has ended. Only the standard library: it starts in .02 s.
"""

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

ADDRESS = "MIGE_FORK_SERVER"  # the environment variable that tells where it listens
WORKER = "worker"  # before the arguments: for pytest-xdist, whose workers have threads and so must not fork


def ask(request: dict, descriptors: list[int]) -> tuple[socket.socket, int]:
    """Have a process started: the connection, by which its wait status comes when it has ended, and its pid."""
    body = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[ADDRESS])
    socket.send_fds(server, [struct.pack("I", len(body))], descriptors)
    server.sendall(body)
    return server, receive(server)


def receive(server: socket.socket) -> int:
    answer = server.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        raise RuntimeError("the fork server has ended: its message stands on stderr")
    return struct.unpack("i", answer)[0]


def request(arguments: list[str], env: dict[str, str], **more: object) -> dict:
    """What the server is asked for; `arguments` are Python's, or those of a `program` to be started as ever."""
    default = {"program": None, "cwd": str(Path.cwd()), "start_new_session": False, "group": 0, "file_size": None,
               "forks": True}  # whether the Python processes that it starts are forks too  # fmt: skip
    return {"arguments": arguments, "env": env} | default | more


def main() -> None:
    worker = sys.argv[1] == WORKER
    server, pid = ask(request(sys.argv[2 if worker else 1 :], dict(os.environ), forks=not worker), [0, 1, 2])
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, lambda number, _: os.kill(pid, number))
    code = os.waitstatus_to_exitcode(receive(server))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
