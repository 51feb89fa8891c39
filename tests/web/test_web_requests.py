"""What a request may ask for beside its pictures: a mask, a negative text, adapters; what a safety check does to it.

And what is kept of it: settings in the PNG, the history of a visitor, the form that is filled again.
"""

import copy
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_web_service import CAT, CUP, levels, request, result

from mige.inference.adapters import add_adapters
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.utils import images
from mige.web import forms, history, strokes
from mige.web.adapting import SCALES, AdapterScales
from mige.web.fields import NUM_SETTINGS, read_request
from mige.web.file_store import FileStore, Results
from mige.web.history import Entry, Histories
from mige.web.instructions import RefusedError
from mige.web.pace import Pace
from mige.web.provenance import read_settings, save_with_settings
from mige.web.remarks import remarks
from mige.web.request import Made
from mige.web.saving import save_results
from mige.web.service import GenerationService
from mige.web.strokes import Stroke, as_lists, draw, read_strokes

EDIT = dict(task=Task.EDIT, instruction="make it dark", pictures=(CAT,), width=0, height=0)


@pytest.fixture(scope="module")
def pipeline(lively) -> MIGEPipeline:
    return MIGEPipeline.from_pretrained(lively)


@pytest.fixture(scope="module")
def service(pipeline):
    service = GenerationService(pipeline, "lively")
    yield service
    service.close()


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_outside_the_strokes_a_result_is_its_source_bit_for_bit(service):
    mask = (Stroke(0.1, ((0.3, 0.3), (0.6, 0.4))),)
    free, held = (result(service, request(**EDIT, mask=one)) for one in ((), mask))
    with_seam = np.asarray(draw(mask, held.before.size)) == 0
    before, after = np.asarray(held.before), np.asarray(held.pictures[0])
    size = images.open_image(CAT).size
    fitted = np.asarray(draw(mask, size).resize(held.before.size, Image.Resampling.BOX)) == 0
    outside = with_seam & fitted
    assert outside.any() and not outside.all()
    assert (before[outside] == after[outside]).all()
    assert (before[~outside] != after[~outside]).any()
    assert (np.asarray(free.pictures[0])[outside] != before[outside]).any()  # the mask does it
    assert held.settings[0]["mask"] == as_lists(mask)


def test_a_stroke_is_as_wide_as_its_brush_at_any_size():
    for size in ((400, 200), (200, 400)):
        drawn = np.asarray(draw([Stroke(0.1, ((0.5, 0.5),))], size)) > 0
        rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
        assert abs(len(rows) - 80) <= 2 and abs(len(columns) - 80) <= 2  # of the longer side, in both directions
        assert abs(rows.mean() - size[1] / 2) <= 1 and abs(columns.mean() - size[0] / 2) <= 1
    line = np.asarray(draw([Stroke(0.05, ((0.25, 0.5), (0.75, 0.5)))], (400, 400))) > 0
    assert line[200, 80:320].all() and abs(line[:, 200].sum() - 40) <= 2
    assert not np.asarray(draw([], (20, 10))).any()


@pytest.mark.parametrize(
    "value",
    ["strokes", 3, {"a": 1}, [1], [["a", 0.1, 0.1]], [[0.1, 0.2]], [[0.1, 0.1, 0.1, 0.1]], [[]], [[0.0, 0.1, 0.1]],
     [[0.6, 0.1, 0.1]], [[0.1, 1.1, 0.1]], [[0.1, -0.1, 0.1]], [[0.1, float("nan"), 0.1]], [[0.1, True, 0.1]],
     [[0.1, 0.1, 0.1]] * (strokes.MAX_STROKES + 1), [[0.1, *[0.1] * 2 * (strokes.MAX_POINTS + strokes.MAX_STROKES)]]],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_no_list_of_strokes_is_refused(value):
    with pytest.raises(RefusedError, match=r"^The mask .*: paint "):
        read_strokes(value)


def test_strokes_are_read_as_they_were_written():
    value = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.0, 1.0]]
    assert as_lists(read_strokes(value)) == value and read_strokes(None) == read_strokes([]) == ()


