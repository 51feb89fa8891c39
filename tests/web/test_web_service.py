"""The web page without a page: numbered instructions, examples, settings in PNG files, and the service's work."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from mige.data.synthetic.cases import make_cases
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction, full_text, tokenize
from mige.tasks import MAX_REFERENCES, Task, placeholders
from mige.utils import images
from mige.web import examples, instructions
from mige.web.instructions import Reading, RefusedError
from mige.web.provenance import read_settings, save_with_settings
from mige.web.service import MAX_AT_ONCE, PREVIEWS, GenerationService, Made, Request, Step, Stopped

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "example_data" / "images"
CAT, CUP, FLOWER = (PICTURES / f"{name}.jpg" for name in ("cat", "cup_on_black", "flower_on_black"))


# ---- numbered instructions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "given", "prompt", "numbers"),
    [
        ("put picture 2 to the left of picture 1", 2, "put<imagehere>to the left of<imagehere>", (2, 1)),
        ("Picture 1, and PICTURE #2.", 2, "<imagehere>, and<imagehere>.", (1, 2)),
        ("a picture of picture 1 beside picture 1", 1, "a picture of<imagehere>beside<imagehere>", (1, 1)),
        ("picture 1 has 2 dogs", 1, "<imagehere>has 2 dogs", (1,)),
    ],
)
def test_numbers_become_placeholders_in_the_order_of_the_text(text, given, prompt, numbers):
    assert instructions.read(Task.SUBJECT, text, [True] * given) == Reading(prompt, numbers)


def test_an_edit_may_leave_its_picture_unnamed():
    assert instructions.read(Task.EDIT, "make the sky night", [True]) == Reading("make the sky night", (1,))
    assert instructions.read(Task.EDIT, "make picture 1 night", [True]) == Reading("make<imagehere>night", (1,))


def test_a_gap_between_the_pictures_keeps_their_numbers():
    reading = instructions.read(Task.SUBJECT_EDIT, "add picture 3 to picture 1", [True, False, True])
    assert reading == Reading("add<imagehere>to<imagehere>", (3, 1))


@pytest.mark.parametrize(
    ("task", "text", "given", "words"),
    [
        (Task.SUBJECT, "  ", [True], "instruction is empty"),
        (Task.SUBJECT, "a" * 2001, [True], "2,001 characters"),
        (Task.SUBJECT, "a<imagehere>here", [True], "Name the pictures by number"),
        (Task.SUBJECT, "a \ud800 picture 1", [True], "no text"),
        (Task.SUBJECT, "a dog", [False, False], "no picture yet"),
        (Task.SUBJECT, "picture 1 and picture 3", [True, True, False], "names picture 3, but there is none"),
        (Task.SUBJECT, "picture 0", [True], "names picture 0"),
        (Task.SUBJECT, "picture 1", [True, True], "does not name picture 2"),
        (Task.SUBJECT, "pictures 1 and 2", [True, True], "does not name picture 1 and picture 2"),
        (Task.SUBJECT, " picture 1" * (MAX_REFERENCES + 1), [True], f"names pictures {MAX_REFERENCES + 1} times"),
        (Task.EDIT, "make it blue", [False], "no picture yet"),
        (Task.EDIT, "put picture 1 into picture 1", [True], "named 2 times"),
        (Task.EDIT, "put picture 2 into picture 1", [True], "names picture 2, but there is none"),
        (Task.SUBJECT_EDIT, "add picture 2 to picture 1", [False, True], "Picture 1, the one to edit, is missing"),
        (Task.SUBJECT_EDIT, "make picture 1 blue", [True, False], "no subject yet"),
        (Task.SUBJECT_EDIT, "add picture 2", [True, True], "does not name picture 1"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(task, text, given, words):
    with pytest.raises(RefusedError, match=words) as refusal:
        instructions.read(task, text, given)
    assert str(refusal.value).endswith(".")


def test_every_instruction_of_the_world_survives_being_spelled_and_read():
    """As the model reads it: blanks around a placeholder, which the world writes here and there, make no tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "output/pretrained_models/mige-mini/tokenizer")

    def tokens(prompt: str, task: Task) -> Instruction:
        return tokenize(full_text(task, prompt), tokenizer)

    for one in make_cases(4):
        case = one.case
        if not case.references:
            continue
        numbers = [*range(len(case.references), 0, -1)] if case.task is not Task.EDIT else [1]
        text = instructions.spell(case.prompt, numbers)
        reading = instructions.read(case.task, text, [True] * len(numbers))
        assert reading.numbers == tuple(numbers)
        assert tokens(reading.prompt, case.task) == tokens(case.prompt, case.task)


# ---- examples and settings in files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("kind", ["world", "records"])
def test_examples_are_instructions_that_can_be_read(task, kind, tmp_path):
    made = (
        examples.of_the_world(task, tmp_path) if kind == "world" else examples.of_records(task, ROOT / "example_data")
    )
    assert made
    for example in made:
        reading = instructions.read(task, example.instruction, [True] * len(example.pictures))
        assert max(placeholders(reading.prompt), 1) == len(example.pictures) == len(set(example.pictures))
        for path in example.pictures:
            images.open_image(path)


