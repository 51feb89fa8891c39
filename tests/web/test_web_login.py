"""Who may enter: every address of the page asks for a name and a password, and a public link needs them."""

import base64
import socket

import httpx
import pytest
from conftest import environment
from gradio_client import Client, handle_file
from processes import start_python
from test_web_service import CAT
from tiny_page import tiny_service

from mige.cli import web_demo
from mige.web import login, page
from mige.web.service import GenerationService

__all__ = ["tiny_service"]  # fixtures

ADDRESSES = (  # one of every kind that the guard knows
    ("GET", "/", {}),
    ("GET", "/config", {}),
    ("GET", "/gradio_api/info", {}),
    ("GET", "/gradio_api/file=/a", {}),
    ("GET", "/gradio_api/queue/data?session_hash=a", {}),
    ("GET", "/nothing", {}),
    ("POST", "/gradio_api/queue/join", {"json": {}}),
    ("POST", "/gradio_api/upload", {"files": {"files": ("a.png", b"a")}}),
    ("OPTIONS", "/", {}),
)


def header(text: str, kind: str = "Basic") -> dict[str, str]:
    return {"Authorization": f"{kind} {base64.b64encode(text.encode()).decode()}"}


@pytest.fixture(scope="module")
def closed(tiny_service):
    """A client of a page with two users, and no login of its own."""
    users = {"ada": "päss:word", "bo": "b"}
    service = GenerationService(tiny_service.pipeline, "tiny")
    with page.serving(service, users=users) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.parametrize("method, path, sent", ADDRESSES, ids=lambda one: one if isinstance(one, str) else "")
def test_no_address_answers_without_a_login(closed, method, path, sent):
    answer = closed.request(method, path, **sent)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.text == "This page needs a name and a password."
    assert closed.request(method, path, headers=header("ada:päss:word"), **sent).status_code != 401
    assert closed.request(method, path, headers=header("bo:b", "basic"), **sent).status_code != 401


@pytest.mark.parametrize(
    "headers",
    [header("ada:wrong"), header("ada:"), header(":"), header("ada"), header("bo:päss:word"), header("ada:b"),
     header("ada:päss:word", "Bearer"), {"Authorization": "Basic ä".encode("latin-1")}, {"Authorization": "Basic"},
     {"Authorization": ""}],
    ids=str,
)  # fmt: skip
def test_no_other_login_enters(closed, headers, monkeypatch):
    monkeypatch.setattr(login, "WRONG_SECONDS", 0)
    assert closed.get("/config", headers=headers).status_code == 401


def test_two_logins_in_one_request_are_none(closed, monkeypatch):
    monkeypatch.setattr(login, "WRONG_SECONDS", 0)
    twice = [*header("ada:päss:word").items(), *header("ada:wrong").items()]
    assert closed.get("/config", headers=twice).status_code == 401


def test_the_client_library_enters_with_a_header(closed, tmp_path):
    client = Client(str(closed.base_url), headers=header("bo:b"), verbose=False, download_files=tmp_path)
    assert client.predict("make it dark", handle_file(str(CAT)), api_name="/edit", steps=1, guidance=1.0)
    client.close()


def test_a_page_is_never_shared_without_users(tiny_service):
    with pytest.raises(ValueError, match="share makes the page public"), page.serving(tiny_service, share=True):
        pass


def test_a_shared_page_answers_to_its_public_name_and_says_when_there_is_none(tiny_service, monkeypatch):
    service, public = GenerationService(tiny_service.pipeline, "tiny"), "https://abc.share.example"
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *_, **__: public)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with page.serving(service, users={"bo": "b"}, share=True, port=port) as address:
        assert address.rstrip("/") == public
        for host, status in (("abc.share.example", 200), ("def.share.example", 403)):
            asked = header("bo:b") | {"Host": host, "Origin": f"https://{host}"}
            assert httpx.get(f"http://127.0.0.1:{port}/config", headers=asked).status_code == status
    service = GenerationService(tiny_service.pipeline, "tiny")

    def fail(*_, **__):
        raise RuntimeError("no way out")

    monkeypatch.setattr("gradio.networking.setup_tunnel", fail)
    with pytest.raises(page.ShareError, match="no public link"), page.serving(service, users={"bo": "b"}, share=True):
        pass


def test_below_a_path_every_address_has_it(tiny_service):
    service = GenerationService(tiny_service.pipeline, "tiny")
    with page.serving(service, root_path="/mige") as address:
        root = httpx.get(f"{address.removesuffix('/mige').rstrip('/')}/config").json()["root"]
    assert root.endswith("/mige")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share"], "--share makes the page public: say with --auth"),
        (["--auth", "ada"], "it is no NAME:PASSWORD"),
        (["--auth", ":secret"], "it is no NAME:PASSWORD"),
        (["--auth", "@{}/none"], "none cannot be read"),
        (["--auth", "@{}/bad"], "line 2 of "),
        (["--auth", "@{}/empty"], "names nobody"),
        (["--root-path", "mige/"], "--root-path is 'mige/'; expected a path such as /mige"),
    ],
)
def test_the_script_refuses_half_a_login(arguments, words, tmp_path, capsys):
    (tmp_path / "bad").write_text("ada:one\nsecret\n")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SystemExit) as ended:
        web_demo.parse([one.format(tmp_path) for one in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and "secret" not in said


def test_users_are_read_from_a_file_and_added_up(tmp_path):
    (tmp_path / "users.txt").write_text("ada:a:b\n\nbo:b\n")
    given = web_demo.parse(["--auth", f"@{tmp_path}/users.txt", "--auth", "cy:c"])
    assert given.auth == {"ada": "a:b", "bo": "b", "cy": "c"}


@pytest.mark.slow
@pytest.mark.processes
def test_the_script_serves_in_the_modes_of_infer_behind_a_login(lively):
    command = ["infer_scripts/web_demo.py", "--model", lively, "--device", "cpu", "--auth", "bo:b", "--offload",
               "--t5-bits", "8", "--vae-dtype", "bfloat16", "--compile"]  # fmt: skip
    with start_python(*command, env=environment(), stdout=-1, stderr=-1) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Open http://127.0.0.1:"), process.stderr.read()
            client = Client(line.split()[1], headers=header("bo:b"), verbose=False)
            [made] = client.predict("make it dark", handle_file(str(CAT)), api_name="/edit", steps=2, guidance=2.0)
            assert made["caption"] == "seed 0"
        finally:
            process.kill()


def test_a_safety_check_is_a_function_by_its_name():
    assert web_demo.load_function("math:sqrt")(4) == 2
    wrong = {
        "math": "expected MODULE:FUNCTION",
        "nowhere:a": "No module named 'nowhere'",
        "math:none": "no attribute 'none'",
        "math:pi": "is a float; expected a function",
    }
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            web_demo.load_function(name)
