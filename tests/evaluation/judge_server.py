"""A server of OpenAI's chat-completions form on loopback whose replies are scripted."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judge_answers import completion


@dataclass
class Response:
    """What a request gets; `seconds`: how late."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def says(text: Any) -> Response:
    return Response(completion(text))


def fails(status: int, message: str = "busy", **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps({"error": {"message": message}}).encode(), status, named)


@dataclass
class Server:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)  # payloads, with "path" and "authorization"


@contextmanager
def serve(script: Callable[[dict[str, Any], int], Response]) -> Iterator[Server]:
    """A server whose n-th response is script(payload, n)."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                beside = {"path": self.path, "authorization": self.headers.get("Authorization")}
                server.requests.append(payload | beside)
            response = script(payload, number)
            time.sleep(response.seconds)
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # a client that did not wait

    http = Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def text_of(payload: dict[str, Any]) -> str:
    return payload["messages"][0]["content"][-1]["text"]


def images_of(payload: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in payload["messages"][0]["content"][:-1]]
