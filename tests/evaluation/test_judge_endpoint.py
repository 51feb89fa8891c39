"""The judge behind an endpoint, against a scripted server: what is sent, what comes back, what is tried again."""

import base64
import io
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from evaluation_files import image
from judge_answers import ANSWERS, reply
from judge_server import Response, fails, images_of, says, serve, text_of
from PIL import Image

from mige.evaluation.judges import answers, endpoint
from mige.evaluation.judges.endpoint import Endpoint
from mige.evaluation.judges.judge import JudgeError, NoReplyError

GOOD = '{"reasoning": "ok", "score": [9, 8]}'
KEY = "sk-secret-1"


def judge(server, waited: list[float] | None = None, **options) -> Endpoint:
    given = {"key": KEY, "attempts": 4, "wait": (waited if waited is not None else []).append}
    return Endpoint("tiny-judge", server.url, **given | options)


def test_the_forty_answers_over_the_wire():
    """Each comes back as it was said, and holds the scores, or the error, that are written beside it."""
    with serve(lambda payload, n: says(ANSWERS[n][2])) as server:
        one = judge(server)
        for name, question, given, expected, _ in ANSWERS:
            got = one.ask(f"rate {name}", [image(0)], 0)
            assert got == reply(given), name
            if isinstance(expected, tuple):
                assert answers.read(got, question).scores == expected, name
            else:
                with pytest.raises(answers.UnreadableAnswerError) as caught:
                    answers.read(got, question)
                assert str(caught.value).startswith(expected), name
    assert len(server.requests) == 40


def test_what_is_sent():
    with serve(lambda payload, n: says(GOOD)) as server:
        judge(server).ask("rate this", [image(0, (7, 5)), image(1)], 3)
    (sent,) = server.requests
    assert sent["path"] == "/v1/chat/completions" and sent["authorization"] == f"Bearer {KEY}"
    assert (sent["model"], sent["temperature"], sent["seed"]) == ("tiny-judge", 0, 3)
    assert text_of(sent) == "rate this" and len(images_of(sent)) == 2
    head, data = images_of(sent)[0].split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(image(0, (7, 5))))


def test_no_key_no_header():
    with serve(lambda payload, n: says(GOOD)) as server:
        judge(server, key=None).ask("rate", [], 0)
    assert server.requests[0]["authorization"] is None


def test_parts_and_refusals():
    parts = b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]}'
    script = [Response(parts), says(answers.Reply("I can't.", "refusal"))]
    with serve(lambda payload, n: script[n]) as server:
        one = judge(server)
        assert one.ask("rate", [], 0) == answers.Reply("ab", "stop")
        assert one.ask("rate", [], 0) == answers.Reply("I can't.", "refusal")


def test_half_a_surrogate_pair_becomes_a_question_mark():
    body = b'{"choices": [{"message": {"content": "so \\ud83d"}}]}'
    with serve(lambda payload, n: Response(body)) as server:
        assert judge(server).ask("rate", [], 0).text == "so ?"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_what_passes_is_tried_again(status):
    script, waited = [fails(status), fails(status), says(GOOD)], []
    with serve(lambda payload, n: script[n]) as server:
        assert judge(server, waited).ask("rate", [], 0).text == GOOD
    assert waited == [1, 2] and len(server.requests) == 3


def test_retry_after_is_kept():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    script = [fails(429, Retry_After="7"), fails(503, Retry_After=soon), fails(429, Retry_After="soon"), says(GOOD)]
    waited = []
    with serve(lambda payload, n: script[n]) as server:
        assert judge(server, waited).ask("rate", [], 0).text == GOOD
    assert waited[0] == 7 and waited[1] == pytest.approx(40, abs=15) and waited[2] == 4


@pytest.mark.parametrize(("asked", "seconds"), [("Wed, 21 Oct 2015 07:28:00 -0000", 0), ("²", 1)])
def test_an_odd_retry_after_ends_no_run(asked, seconds):
    waited = []
    with serve(lambda payload, n: [fails(429, Retry_After=asked), says(GOOD)][n]) as server:
        assert judge(server, waited).ask("rate", [], 0).text == GOOD
    assert waited == [seconds]


