"""The HTTP endpoint, spoken to by OpenAI's own client and by hand: answers, limits, the queue, whoever leaves."""

import base64
import io
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from test_web_service import CAT, CUP, bomb
from tiny_page import PUBLIC, edit, tiny_service

from mige.tasks import Task
from mige.utils import images
from mige.web import api, page, traffic
from mige.web.api_prompt import read_prompt
from mige.web.api_server import serving_endpoint
from mige.web.instructions import Reading, RefusedError
from mige.web.provenance import read_settings
from mige.web.service import GenerationService

__all__ = ["tiny_service"]  # a fixture

platform.processor()  # asks a program and keeps the answer, which OpenAI's client sends along
FAST = {"steps": 1, "guidance": 1.0, "seed": 7}


@dataclass
class Served:
    """A server over the tiny model, and what it counts."""

    url: str
    service: GenerationService
    api: api.Api
    calls: list[int] = field(default_factory=list)  # one a step of the model

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}v1", api_key=key, max_retries=0, timeout=60, **options)

    def post(self, name: str = "edits", **options) -> httpx.Response:
        return httpx.post(f"{self.url}v1/images/{name}", timeout=60, **options)

    @property
    def has_page(self) -> bool:
        return "Gradio" in httpx.get(self.url).text

    @property
    def is_idle(self) -> bool:
        store = self.api.store
        others = {*store._permanent, store.folder / "gradio"}
        walked = ((Path(where), names) for where, _, names in os.walk(store.folder))  # unlike rglob: they may go
        stored = [where for where, names in walked if names and not {where, *where.parents} & others]
        return not (stored or self.api.traffic.waiting or self.api.traffic.in_flight or self.api.traffic.arriving)


@pytest.fixture(scope="module", params=["page", "alone"])
def served(request, tiny_service) -> Iterator[Served]:
    """The endpoint beside the page, and alone."""
    service, made = GenerationService(tiny_service.pipeline, "tiny"), []
    opened = api.Api.__init__

    def noted(self, *arguments):
        opened(self, *arguments)
        made.append(self)

    serving = page.serving if request.param == "page" else serving_endpoint
    options = {} if request.param == "page" else {"port": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.Api, "__init__", noted)
        with serving(service, public_hosts=[PUBLIC], **options) as url:
            found = Served(url, service, made[0])
            hook = service.pipeline.transformer.register_forward_hook(lambda *_: found.calls.append(1))
            try:
                yield found
            finally:
                hook.remove()


def decoded(answer) -> list[np.ndarray]:
    """The images of an answer, [H, W, 3] levels."""
    files = [io.BytesIO(base64.b64decode(one.b64_json)) for one in answer.data]
    return [np.asarray(Image.open(file)).astype(int) for file in files]


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


# ---- what is made ----------------------------------------------------------------------------------------------------


def test_one_image_is_an_edit_that_equals_the_pipelines(served, tmp_path):
    answer = served.client().images.edit(image=CAT, prompt="make it dark", n=2, extra_body=FAST)
    options = dict(num_inference_steps=1, guidance_scale=1.0, source_guidance_scale=1.0)
    want = served.service.pipeline("make it dark", source=images.open_image(CAT), seed=8, **options).images[0]
    first, second = decoded(answer)
    assert first.shape == second.shape == (96, 144, 3) and answer.size == "144x96"  # CAT has 451 x 300 px
    assert np.abs(second - np.asarray(want).astype(int)).max() <= 1 and np.abs(first - second).max() > 5
    assert [one.seed for one in answer.data] == [7, 8]
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[1].b64_json))
    settings = read_settings(tmp_path / "a.png")
    assert (settings["task"], settings["seed"], settings["model"]) == ("edit", 8, "tiny")
    assert served.is_idle