def test_a_mask_needs_something_to_edit_and_something_left(service):
    with pytest.raises(RefusedError, match="nothing is edited here"):
        service.check(request(mask=(Stroke(0.1, ((0.5, 0.5),)),)))
    with pytest.raises(RefusedError, match="Nothing of the mask is left"):
        result(service, request(**EDIT, mask=(Stroke(1e-9, ((0.5, 0.5),)),)))


# ---- negative text, adapters, safety ---------------------------------------------------------------------------------


def test_a_negative_text_is_the_pipelines(service):
    asked = request(**EDIT, negative="blue sky")
    made = result(service, asked)
    want = service.pipeline("make it dark", source=images.open_image(CAT), negative_prompt="blue sky", seed=5,
                            num_inference_steps=asked.steps, guidance_scale=asked.guidance,
                            source_guidance_scale=asked.source_guidance).images[0]  # fmt: skip
    plain = result(service, request(**EDIT))
    assert np.abs(levels(made.pictures[0]) - levels(want)).max() <= 1
    assert (levels(made.pictures[0]) != levels(plain.pictures[0])).any()
    assert made.settings[0]["negative"] == "blue sky"


@pytest.fixture(scope="module")
def adapters(pipeline, tmp_path_factory) -> list[Path]:
    folders = []
    for seed in range(2):
        made, random = copy.deepcopy(pipeline.transformer), torch.Generator().manual_seed(seed)
        made = get_peft_model(made, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) / 4)
        folders.append(tmp_path_factory.mktemp("adapters") / f"style-{seed}")
        made.save_pretrained(folders[-1])
    return folders


def test_each_request_has_its_own_scales_and_no_other_is_touched(lively, adapters):
    pipeline = MIGEPipeline.from_pretrained(lively)
    loaded = [(adapters[0], 1.0), (adapters[1], 0.5)]
    for path, scale in loaded:
        add_adapters(pipeline, path, scale)
    service = GenerationService(pipeline, "lively", adapters=loaded)
    assert [(one.label, one.scale) for one in service.adapters.offered] == [("style-0", 1.0), ("style-1", 0.5)]

    def made(scales):
        one = result(service, request(**EDIT, scales=scales))
        return levels(one.pictures[0]), one.settings[0]["adapters"]

    usual, named = made(None)
    assert named == {"style-0": 1.0, "style-1": 0.5}
    off, named = made((0.0, 0.0))
    assert named == {"style-0": 0.0, "style-1": 0.0} and (off != usual).any()
    plain = GenerationService(MIGEPipeline.from_pretrained(lively), "lively")
    assert (off == levels(result(plain, request(**EDIT)).pictures[0])).all()
    assert (made(None)[0] == usual).all()
    with pytest.raises(RefusedError, match="scale of style-1 is 5: choose one from -4 to 4"):
        service.check(request(**EDIT, scales=(1.0, 5.0)))
    with pytest.raises(RefusedError, match="1 scales for 2 adapters"):
        service.check(request(**EDIT, scales=(1.0,)))
    with pytest.raises(ValueError, match=r"scale of .*style-0 is 9, expected one from -4 to 4"):
        GenerationService(pipeline, "lively", adapters=[(adapters[0], 9.0), loaded[1]])
    for one in (service, plain):
        one.close()


def test_adapters_of_the_text_encoder_alone_have_their_scale_too(lively, adapters, tmp_path):
    pipeline = MIGEPipeline.from_pretrained(lively)
    words = get_peft_model(copy.deepcopy(pipeline.text_encoder), LoraConfig(r=2, target_modules=["q", "v"]))
    with torch.no_grad():
        for name, parameter in words.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    words.save_pretrained(tmp_path / "words" / "text_encoder")
    loaded = [(tmp_path / "words", 0.25), (adapters[0], 1.0)]
    for path, scale in loaded:
        add_adapters(pipeline, path, scale)
    service = GenerationService(pipeline, "lively", adapters=loaded)
    assert [(one.label, one.scale) for one in service.adapters.offered] == [("words", 0.25), ("style-0", 1.0)]
    service.adapters.use((0.5, 0.0))
    assert [round(scale, 2) for scale in pipeline._stack.scales.values()] == [0.5, 0.0]
    service.close()


