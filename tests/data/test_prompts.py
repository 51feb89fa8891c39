"""What in a prompt is not read as written: near markers, unknown and special tokens; texts of training."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_program
from transformers import AutoTokenizer

from mige.data.checks import check_lengths, check_training_text
from mige.data.parsing import read_records
from mige.data.records import Record
from mige.models.instruction import full_text, tokenize
from mige.tasks import PLACEHOLDER, Task, near_markers, placeholders

CASES = Path(__file__).parents[1] / "fixtures" / "images"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model / "tokenizer")


def record(prompt, references=1, task=Task.EDIT, edit_type=None):
    paths = tuple(Path(f"{n}.jpg") for n in range(references))
    source = None if task is Task.SUBJECT else paths[0]
    return Record("7", task, prompt, paths, source, None, edit_type, "x.json, record 1 (id 7)")


def rows(tmp_path, prompts, references=1):
    """Records as a user's file gives them: edits of one image or with another reference."""
    names = ["wide.png", "tall.png"][:references]
    lines = [
        {"multi_prompt": prompt, "entity_path": names, "source_path": ["wide.png"], "image": "wide.png", "id": name}
        for name, prompt in prompts.items()
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return read_records([file], root=CASES)


NEAR = [
    *("<image here>", "<ImageHere >", "&lt;imagehere&gt;", "&amp;lt;imagehere&amp;gt;", "<image>", "<img>", "<Image1>"),
    *("<imagehere/>", "[imagehere]", "{image}", "< imagehere >", "＜imagehere＞", "<ｉｍａｇｅｈｅｒｅ>", "<imagehre>"),
    *("<image_here>", "<image-here>", "(imagehere)", "«imagehere»", "【imagehere】", "<|image|>", "<img src='a.jpg'>"),
    *("imagehere", "<imagehere", "imagehere>", "%3Cimagehere%3E", "\\u003cimagehere\\u003e", "<im\u200bagehere>"),
    *(
        "<imageh\u0435\u0440\u0435>",
        "<image\u04bb\u0435\u0433\u0435>",
        "<source image>",
        "<reference image 2>",
        "<placeholder>",
    ),
    *("<image: the cat>", "<entity>", "<object>"),
]


@pytest.mark.parametrize("near", NEAR)
def test_what_looks_like_the_marker_is_named(tmp_path, tokenizer, near):
    report = rows(tmp_path, {"a": f"make {near} snowy"})
    assert not report.errors
    for issues in (check_lengths(report.records, tokenizer, 3, 10_000), check_training_text(report.records[0])):
        warnings = [warning for warning in issues if "looks like the marker" in warning.message]
        assert len(warnings) == 1 and not warnings[0].fatal and warnings[0].where == report.records[0].where
        assert repr(near) in warnings[0].message and PLACEHOLDER in warnings[0].hint


def test_an_error_in_the_number_of_markers_names_the_near_one(tmp_path):
    (error,) = rows(tmp_path, {"a": "put <image here> in<imagehere>"}, references=2).errors
    assert "1 <imagehere> in the prompt, 2 references ('<image here>' is read as words)" in error.message


@pytest.mark.parametrize(
    "text",
    [
        *("a<imagehere>b <IMAGEHERE>", "write <b>hello</b>", "3 < 5 and 5 > 3", "the (photo) above", "image here"),
        *("make the image [dark]", "a picture of an image", "{red, green}", "imagery", "pilgrimagehereby"),
    ],
)
def test_other_texts_give_no_warning(text):
    assert near_markers(text) == []


@given(st.lists(st.sampled_from(["make", "the", "image", "photo", "here", "(sic)", "[x]", "<b>", PLACEHOLDER, "&"])))
def test_texts_of_whole_words_give_no_warning(words):
    assert near_markers(" ".join(words)) == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_only_bracketed_or_joined_words_give_a_warning(text):
    found = near_markers(text)
    plain = unicodedata.normalize("NFKC", text).lower()
    assert not found or "i" in plain or "&" in plain or any(letter in plain for letter in "prs")
    assert all(isinstance(one, str) and one for one in found)


def test_words_stay_words_outside_of_emu_edit(tmp_path):
    prompts = {"e": "remove the photographer on the left", "f": "make the pictures on the wall red"}
    for one in rows(tmp_path, prompts).records:
        assert full_text(one.task, one.prompt, one.edit_type).endswith(f"\n {one.prompt} in<imagehere>")
    emu = tmp_path / "emu.json"
    emu.write_text(json.dumps([{"instruction": prompts["e"], "image": "wide.png"}]))
    (one,) = read_records([emu], root=CASES).raise_if_errors()
    assert full_text(one.task, one.prompt, one.edit_type).endswith("\n remove <imagehere> grapher on the left")


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "unknown"), [("把天空变成夜晚<imagehere>", 1), ("add a 🐱 to<imagehere>", 1), ("a cat in<imagehere>", 0)]
)
def test_unknown_tokens_are_counted(tokenizer, prompt, unknown):
    warnings = [str(f) for f in check_lengths([record(prompt)], tokenizer, 3, 10_000) if "unknown" in f.message]
    assert len(warnings) == bool(unknown)
    assert all(f"{unknown} token" in one and one.startswith("warning: x.json, record 1 (id 7)") for one in warnings)


