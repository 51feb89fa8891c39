"""The served page as an attacker uses it: every event the running page has, found in its own config."""

import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_page import PUBLIC, edit, events, http, tiny_service, upload

from mige.web.service import GenerationService

__all__ = ["events", "http", "tiny_service"]  # fixtures

SECRET = b"planted-secret-4711"
INTERNAL = ("Traceback", "went wrong at our end", "Internal Server Error", '"error": null', '"error":null')


@pytest.fixture
def planted(tmp_path) -> Iterator[dict[str, str]]:
    """Paths to a secret file in every place that Gradio would serve; keys say which, "missing" has no file."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    outside, cwd, inside = tmp_path / "secret.png", Path(f"planted-secret-{os.getpid()}.png"), folder / "secret.png"
    for path in (outside, cwd, inside):
        path.write_bytes(SECRET)
    link = folder / "link.png"
    link.symlink_to(outside)
    yield {
        "missing": str(tmp_path / "missing.png"),
        "temporary": str(outside),
        "working": str(cwd.absolute()),
        "relative": str(cwd),
        "dots": f"{folder}/../{outside.relative_to(outside.anchor)}",
        "link": str(link),
        "not handed out": str(inside),
        "file:": outside.as_uri(),
        "system": "/etc/passwd",
    }
    for path in (cwd, inside, link):
        path.unlink()


@pytest.fixture
def reached(monkeypatch) -> list[str]:
    """Every host that this process, which serves the page, resolves or connects to, this machine's address apart."""
    hosts: list[str] = []

    def spy(kind: type | object, name: str, host_of: Callable) -> None:
        real = getattr(kind, name)

        def noted(*arguments, **options):
            if (host := host_of(arguments)) not in ("127.0.0.1", b"127.0.0.1"):
                hosts.append(str(host))
                raise OSError(f"{name} of {host}")
            return real(*arguments, **options)

        monkeypatch.setattr(kind, name, noted)

    spy(socket, "getaddrinfo", lambda arguments: arguments[0])
    for name in ("connect", "connect_ex"):
        spy(socket.socket, name, lambda arguments: arguments[1][0])
    return hosts