@pytest.mark.parametrize(
    ("prompt", "given", "references"),
    [
        ("put<imagehere>on<imagehere>", "put<imagehere>on<imagehere>", [CAT, CUP]),
        ("put image 2 on picture 1", "put<imagehere>on<imagehere>", [CUP, CAT]),
        ("put the cup on the cat", "put the cup on the cat<imagehere><imagehere>", [CAT, CUP]),
    ],
)
def test_of_several_images_the_first_is_edited_unless_the_task_says_otherwise(served, prompt, given, references):
    files = [CAT, CUP]
    opened = {path: images.open_image(path) for path in references}
    for task, source in (("subject_edit", opened[CAT]), ("subject", None)):
        extra = FAST | ({"task": task} if source is None else {})
        answer = served.client().images.edit(image=files, prompt=prompt, size="128x128", extra_body=extra)
        want = served.service.pipeline(
            given, [opened[path] for path in references], source=source, size="native" if source else None,
            num_inference_steps=1, guidance_scale=1.0, source_guidance_scale=1.0, seed=7,
        ).images[0]  # fmt: skip
        assert np.abs(decoded(answer)[0] - np.asarray(want).astype(int)).max() <= 1


def test_generation_is_of_words_alone(served):
    answer = served.client().images.generate(prompt="a cat by a lake", model="tiny", n=1, extra_body=FAST)
    options = dict(num_inference_steps=1, guidance_scale=1.0, source_guidance_scale=1.0, seed=7)
    want = served.service.pipeline("a cat by a lake", [], **options).images[0]
    assert np.abs(decoded(answer)[0] - np.asarray(want).astype(int)).max() <= 1