@pytest.mark.parametrize("token", ["</s>", "<pad>", "<unk>", "<extra_id_0>"])
def test_special_tokens_are_text(tokenizer, token):
    control = tokenizer.convert_tokens_to_ids(token)
    assert control in tokenizer.all_special_ids
    ids = [i for segment in tokenize(f"a dog{token} in<imagehere>", tokenizer).segments for i in segment][:-1]
    if token == "<unk>":  # its brackets are unknown, its letters are not
        assert len(ids) > len(tokenizer("a dog<unk> in", add_special_tokens=False).input_ids)
    else:
        assert control not in ids
    (warning,) = check_lengths([record(f"a dog{token} in<imagehere>")], tokenizer, 3, 10_000)
    assert not warning.fatal and f"{token} in the prompt" in warning.message


# ---- the text of training --------------------------------------------------------------------------------------------


def test_texts_that_training_cannot_pair_are_errors(tmp_path):
    late = "add<imagehere>to the scene" + " word" * 88 + " in<imagehere>"
    report = rows(tmp_path, {"late": late}, references=2)
    (error,) = check_training_text(report.records[0])
    assert error.fatal and "(id late)" in error.where
    assert "1 <imagehere> for 2 references, as the text is cut after 88 words" in error.message
    report = rows(tmp_path, {"twice": "make the photo brighter, then put a frame around the picture"})
    (error,) = check_training_text(report.records[0])
    assert error.fatal and "x.jsonl, record 1 (id twice)" in error.where
    assert "2 <imagehere> for 1 reference, as the prompt mentions its image 2 times" in error.message


def test_an_edit_whose_appended_marker_is_cut_is_an_error():
    (error,) = check_training_text(record(" ".join(["word"] * 88)))
    assert error.fatal and "0 <imagehere> for 1 reference" in error.message
    assert check_training_text(record(" ".join(["word"] * 87))) == []


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), st.integers(1, 3), st.sampled_from(list(Task)))
def test_any_text_is_either_paired_or_an_error(prompt, references, task):
    from mige.models.instruction import training_text

    one = record(prompt, references, task)
    errors = [issue for issue in check_training_text(one) if issue.fatal]
    assert bool(errors) == (placeholders(training_text(task, prompt)) != references)


@pytest.mark.processes
def test_checks_need_no_torch():
    code = "import sys, mige.data.checks, mige.models.instruction; print({'torch', 'transformers'} & set(sys.modules))"
    done = run_program(sys.executable, "-c", code)
    assert done.stdout.strip() == "set()", done.stderr
