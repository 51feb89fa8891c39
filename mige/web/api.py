"""The HTTP endpoint: images for programs, in the form that OpenAI's client speaks.

    client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
    client.images.edit(image=open("photo.jpg", "rb"), prompt="make it snowy", extra_body={"seed": 3})

It keeps the page's rules: the names it answers to, the limits on what arrives, files in the private folder alone, no
address fetched. One request is at work at a time; page and endpoint take turns where both have some that wait.
"""

import asyncio
import base64
import hmac
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import torch
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mige.tasks import MAX_REFERENCES
from mige.web.api_request import ApiError, read_request
from mige.web.event_body import BadRequestError, kind
from mige.web.file_store import FileStore, StoreFullError
from mige.web.instructions import RefusedError
from mige.web.origin import OwnNames
from mige.web.provenance import png_with_settings
from mige.web.service import GenerationService, Made, Request, Stopped
from mige.web.traffic import MAX_BODY, UPLOAD_MB, Traffic, read_json

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
MAX_FIELDS = 64  # of a form

_log = logging.getLogger(__name__)


class Endpoint:
    """ASGI middleware: the addresses of the endpoint are its own, all others go on to `app`, where there is one."""

    def __init__(self, app: ASGIApp | None, api: "Api"):
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, of any kind."""
        is_own = scope["type"] == "http" and (scope["path"] == "/health" or scope["path"].startswith("/v1/"))
        if self.app is not None and not is_own:
            await self.app(scope, receive, send)
            return
        answer = await self.api.answer(scope, receive)
        if answer is not None:
            await answer(scope, receive, send)


class Api:
    """What the endpoint answers.

    Args:
        key: what a request has to bear as "Authorization: Bearer KEY", but for /health; None for nothing.
    """

    def __init__(
        self, service: GenerationService, store: FileStore, names: OwnNames, traffic: Traffic, key: str | None = None
    ):
        self.service, self.store, self.names, self.traffic = service, store, names, traffic
        self._key = None if key is None else key.encode()
        self._turn = asyncio.Lock()  # first come, first served
        self._started = int(time.time())

    async def answer(self, scope: Scope, receive: Receive) -> JSONResponse | None:
        """The answer to one request; None where nobody is there to be answered."""
        try:
            self.names.check(scope["headers"])
            return await self._answer(scope["method"], scope["path"], scope, receive)
        except ClientDisconnect:
            return None
        except ApiError as error:
            return _error(str(error), error.status, error.param, error.code)
        except BadRequestError as refusal:
            return _error(str(refusal), refusal.status)
        except RefusedError as refusal:
            return _error(str(refusal), 400)
        except StoreFullError:
            return _error("The server holds too many files: try again in an hour.", 507)
        except Stopped:
            return _error("The server is closing.", 503)
        except torch.OutOfMemoryError:
            return _error("The model ran out of memory: ask for fewer images at once, or a smaller size.", 500)
        except Exception:
            _log.exception("%s %s failed", scope["method"], ascii(scope["path"]))
            return _error("Something went wrong at our end: the log of the server says what.", 500)

    async def _answer(self, method: str, path: str, scope: Scope, receive: Receive) -> JSONResponse:
        expected = {"/health": "GET", "/v1/models": "GET", EDITS: "POST", GENERATIONS: "POST"}
        one = path.removeprefix("/v1/models/")
        known = path in expected or one == self.service.name
        if path != "/health":
            self._check_key(scope)
        if not known:
            raise ApiError("There is nothing at this address.", 404, code="not_found")
        wanted = expected.get(path, "GET")
        if method != wanted and (method, wanted) != ("HEAD", "GET"):
            raise ApiError(f"{method} is not understood here: use {wanted}.", 405)
        if path == "/health":
            waiting = self.traffic.waiting + self.traffic.queued()
            return JSONResponse({"status": "ok", "model": self.service.name, "waiting": waiting})
        if wanted == "GET":
            model = {"id": self.service.name, "object": "model", "created": self._started, "owned_by": "mige"}
            return JSONResponse({"object": "list", "data": [model]} if path == "/v1/models" else model)
        return await self._images(path == EDITS, scope, receive)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None:
            return
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], b"Bearer " + self._key):
            message = "The key is missing or wrong: send the one that this server was started with, as “Bearer KEY”."
            raise ApiError(message, 401, code="invalid_api_key")

    async def _images(self, edits: bool, scope: Scope, receive: Receive) -> JSONResponse:
        """Read a request, wait its turn, and make its images; its files go when it ends, however it does."""
        stored: list[str] = []
        try:
            with self.traffic.sending():
                self.traffic.require_room()
                if edits:
                    limits = {"max_files": MAX_REFERENCES + 1, "max_fields": MAX_FIELDS, "max_part_size": MAX_BODY}
                    async with self.traffic.form(scope, receive, **limits) as form:
                        request = await self._read_form(form, stored)
                else:
                    fields = await read_json(scope, receive)
                    if not isinstance(fields, dict):
                        raise ApiError(f"The request is {kind(fields)}: send an object.")
                    request = read_request(self.service, fields, 0, mask=False, edits=False)
            with self._waiting():
                made = await self._make(request, receive)
            return JSONResponse(await anyio.to_thread.run_sync(_answer_of, made))
        finally:
            for path in stored:
                self.store.discard(path)

    async def _read_form(self, form: FormData, stored: list[str]) -> Request:
        """The request of a form, its files stored; their paths are noted in `stored`."""
        fields: dict[str, Any] = {}
        pictures: list[UploadFile] = []
        masks: list[UploadFile] = []
        for name, value in form.multi_items():
            is_file = name in ("image", "image[]", "mask")
            if isinstance(value, str) and is_file:
                raise ApiError(f"“{name}” is a text: send the file itself, no address is fetched.", param=name)
            if isinstance(value, UploadFile) and not is_file:
                raise ApiError(f"{name[:40]!a} is a file: expected a text.", param=name[:40])
            if name in fields or (name == "mask" and masks):
                raise ApiError(f"{name[:40]!a} is sent twice: send it once.", param=name[:40])
            if isinstance(value, str):
                fields[name] = value
            elif (value.size or 0) > UPLOAD_MB * 2**20:
                raise ApiError(f"“{name}” has more than {UPLOAD_MB} MB: send less.", 413, param=name)
            else:
                (masks if name == "mask" else pictures).append(value)
        request = read_request(self.service, fields, len(pictures), mask=bool(masks), edits=True)
        for file in [*pictures, *masks]:
            stored.append(self.store.add_upload("image", await file.read()))
        paths = [Path(path) for path in stored]
        mask = paths[-1] if masks else None
        return replace(request, pictures=tuple(paths[: len(pictures)]), mask=mask)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.traffic.require_room()
        self.traffic.waiting += 1
        try:
            yield
        finally:
            self.traffic.waiting -= 1

    async def _make(self, request: Request, receive: Receive) -> Made:
        """The images of a request, in its turn. A client that leaves stops the work: raises ClientDisconnect."""
        stop = threading.Event()
        outcome: Made | Exception = ClientDisconnect()

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            stop.set()
            group.cancel_scope.cancel()

        def work() -> Made:
            *_, made = self.service.run(request, stop, previews=False)
            return made

        async with anyio.create_task_group() as group:
            group.start_soon(leave)
            try:
                async with self._turn:
                    outcome = await anyio.to_thread.run_sync(work)  # it is waited for, even when the client has left
            except Exception as error:  # raised below: a group would wrap it
                outcome = error
            group.cancel_scope.cancel()
        if isinstance(outcome, Exception):
            left = stop.is_set() and isinstance(outcome, Stopped)
            raise ClientDisconnect if left else outcome
        return outcome


def _answer_of(made: Made) -> dict[str, Any]:
    """OpenAI's answer, and the seed of each image."""
    width, height = made.pictures[0].size
    data = [
        {"b64_json": base64.b64encode(png_with_settings(picture, settings)).decode(), "seed": settings["seed"]}
        for picture, settings in zip(made.pictures, made.settings, strict=True)
    ]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{width}x{height}"}


def _error(sentence: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form; what may be tried again says when."""
    whose = "invalid_request_error" if status < 500 else "server_error"
    headers = {503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    body = {"error": {"message": sentence, "type": whose, "param": param, "code": code}}
    return JSONResponse(body, status, headers)