@pytest.mark.parametrize("form", ["transparent", "white"])
def test_what_the_mask_leaves_out_stays_as_it_was(served, form):
    cat = images.open_image(CAT)
    white = Image.new("L", cat.size)
    white.paste(255, (0, 0, cat.width // 2, cat.height))
    if form == "transparent":  # OpenAI's: transparent is what may change
        mask = cat.copy()
        mask.putalpha(white.point(lambda level: 255 - level))
    else:
        mask = white
    file = io.BytesIO()
    mask.save(file, "PNG")
    client = served.client()
    answer = client.images.edit(image=CAT, mask=file.getvalue(), prompt="make it dark", extra_body=FAST)
    [made] = decoded(answer)
    kept = np.asarray(cat.resize((144, 96), Image.Resampling.BILINEAR)).astype(int)
    assert (made[:, 73:] == kept[:, 73:]).all() and np.abs(made[:, :60] - kept[:, :60]).mean() > 5


def test_without_a_seed_each_request_has_its_own(served):
    asked = {"image": CAT, "prompt": "make it dark", "extra_body": {"steps": 1, "guidance": 1}}
    first = served.client().images.edit(**asked).data[0].seed
    assert served.client().images.edit(**asked).data[0].seed != first


def test_health_and_models(served):
    assert httpx.get(f"{served.url}health").json() == {"status": "ok", "model": "tiny", "waiting": 0}
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert served.client().models.retrieve("tiny").owned_by == "mige"
    with pytest.raises(openai.NotFoundError, match="nothing at this address"):
        served.client().models.retrieve("gpt")


# ---- the prompt's images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "prompt", "count", "reading"),
    [
        (Task.EDIT, "make it dark ", 1, Reading("make it dark", (1,))),
        (Task.EDIT, "make image 1 dark", 1, Reading("make<imagehere>dark", (1,))),
        (Task.SUBJECT, "a dog on a beach", 1, Reading("a dog on a beach<imagehere>", (1,))),
        (Task.SUBJECT, "image 1 by Picture #1", 1, Reading("<imagehere>by<imagehere>", (1, 1))),
        (Task.SUBJECT, "an image 2 metres high", 0, Reading("an image 2 metres high", ())),
        (Task.SUBJECT_EDIT, "<IMAGEHERE> in image 9 <imagehere>", 2,
         Reading("<IMAGEHERE> in image 9 <imagehere>", (1, 2))),
    ],
)  # fmt: skip
def test_how_a_prompt_names_images(task, prompt, count, reading):
    assert read_prompt(task, prompt, count) == reading


@pytest.mark.parametrize(
    ("task", "prompt", "count", "words"),
    [
        (Task.EDIT, " \n", 1, "is empty"),
        (Task.EDIT, "a" * 2001, 1, "2,001 characters"),
        (Task.EDIT, "a \ud800", 1, "no text"),
        (Task.EDIT, "image 1 and image 1", 1, "names images 2 times: 1 at most"),
        (Task.SUBJECT, "a<imagehere>", 2, "1 times <imagehere> for 2 images"),
        (Task.SUBJECT, "a<imagehere>", 0, "1 times <imagehere> for 0 images"),
        (Task.SUBJECT, "image 3", 2, "names image 3, but 2 came"),
        (Task.SUBJECT, "image 0", 2, "names image 0"),
        (Task.SUBJECT_EDIT, "put image 2 there", 2, "but not image 1: write “image 1”"),
        (Task.SUBJECT, "image 1 " * 5, 1, "names images 5 times: 4 at most"),
    ],
)
def test_a_prompt_that_names_images_wrongly_gets_a_sentence(task, prompt, count, words):
    with pytest.raises(RefusedError, match=words):
        read_prompt(task, prompt, count)


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [  # fields, the field that is named, what is said
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": "so " * 200 + "<imagehere>"}, None, "too long"),
    ({"model": "gpt-image-1"}, "model", "is not here"),
    ({"n": "0"}, "n", "number of images is 0"),
    ({"n": "9"}, "n", "from 1 to 8"),
    ({"n": "1.5"}, "n", "whole number"),
    ({"n": "NaN"}, "n", "NaN"),
    ({"n": "true"}, "n", "true"),
    ({"n": "[1]"}, "n", "whole number"),
    ({"seed": "-1"}, "seed", "seed is -1"),
    ({"seed": "4294967295", "n": "2"}, None, "seed is 4294967296"),
    ({"seed": "9" * 5000}, "seed", "whole number"),
    ({"seed": "1e999"}, "seed", "Infinity"),
    ({"steps": "101"}, "steps", "from 1 to 100"),
    ({"steps": "{}"}, "steps", "whole number"),
    ({"steps": "[" * 5000}, "steps", "whole number"),
    ({"guidance": "nan"}, "guidance", "expected a number"),
    ({"guidance": "NaN"}, "guidance", "guidance is nan"),
    ({"guidance": "-Infinity"}, "guidance", "is -inf"),
    ({"source_guidance": "-1"}, "source_guidance", "source guidance is -1"),
    ({"task": "paint"}, "task", "expected one of subject, edit, subject_edit"),
    ({"task": "subject_edit"}, "task", "does not fit 1 images"),
    ({"size": "big"}, "size", "expected “auto”"),
    ({"size": "128X128"}, "size", "expected “auto”"),
    ({"size": "0x0"}, "size", "expected “auto”"),
    ({"size": "100x128"}, None, "width is 100 px"),
    ({"size": "99999x99999"}, None, "width is 99999 px"),
    ({"size": "-128x128"}, "size", "expected “auto”"),
    ({"response_format": "url"}, "response_format", '"b64_json" alone'),
    ({"output_format": "webp"}, "output_format", '"png" alone'),
    ({"stream": "true"}, "stream", "false alone"),
    ({"quality": "high"}, "quality", "“auto” alone"),
    ({"style": "<script>alert(1)</script>"}, "style", "(script)"),
    ({"image": "https://example.org/a.png"}, "image", "no address is fetched"),
    ({"image[]": "/etc/passwd"}, "image[]", "no address is fetched"),
    ({"mask": "file:///etc/passwd"}, "mask", "no address is fetched"),
    ({"image_url": "https://example.org/a.png"}, "image_url", "no field of this request"),
    ({"negative": "x"}, "negative", "no field of this request"),
    ({"a" * 500: "x"}, "a" * 40, "no field of this request"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_a_bad_field_is_named_in_openais_form(served, fields, param, words):
    fields = {"prompt": "make it dark", "steps": "1"} | fields
    given = {name: value for name, value in fields.items() if value is not None}
    answer = served.post(data=given, files={"image": ("../../etc/passwd", CAT.read_bytes())})
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400) and words in error["message"], error
    assert error["param"] == param and error["type"] == "invalid_request_error" and error.keys() == ERROR
    assert len(answer.text) < 600 and "went wrong" not in answer.text and served.is_idle


ERROR = {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ([], None, "is a list: send an object"),
        ("x", None, "is a text: send an object"),
        ({"prompt": 3}, "prompt", "expected a text"),
        ({"prompt": ["a", "b"]}, "prompt", "expected a text"),
        ({"prompt": "a", "n": True}, "n", "true"),
        ({"prompt": "a", "n": [1]}, "n", "whole number"),
        ({"prompt": "a", "size": {"w": 1}}, "size", "expected “auto”"),
        ({"prompt": "a", "size": 128}, "size", "expected “auto”"),
        ({"prompt": "a", "model": ["tiny"]}, "model", "is not here"),
        ({"prompt": "a", "task": {"a": []}}, "task", "expected one of"),
        ({"prompt": "a", "task": "edit"}, "task", "does not fit 0 images"),
        ({"prompt": "a", "stream": True}, "stream", "false alone"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance", "guidance is nan"),
        ({"prompt": "a", "response_format": ["url"]}, "response_format", "alone"),
        ({"prompt": "a", "image": "https://example.org/a.png"}, "image", "no field of this request"),
        ({"prompt": "a", "quality": {}}, "quality", "alone"),
    ],
)
def test_a_wrong_type_in_json_is_named(served, body, param, words):
    answer = served.post("generations", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404 if param == "model" else 400, param)
    assert words in error["message"]


def part(name: str, content: bytes = b"x", more: str = "") -> bytes:
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


FILE = '; filename="upload"'
PROMPT = part("prompt", b"make it dark")
END = b"--B--\r\n"
FORMS = {
    "nothing": (b"", 400, "no image"),
    "no part": (END, 400, "no image"),
    "no boundary": (b"x" * 1000, 400, "cannot be read"),
    "cut short": (PROMPT + part("image", b"x" * 1000, FILE)[:-500], 400, "no image"),
    "empty file": (PROMPT + part("image", b"", FILE) + END, 400, "file is empty"),
    "prompt is a file": (part("prompt", b"x", FILE) + part("image", b"x", FILE) + END, 400, "'prompt' is a file"),
    "prompt twice": (PROMPT * 2 + part("image", b"x", FILE) + END, 400, "sent twice"),
    "two masks": (PROMPT + part("mask", b"x", FILE) * 2 + END, 400, "sent twice"),
    "five images": (PROMPT + part("image[]", b"x", FILE) * 5 + END, 400, "There are 5 images"),
    "six files": (PROMPT + part("image[]", b"x", FILE) * 6 + END, 400, "Too many files"),
    "many fields": (part("user") * 65 + END, 400, "Too many fields"),
    "huge text": (part("prompt", b"a" * (traffic.MAX_BODY + 1)) + END, 400, "cannot be read"),
    "no image": (PROMPT + part("image", b"no picture", FILE) + END, 400, "Picture 1: a text, not an image"),
    "bomb": (PROMPT + part("image", bomb(), FILE) + END, 400, "pixels"),
    "nested": (
        PROMPT + b"--B\r\nContent-Disposition: form-data; name=image; filename=a\r\n"
        b"Content-Type: multipart/mixed; boundary=C\r\n\r\n--C\r\n\r\nx\r\n--C--\r\n" + END, 400, "Picture 1",
    ),
    "nameless": (b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, 400, "cannot be read"),
    "mask of nothing": (
        PROMPT + part("task", b"subject") + part("image", b"x", FILE) + part("mask", b"x", FILE) + END, 400,
        "nothing is edited",
    ),
    "bad mask": (PROMPT + part("image", CAT.read_bytes(), FILE) + part("mask", CUP.read_bytes(), FILE) + END, 400,
                 "The mask: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_an_odd_form_gets_a_sentence_and_leaves_nothing(served, name):
    body, status, words = FORMS[name]
    answer = served.post(content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
    assert answer.json()["error"].keys() == ERROR and served.is_idle


def test_forms_and_json_each_have_their_address(served):
    assert "multipart/form-data" in served.post("edits", json={"prompt": "a"}).json()["error"]["message"]
    assert "no JSON" in served.post("generations", data={"prompt": "a"}).json()["error"]["message"]
    answer = served.post("generations", content=b"[" * 100_000)
    assert (answer.status_code, "no JSON" in answer.text) == (400, True)
    answer = served.post("generations", content=b" " * (traffic.MAX_BODY + 1))
    assert (answer.status_code, "send less" in answer.text) == (413, True)


def test_files_too_large_and_folders_too_full_are_told(served, monkeypatch):
    large = bytes(traffic.UPLOAD_MB * 2**20 + 1)
    answer = served.post(data={"prompt": "a"}, files={"image": large})
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "image")
    monkeypatch.setattr("mige.web.file_store.MAX_STORED_BYTES", 10)
    answer = served.post(data={"prompt": "a"}, files={"image": CAT.read_bytes()})
    assert answer.status_code == 507 and served.is_idle


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "a b"}, 400),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": PUBLIC}, 200),
    ],
)
def test_the_endpoint_answers_to_its_own_names_and_pages(served, headers, status):
    for path in ("health", "v1/models"):
        answer = httpx.get(f"{served.url}{path}", headers=headers)
        assert answer.status_code == status and ("error" in answer.json()) == (status != 200)