def shapes(path: str) -> list:
    """The ways in which a value may name a file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    deeper = [path, {"path": path}, {"url": path, "meta": {"_type": "gradio.FileData"}}, {"value": {"deep": [file]}}]
    return [path, {"path": path}, file | {"url": path}, [{"image": file, "caption": path}], deeper]


def send(http: httpx.Client, event: dict, shape: int, value) -> str:
    """The value in every input of an event, through a route that starts one; all that was answered.

    The route follows from event and shape: every event and every shape goes through all three. Events that wait their
    turn are refused by the first.
    """
    data, index, name, session = [value] * len(event["inputs"]), event["id"], event["api_name"], secrets.token_hex(8)
    select = {"index": value, "value": value}
    body = {"data": data, "fn_index": index, "session_hash": session, "event_data": select, "trigger_id": index}
    route = 1 + (index + shape) % 2 if event["queue"] and shape else (index + shape) % 3
    if route == 0:
        return http.post("/gradio_api/run/predict", json=body).text
    if route == 1:
        joined, stream = http.post("/gradio_api/queue/join", json=body), f"queue/data?session_hash={session}"
    else:
        joined, stream = http.post(f"/gradio_api/call/{name}", json={"data": data}), f"call/{name}/"
    if joined.is_error:
        return joined.text
    return http.get(f"/gradio_api/{stream}{joined.json()['event_id'] if route == 2 else ''}").text


def neutral(text: str, path: str) -> str:
    """An answer without what differs in every request."""
    lines = [line for line in text.splitlines() if "process_completed" in line or "error" in line]
    kept = [line.split('"output":')[-1].split('"duration"')[0] if '"output":' in line else line for line in lines]
    return re.sub(r'"[\w-]{32}"', '"VISITOR"', "\n".join(kept).replace(path, "PATH"))


@pytest.mark.slow
def test_no_event_reads_publishes_or_tells_of_a_file(http, events, planted):
    asked = [
        (event, place, number, value)
        for event in events
        for place, path in planted.items()
        for number, value in enumerate(shapes(path))
        if number == 2 or place in ("missing", "temporary")
    ]
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda one: send(http, one[0], one[2], one[3]), asked))
    answers: dict = {}
    for (event, place, number, _), text in zip(asked, texts, strict=True):
        path, where = planted[place], (event["api_name"], place, number)
        assert SECRET.decode() not in text and "root:" not in text, where
        assert "file=" + path not in text, where
        for sign in INTERNAL:
            assert sign not in text, (where, sign)
        if number in (1, 2):  # those that quote nothing of what was sent
            same = answers.setdefault((event["id"], number), neutral(text, path))
            assert neutral(text, path) == same, where


ADDRESSES = ("http://planted.example/a.png", "https://203.0.113.7/a.png")  # neither is this machine's, nor anybody's


def test_no_event_and_no_route_fetches_an_address(http, events, reached):
    sent = [(event, number, shapes(url)[number]) for event in events for url in ADDRESSES for number in (2, 4)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda one: send(http, *one), sent))
    for url in ADDRESSES:
        for route in ("proxy=", "file=", "file/", "stream/", "upload_progress?upload_id=", "deep_link?session_hash="):
            http.get(f"/gradio_api/{route}{url}")
        host = url.split("/")[2]
        for name in ("Host", "Origin", "Referer", "X-Forwarded-Host", "X-Gradio-Server", "Cookie"):
            http.get("/config", headers={name: host if "ost" in name else url})
    assert reached == []


def test_no_address_serves_a_file_or_tells_of_one(http, planted):
    answers = set()
    for path in planted.values():
        for route in ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "gradio_api/proxy="):
            for spelled in (path, path.replace("/", "%2f"), path.replace("/", "%2F%2F")):
                answer = http.get(f"/{route}{spelled}")
                assert answer.status_code >= 400 and SECRET not in answer.content
                if route not in ("static/", "assets/"):  # those two hold Gradio's own files, which may be missing
                    answers.add((answer.status_code, answer.text))
    assert len(answers) == 1
    for route in ("component_server", "process_recording", "vibe-edit", "stream/a"):
        assert http.post(f"/gradio_api/{route}", json={"data": planted["working"]}).status_code == 404
    for route in ("deep_link?session_hash=a", "custom_component/a/client/b/c", "runs", "dev/reload"):
        assert http.get(f"/gradio_api/{route}").status_code == 404


def test_no_header_ends_in_an_error_or_makes_an_address_of_its_own(http):
    for value in ("[::1", "a b", "http://[::1", '"></script><script>', "file:///etc/passwd", "a/../b", ""):
        answer = http.get("/config", headers={"X-Forwarded-Host": value})
        assert answer.status_code == 400 and "“x-forwarded-host” names no host" in answer.json()["error"]
        assert "/etc/passwd" not in http.get("/config", headers={"X-Gradio-Server": value or "x"}).text
    for host in ("example.org", "a.example:8443, b", "[2001:db8::1]:8080"):
        root = http.get("/config", headers={"X-Forwarded-Host": host, "X-Forwarded-Proto": "https"}).json()["root"]
        assert root == f"https://{host.split(',')[0]}"


ROUTES = (  # method, path and what is sent: a page, its list of events, a file, an event, an upload
    ("GET", "/", {}),
    ("GET", "/config", {}),
    ("GET", "/gradio_api/file=/a", {}),
    ("POST", "/gradio_api/run/predict", {"content": b"{}"}),
    ("POST", "/gradio_api/cancel", {"content": b"{}"}),
    ("POST", "/gradio_api/upload", {"files": {"files": ("a.png", b"a")}}),
)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "rebound.example:7860", "Origin": "http://rebound.example:7860"},
        {"Host": "127.0.0.1.rebound.example"},
        {"Host": "localhost.rebound.example"},
        {"Host": f"{PUBLIC}.rebound.example"},
        {"Host": "2130706433"},
        {"Origin": "https://foreign.example"},
        {"Origin": "https://foreign.example", "X-Forwarded-Host": "foreign.example"},
        {"Origin": f"https://foreign.example/{PUBLIC}"},
        {"Origin": f"https://{PUBLIC}@foreign.example"},
        {"Origin": f"https://{PUBLIC}:1:foreign.example"},
        {"Origin": f"https://{PUBLIC}", "Host": "foreign.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Origin": "file://"},
        {"Origin": "http://[::1"},
    ],
    ids=str,
)
def test_no_other_web_page_reaches_this_one(http, headers):
    """Neither from its own address nor by a name of its owner's that leads here: no page, no list, no upload kept."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = set(folder.iterdir())
    for method, path, sent in ROUTES:
        answer = http.request(method, path, headers=headers, **sent)
        assert answer.status_code == 403, (path, answer.text)
        assert answer.json()["error"].startswith(
            f"This page is not served as “{headers['Host'].removesuffix(':7860')}”: start it with --public-host "
            if "Host" in headers
            else "This request comes from another web page"
        )
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "LOCALHOST:99"},
        {"Host": "page.localhost"},
        {"Host": "localhost."},
        {"Host": "192.0.2.7"},
        {"Host": "[2001:db8::1]:80", "Origin": "http://[2001:db8::1]:80"},
        {"Host": PUBLIC, "Origin": f"https://{PUBLIC}"},
        {"Origin": f"https://{PUBLIC}"},  # of a proxy that sends its own address
        {"Host": socket.gethostname()},
    ],
    ids=str,
)
def test_its_own_names_and_every_address_reach_the_page(http, headers):
    for method, path, sent in ROUTES:
        assert http.request(method, path, headers=headers, **sent).status_code in (200, 400, 404), path


