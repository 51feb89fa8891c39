"""What a judge's answer says: every one of forty hand-written answers, and what is no answer."""

import pytest
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