@pytest.mark.parametrize(
    "path", ["/v1/", "/v1/images", "/v1/models/", "/v1/images/edits/", "/v1/../config", "/v1/x%00"]
)
def test_other_addresses_are_not_there(served, path):
    with httpx.Client(base_url=served.url) as client:
        answer = client.get(path)
    assert answer.status_code == (404 if "config" not in path else answer.status_code)
    assert client.build_request("GET", path).method == "GET"


def test_another_method_is_told_which(served):
    assert "use POST" in httpx.get(f"{served.url}v1/images/edits").json()["error"]["message"]
    assert httpx.delete(f"{served.url}v1/models").status_code == 405
    assert httpx.options(f"{served.url}v1/images/edits").status_code == 405


def test_a_fault_of_ours_tells_nothing_of_itself(served, monkeypatch, caplog):
    monkeypatch.setattr(GenerationService, "defaults", lambda *_: 1 / 0)
    answer = served.post(data={"prompt": "a"}, files={"image": CAT.read_bytes()})
    assert answer.status_code == 500 and "division" not in answer.text
    assert answer.json()["error"]["type"] == "server_error" and "ZeroDivisionError" in caplog.text and served.is_idle


# ---- a key -----------------------------------------------------------------------------------------------------------


def test_with_a_key_only_who_bears_it_is_answered(tiny_service):
    service = GenerationService(tiny_service.pipeline, "tiny")
    with serving_endpoint(service, port=0, api_key="s3cret") as url:
        right = openai.OpenAI(base_url=f"{url}v1", api_key="s3cret", max_retries=0)
        assert [model.id for model in right.models.list()] == ["tiny"]
        for wrong in ("s3cre", "s3cretx", "S3cret"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                openai.OpenAI(base_url=f"{url}v1", api_key=wrong, max_retries=0).models.list()
        for header in ("s3cret", "Basic s3cret", "bearer s3cret", "Bearer  s3cret", "Bearer s3cret\xff"):
            headers = {"Authorization": header.encode("latin-1")}
            answers = [
                httpx.post(f"{url}v1/images/edits", headers=headers), httpx.get(f"{url}v1/x", headers=headers)
            ]  # fmt: skip
            assert [answer.status_code for answer in answers] == [401, 401]
        twice = [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer s3cret")]
        assert httpx.get(f"{url}v1/models", headers=twice).status_code == 401
        assert httpx.get(f"{url}health").status_code == 200


@pytest.mark.parametrize("key", [None, "s3cret"])
def test_beside_a_page_with_a_login_the_endpoint_has_its_key_or_that_login(tiny_service, key):
    service = GenerationService(tiny_service.pipeline, "tiny")
    with page.serving(service, users={"ada": "pass"}, api_key=key) as url:
        bearer = {"headers": {"Authorization": "Bearer s3cret"}}
        ways = {"nothing": {}, "login": {"auth": ("ada", "pass")}, "key": bearer}
        found = {
            name: [httpx.get(f"{url}{path}", **way).status_code for path in ("v1/models", "config", "health")]
            for name, way in ways.items()
        }
    let_in = {"login": [200, 200, 200], "key": [401, 401, 200]} if key is None else {
        "login": [401, 200, 200], "key": [200, 401, 200]
    }  # fmt: skip
    assert found == {"nothing": [401, 401, 200]} | let_in


# ---- many clients, and those that leave ------------------------------------------------------------------------------


def test_twenty_clients_at_once_each_get_their_own(served):
    def ask(seed: int) -> tuple[int, bytes]:
        extra = {"steps": 1, "guidance": 1, "seed": seed}
        [one] = served.client().images.edit(image=CAT, prompt="make it dark", extra_body=extra).data
        return one.seed, np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))).tobytes()

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert [seed for seed, _ in found] == list(range(20)) and len({pixels for _, pixels in found}) == 20
    assert found[3] == ask(3) and served.is_idle


