"""Values that are none of a field's, in every field and through every route; any bytes at all as a request."""

import json
import os
import secrets
import socket
from http.client import HTTPResponse
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_page import edit, events, http, tiny_service, upload

from mige.web.service import GenerationService

__all__ = ["events", "http", "tiny_service"]  # fixtures

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
SIZE = {"width": 128, "height": 128}  # by default an edit has its picture's
FORM = "multipart/form-data; boundary=B"
NUMBERS = {  # of the API -> in sentences, least and most, whether a fraction is one
    "seed": ("seed", 0, 2**32 - 1, False),
    "pictures": ("number of pictures", 1, 8, False),
    "steps": ("number of steps", 1, 100, False),
    "guidance": ("guidance", 0, 20, True),
    "source_guidance": ("source guidance", 0, 10, True),
    "width": ("width", 64, 256, False),
    "height": ("height", 64, 256, False),
}
"""For the tiny model, whose images have 128 px."""


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_that_is_none_of_the_fields_is_refused_by_its_name(http, monkeypatch, field):
    """Of a wrong type, not finite, not whole, one beyond either end, or of hundreds of digits: never rounded or cut."""
    ran = []
    monkeypatch.setattr(GenerationService, "_make", lambda *arguments: ran.append(arguments))
    name, least, most, is_fraction = NUMBERS[field]
    path = upload(http)
    wrong = [None, True, False, "1", "", [1], {"a": 1}, NAN, INF, -INF, least - 1, most + 1, HUGE, -HUGE]
    for value in [*wrong, least - 0.1, most + 0.1] if is_fraction else [*wrong, most - 0.5, 1e300]:
        said = edit(http, picture_1={"path": path}, **(SIZE | {field: value}))
        remedies = (
            "expected a ",
            " px: choose a multiple of ",
            f": choose one from {least} to",
            ": write a ",
        )
        assert value is not None or f"The {name} is empty: write a" in said
        assert f'"error": "The {name} is ' in said and any(remedy in said for remedy in remedies), (value, said)
    assert ran == []


@pytest.mark.parametrize("field", NUMBERS)
def test_both_ends_and_a_whole_number_written_as_a_fraction_are_taken(http, monkeypatch, field):
    """As JSON of other languages writes it: 4.0 is 4, exactly, up to the largest seed."""
    made = []
    monkeypatch.setattr(GenerationService, "_make", lambda self, request, *rest: made.append(request) or 1 / 0)
    _, least, most, _ = NUMBERS[field]
    for value in (least, most, float(least), float(most)):
        edit(http, **(SIZE | {field: value}))
        asked = {"seed": made[-1].seeds[0], "pictures": len(made[-1].seeds)}
        assert asked.get(field, getattr(made[-1], field, None)) == value
    assert len(made) == 4


def test_a_list_of_another_length_starts_no_event(http, events):
    """One too few, one too many, none and thousands, for every event and through every route.

    A client may leave out what is the page's own, all of it or nothing.
    """
    own = {one["id"] for one in http.get("/config").json()["components"] if one["skip_api"]}
    for event in events:
        many = len(event["inputs"])
        lengths = sorted({many, sum(number not in own for number in event["inputs"])})
        expected = " or ".join(map(str, lengths))
        routes = ["queue/join"] if event["queue"] else ["run/predict", "queue/join"]
        routes += [f"call/{event['api_name']}"] if event["api_name"] in ("generate", "edit") else []
        for length in {0, many - 1, many + 1, 5000} - {*lengths, -1}:
            body = {"data": [None] * length, "fn_index": event["id"], "session_hash": secrets.token_hex(8)}
            for route in routes if not event["cancels"] else []:
                answer = http.post(f"/gradio_api/{route}", json=body)
                assert answer.status_code == 400, (event["api_name"], route, length, answer.text)
                assert answer.json()["error"] == f"“data” has {length} values: this event takes {expected}."
    for data in (None, {}, "data", 3, True):
        answer = http.post("/gradio_api/call/edit", json={"data": data})
        assert answer.status_code == 400 and answer.json()["error"].startswith("“data” is ")


OF_PATHS = """. .. %2e%2e %252e%252e / // %2f %5c %00 %0d%0aX: %ff ; # ~ é * gradio_api file= file proxy= static assets
svelte config theme.css queue join data call v2 run api predict edit pick upload upload_progress cancel reset heartbeat
stream component_server etc passwd pyproject.toml info pwa_icon http: planted.example"""
OF_HEADERS = """Host Origin Referer Cookie Range Content-Type Content-Encoding X-Forwarded-Host X-Forwarded-Proto
X-Gradio-Server X-Gradio-User If-None-Match Upgrade Accept-Encoding"""
PIECES = st.sampled_from(OF_PATHS.split())
PATHS = st.tuples(st.sampled_from(["/", ""]), st.lists(PIECES, max_size=8)).map(
    lambda path: "/" + path[0].join(path[1])
)
QUERIES = st.dictionaries(
    st.sampled_from(["page", "deep_link", "session_hash", "upload_id", "all_endpoints", "__theme", "view"]),
    st.text("ab/.%&=é", max_size=6),
).map(lambda query: "&".join(f"{key}={value}" for key, value in query.items()))
HEADERS = st.dictionaries(
    st.sampled_from(OF_HEADERS.split()),
    st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=12)
    | st.sampled_from(["localhost", "evil.example", "http://evil.example", FORM, "gzip", "null"]),
    max_size=3,
)
FORMS = st.lists(
    st.sampled_from([b"--B", b"--B--", b"\r\n", b"\r\n\r\n", b"\0", b'Content-Disposition: form-data; name="files"'])
    | st.sampled_from([b'; filename="../../a.png"', b'; filename="\xff\0.png"', b"; filename*=utf-8''%2fetc%2fpasswd"])
    | st.binary(max_size=8),
    max_size=12,
).map(b"".join)
BODIES = FORMS | st.binary(max_size=30) | st.sampled_from([b"{}", b"[]", b"null", b'{"data":[],"fn_index":0}', b"NaN"])


def answered(client, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """Sent as it is: httpx would tidy up the address."""
    address = client.base_url.host, client.base_url.port
    sent = {"Host": address[0], **headers, "Content-Length": str(len(body)), "Connection": "close"}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in sent.items()) + "\r\n"
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(head.encode("latin-1") + body)
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        return answer.status, b"" if "event-stream" in answer.getheader("content-type", "") else answer.read()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT"]),
    path=PATHS
    | st.sampled_from(["/", "/config", "/gradio_api/upload", "/gradio_api/call/edit", "/gradio_api/queue/join"]),
    query=QUERIES,
    headers=HEADERS,
    body=BODIES,
)
@example(method="GET", path="/", query="page=x", headers={}, body=b"")
def test_no_bytes_at_all_end_in_an_error_of_ours(http, caplog, method, path, query, headers, body):
    """No address, header or form reads a file or fails inside; an upload lands in a folder of its own."""
    if path == "/gradio_api/upload" and len(headers) < 2:
        headers = headers | {"Content-Type": FORM}
    target = (path + "?" + query if query else path).encode("utf-8").decode("latin-1")
    status, content = answered(http, method, target, headers, body)
    assert status < 500, (status, content[:200])
    assert b"root:" not in content and b"[project]" not in content and b"Traceback" not in content
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    if path == "/gradio_api/upload" and method == "POST" and status == 200:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert all(Path(kept).parent.parent == folder for kept in json.loads(content))
