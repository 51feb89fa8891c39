"""The served page through Gradio's API client: results, refusals, the queue, load, and what is left behind."""

import gc
import http.server
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT, environment, run_here
from gradio_client import Client, handle_file
from PIL import Image
from processes import start_python
from test_web_service import BAD_FILES, CAT, CUP

from mige.cli import web_demo
from mige.inference.pipeline import MIGEPipeline
from mige.utils import images
from mige.web import page, traffic
from mige.web.provenance import read_settings
from mige.web.service import GenerationService

FEW = dict(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def service(lively) -> GenerationService:
    return GenerationService(MIGEPipeline.from_pretrained(lively), "lively")


@pytest.fixture(scope="module")
def address(service):
    with page.serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def folder(address) -> Path:
    """Gradio's temporary folder while the page is served."""
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture
def client(address, tmp_path):
    client = Client(address, verbose=False, download_files=tmp_path / "downloads")
    yield client
    client.close()


def levels(path) -> np.ndarray:
    return np.asarray(images.open_image(Path(path))).astype(int)


def refusal(client, *values, **named) -> str:
    with pytest.raises(Exception) as refused:
        client.predict(*values, **FEW, **named)
    return str(refused.value)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_it_listens_to_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("api_name", "instruction", "pictures"),
    [
        ("/generate", "a picture 2 beside a picture 1", (CAT, CUP)),
        ("/edit", "make it a snowy day", (CAT,)),
        ("/edit_with_subject", "put picture 2 to the left of picture 1", (CAT, CUP)),
    ],
)
def test_three_lines_of_python_make_pictures_with_their_settings(client, service, api_name, instruction, pictures):
    uploads = [handle_file(str(path)) for path in pictures]
    results = client.predict(instruction, *uploads, api_name=api_name, pictures=2, seed=4, **FEW)
    assert [result["caption"] for result in results] == ["seed 4", "seed 5"]
    settings = read_settings(Path(results[1]["image"]))
    assert (settings["instruction"], settings["seed"], settings["steps"]) == (instruction, 5, 2)
    opened = [images.open_image(path) for path in pictures]
    want = service.pipeline(
        settings["prompt"],
        [opened[number - 1] for number in settings["pictures"]],
        None if api_name == "/generate" else opened[0],
        num_inference_steps=2,
        guidance_scale=settings["guidance"],
        source_guidance_scale=settings["source_guidance"],
        seed=5,
    ).images[0]
    assert np.abs(levels(results[1]["image"]) - np.asarray(want).astype(int)).max() <= 1


def test_the_api_names_what_it_takes(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/generate", "/edit", "/edit_with_subject"}
    settings = ["seed", "pictures", "steps", "guidance", "source_guidance", "width", "height", "negative"]
    for name, many in (("/generate", 4), ("/edit", 1), ("/edit_with_subject", 4)):
        taken = [parameter["parameter_name"] for parameter in endpoints[name]["parameters"]]
        assert taken == ["instruction", *(f"picture_{n}" for n in range(1, many + 1)), *settings]
        assert len(endpoints[name]["returns"]) == 1


def test_a_full_model_starts_with_the_official_settings_and_photographs(lively, monkeypatch):
    monkeypatch.setattr(GenerationService, "is_miniature", property(lambda self: False))
    with page.serving(GenerationService(MIGEPipeline.from_pretrained(lively), "full")) as address:
        client = Client(address, verbose=False)
        parameters = client.view_api(return_format="dict")["named_endpoints"]["/generate"]["parameters"]
        shown = json.dumps(client.config)
        client.close()
    offered = {parameter["parameter_name"]: parameter["parameter_default"] for parameter in parameters}
    assert (offered["steps"], offered["guidance"], offered["source_guidance"]) == (50, 7, 1)
    assert "pagoda.jpg" in shown and "drawn world" not in shown


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_upload_gets_a_sentence(client, tmp_path, kind):
    content, words = BAD_FILES[kind]
    if kind == "empty":
        words = "empty|picture"
    (tmp_path / "bad.png").write_bytes(content())
    bad = handle_file(str(tmp_path / "bad.png"))
    said = refusal(client, "picture 1 by picture 2", handle_file(str(CAT)), bad, api_name="/generate")
    assert "Picture 2: " in said and words.split("|")[0] in said


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"instruction": "a picture 2"}, "names picture 2, but there is none"),
        ({"instruction": "a dog"}, "does not name picture 1"),
        ({"instruction": "a picture 1", "width": 100}, "width is 100 px: choose a multiple of 16 px"),
        ({"instruction": "a picture 1", "seed": None}, "seed is empty"),
        ({"instruction": "a picture 1", "pictures": 99}, "number of pictures is 99: choose one from 1 to 8"),
    ],
)
def test_a_mismatch_gets_a_sentence(client, named, words):
    assert words in refusal(client, picture_1=handle_file(str(CAT)), api_name="/generate", **named)


def test_an_upload_over_the_limit_is_refused_and_not_kept(client, folder, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(traffic.UPLOAD_MB * 2**20 + 1))
    before = set(folder.rglob("*"))
    with pytest.raises(Exception, match=r"413|size|large"):
        client.predict("a picture 1", handle_file(str(large)), api_name="/generate", **FEW)
    assert {path for path in set(folder.rglob("*")) - before if path.is_file()} == set()