def test_the_picture_to_edit_is_picture_1_of_an_example():
    added = examples.of_records(Task.SUBJECT_EDIT, ROOT / "example_data")[1]
    assert added.instruction == "add the picture 2 in front of the cat in picture 1"
    assert [path.name for path in added.pictures] == ["cat.jpg", "cup_on_black.jpg"]


def test_settings_survive_in_the_png(tmp_path):
    settings = {"instruction": "a “picture 1” 在海边", "seed": 7, "guidance": 2.5}
    save_with_settings(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    read = read_settings(tmp_path / "a.png")
    assert {name: read[name] for name in settings} == settings and read["version"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["Description"] == settings["instruction"]
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png holds no settings"):
        read_settings(tmp_path / "b.png")


def test_a_png_that_says_it_is_gigantic_has_no_settings(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT")
    with pytest.raises(ValueError, match=r"a\.png: Image size \(3600000000 pixels\)"):
        read_settings(tmp_path / "a.png")


# ---- the service -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(lively):
    service = GenerationService(MIGEPipeline.from_pretrained(lively), "lively")
    yield service
    service.close()


def request(task=Task.SUBJECT, instruction="picture 1 beside picture 2", pictures=(CAT, CUP), **changes) -> Request:
    settings = dict(seeds=(5,), steps=3, guidance=2.0, source_guidance=1.5, width=128, height=128)
    return Request(task, instruction, pictures, **(settings | changes))


def result(service, asked: Request) -> Made:
    *_, made = service.run(asked)
    return made


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_run_reports_every_step_and_shows_the_picture_on_the_way(service):
    *steps, made = service.run(request(steps=14, seeds=(1, 2), height=96))
    assert [(step.number, step.of) for step in steps] == [(n, 14) for n in range(1, 15)]
    shown = [step for step in steps if step.previews]
    assert 1 < len(shown) <= PREVIEWS and shown[-1].number < 14
    assert all(picture.size == (128, 96) for step in shown for picture in step.previews)
    assert [picture.size for picture in made.pictures] == [(128, 96)] * 2
    assert [settings["seed"] for settings in made.settings] == [1, 2] and made.before is None


def test_the_nth_named_picture_is_the_nth_reference(service):
    cat, cup = images.open_image(CAT), images.open_image(CUP)
    prompt = "<imagehere>beside<imagehere>"
    for text, references in (
        ("picture 1 beside picture 2", [cat, cup]),
        ("picture 2 beside picture 1", [cup, cat]),
    ):
        want = service.pipeline(prompt, references, num_inference_steps=3, guidance_scale=2.0, seed=5).images[0]
        got = result(service, request(instruction=text)).pictures[0]
        assert np.abs(levels(got) - levels(want)).max() <= 1
    swapped = result(service, request(instruction="picture 2 beside picture 1")).pictures[0]
    assert np.abs(levels(swapped) - levels(result(service, request()).pictures[0])).max() > 5


def test_a_picture_named_twice_is_two_references(service):
    cat = images.open_image(CAT)
    want = service.pipeline("<imagehere>by<imagehere>", [cat, cat], num_inference_steps=3, guidance_scale=2.0, seed=5)
    got = result(service, request(instruction="picture 1 by picture 1", pictures=(CAT,)))
    assert np.abs(levels(got.pictures[0]) - levels(want.images[0])).max() <= 1


@pytest.mark.parametrize("named", [False, True])
def test_an_edit_is_the_pipelines_and_shows_what_it_edited(service, named):
    cat = images.open_image(CAT)
    text, prompt = ("make picture 1 dark", "make<imagehere>dark") if named else ("make it dark", "make it dark")
    want = service.pipeline(
        prompt, source=cat, num_inference_steps=3, guidance_scale=2.0, source_guidance_scale=1.5, seed=5, size="native"
    )
    got = result(service, request(Task.EDIT, text, (CAT,)))
    assert np.abs(levels(got.pictures[0]) - levels(want.images[0])).max() <= 1
    assert (levels(got.before) == levels(images.center_crop(cat, 128, 128))).all()


def test_an_edit_with_a_subject_edits_picture_1(service):
    cat, cup = images.open_image(CAT), images.open_image(CUP)
    settings = dict(num_inference_steps=3, guidance_scale=2.0, source_guidance_scale=1.5, seed=5, size="native")
    want = service.pipeline("add<imagehere>to<imagehere>", [cup, cat], source=cat, **settings)
    got = result(service, request(Task.SUBJECT_EDIT, "add picture 2 to picture 1"))
    assert np.abs(levels(got.pictures[0]) - levels(want.images[0])).max() <= 1


@pytest.mark.parametrize("task", list(Task))
def test_a_width_and_height_of_0_are_the_source_s(service, task):
    """CAT has 451 x 300 px: all of it, scaled; a subject's picture has no source and the native size."""
    text = {Task.SUBJECT: "picture 2 by picture 1", Task.EDIT: "make it dark"}.get(task, "add picture 2 to picture 1")
    own = {"pictures": (CAT,)} if task is Task.EDIT else {}
    got = result(service, request(task, text, **own, width=0, height=0))
    size = (128, 128) if task is Task.SUBJECT else (144, 96)
    assert got.pictures[0].size == size and got.settings[0]["width"] == got.settings[0]["height"] == 0
    if task is not Task.SUBJECT:
        assert (levels(got.before) == levels(images.open_image(CAT).resize(size, Image.Resampling.BILINEAR))).all()
    with pytest.raises(RefusedError, match="width is 0 px"):
        list(service.run(request(task, text, **own, width=0)))


@pytest.mark.parametrize(
    ("task", "text"), [(Task.SUBJECT, "picture 2 by picture 1"), (Task.SUBJECT_EDIT, "picture 2 in picture 1")]
)
def test_a_picture_of_a_grid_is_that_seed_alone(service, task, text):
    grid = result(service, request(task, text, seeds=(3, 4, 5)))
    alone = [result(service, request(task, text, seeds=(seed,))) for seed in (3, 4, 5)]
    for place in range(3):
        assert np.abs(levels(grid.pictures[place]) - levels(alone[place].pictures[0])).max() <= 1
    assert np.abs(levels(grid.pictures[0]) - levels(grid.pictures[1])).max() > 5


def test_the_settings_of_a_result_say_all_that_made_it(service):
    [settings] = result(service, request(Task.SUBJECT_EDIT, "add picture 2 to picture 1", seeds=(9,))).settings
    assert settings == {
        "task": "subject_edit",
        "instruction": "add picture 2 to picture 1",
        "prompt": "add<imagehere>to<imagehere>",
        "pictures": [2, 1],
        "model": "lively",
        "dtype": "float32",
        "seed": 9,
        "steps": 3,
        "guidance": 2.0,
        "source_guidance": 1.5,
        "width": 128,
        "height": 128,
        "negative": "",
        "mask": [],
        "adapters": {},
    }
    json.dumps(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 120}, "width is 120 px: choose a multiple of 16 px from 64 to 256 px"),
        ({"height": 512}, "height is 512 px"),
        ({"steps": 0}, "number of steps is 0: choose one from 1 to 100"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"source_guidance": -1.0}, "source guidance is -1"),
        ({"seeds": ()}, "number of pictures is 0"),
        ({"seeds": tuple(range(MAX_AT_ONCE + 1))}, "number of pictures is 9: choose one from 1 to 8"),
        ({"seeds": (-1,)}, "seed is -1"),
        ({"seeds": (2**32,)}, "seed is 4294967296"),
        ({"instruction": "picture 1 " + "so " * 90 + "picture 2"}, "too long: a picture in it would not be read"),
    ],
)
def test_a_request_out_of_bounds_is_refused_before_any_work(service, changes, words):
    with pytest.raises(RefusedError, match=words):
        next(service.run(request(**changes)))


