"""A server of the HTTP endpoint alone, without the page."""

import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from mige.web.api import Api, Endpoint
from mige.web.file_store import FileStore
from mige.web.origin import OwnNames
from mige.web.service import GenerationService
from mige.web.traffic import Traffic

PORT = 7860  # the page's first


@contextmanager
def serving_endpoint(
    service: GenerationService,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    public_hosts: Sequence[str] = (),
    api_key: str | None = None,
) -> Iterator[str]:
    """Serve the endpoint while the context lasts, and yield its address; closes the service in the end.

    Args: those of `page.serving`; a port of None is 7860, one of 0 any that is free. Raises OSError if it is taken.
    """
    with tempfile.TemporaryDirectory(prefix="mige-web-", ignore_cleanup_errors=True) as folder:
        api = Api(service, FileStore(Path(folder)), OwnNames(host, public_hosts), Traffic(), api_key)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, PORT if port is None else port), family=family) as listening:
            config = uvicorn.Config(Endpoint(None, api), log_level="warning", lifespan="off", ws="none")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, args=([listening],), name="endpoint")
            thread.start()
            try:
                named = f"[{host}]" if ":" in host else host
                yield f"http://{named}:{listening.getsockname()[1]}/"
            finally:
                service.close()
                server.should_exit = True
                thread.join()