@pytest.mark.slow
@pytest.mark.parametrize("served", ["page"], indirect=True)
def test_memory_is_flat_over_two_hundred_requests(served):
    process, client, file = psutil.Process(), served.client(), io.BytesIO()
    Image.open(CAT).resize((64, 64)).save(file, "PNG")

    def ask(times: int) -> int:
        for _ in range(times):
            client.images.edit(image=file.getvalue(), prompt="make it dark", size="64x64", extra_body=FAST)
        return process.memory_info().rss

    before = ask(40)  # allocators and caches have filled
    assert ask(160) - before < 15 * 2**20 and served.is_idle


def leave_after(served: Served, steps: int, condition) -> None:
    """A client that asks for a long run and goes when a condition holds."""
    body = {"prompt": "make it dark", "steps": str(steps), "guidance": "1"}
    with httpx.Client() as client:
        request = client.build_request("POST", f"{served.url}v1/images/edits", data=body,
                                       files={"image": CAT.read_bytes()}, timeout=60)  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(client.send, request)
            wait_until(condition)
            [connection] = client._transport._pool.connections
            connection._connection._network_stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            with pytest.raises(httpx.HTTPError):
                sent.result()


def test_a_client_that_leaves_stops_its_work(served, caplog):
    before = len(served.calls)
    leave_after(served, 100, lambda: len(served.calls) > before + 3)
    wait_until(lambda: served.is_idle)
    served.client().images.edit(image=CAT, prompt="make it dark", extra_body=FAST)  # there is room at once
    assert len(served.calls) < before + 90 and caplog.records == []


