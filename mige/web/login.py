"""A name and a password before everything else: HTTP's own login (RFC 7617), which browsers and clients know.

There is no session and no cookie: a browser sends the name with every request to this server, and no other page can
make it do so (`origin.py`).
"""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Mapping

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

WRONG_SECONDS = 1.0  # that a wrong password waits for its answer
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="MIGE", charset="UTF-8"'}
_OPEN = ("/health", "/gradio_api/startup-events")  # the second starts the queue, once: Gradio asks itself for it
_ENDPOINT = "/v1/"


class Login:
    """ASGI middleware around the whole server.

    Args:
        users: passwords by name; none: everybody may enter.
        has_key: whether the HTTP endpoint asks for a key of its own; else it needs the login too.
    """

    def __init__(self, app: ASGIApp, users: Mapping[str, str], has_key: bool = False):
        self.app, self.has_key = app, has_key
        self.users = {name.encode(): password.encode() for name, password in users.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: let in, or asked who it is."""
        if not self.users or scope["type"] == "lifespan" or self._is_open(scope["path"]) or self._knows(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if any(name == b"authorization" for name, _ in scope["headers"]):
            await asyncio.sleep(WRONG_SECONDS)
        refusal = PlainTextResponse("This page needs a name and a password.", 401, headers=_CHALLENGE)
        await refusal(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in _OPEN or (self.has_key and path.startswith(_ENDPOINT))

    def _knows(self, scope: Scope) -> bool:
        """Whether a request bears one user's name and password; every comparison takes as long as any other."""
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, encoded = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        if kind.lower() != b"basic":
            return False
        try:
            name, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except binascii.Error:
            return False
        known = [hmac.compare_digest(name, user) & hmac.compare_digest(password, own)
                 for user, own in self.users.items()]  # fmt: skip
        return any(known)