def answer(address: str, api_name: str, *values) -> str:
    """How a request ends that is sent as it is ("complete" or "error"); the client would upload local paths itself."""
    url = f"{address}gradio_api/call/{api_name}"
    event = httpx.post(url, json={"data": values}).json()["event_id"]
    lines = httpx.get(f"{url}/{event}", timeout=60).text.splitlines()
    return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")][-1]


def file_data(path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_nothing_is_fetched_and_no_other_file_is_read(address, folder):
    form = {"files": ("inside.png", CAT.read_bytes())}
    [inside] = httpx.post(f"{address}gradio_api/upload", files=form).json()
    assert Path(inside).is_relative_to(folder)
    assert answer(address, "edit", "make it dark", file_data(inside), 0, 1, 2, 2, 1, 128, 128, "") == "complete"
    not_uploaded = folder / "beside.png"
    not_uploaded.write_bytes(CAT.read_bytes())
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in (f"http://127.0.0.1:{server.server_port}/a.png", str(CAT), "/etc/hostname", not_uploaded):
            assert answer(address, "edit", "make it dark", file_data(path), 0, 1, 2, 2, 1, 128, 128, "") == "error"
        server.shutdown()
    assert asked == []


def test_a_fault_of_ours_keeps_its_details_and_harms_no_other(client, service, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(service.pipeline, "decode", lambda *_: 1 / 0)
        said = refusal(client, "make it dark", handle_file(str(CAT)), api_name="/edit")
    assert "went wrong at our end" in said and "division" not in said
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert client.predict("make it dark", handle_file(str(CAT)), api_name="/edit", **FEW)


# ---- the queue, load -------------------------------------------------------------------------------------------------


def test_twenty_at_once_are_all_answered_and_the_bad_ones_harm_no_other(address, tmp_path):
    clients = [Client(address, verbose=False, download_files=tmp_path / str(n)) for n in range(4)]
    upload = handle_file(str(CAT))
    jobs = [
        clients[n % 4].submit(
            "make it dark" if n % 5 else "make picture 3 dark", upload, seed=n // 4, api_name="/edit", **FEW
        )
        for n in range(20)
    ]
    places = set()
    while not all(job.done() for job in jobs):
        places |= {job.status().rank for job in jobs}
        time.sleep(0.05)
    seeds = {}
    for n, job in enumerate(jobs):
        if n % 5 == 0:
            with pytest.raises(Exception, match="names picture 3"):
                job.result(timeout=120)
            continue
        [result] = job.result(timeout=120)
        seeds.setdefault(n // 4, []).append(levels(result["image"]))
    assert max(place or 0 for place in places) > 3, "nobody was told a place in the queue"
    assert sorted(seeds) == [0, 1, 2, 3, 4]
    for same in seeds.values():
        assert all((picture == same[0]).all() for picture in same)
    for client in clients:
        client.close()


def test_cancelling_stops_the_work(client, service):
    calls = []
    hook = service.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        job = client.submit("make it dark", handle_file(str(CAT)), api_name="/edit", steps=100, guidance=1.0)
        while not calls:
            time.sleep(0.01)
        job.cancel()
        client.predict("make it dark", handle_file(str(CAT)), api_name="/edit", steps=1, guidance=1.0)
    finally:
        hook.remove()
    assert len(calls) < 90


@pytest.mark.slow
def test_memory_stays_flat(client, tmp_path):
    """Each request opens a picture of 12 MB: keeping one a request would show."""
    Image.linear_gradient("L").resize((2000, 2000)).convert("RGB").save(tmp_path / "large.jpg")

    def ask(times: int) -> None:
        for _ in range(times):
            upload, small = handle_file(str(tmp_path / "large.jpg")), dict(steps=1, width=64, height=64)
            client.predict("make it dark", upload, api_name="/edit", **small)

    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc, which this system has not")
    ask(5)
    before = resident()
    ask(15)
    assert resident() - before < 15 * 4e6


# ---- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_script_serves_and_leaves_nothing_behind_when_it_is_ended(lively, tmp_path):
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    temporary.mkdir()
    elsewhere.mkdir()
    command = [ROOT / "infer_scripts" / "web_demo.py", "--model", lively, "--device", "cpu"]
    env = environment() | {"TMPDIR": str(temporary)}
    env.pop("GRADIO_TEMP_DIR", None)  # set while this process serves a page itself
    options = dict(cwd=elsewhere, env=env, stdout=-1, stderr=subprocess.PIPE)
    with start_python(*command, **options) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Open http://127.0.0.1:"), process.stderr.read()
            client = Client(line.split()[1], verbose=False, download_files=tmp_path / "downloads")
            assert client.predict("make it dark", handle_file(str(CAT)), api_name="/edit", **FEW)
            assert len(list(temporary.glob("mige-web-*"))) == 1
            client.submit("make it dark", handle_file(str(CAT)), api_name="/edit", steps=100)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert list(temporary.iterdir()) == []
    assert list(elsewhere.iterdir()) == []
    assert not list((ROOT / "mige" / "web").glob("*.pyi"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "0"], "--port is 0"),
        (["--device", "q"], "--device q"),
        (["--public-host", "https://a.example"], "--public-host is 'https://a.example'; expected a name alone"),
    ],
)
def test_the_script_explains_what_it_cannot_do(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        web_demo.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_the_script_names_a_model_that_is_not_there(tmp_path):
    done = run_here("infer_scripts/web_demo.py", "--model", tmp_path / "none")
    assert done.returncode == 1 and str(tmp_path / "none") in done.stderr and "Traceback" not in done.stderr