@contextmanager
def held(service: GenerationService) -> Iterator[threading.Event]:
    """The one worker at something else until the event is set, or the context ends."""
    release = threading.Event()
    service._worker.submit(release.wait)
    try:
        yield release
    finally:
        release.set()


def test_a_client_that_leaves_behind_the_page_s_work_is_never_worked_for(served, monkeypatch):
    run, stops, before = served.service.run, [], len(served.calls)

    def noted(request, stop, **options):
        stops.append(stop)
        return run(request, stop, **options)

    monkeypatch.setattr(served.service, "run", noted)
    with held(served.service):
        leave_after(served, 100, lambda: len(stops) == 1)
        wait_until(stops[0].is_set)
    wait_until(lambda: served.is_idle)
    assert len(served.calls) == before


def test_a_client_that_leaves_the_queue_is_never_worked_for(served):
    before = len(served.calls)
    with ThreadPoolExecutor(1) as pool, held(served.service) as release:
        first = pool.submit(lambda: served.client().images.edit(image=CAT, prompt="a", extra_body=FAST))
        wait_until(lambda: served.api.traffic.waiting == 1)
        leave_after(served, 100, lambda: served.api.traffic.waiting == 2)
        wait_until(lambda: served.api.traffic.waiting == 1)
        release.set()
        assert len(first.result().data) == 1
    assert len(served.calls) == before + 1 and served.is_idle


def test_as_many_wait_as_may_and_the_next_is_told_when_to_come(served, monkeypatch):
    monkeypatch.setattr(traffic, "MAX_WAITING", 2)
    with ThreadPoolExecutor(2) as pool, held(served.service) as release:

        def ask():
            return served.client().images.edit(image=CAT, prompt="a", extra_body=FAST)

        two = [pool.submit(ask) for _ in range(2)]
        wait_until(lambda: served.api.traffic.waiting == 2)
        assert httpx.get(f"{served.url}health").json()["waiting"] == 2
        with pytest.raises(openai.InternalServerError, match="2 requests wait already") as refused:
            ask()
        assert refused.value.response.status_code == 503 and refused.value.response.headers["Retry-After"] == "5"
        if served.has_page:  # the page's visitors wait in the same queue
            with httpx.Client(base_url=served.url.rstrip("/")) as client:
                assert "2 requests wait already" in edit(client, picture_1=None)
        release.set()
        assert all(len(one.result().data) == 1 for one in two)
    assert served.is_idle
