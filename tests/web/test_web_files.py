"""Files and limits of the served page: old ones go, links and races give nothing away, too much is refused."""

import errno
import io
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import bombs
import httpx
import pytest
from PIL import Image
from test_web_service import CAT
from tiny_page import edit, http, tiny_service, upload

from mige.web import file_store, guard, page, traffic
from mige.web.file_store import FileStore
from mige.web.service import GenerationService

__all__ = ["http", "tiny_service"]  # fixtures


def test_old_files_are_deleted_and_the_examples_stay(tiny_service, monkeypatch):
    """One folder that cannot be deleted keeps no other from going."""
    monkeypatch.setattr(page, "SWEEP_SECONDS", 0.1)
    delete = shutil.rmtree

    def rmtree(folder, *arguments, **options) -> None:
        if Path(folder).name.startswith("stuck-"):
            raise OSError("stuck")
        delete(folder, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    service = GenerationService(tiny_service.pipeline, "tiny")
    with page.serving(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        examples = set(folder.rglob("*.png"))
        for number in range(20):  # so many that one comes before the others, in whatever order
            (folder / f"stuck-{number}").mkdir()
        path = upload(client)
        assert "complete" in edit(client, picture_1={"path": path}) and examples
        monkeypatch.setattr(page, "KEPT_SECONDS", 0.1)
        wait_until(lambda: files(folder) == examples)
        assert client.get(f"/gradio_api/file={path}").status_code == 404
        assert "was deleted since: upload it again" in edit(client, picture_1={"path": path})
    assert not folder.exists() or delete(folder) is None


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())  # an image, so that it would be edited if it were read
    return tmp_path / "cat.jpg"


@pytest.mark.parametrize("swapped", ["file", "folder", "gone"])
def test_an_upload_that_became_a_link_is_none(http, secret, swapped):
    """The same words, whatever stands at its path by now."""
    path = Path(upload(http))
    if swapped == "folder":
        shutil.rmtree(path.parent)
        path.parent.symlink_to(secret.parent)
    else:
        path.unlink()
        if swapped == "file":
            path.symlink_to(secret)
    answer = http.get(f"/gradio_api/file={path}")
    assert (answer.status_code, answer.json()["error"]) == (404, "There is nothing at this address.")
    assert "Picture 1 is no file that was uploaded to this server, or was deleted since" in edit(
        http, picture_1={"path": str(path)}
    )


@pytest.mark.parametrize("swapped", ["a link", "a folder's link", "gone"])
def test_a_file_exchanged_while_it_is_fetched_is_none(http, secret, monkeypatch, swapped):
    path, find = Path(upload(http)), FileStore.find

    def found_then_swapped(self, asked):
        found = find(self, asked)
        if found is not None:
            shutil.rmtree(path.parent)
            if swapped == "a folder's link":
                path.parent.symlink_to(secret.parent)
            elif swapped == "a link":
                path.parent.mkdir()
                path.symlink_to(secret)
        return found

    monkeypatch.setattr(FileStore, "find", found_then_swapped)
    answer = http.get(f"/gradio_api/file={path}")
    assert (answer.status_code, answer.json()["error"]) == (404, "There is nothing at this address.")


def test_more_pixels_than_the_page_takes_are_refused_to_a_client(http, monkeypatch):
    large = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(large, "PNG")  # a few kB, which the command line would open
    said = edit(http, picture_1={"path": upload(http, large.getvalue())})
    assert "Picture 1: 169,000,000 pixels, expected at most 65,000,000" in said


@pytest.mark.parametrize("kind", ["progressive JPEG", "GIF comments", "PPM comments", "TIFF strips", "EXIF in WebP"])
def test_a_file_of_much_work_is_refused_to_a_client(http, kind):
    make, words = bombs.BOMBS[kind]
    said = edit(http, picture_1={"path": upload(http, make())})
    assert "Picture 1: " in said and words in said


def form(http: httpx.Client, body: bytes, kind: str = "multipart/form-data; boundary=B") -> httpx.Response:
    return http.post("/gradio_api/upload", content=body, headers={"Content-Type": kind})


FILE = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    "body",
    [b"", b"--B--\r\n", FILE % b"a", b'--B\r\nContent-Disposition: form-data; name="files"\r\n\r\na\r\n--B--\r\n'],
    ids=["nothing", "no part", "cut short", "no file name"],
)
def test_a_form_without_a_whole_file_is_refused(http, body):
    answer = form(http, body)
    assert (answer.status_code, answer.text) == (400, "The upload holds no whole file: send the form again.")


def test_as_many_files_as_an_upload_takes_may_each_have_its_most_bytes(http):
    answer = form(
        http,
        FILE % bytes(traffic.UPLOAD_MB * 2**20) * traffic.MAX_FILES + b"--B--\r\n",
        "Multipart/Form-Data; boundary=B",
    )
    assert [Path(path).stat().st_size for path in answer.json()] == [traffic.UPLOAD_MB * 2**20] * traffic.MAX_FILES
    for path in answer.json():
        shutil.rmtree(Path(path).parent)
    answer = form(http, FILE % b"a" * (traffic.MAX_FILES + 1) + b"--B--\r\n")
    assert answer.text == "The upload cannot be read: Too many files. Maximum number of files is 4."


