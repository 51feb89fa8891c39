"""What a judge's answer says: every one of forty hand-written answers, and what is no answer."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_answers import ANSWERS, MORE, reply

from mige.evaluation.judges import answers


def test_there_are_forty():
    assert len(ANSWERS) == 40 == len({name for name, *_ in ANSWERS})


@pytest.mark.parametrize(("name", "question", "given", "expected", "reason"), ANSWERS + MORE,
                         ids=[name for name, *_ in ANSWERS + MORE])  # fmt: skip
def test_every_answer_is_read_or_refused(name, question, given, expected, reason):
    if isinstance(expected, tuple):
        found = answers.read(reply(given), question)
        assert found.scores == expected and reason in found.reason
    else:
        with pytest.raises(answers.UnreadableAnswerError) as caught:
            answers.read(reply(given), question)
        assert str(caught.value).startswith(expected)


PIECES = st.sampled_from(
    ['{"score": ', "[8, 7]", "}", "{", '"reasoning": ', "Score:", " 5", "/10", "\n", "<think>", "'", '"', ","]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
REPLIES = st.text(max_size=80) | st.lists(PIECES, max_size=12).map("".join)
REPLIES |= VALUES.map(lambda value: json.dumps({"score": value}))


@settings(max_examples=100, deadline=None)
@given(REPLIES, st.sampled_from([one for _, one, *_ in ANSWERS]))
def test_whatever_is_said_is_read_within_the_scale_or_refused_by_name(text, question):
    try:
        found = answers.read(answers.Reply(text), question)
    except answers.UnreadableAnswerError as error:
        assert str(error).encode()  # it can be written
    else:
        assert len(found.scores) == len(question.criteria) and found.reason.encode() is not None
        assert all(question.low <= score <= question.high for score in found.scores)