def test_what_follows_the_address_of_a_page_changes_nothing(http):
    """Gradio reads parameters there that the page has no use for: one was an error of the server."""
    for path, queries in {
        "/": ("page=x", "page=x&page=", "deep_link=..%2f.."),
        "/config": ("page=x", "deep_link=a&page=%00", "%ff=%fe"),
        "/gradio_api/info": ("page=x", "all_endpoints=true&page=x"),
    }.items():
        plain = http.get(path)
        for query in queries:
            answer = http.get(f"{path}?{query}")
            assert (answer.status_code, answer.text) == (200, plain.text), (path, query)
    private = http.get("/gradio_api/info/?all_endpoints=true").json()
    assert private != plain.json()  # this one the page asks for


def test_an_upload_is_its_senders_and_lies_in_a_private_folder(http):
    first, second = (
        http.post("/gradio_api/upload", files={"files": ("../../a.html", b"<script>")}).json()[0] for _ in range(2)
    )
    assert first != second and first.endswith("/a.html")  # the same bytes, but nobody can reckon the other's path
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert Path(first).parent.parent == folder and folder.stat().st_mode & 0o777 == 0o700
    answer = http.get(f"/gradio_api/file={first}")
    assert answer.content == b"<script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    Path(first).unlink()
    Path(first).symlink_to("/etc/passwd")
    assert http.get(f"/gradio_api/file={first}").status_code == 404