def test_adapters_of_one_name_keep_a_scale_each(tmp_path):
    pipeline = SimpleNamespace(get_active_adapters=lambda: ["0", "1", "2"])
    given = [(tmp_path / "a" / "lora", 1.0), (tmp_path / "b" / "lora", 0.5), (tmp_path / "style", 2.0)]
    assert AdapterScales(pipeline, given).named((0.1, 0.2, 0.3)) == {"lora": 0.1, "lora (2)": 0.2, "style": 0.3}


def test_the_safety_check_sees_what_comes_in_and_what_goes_out(pipeline):
    seen, withhold = [], []

    def checker(pictures):
        seen.append([picture.size for picture in pictures])
        return [one in withhold for one in range(len(seen) * 10, len(seen) * 10 + len(pictures))]

    service = GenerationService(pipeline, "lively", safety_checker=checker)
    asked = request(pictures=(CAT, CUP), seeds=(3, 4))
    events = list(service.run(asked))
    assert all(not getattr(event, "previews", None) for event in events)
    assert len(events[-1].pictures) == 2 and [len(sizes) for sizes in seen] == [2, 2]
    withhold.append(40)  # the first result of the second run
    assert [one["seed"] for one in result(service, asked).settings] == [4]
    withhold.append(51)  # the second picture of the third
    with pytest.raises(RefusedError, match="refuses a picture of yours"):
        result(service, asked)
    withhold += [70, 71]
    with pytest.raises(RefusedError, match="withheld what was made"):
        result(service, asked)
    service.close()