def bomb() -> bytes:
    """A PNG whose header announces 60,000 x 60,000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def truncated() -> bytes:
    return CUP.read_bytes()[:5000]


BAD_FILES = {
    "bomb": (bomb, "pixels"),
    "text": (lambda: b"no picture at all", "a text, not an image of a known format"),
    "truncated": (truncated, "cannot be decoded"),
    "empty": (lambda: b"", "empty"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_by_its_number_and_harms_nobody(service, tmp_path, kind):
    content, words = BAD_FILES[kind]
    bad = tmp_path / "bad.png"
    bad.write_bytes(content())
    waiting = service.run(request(pictures=(CAT, bad)))
    with pytest.raises(RefusedError, match=rf"^Picture 2: .*{words}") as refusal:
        list(waiting)
    assert str(tmp_path) not in str(refusal.value)
    assert result(service, request()).pictures


def test_an_upload_of_more_pixels_than_the_page_takes_is_refused(service, tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")  # a few kB; the library itself would open it
    with pytest.raises(RefusedError, match=r"^Picture 1: 169,000,000 pixels, expected at most 65,000,000"):
        list(service.run(request(Task.EDIT, "make it dark", (tmp_path / "large.png",))))


def test_a_picture_too_long_to_scale_is_refused(service, tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "long.png")
    with pytest.raises(RefusedError, match=r"60000.*make it smaller or crop it"):
        list(service.run(request(Task.EDIT, "make it dark", (tmp_path / "long.png",), width=256, height=256)))


def test_closing_a_run_stops_the_work(service):
    calls = []
    hook = service.pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        running = service.run(request(steps=100, guidance=1.0))
        assert isinstance(next(running), Step)
        running.close()
        result(service, request(steps=1, guidance=1.0))  # the worker has come to it, so the first one is over
    finally:
        hook.remove()
    assert len(calls) < 90


def test_closing_the_studio_ends_what_runs(tiny_model):
    service = GenerationService(MIGEPipeline.from_pretrained(tiny_model), "tiny")
    running = service.run(request(steps=100))
    next(running)
    service.close()
    with pytest.raises(Stopped):
        list(running)