def test_results_are_named_by_their_token_and_a_number(http, events):
    """As the page does it: a run of two images, then a click on the second one, or on one that is not there."""
    path = upload(http)
    for start, pick in zip(
        [event for event in events if event["api_name"] in ("generate", "edit")],
        [event for event in events if event["api_name"].startswith("pick")],
        strict=False,
    ):
        pictures = [{"path": path}] + [None] * (len(start["inputs"]) - 12)
        values = ["a picture 1", *pictures, 7, 2, 1, 1.0, 1.0, 128, 128, "", None, None]
        session = f"token{start['id']}"
        http.post("/gradio_api/queue/join", json={"data": values, "fn_index": start["id"], "session_hash": session})
        lines = http.get(f"/gradio_api/queue/data?session_hash={session}").text.splitlines()
        [ended] = [json.loads(line.removeprefix("data: ")) for line in lines if "process_completed" in line]
        token = ended["output"]["data"][1]
        asked = {"data": [token], "fn_index": pick["id"], "session_hash": session}
        shown = http.post("/gradio_api/run/predict", json=asked | {"event_data": {"index": 1, "value": None}}).json()
        assert shown["data"][3]["label"] == "Download PNG of seed 8"
        assert http.get(f"/gradio_api/file={shown['data'][3]['value']['path']}").content.startswith(b"\x89PNG")
        for index, sentence in ((2, "The number of the result is 2"), ("/etc/passwd", 'is \\"/etc/passwd\\"')):
            said = http.post("/gradio_api/run/predict", json=asked | {"event_data": {"index": index, "value": None}})
            assert sentence in said.text and "expected a whole number from 0 to 1" in said.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instruction": None}, "The instruction is empty"),
        ({"instruction": ["a"]}, 'The instruction is [\\"a\\"]: expected a text'),
        ({"picture_1": "photo.jpg"}, 'Picture 1 is \\"photo.jpg\\": expected a file that was uploaded'),
        ({"picture_1": {"path": "/etc/passwd"}}, "Picture 1 is no file that was uploaded to this server"),
        ({"seed": float("nan")}, "The seed is NaN: expected a whole number from 0 to 4294967295"),
        ({"seed": 0.5}, "The seed is 0.5: expected a whole number"),
        ({"seed": True}, "The seed is true: expected a whole number"),
        ({"pictures": 10**12}, "number of pictures is 1e+12: choose one from 1 to 8"),
        ({"width": 128.5}, "The width is 128.5: expected a whole number of px"),
        ({"guidance": "2"}, 'The guidance is \\"2\\": expected a number from 0 to 20'),
        ({"guidance": float("inf")}, "The guidance is inf: choose one from 0 to 20"),
        ({"negative": ["a"]}, 'The negative text is [\\"a\\"]: expected a text'),
        ({"negative": "a picture 1"}, "The negative text names a picture"),
        ({"negative": "blur"}, "The negative text is not read at this guidance"),
        ({"negative": "a\x00"}, "The negative text holds a character that is no text"),
        ({"guidence": 2}, "'guidence' is no parameter of /edit: it takes instruction, picture_1, seed"),
    ],
)
def test_a_wrong_value_gets_a_sentence_that_names_the_field_and_nothing_runs(http, monkeypatch, changes, words):
    """By the names of the parameters, and in their order by every route that starts an edit."""
    ran = []
    monkeypatch.setattr(GenerationService, "_make", lambda *arguments: ran.append(arguments))
    assert words in edit(http, **changes)
    event = next(event for event in http.get("/config").json()["dependencies"] if event["api_name"] == "edit")
    asked = {"instruction": "make it dark", "picture_1": None, "seed": 0, "pictures": 1, "steps": 1, "guidance": 1.0}
    asked |= {"source_guidance": 1.0, "width": 128, "height": 128, "negative": ""} | changes
    if len(asked) == 10:
        asked["picture_1"] = asked["picture_1"] or {"path": upload(http)}
        session = secrets.token_hex(8)
        body = {"data": [*asked.values()], "fn_index": event["id"], "session_hash": session}
        for route in ("call/edit", "queue/join"):
            sent = http.post(f"/gradio_api/{route}", content=json.dumps(body))
            stream = f"{route}/{sent.json()['event_id']}" if "call" in route else f"queue/data?session_hash={session}"
            assert words in http.get(f"/gradio_api/{stream}").text
        assert "waits its turn" in http.post("/gradio_api/run/predict", content=json.dumps(body)).json()["error"]
    assert ran == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["path", "url", "meta", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_ends_in_an_internal_error(http, events, capfd, data):
    """Values of the right number, so that they reach the event, or any JSON at all."""
    event = data.draw(st.sampled_from(events))
    values = [data.draw(JSON) for _ in event["inputs"]]
    body = {
        "data": data.draw(st.just(values) | JSON),
        "fn_index": data.draw(st.just(event["id"]) | JSON),
        "session_hash": secrets.token_hex(8),
        "event_data": data.draw(JSON),
        "trigger_id": data.draw(JSON),
    }
    route = data.draw(st.sampled_from(["run/predict", "queue/join", f"call/{event['api_name']}", "call/v2/edit"]))
    sent = data.draw(st.just(body) | JSON) if route != "call/v2/edit" else data.draw(JSON)
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"/gradio_api/{route}", content=json.dumps(sent), headers=headers)
    text = answer.text
    if answer.is_success and route != "run/predict":
        stream = f"queue/data?session_hash={body['session_hash']}"
        if route != "queue/join":
            stream = f"{route}/{answer.json()['event_id']}"
        text += http.get(f"/gradio_api/{stream}").text
    elif answer.is_error:
        assert isinstance(answer.json()["error"], str)
    for sign in INTERNAL:
        assert sign not in text
    assert "Traceback" not in capfd.readouterr().err