def test_a_safety_check_that_fails_lets_nothing_out(pipeline):
    service = GenerationService(pipeline, "lively", safety_checker=lambda pictures: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result(service, request(**EDIT))
    service.close()


def test_what_is_left_and_what_is_typical(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mige.web.pace.time.perf_counter", lambda: now[0])
    pace = Pace()
    assert pace.left() == 0.0 and pace.typical is None
    with pace.running():
        assert pace.left() is None
        now[0] += 2
        pace.step(1, 5)
        assert pace.left() == pytest.approx(8.0)
        now[0] += 8
    assert pace.typical == 10.0 and pace.left() == 0.0
    with pytest.raises(ValueError), pace.running():
        assert pace.left() == 10.0
        now[0] += 3
        assert pace.left() == 7.0
        raise ValueError
    assert pace.typical == 10.0  # a run that fails says nothing
    with pace.running():
        now[0] += 20
    assert pace.typical == pytest.approx(0.3 * 20 + 0.7 * 10)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> FileStore:
    folder = tmp_path / "store"
    folder.mkdir()
    return FileStore(folder)


@pytest.mark.parametrize(("task", "kind"), [("subject", "trainedAlgorithmicMedia"),
                                            ("edit", "compositeWithTrainedAlgorithmicMedia")])  # fmt: skip
def test_a_result_says_that_a_model_made_it(tmp_path, task, kind):
    save_with_settings(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"instruction": "a", "task": task})
    with Image.open(tmp_path / "a.png") as image:
        packet = image.info["XML:com.adobe.xmp"]
    [said] = ElementTree.fromstring(packet.lstrip("\ufeff")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    source_type = said.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert source_type == f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"


def test_results_are_files_named_after_what_was_asked_and_an_archive_of_several(store):
    settings = [
        {"instruction": "Make it a SNOWY day, ../../etc — now!", "task": "edit", "seed": seed} for seed in (3, 4)
    ]
    made = Made([Image.new("RGB", (8, 8), color) for color in ("red", "blue")], settings, Image.new("RGB", (8, 8)), 1.0)
    results = save_results(made, "edit", store)
    names = [Path(path).name for path, _ in results.images]
    assert names == [f"mige-edit-make-it-a-snowy-day-etc-seed-{seed}.png" for seed in (3, 4)]
    assert [caption for _, caption in results.images] == ["seed 3", "seed 4"]
    with zipfile.ZipFile(results.archive) as archive:
        assert archive.namelist() == names
        assert archive.read(names[1]) == Path(results.images[1][0]).read_bytes()
    assert all(store.find(path) for path in (results.before, results.archive, *(path for path, _ in results.images)))
    alone = save_results(Made(made.pictures[:1], settings[:1], None, 1.0), "generate", store)
    assert alone.archive is None and alone.before is None


def test_a_history_is_its_visitors_alone_and_keeps_what_was_asked_for(store, tmp_path):
    histories = Histories()
    ada, bo = histories.welcome(None), histories.welcome("guessed")
    assert ada != bo != "guessed" and histories.welcome(ada) == ada and len(ada) >= 32
    path = store.new_folder() / "a.png"
    path.write_bytes(b"a")
    token = store.add_results(Results(((store.hand_out(path), "seed 0"),)))
    entry = Entry(token, request(**EDIT))
    histories.add(ada, entry)
    histories.add("guessed", entry)
    assert histories.entries(ada) == [entry] and histories.find(ada, token) == entry
    for other in (bo, "guessed", None, 3, ["a"], {"a": 1}):
        assert histories.entries(other) == [] and histories.find(other, token) is None
        assert histories.find(ada, None if other == bo else other) is None
    os.utime(path.parent, (0, 0))
    store.sweep(1.0)
    assert store.results(token) is None and histories.entries(ada) == [entry]


def test_histories_have_an_end(monkeypatch):
    monkeypatch.setattr(history, "MAX_VISITORS", 3)
    monkeypatch.setattr(history, "MAX_ENTRIES", 2)
    histories = Histories()
    first, *others = (histories.welcome(None) for _ in range(3))
    histories.welcome(first)  # comes again: the second one is who came longest ago
    histories.welcome(None)
    assert histories.welcome(first) == first and histories.welcome(others[0]) != others[0]
    for number in range(4):
        histories.add(first, Entry(str(number), request()))
    assert [entry.token for entry in histories.entries(first)] == ["3", "2"]


# ---- forms -----------------------------------------------------------------------------------------------------------


def uploaded(store: FileStore, path: Path = CAT) -> Path:
    return Path(store.add_upload(path.name, path.read_bytes()))


def test_a_form_is_filled_as_it_was_sent(store):
    picture = uploaded(store)
    asked = request(Task.SUBJECT_EDIT, "put picture 2 into picture 1", (picture, None, picture, None), seeds=(7, 8),
                    negative="blur", mask=(Stroke(0.1, ((0.2, 0.3),)),), scales=())  # fmt: skip
    values = forms.of_request(asked, store, 4, ())
    assert len(values) == 5 + NUM_SETTINGS
    as_sent = [{"path": value} if value == str(picture) else value for value in values]
    assert read_request(asked.task, as_sent, store) == asked
    assert forms.of_draft(as_sent, 4, store, ()) == values
    os.utime(picture.parent, (0, 0))
    store.sweep(1.0)
    assert forms.of_request(asked, store, 4, ())[1:5] == [None] * 4


def test_settings_in_a_png_fill_the_form_they_came_from(store, service, tmp_path):
    asked = request(**EDIT, negative="blur", mask=(Stroke(0.2, ((0.25, 0.5), (0.75, 0.5))),), seeds=(41, 42))
    made = result(service, asked)
    save_with_settings(made.pictures[1], tmp_path / "a.png", made.settings[1])
    task, values = forms.of_settings(read_settings(tmp_path / "a.png"), {Task.EDIT: 1}, ())
    want = forms.of_request(asked, store, 1, ())
    assert task is Task.EDIT and values[1] is forms.KEEP
    assert [values[0], *values[2:]] == [want[0], 42, 1, *want[4:]]


GOOD = {"task": "edit", "instruction": "a", "seed": 1, "steps": 2, "guidance": 2.0, "source_guidance": 1.0, "width": 0,
        "height": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "paint"}, 'task in this file is "paint"'),
        ({"task": ["edit"]}, "task in this file is"),
        ({"instruction": 3}, "instruction is 3: expected a text"),
        ({"instruction": "a" * 2001}, "instruction has 2,001 characters"),
        ({"seed": None}, "seed is empty"),
        ({"steps": 1e9}, "number of steps is 1000000000"),
        ({"guidance": "2"}, 'guidance is "2"'),
        ({"width": -1}, "width is -1"),
        ({"negative": {}}, "negative text is {}"),
        ({"mask": "x"}, "mask is no list"),
        ({"adapters": []}, "adapters in this file are []"),
    ],
)
def test_settings_that_are_none_of_ours_are_refused_in_a_sentence(changes, words):
    assert forms.of_settings(GOOD, {Task.EDIT: 1}, ())[0] is Task.EDIT
    with pytest.raises(RefusedError) as refusal:
        forms.of_settings(GOOD | changes, {Task.EDIT: 1}, ())
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "holds no settings"), ("{", "no JSON"), ("[1]", "no object"), ('{"a":' + "[" * 90000, "no JSON"),
     (" " * 300_000, "300,000 characters")],
)  # fmt: skip
def test_a_png_of_anybody_is_read_with_care(tmp_path, text, words):
    info = None
    if text is not None:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("mige", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=words):
        read_settings(tmp_path / "a.png")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "task", "mask"]), inner),
    max_leaves=12,
)


