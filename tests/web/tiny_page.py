"""A page over a tiny model that the tests of a file share, and a request to it."""

import json
from collections.abc import Iterator

import httpx
import pytest
from test_web_service import CAT

from mige.inference.pipeline import MIGEPipeline
from mige.web import page
from mige.web.service import GenerationService

PUBLIC = "mige.example.org"


@pytest.fixture(scope="module")
def tiny_service(tiny_model) -> GenerationService:
    return GenerationService(MIGEPipeline.from_pretrained(tiny_model), "tiny")


@pytest.fixture(scope="module")
def http(tiny_service) -> Iterator[httpx.Client]:
    """A client of a page over a tiny model, which visitors reach as `PUBLIC` too."""
    with (
        page.serving(tiny_service, public_hosts=[PUBLIC]) as address,
        httpx.Client(base_url=address.rstrip("/"), timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def events(http) -> list[dict]:
    """The events of that page's config that run on the server."""
    return [event for event in http.get("/config").json()["dependencies"] if event["backend_fn"]]


def upload(http: httpx.Client, content: bytes | None = None) -> str:
    """The path by which this server knows a photograph, or what else is sent."""
    form = {"files": ("cat.jpg", CAT.read_bytes() if content is None else content)}
    [path] = http.post("/gradio_api/upload", files=form).json()
    return path


def edit(http: httpx.Client, **changes) -> str:
    """How the edit of an uploaded photograph ends, sent by the names of the fields."""
    picture = {} if "picture_1" in changes else {"picture_1": {"path": upload(http)}}
    asked = {"instruction": "make it dark", "steps": 1, "guidance": 1.0} | picture | changes
    called = http.post(  # by hand: httpx would refuse NaN
        "/gradio_api/call/v2/edit", content=json.dumps(asked), headers={"Content-Type": "application/json"}
    )
    if called.is_error:
        return called.text
    return http.get(f"/gradio_api/call/v2/edit/{called.json()['event_id']}").text
