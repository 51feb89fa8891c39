"""What stands between the network and Gradio: an allow-list of addresses, and no path that a client made up.

Gradio reads, copies and fetches what a request names. So no request reaches it as it came: only the routes the page
needs exist, uploads and files are served from the store, and of every event the body is parsed, checked against the
event it is for, and written anew. A value that looks like a file becomes the path of an upload of this server or
`NOT_UPLOADED`, whatever it named; the fields turn that into a sentence.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO
from urllib.parse import quote

import gradio as gr
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mige.web import event_body
from mige.web.event_body import BadRequestError
from mige.web.file_store import SUFFIXES, FileStore, StoreFullError
from mige.web.origin import OwnNames
from mige.web.traffic import MAX_FILES, UPLOAD_MB, Traffic, read_json

CHUNK = 256 * 1024  # bytes of a file that is sent at once

API = "/gradio_api"
_SEGMENT = r"[\w@+-][\w.@+-]*"
_READ = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(?:/\d{{1,4}})?"
    rf"|/(?:static|assets|svelte)/(?:{_SEGMENT}/)*{_SEGMENT}"
    rf"|{API}/(?:info/?|openapi\.json|app_id/?|user/?|login_check/?|startup-events|theme\.css|queue/status)"
    rf"|{API}/heartbeat/{event_body.ID.pattern}",
    re.ASCII,
)
_FILE = f"{API}/file="
_EVENT = re.compile(rf"{API}/(queue/join|run|api|call/v2|call)(?:/(\w{{1,80}}))?/?", re.ASCII)
_RESULT = re.compile(rf"{API}/call/(?:v2/)?\w{{1,80}}/({event_body.ID.pattern})", re.ASCII)
_ALL = "all_endpoints=true"
_FILE_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}

_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around Gradio's application.

    Args:
        page: gives the blocks that are served, once they are there.
        names: of the server, to which a request may be sent.
    """

    def __init__(
        self, app: ASGIApp, store: FileStore, page: Callable[[], gr.Blocks], names: OwnNames, traffic: Traffic
    ):
        self.app, self.store, self.page, self.names, self.traffic = app, store, page, names, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; whatever goes wrong ends in a sentence, and in the log if it is a fault of ours."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        except BadRequestError as refusal:
            await _refusal(str(refusal), refusal.status)(scope, receive, watched)
        except ClientDisconnect:  # nobody is there to be answered, and nothing is wrong here
            return
        except Exception:
            _log.exception("%s %s failed", scope["method"], ascii(scope["path"]))
            if not started:
                sentence = "Something went wrong at our end: the log of the server says what."
                await _refusal(sentence, 500)(scope, receive, watched)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        self.names.check(scope["headers"])
        headers = [(name, value) for name, value in scope["headers"] if not name.startswith(b"x-gradio-")]
        scope = scope | {"headers": headers}
        if method in ("GET", "HEAD"):
            await self._read(path, scope, receive, send)
        elif method == "POST":
            with self.traffic.sending():
                await self._write(path, scope, receive, send)
        elif method == "OPTIONS":
            await Response(status_code=204)(scope, receive, send)
        else:
            raise BadRequestError(f"{method} is not understood here: use GET or POST.", 405)

    async def _read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path.startswith(_FILE):
            await self._file(path.removeprefix(_FILE))(scope, receive, send)
        elif path == f"{API}/upload_progress":  # what Gradio would measure is an upload it receives itself
            await Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
        elif path == f"{API}/queue/data":
            session = self._require_session(Request(scope).query_params.get("session_hash"))
            await self.app(_asking(scope, f"session_hash={session}"), receive, send)
        elif match := _RESULT.fullmatch(path):
            self._require_event(match[1])
            await self.app(_asking(scope), receive, send)
        elif _READ.fullmatch(path):  # of what Gradio lets a reader ask for, the page needs the list of its events
            await self.app(_asking(scope, _ALL if scope["query_string"] == _ALL.encode() else ""), receive, send)
        else:
            raise _NOTHING_HERE

    async def _write(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == f"{API}/upload":
            answer = await self._upload(scope, receive)
            await answer(scope, receive, send)
            return
        match = _EVENT.fullmatch(path)
        if not match and path.rstrip("/") not in (f"{API}/cancel", f"{API}/reset"):
            raise _NOTHING_HERE
        sent = await read_json(scope, receive)
        if not match:
            body = event_body.of_cancel(sent)
        else:
            self.traffic.require_room()
            route, name = match.groups()
            body = event_body.of_event(self.page(), self.store, route, name, sent)
            if route == "call/v2":  # parameters by name: now in their order
                scope = scope | {"path": f"{API}/call/{name}", "raw_path": f"{API}/call/{name}".encode()}
        await self.app(*_with_body(_asking(scope), receive, body), send)

    def _file(self, path: str) -> Response:
        """A file that was handed out. For any other path one answer, be there a file or not."""
        file = self.store.open(path)
        if file is None:
            raise _NOTHING_HERE
        name = PurePath(path).name
        shown_as = SUFFIXES.get(PurePath(path).suffix.lower())
        headers = _FILE_HEADERS | {
            "Content-Length": str(os.fstat(file.fileno()).st_size),
            "Content-Disposition": f"{'inline' if shown_as else 'attachment'}; filename*=utf-8''{quote(name)}",
        }
        return StreamingResponse(_chunks(file), headers=headers, media_type=shown_as or "application/octet-stream")

    async def _upload(self, scope: Scope, receive: Receive) -> Response:
        """Keep the files of a form; answers with the paths by which the sender, and nobody else, may name them."""
        try:
            async with self.traffic.form(scope, receive, max_files=MAX_FILES, max_fields=8) as form:
                files = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
                if not files:
                    return PlainTextResponse("The upload holds no whole file: send the form again.", 400)
                if too_large := [file for file in files if (file.size or 0) > UPLOAD_MB * 2**20]:
                    size = (too_large[0].size or 0) / 2**20
                    return PlainTextResponse(f"The file has a size of {size:.1f} MB: send at most {UPLOAD_MB} MB.", 413)
                return JSONResponse([self.store.add_upload(one.filename or "image", await one.read()) for one in files])
        except BadRequestError as refusal:
            return PlainTextResponse(str(refusal), refusal.status)
        except StoreFullError:
            return PlainTextResponse("The server holds too many files: try again in an hour.", 507)

    def _require_session(self, session: str | None) -> str:
        """Gradio would open a stream and fail within."""
        if session is None or session not in self.page()._queue.pending_messages_per_session:
            raise _NO_SESSION
        return session

    def _require_event(self, event: str) -> None:
        queue = self.page()._queue
        waiting = queue.pending_event_ids_session.values()
        if event not in queue.event_ids_to_events and not any(event in ids for ids in waiting):
            raise _NO_SESSION


_NOTHING_HERE = BadRequestError("There is nothing at this address.", 404)
_NO_SESSION = BadRequestError("There is no such request: it has ended, or was never sent.", 404)


def _asking(scope: Scope, query: str = "") -> Scope:
    """The request with that query and no other."""
    return scope | {"query_string": query.encode()}


def _refusal(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence, "detail": sentence}, status)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def _with_body(scope: Scope, receive: Receive, body: dict[str, Any]) -> tuple[Scope, Receive]:
    """The request with another body; what follows the body, the client's leaving, comes through."""
    encoded = json.dumps(body).encode()
    dropped = (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(encoded)).encode())]
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": encoded, "more_body": False}

    return scope | {"headers": headers}, replayed
