"""A judge behind an endpoint of OpenAI's chat-completions form: OpenAI's own, vLLM, SGLang, llama.cpp and others."""

import base64
import email.utils
import io
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
from PIL import Image

from mige.evaluation.judges.answers import Reply, storable
from mige.evaluation.judges.judge import JudgeError, NoReplyError

MAX_TOKENS = 1400  # of a reply, as OmniContext's official judge has it
MAX_WAIT = 300.0  # seconds; who asks for more before the next attempt gets none
_ALL_LOST = {401: "the key is wrong or missing", 403: "the key may not do this", 404: "no such address or model"}
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class Endpoint:
    """Asks `POST BASE/chat/completions`, images as data URLs of PNG.

    What passes (429, 5xx, no connection, no reply within `timeout`) is tried again, after the seconds that Retry-After
    asks for or 1, 2, 4, ... up to 60.

    Args:
        model, base_url: as the endpoint knows them; the URL with its version, such as http://localhost:8000/v1.
        key: sent as a bearer token, and never shown; None sends none. timeout: seconds for one reply.
        attempts: for each question. wait: sleeps so many seconds.

    Raises JudgeError for an address that is none, or that the key would reach unencrypted.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key: str | None = None,
        *,
        temperature: float = 0.0,
        timeout: float = 180.0,
        attempts: int = 6,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.model, self.temperature, self.attempts, self.wait, self.key = model, temperature, attempts, wait, key
        try:
            url = httpx.URL(base_url.rstrip("/"))
        except httpx.InvalidURL as error:
            raise JudgeError(f"--endpoint: {error}; give a URL such as http://localhost:8000/v1") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise JudgeError("--endpoint: expected a URL without user and password, such as http://localhost:8000/v1")
        if key and url.scheme == "http" and url.host not in ("localhost", "127.0.0.1", "::1"):
            raise JudgeError(f"--endpoint: the key would go to {url.host} unencrypted; use https, or --key-env none")
        self.url = str(url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))
        self.lost, self.lock = 0, threading.Lock()  # questions in a row without any reply

    @property
    def settings(self) -> Mapping[str, str]:
        """Model, address and how it is asked."""
        return {
            "judge": self.model,
            "endpoint": self.url,
            "temperature": f"{self.temperature:g}",
            "tokens of an answer": f"at most {MAX_TOKENS}",
        }

    def ask(self, text: str, images: Sequence[Image.Image], repetition: int) -> Reply:
        """The reply of the endpoint; see `Judge.ask`. The repetition is sent as the seed."""
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            "temperature": self.temperature,
            "max_tokens": MAX_TOKENS,
            "seed": repetition,
        }
        try:
            reply = _reply(self._post(payload))
        except NoReplyError as error:
            self._count_lost(error)
            raise
        self.lost = 0
        return reply

    def _count_lost(self, error: NoReplyError) -> None:
        """Stop the run where nothing answers any more, rather than wait for every question."""
        with self.lock:
            self.lost += 1
            if self.lost >= 10:
                raise JudgeError(f"{self.url}: no reply to {self.lost} questions in a row, the last: {error}; "
                                 "what was answered is kept, run again when it answers") from error  # fmt: skip

    def _post(self, payload: Mapping[str, Any]) -> httpx.Response:
        """A successful response; raises NoReplyError or JudgeError."""
        problem, delay = "", 1.0
        for attempt in range(1, self.attempts + 1):
            asked = None
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=payload)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.status_code == 200:
                    return response
                problem = f"HTTP {response.status_code}: {_message(response, self.key)}"
                if response.status_code in _ALL_LOST:
                    raise JudgeError(f"{self.url}: {_ALL_LOST[response.status_code]} ({problem})")
                if response.status_code not in _PASSING:
                    raise NoReplyError(problem)
                asked = _retry_after(response.headers.get("Retry-After"))
            if asked is not None and asked > MAX_WAIT:
                raise NoReplyError(f"{problem}; it asks to wait {asked:.0f} s, {MAX_WAIT:.0f} at most are waited")
            if attempt < self.attempts:
                self.wait(delay if asked is None else asked)
                delay = min(2 * delay, 60.0)
        raise NoReplyError(f"{problem} ({self.attempts} attempts)")


def data_url(image: Image.Image) -> str:
    """An image as a data URL of PNG, without loss."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def key_from(variable: str) -> str | None:
    """The key that an environment variable holds, without blanks around it; None where it is not set or empty."""
    return os.environ.get(variable, "").strip() or None


def _reply(response: httpx.Response) -> Reply:
    """The text of a response; raises NoReplyError for JSON of another form."""
    try:
        choice = response.json()["choices"][0]
        message, stop = choice["message"], choice.get("finish_reason") or "stop"
        if message.get("refusal"):
            return Reply(storable(str(message["refusal"])), "refusal")
        content = message["content"] or ""
        if isinstance(content, list):  # parts
            content = "".join(part.get("text", "") for part in content)
        if not isinstance(content, str):
            raise TypeError(f"content of type {type(content).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"a response of another form than chat completions' ({error!r}): {response.text[:80]!r}"
        raise NoReplyError(problem) from error
    return Reply(storable(content), storable(str(stop)))


def _message(response: httpx.Response, key: str | None) -> str:
    """What a response says of itself, in one short line, and no part of the key."""
    try:
        said = response.json()["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, LookupError, TypeError):
        said = response.text
    said = " ".join(str(said).split())
    said = said.replace(key, "***") if key else said  # before it is cut, which would leave a part of the key
    return storable(said[:200]) or response.reason_phrase


def _retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3): a number or a date; None for neither."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:  # "-0000": UTC, and nothing is said of the sender's zone
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