def test_who_asks_for_an_hour_gets_no_wait():
    waited = []
    with serve(lambda payload, n: fails(429, Retry_After="3600")) as server, pytest.raises(NoReplyError) as caught:
        judge(server, waited).ask("rate", [], 0)
    assert "it asks to wait 3600 s" in str(caught.value) and waited == [] and len(server.requests) == 1


def test_attempts_end():
    waited = []
    with serve(lambda payload, n: fails(500, "out of memory")) as server, pytest.raises(NoReplyError) as caught:
        judge(server, waited).ask("rate", [], 0)
    assert str(caught.value) == "HTTP 500: out of memory (4 attempts)" and waited == [1, 2, 4]


def test_a_slow_reply_is_given_up_and_asked_again():
    script = [Response(b"{}", seconds=0.5), says(GOOD)]
    with serve(lambda payload, n: script[n]) as server:
        assert judge(server, timeout=0.15).ask("rate", [], 0).text == GOOD
    assert len(server.requests) == 2


def test_a_bad_request_is_of_one_question_alone():
    script = [fails(400, "image too large"), says(GOOD)]
    with serve(lambda payload, n: script[n]) as server:
        one = judge(server)
        with pytest.raises(NoReplyError, match="HTTP 400: image too large"):
            one.ask("rate", [], 0)
        assert one.ask("rate", [], 0).text == GOOD


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_and_shows_no_key(status):
    said = f"Incorrect API key: {KEY}"
    with serve(lambda payload, n: fails(status, said)) as server, pytest.raises(JudgeError) as caught:
        judge(server).ask("rate", [], 0)
    assert KEY not in str(caught.value) and "***" in str(caught.value) and len(server.requests) == 1


def test_a_key_at_the_end_of_a_long_message_is_not_cut_but_hidden():
    with serve(lambda payload, n: fails(400, "a" * 190 + KEY)) as server, pytest.raises(NoReplyError) as caught:
        judge(server).ask("rate", [], 0)
    assert str(caught.value) == "HTTP 400: " + "a" * 190 + "***"


def test_ten_questions_without_a_reply_end_the_run():
    with serve(lambda payload, n: fails(500)) as server:
        one = judge(server, attempts=1)
        for _ in range(9):
            with pytest.raises(NoReplyError):
                one.ask("rate", [], 0)
        with pytest.raises(JudgeError, match="no reply to 10 questions in a row"):
            one.ask("rate", [], 0)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 7}}]}', b"[]"]
)
def test_a_response_of_another_form(body):
    with serve(lambda payload, n: Response(body)) as server, pytest.raises(NoReplyError, match="of another form"):
        judge(server).ask("rate", [], 0)


def test_nobody_listens():
    waited = []
    with serve(lambda payload, n: says(GOOD)) as server:
        pass
    with pytest.raises(NoReplyError, match=r"ConnectError.*\(4 attempts\)"):
        judge(server, waited).ask("rate", [], 0)
    assert waited == [1, 2, 4]


@pytest.mark.parametrize(
    ("url", "said"),
    [("ftp://a/v1", "expected a URL"), ("localhost:8000", "expected a URL"), ("http://u:p@a/v1", "without user"),
     ("http://example.com/v1", "unencrypted")],
)  # fmt: skip
def test_addresses_that_are_refused(url, said):
    with pytest.raises(JudgeError, match=said) as caught:
        Endpoint("m", url, KEY)
    assert KEY not in str(caught.value)


def test_the_key_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    monkeypatch.setenv("EMPTY_KEY", "")
    assert endpoint.key_from("JUDGE_KEY") == KEY
    assert endpoint.key_from("EMPTY_KEY") is None is endpoint.key_from("NO_SUCH_KEY")
    assert KEY not in str(Endpoint("m", "https://example.com/v1", KEY).settings)