@given(value=JSON, values=st.lists(JSON, min_size=5 + NUM_SETTINGS, max_size=5 + NUM_SETTINGS))
def test_no_draft_fails_and_none_names_a_file(value, values, tmp_path_factory):
    empty = FileStore(tmp_path_factory.mktemp("empty"))
    assert forms.of_draft(value, 4, empty, ()) == [forms.KEEP] * (5 + NUM_SETTINGS)
    filled = forms.of_draft(values, 4, empty, ())
    assert filled[1:5] == [None] * 4
    json.dumps([value for value in filled if value is not forms.KEEP])


def test_scales_of_a_draft_and_of_a_file_belong_to_the_adapters_here():
    from mige.web.adapting import Adapter

    own = [Adapter("0: a", "a", 0.5)]
    assert forms.of_settings(GOOD, {Task.EDIT: 1}, own)[1][-1] is forms.KEEP
    assert forms.of_settings(GOOD | {"adapters": {"b": 1}}, {Task.EDIT: 1}, own)[1][-1] == 0.0
    assert forms.of_settings(GOOD | {"adapters": {"a": 2}}, {Task.EDIT: 1}, own)[1][-1] == 2.0
    with pytest.raises(RefusedError, match="scale of a is 5"):
        forms.of_settings(GOOD | {"adapters": {"a": SCALES[1] + 1}}, {Task.EDIT: 1}, own)


@pytest.mark.parametrize(
    ("kind", "mode", "words"),
    [
        ("png", "RGB", None),
        ("jpeg", "RGB", None),
        ("png", "RGBA", "Picture 2 is transparent in places: the model reads those as black"),
        ("tiff", "RGB", "Picture 2 is a TIFF file, which browsers do not show; it is read"),
        (None, "RGB", "Picture 2 is no image that can be read: use another"),
    ],
)
def test_what_a_visitor_does_not_see_is_said_before_the_run(tmp_path, kind, mode, words):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image") if kind is None else Image.new(mode, (8, 8)).save(path, kind)
    assert remarks([None, path]) == ([] if words is None else [words])
