"""Prompt text -> the text the model reads -> token ids around images."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mige.data.checks import check_lengths
from mige.data.records import Record
from mige.models.instruction import MAX_WORDS, Instruction, clean, full_text, point_at_source, tokenize
from mige.tasks import Task

SUBJECT_PREFIX = (
    "follow the text instruction to generate an image with the given objects' images, "
    "preserving the subject's identity "
)
EDIT_PREFIX = "Follow the instruction to edit the image:\n "
SUBJECT_EDIT_PREFIX = "subject-driven editing "


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model / "tokenizer")


# ---- cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", '.!"()*#:;~')
def test_punctuation_that_becomes_a_blank(mark):
    assert clean(f"a{mark}b") == "a b"
    assert clean(f"{mark}a {mark} b{mark}{mark}") == "a b"


@pytest.mark.parametrize("mark", "<>',-?&%$/_+=@[]{}|")
def test_punctuation_that_stays(mark):
    assert clean(f"a{mark}b") == f"a{mark}b"


def test_case_and_white_space():
    assert clean("  A  Cat\t\tIN \n the\n\nSnow \n") == "a cat in the snow"
    assert clean("a\tb") == "a\tb"  # a single one is left as it is
    assert clean("a . b") == "a b"
    assert clean("A <ImageHere>IN <IMAGEHERE>") == "a <imagehere>in <imagehere>"
    assert clean("") == clean(" .!  ") == ""


def test_at_most_88_words():
    words = [f"w{n}" for n in range(100)]
    assert clean(" ".join(words[:88])).split() == words[:88]
    assert clean(" ".join(words)).split() == words[:88]
    assert clean("  ".join(words) + ".") == " ".join(words[:88])
    assert clean("a.b " * 50).split() == ["a", "b"] * 44  # counted after the punctuation is gone


# ---- the source's placeholder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("article", ["the", "this", "The", "THIS"])
@pytest.mark.parametrize("noun", ["image", "photo", "picture", "Image", "PHOTO"])
def test_a_mention_becomes_the_placeholder(article, noun):
    assert point_at_source(f"Turn {article} {noun} into snow.") == "Turn  <imagehere>  into snow."


def test_mentions():
    two = point_at_source("crop the image so that this photo is square")
    assert two == "crop  <imagehere>  so that  <imagehere>  is square"
    for edit_type in ("local", ""):  # rows of Emu Edit: no word boundaries, as released
        assert point_at_source("use the photograph", edit_type) == "use  <imagehere> graph"
        assert point_at_source("bathe images", edit_type) == "ba <imagehere> s"
    for words in ("remove the photographer", "make the pictures on the wall red", "bathe images"):
        assert point_at_source(words) == f"{words} in<imagehere>"
    for other in ("a photo", "the  image", "the imag", "the drawing", "that picture"):
        assert point_at_source(f"change {other}") == f"change {other} in<imagehere>"


@pytest.mark.parametrize("edit_type, preposition", [("global", "of"), ("local", "in"), ("add", "in"), (None, "in")])
def test_a_placeholder_is_appended(edit_type, preposition):
    assert point_at_source("Make it night.", edit_type) == f"Make it night {preposition}<imagehere>"
    assert point_at_source(" Make it night ", edit_type) == f"Make it night {preposition}<imagehere>"
    assert point_at_source("Wait..", edit_type) == f"Wait. {preposition}<imagehere>"  # one full stop only
    assert point_at_source("Make it night!", edit_type) == f"Make it night! {preposition}<imagehere>"


@pytest.mark.parametrize("text", ["turn<imagehere>blue in the photo.", "<ImageHere> in this image"])
def test_a_prompt_with_a_placeholder_is_left_alone(text):
    assert point_at_source(text, "global") == text


# ---- what the model reads --------------------------------------------------------------------------------------------


def test_the_text_of_each_task():
    prompt = "A <ImageHere> in the PHOTO: wow."
    assert full_text(Task.SUBJECT, prompt) == SUBJECT_PREFIX + "a <imagehere> in the photo wow"
    assert full_text(Task.SUBJECT_EDIT, prompt) == SUBJECT_EDIT_PREFIX + "a <imagehere> in the photo wow"
    assert full_text(Task.EDIT, prompt) == EDIT_PREFIX + "a <imagehere> in the photo wow"
    assert full_text(Task.EDIT, "Make this image: red.") == EDIT_PREFIX + "make <imagehere> red"
    assert full_text(Task.EDIT, "Make it red.", "global") == EDIT_PREFIX + "make it red of<imagehere>"
    assert full_text(Task.SUBJECT, "a cat in the photo", "global") == SUBJECT_PREFIX + "a cat in the photo"


def test_88_words_include_a_cleaned_prefix_but_not_a_raw_one():
    prompt = " ".join(["word"] * 100)
    assert full_text(Task.SUBJECT, prompt).count("word") == 88 - len(SUBJECT_PREFIX.split())
    assert full_text(Task.SUBJECT_EDIT, prompt).count("word") == 88 - len(SUBJECT_EDIT_PREFIX.split())
    assert full_text(Task.EDIT, "<imagehere> " + prompt).count("word") == 87


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_segments_are_tokenised_alone(tokenizer):
    def ids(text):
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    got = tokenize("a cat<imagehere>in the snow<imagehere>at night", tokenizer)
    assert got.segments == (ids("a cat"), ids("in the snow"), (*ids("at night"), tokenizer.eos_token_id))
    assert got.num_images == 2
    assert got.length(num_queries=3) == 6 + len(ids("a cat")) + len(ids("in the snow")) + len(ids("at night")) + 1


def test_the_end_token_stands_once_at_the_end(tokenizer):
    eos = tokenizer.eos_token_id
    assert eos == 1
    for text in ("a cat", "a<imagehere>cat", "<imagehere>", "<imagehere><imagehere>in snow", ""):
        flat = [token for segment in tokenize(text, tokenizer).segments for token in segment]
        assert flat.count(eos) == 1 and flat[-1] == eos


def test_empty_segments_have_no_tokens(tokenizer):
    assert tokenize("<imagehere>", tokenizer).segments == ((), (1,))
    assert tokenize("<imagehere> <imagehere>\n ", tokenizer).segments == ((), (), (1,))
    assert tokenize("", tokenizer) == Instruction(((1,),))
    assert tokenize("", tokenizer).num_images == 0


def test_outer_blanks_of_a_segment_vanish(tokenizer):
    assert tokenize("a<imagehere>in snow", tokenizer) == tokenize("  a \n<imagehere>  in snow  ", tokenizer)
    assert tokenize("make the<imagehere>red", tokenizer) != tokenize("makethe<imagehere>red", tokenizer)


# ---- what is cut -----------------------------------------------------------------------------------------------------


def record(task, prompt, references=1, edit_type=None):
    paths = tuple(Path(f"{n}.jpg") for n in range(references))
    source = None if task is Task.SUBJECT else paths[0]
    return Record("7", task, prompt, paths, source, None, edit_type, "x.json, record 1 (id 7)")


def issues(tokenizer, *records, num_queries=3, max_tokens=10_000):
    return check_lengths(records, tokenizer, num_queries, max_tokens)


def test_nothing_is_said_of_a_prompt_that_fits(tokenizer):
    good = [
        record(Task.SUBJECT, "a<imagehere>and a<imagehere>", 2),
        record(Task.EDIT, "make it red"),
        record(Task.EDIT, "make the photo red"),
        record(Task.SUBJECT_EDIT, "replace the cup in<imagehere>with<imagehere>", 2),
    ]
    assert issues(tokenizer, *good) == []
    length = tokenize(full_text(Task.EDIT, "make it red"), tokenizer).length(3)
    assert issues(tokenizer, good[1], max_tokens=length) == []


def test_tokens_over_the_limit_are_a_note_that_counts_them(tokenizer):
    row = record(Task.SUBJECT, "a<imagehere>in the snow")
    length = tokenize(full_text(Task.SUBJECT, row.prompt), tokenizer).length(3)
    (warning,) = issues(tokenizer, row, max_tokens=length - 2)
    assert not warning.fatal and warning.where == row.where
    assert f"takes {length} tokens, the last 2 are cut (limit {length - 2})" in warning.message


def test_a_whole_image_over_the_limit_is_fatal(tokenizer):
    row = record(Task.SUBJECT, "a<imagehere>in the snow")
    instruction = tokenize(full_text(Task.SUBJECT, row.prompt), tokenizer)
    start = len(instruction.segments[0])
    (error,) = issues(tokenizer, row, max_tokens=start)
    assert error.fatal and "a whole image" in error.message
    (warning,) = issues(tokenizer, row, max_tokens=start + 1)  # a part of it is read
    assert not warning.fatal


def test_a_placeholder_beyond_88_words_is_fatal(tokenizer):
    prompt = "a<imagehere>" + " word" * 90 + " and<imagehere>"
    for task in (Task.SUBJECT, Task.SUBJECT_EDIT):
        (error,) = issues(tokenizer, record(task, prompt, 2))
        assert error.fatal and "only 1 of 2 <imagehere> are within the first 88 words" in error.message


def test_the_appended_placeholder_of_a_long_edit_is_lost_too(tokenizer):
    """The user wrote none; the one that the rewriting appends is word 89."""
    prompt = " ".join(["word"] * MAX_WORDS)
    (error,) = issues(tokenizer, record(Task.EDIT, prompt))
    assert error.fatal and "only 0 of 1 <imagehere>" in error.message
    assert issues(tokenizer, record(Task.EDIT, " ".join(["word"] * (MAX_WORDS - 1)))) == []


def test_a_second_mention_of_the_image_is_a_note(tokenizer):
    (warning,) = issues(tokenizer, record(Task.EDIT, "make the image like this photo"))
    assert not warning.fatal and "mentions the image 2 times; 1 mention(s) read an empty image" in warning.message