def slow_upload(http: httpx.Client, sent: int, announced: int = 10**6) -> socket.socket:
    """An upload that has begun: so many bytes of its form have been sent, and no more come."""
    host, port = http.base_url.host, http.base_url.port
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {announced}\r\n"
    head += "Content-Type: multipart/form-data; boundary=B\r\n\r\n"
    connection = socket.create_connection((host, port))
    connection.sendall(head.encode() + (FILE % bytes(announced))[:sent])
    return connection


def test_uploads_that_arrive_count_and_who_leaves_is_no_fault(http, monkeypatch, caplog):
    """Their bytes lie on the disk before they are kept."""
    monkeypatch.setattr(traffic, "MAX_ARRIVING", 1000)
    receive, guards = guard.Guard._upload, []

    async def upload(self, *request):
        guards.append(self)
        return await receive(self, *request)

    monkeypatch.setattr(guard.Guard, "_upload", upload)
    slow = slow_upload(http, 900)
    wait_until(
        lambda: guards and guards[0].traffic.arriving == 900
    )  # asked before, the form's bytes might push the other out
    answer = form(http, FILE % bytes(200) + b"--B--\r\n")
    said = "The server receives too many uploads at once: try again in a moment."
    assert (answer.status_code, answer.text) == (503, said)
    slow.close()
    wait_until(lambda: form(http, FILE % bytes(200) + b"--B--\r\n").status_code == 200)
    assert caplog.records == []


def test_a_full_folder_takes_no_file_and_starts_no_run(http, monkeypatch):
    """Empty files fill it too, and a disk without room is as good as full."""
    path = upload(http)
    with monkeypatch.context() as patch:
        patch.setattr(file_store, "MAX_STORED_FILES", 1)
        answer = form(http, FILE % b"" + b"--B--\r\n")
        assert (answer.status_code, answer.text) == (507, "The server holds too many files: try again in an hour.")
        assert "The server holds too many files: try again in an hour." in edit(http, picture_1={"path": path})
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = set(folder.iterdir())

    def no_room(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    assert form(http, FILE % b"a" + b"--B--\r\n").status_code == 507
    assert set(folder.iterdir()) == before


def test_requests_in_flight_are_limited(http, monkeypatch):
    """Two that never finish sending take the places; once they leave there is room again."""
    monkeypatch.setattr(traffic, "MAX_IN_FLIGHT", 2)
    receive, begun = guard.Guard._upload, []

    async def upload(self, *request):
        begun.append(request)
        return await receive(self, *request)

    monkeypatch.setattr(guard.Guard, "_upload", upload)
    slow = [slow_upload(http, 0) for _ in range(2)]

    def answer() -> httpx.Response:
        return http.post("/gradio_api/call/v2/edit", json={"instruction": "a"})

    wait_until(lambda: len(begun) == 2)  # asking earlier would take the place of one
    assert answer().status_code == 503
    assert "too many requests at once" in answer().json()["error"]
    for connection in slow:
        connection.close()
    wait_until(lambda: answer().status_code == 400)
    assert "“picture_1” is missing" in answer().json()["error"]


def test_a_full_queue_and_a_full_folder_refuse_a_client_with_a_sentence(tiny_service, monkeypatch):
    monkeypatch.setattr(traffic, "MAX_WAITING", 2)
    service, release = GenerationService(tiny_service.pipeline, "tiny"), threading.Event()
    with page.serving(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        service._worker.submit(release.wait)
        body = {"instruction": "make it dark", "picture_1": {"path": upload(client)}, "steps": 1, "guidance": 1.0}
        answers = [client.post("/gradio_api/call/v2/edit", json=body)]
        wait_until(lambda: service._worker._work_queue.qsize() == 1)  # the first one runs; the next two wait
        answers += [client.post("/gradio_api/call/v2/edit", json=body) for _ in range(3)]
        release.set()
        assert [answer.status_code for answer in answers] == [200, 200, 200, 503]
        assert answers[3].json()["error"] == "2 requests wait already: try again in some minutes."
        for answer in answers[:3]:
            assert "event: complete" in client.get(f"/gradio_api/call/v2/edit/{answer.json()['event_id']}").text
        held = sum(path.stat().st_size for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file())
        monkeypatch.setattr(file_store, "MAX_STORED_BYTES", held + 2 * len(CAT.read_bytes()))
        form = {"files": ("cat.jpg", CAT.read_bytes())}
        answers = [client.post("/gradio_api/upload", files=form) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 507]
        assert answers[2].text == "The server holds too many files: try again in an hour."


def files(folder: Path) -> set[Path]:
    """The files below a folder of which some go meanwhile: unlike `rglob`, `walk` passes those by."""
    return {Path(where) / name for where, _, names in os.walk(folder) for name in names}


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()
