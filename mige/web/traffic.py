"""What arrives at one server, by whichever door: how much at once, how large, how long, and how many may wait.

The page's guard and the HTTP endpoint count in one `Traffic`, so that neither gets past the other's limits.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from mige.web.event_body import BadRequestError

UPLOAD_MB = 20  # of one file
MAX_FILES = 4  # of one upload of the page
MAX_UPLOAD = (MAX_FILES * UPLOAD_MB + 1) * 2**20  # bytes of one with what stands between its files
MAX_ARRIVING = 8 * MAX_UPLOAD  # of all uploads that arrive at the same time
MAX_BODY = 256 * 1024  # bytes of what is no upload
MAX_IN_FLIGHT = 64  # requests that send something, at the same time; finished ones wait in the queue instead
MAX_WAITING = 100  # requests in the queue; one more is told that it is full
BODY_SECONDS = 120  # for a body to arrive


class Traffic:
    """The counts of one server, all of its event loop."""

    def __init__(self):
        self.in_flight = 0  # requests that send something
        self.arriving = 0  # bytes of uploads
        self.waiting = 0  # requests of the endpoint, from their check to their answer
        self.queued: Callable[[], int] = lambda: 0  # how many wait in the page's own queue

    @contextmanager
    def sending(self) -> Iterator[None]:
        """A request that sends something. Raises BadRequestError (503) where there are too many."""
        if self.in_flight >= MAX_IN_FLIGHT:
            raise BadRequestError("The server has too many requests at once: try again in a moment.", 503)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def require_room(self) -> None:
        """Raise BadRequestError (503) where as many requests wait as may."""
        if self.waiting + self.queued() >= MAX_WAITING:
            raise BadRequestError(f"{MAX_WAITING} requests wait already: try again in some minutes.", 503)

    @asynccontextmanager
    async def form(self, scope: Scope, receive: Receive, **limits: int) -> AsyncIterator[FormData]:
        """The form of an upload, whose bytes count until the context ends: they lie on the disk all the while.

        limits: `max_files` and `max_fields` of the form. Raises BadRequestError for any that cannot be read.
        """
        request, taken = Request(scope), 0
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise BadRequestError("An upload is a form of type multipart/form-data: send one.")

        def take(num_bytes: int) -> None:
            nonlocal taken
            taken += num_bytes
            self.arriving += num_bytes
            if self.arriving > MAX_ARRIVING:
                raise BadRequestError("The server receives too many uploads at once: try again in a moment.", 503)

        try:
            reading = Request(scope, _limited(receive, MAX_UPLOAD, take)).form(**limits)
            try:
                form = await asyncio.wait_for(reading, BODY_SECONDS)
            except (HTTPException, MultiPartException, TimeoutError, UnicodeError, ValueError) as error:
                reason = getattr(error, "detail", "") or getattr(error, "message", "") or "cut short"
                raise BadRequestError(f"The upload cannot be read: {reason.rstrip('.')}.") from error
            try:
                yield form
            finally:
                await form.close()
        finally:
            self.arriving -= taken


async def read_json(scope: Scope, receive: Receive) -> Any:
    """The JSON of a body of at most MAX_BODY bytes; raises BadRequestError for any other."""
    try:
        return json.loads(await asyncio.wait_for(Request(scope, _limited(receive, MAX_BODY)).body(), BODY_SECONDS))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, an integer of thousands of digits
        raise BadRequestError("The request is no JSON that can be read: send an object.") from error
    except TimeoutError as error:
        raise BadRequestError("The request was cut short: send it again.", 408) from error


def _limited(receive: Receive, most: int, take: Callable[[int], None] = lambda num_bytes: None) -> Receive:
    """The same messages, refused once their bodies come to more than that many bytes; `take` is told of each."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        size = len(message.get("body", b""))
        take(size)
        total += size
        if total > most:
            raise BadRequestError(f"The request has a size of more than {most / 2**20:g} MB: send less.", 413)
        return message

    return limited
