"""Judged runs: what is asked, kept, asked again; measures by hand; agreement and the bias of the order."""

import json
import math
import threading

import evaluation_files as files
import judged_files
import pytest
from judge_server import images_of, says, serve, text_of

from mige.evaluation.benchmarks.files import Options
from mige.evaluation.benchmarks.prepared import prepare, read
from mige.evaluation.judges import agreement, report
from mige.evaluation.judges.answers import Reply
from mige.evaluation.judges.endpoint import Endpoint
from mige.evaluation.judges.judge import JudgeError, NoReplyError
from mige.evaluation.judges.judging import Plan, judge_results
from mige.evaluation.judges.rubrics import EDIT, QUALITY, SUBJECT, SUBJECT_EDIT, Question, rubric

RUBRICS = [EDIT, SUBJECT, SUBJECT_EDIT]
RUBRICS += [rubric("dreambench_plus", {"group": group}) for group in ("animal", "style")]
RUBRICS += [rubric("imgedit", {"group": group}) for group in ("add", "style", "action", "extract")]
RUBRICS += [rubric("omnicontext", {"group": group}) for group in ("single_object", "scene_object")]
QUESTIONS = list(dict.fromkeys(question for one in RUBRICS for question in one.questions))


class Scripted:
    """A judge that answers by a function of (text, number of images, repetition), and counts."""

    def __init__(self, answer):
        self.answer, self.asked, self.settings = answer, [], {"judge": "scripted"}

    def ask(self, text, images, repetition):
        self.asked.append((text, len(images), repetition))
        said = self.answer(text, len(images), repetition)
        if isinstance(said, Exception):
            raise said
        return Reply(said if isinstance(said, str) else json.dumps({"reasoning": "because", "score": said}))


@pytest.fixture
def edits(tmp_path):
    """GEdit-Bench of three rows with results: (prepared, outputs, an existing folder)."""
    prepare("gedit", Options(str(judged_files.gedit(tmp_path / "data"))), tmp_path / "run" / "benchmark")
    prepared, found = read(tmp_path / "run" / "benchmark"), {}
    for n, row in enumerate(prepared.rows):
        found[row["id"]] = tmp_path / "run" / "images" / f"{row['id']}.png"
        files.save(found[row["id"]], 50 + n, (32, 32))
    (tmp_path / "run" / "judged").mkdir()
    return prepared, found, tmp_path / "run" / "judged"


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.prompt)
def test_a_prompt_says_all_that_it_must(question):
    text = question.text("make $5 of it {now}", ["the source image", "the edited image"])
    assert "Image A: the source image.\nImage B: the edited image." in text and "given 2 images" in text
    assert ("make $5 of it {now}" in text) == (question.prompt not in ("quality", "concept", "style"))
    assert f"{question.low} to {question.high}" in text.replace("from ", "")
    assert f'"score": [{", ".join(f"<{name}>" for name in question.criteria)}]' in text
    assert "$instruction" not in text and "$high" not in text


def test_hashes_tell_questions_apart():
    hashes = {question.hash for question in QUESTIONS}
    assert len(hashes) == len(QUESTIONS) == 14
    assert EDIT.questions[0].on_scale(25).hash not in hashes


def test_values_by_hand():
    assert EDIT.questions[0].value((7, 4)) == 4  # VIEScore: the least
    assert EDIT.questions[0].on_scale(25).value((20, 10)) == 4
    concept = rubric("dreambench_plus", {"group": "object"}).questions[0]
    assert concept.value((3,)) == 0.75
    assert rubric("imgedit", {"group": "add"}).questions[0].value((5, 3, 4)) == 4


# ---- lines -----------------------------------------------------------------------------------------------------------


def by_question(text, images, repetition):
    return [6, 4] if images == 1 else [9, 8]


def test_a_line_by_hand(edits):
    lines = judge_results(*edits[:2], Scripted(by_question), edits[2], Plan())
    assert [line["group"] for line in lines] == ["background_change", "subject-add", "background_change"]
    assert lines[0]["model"] == {"SC": 8, "PQ": 4, "O": pytest.approx(math.sqrt(32))} and lines[0]["errors"] == []
    assert [(one["measure"], one["scores"], one["reason"]) for one in lines[0]["answers"]] == [
        ("SC", [9, 8], "because"), ("PQ", [6, 4], "because")]  # fmt: skip


def test_what_cannot_be_read_is_an_error_and_no_score(edits):
    judge = Scripted(lambda text, images, repetition: "I cannot rate this." if images == 2 else [6, 4])
    lines = judge_results(*edits[:2], judge, edits[2], Plan())
    assert lines[0]["model"] == {"PQ": 4}
    assert lines[0]["errors"] == ["SC: unreadable: refused: I cannot rate this."]
    facts = report.facts(edits[0], judge, Plan(), lines, "mine")
    assert {entry["measure"] for entry in facts["table"]} == {"PQ"} and len(facts["errors"]) == 3
    assert "3 of 6 answers gave no score; 0 records have none at all" in facts["note"]


def test_overall_is_of_repetitions_that_have_both(edits):
    def answer(text, images, repetition):
        if images == 1:
            return "no" if repetition == 1 else [4, 4]
        return [9, 9] if repetition == 0 else [1, 1]

    lines = judge_results(*edits[:2], Scripted(answer), edits[2], Plan(repeats=2))
    assert lines[0]["model"] == {"SC": 5, "PQ": 4, "O": 6}


# ---- kept answers ----------------------------------------------------------------------------------------------------


def test_an_answer_is_asked_for_once(edits):
    first, second = Scripted(by_question), Scripted(by_question)
    lines = judge_results(*edits[:2], first, edits[2], Plan(), workers=3)
    assert len(first.asked) == 6
    assert judge_results(*edits[:2], second, edits[2], Plan()) == lines and second.asked == []
    judge_results(*edits[:2], second, edits[2], Plan(repeats=2))
    assert len(second.asked) == 6 and {repetition for *_, repetition in second.asked} == {1}


@pytest.mark.parametrize("changed", ["judge", "prompt", "image", "scale"])
def test_what_decides_an_answer_decides_its_key(edits, monkeypatch, changed):
    judge_results(*edits[:2], Scripted(by_question), edits[2], Plan())
    again, plan = Scripted(by_question), Plan(high=25 if changed == "scale" else None)
    if changed == "judge":
        again.settings = {"judge": "another"}
    if changed == "prompt":
        monkeypatch.setattr(Question, "template", property(lambda self: "$inputs $count $places rate it"))
    if changed == "image":
        files.save(next(iter(edits[1].values())), 99, (32, 32))
    judge_results(*edits[:2], again, edits[2], plan)
    assert len(again.asked) == (2 if changed == "image" else 6)


def test_what_was_asked_beside_the_question_that_ends_a_run_is_kept(edits):
    together = threading.Barrier(6)  # all six questions are under way when the first one fails
    first = edits[0].rows[0]["score"]["instruction"]

    def answer(text, images, _):
        together.wait(timeout=60)
        return JudgeError("gone") if first in text and images == 2 else by_question(text, images, 0)

    with pytest.raises(JudgeError):
        judge_results(*edits[:2], Scripted(answer), edits[2], Plan(), workers=6)
    assert len((edits[2] / "answers.jsonl").read_text().splitlines()) == 5


def test_a_run_that_ended_resumes(edits):
    """Killed while the answers were written, with a cut line; then without a reply to one question."""
    stopped = Scripted(
        lambda text, images, _: by_question(text, images, 0) if len(stopped.asked) < 4 else JudgeError("gone")
    )
    with pytest.raises(JudgeError):
        judge_results(*edits[:2], stopped, edits[2], Plan())
    kept = edits[2] / "answers.jsonl"
    assert len(kept.read_text().splitlines()) == 3
    kept.write_bytes(kept.read_bytes()[:-20])  # cut in its last line
    lost = Scripted(
        lambda text, images, repetition: (
            NoReplyError("HTTP 500: busy") if len(lost.asked) == 4 else by_question(text, images, 0)
        )
    )
    lines = judge_results(*edits[:2], lost, edits[2], Plan())
    assert len(lost.asked) == 4 and lines[2]["errors"] == ["PQ: no reply: HTTP 500: busy"]
    last = Scripted(by_question)
    lines = judge_results(*edits[:2], last, edits[2], Plan())
    assert len(last.asked) == 1 and not any(line["errors"] for line in lines)


# ---- trust -----------------------------------------------------------------------------------------------------------


def test_krippendorff_is_the_published_example():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: alpha of interval data is .849."""
    coders = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    groups = [[float(v) for v in unit if v != "."] for unit in zip(*(line.split() for line in coders), strict=True)]
    assert agreement.krippendorff(groups) == pytest.approx(0.849, abs=5e-4)
    assert agreement.krippendorff([[2, 2], [2, 2]]) is None is agreement.krippendorff([[1], [2]])
    assert agreement.krippendorff([[1, 1], [2, 2]]) == 1


def test_agreement_by_hand(edits):
    judge = Scripted(lambda text, images, repetition: [5 + repetition, 9] if images == 2 else [4, 4])
    lines = judge_results(*edits[:2], judge, edits[2], Plan(repeats=2))
    found = report.trust(lines, ["SC", "PQ"])
    assert found["SC"]["agreement"] == {
        "records": 3,
        "same": 0,
        "spread": pytest.approx(math.sqrt(0.5)),
        "alpha": pytest.approx(-2 / 3),
    }
    assert found["PQ"]["agreement"]["same"] == 1 and found["PQ"]["agreement"]["alpha"] is None


def test_a_judge_that_prefers_what_it_sees_first_is_found_out(edits):
    """The order is told by the list of names and by the images; PQ, of one image, is asked in one order alone."""
    judge = Scripted(lambda text, images, repetition: [8, 8] if "Image A: the edited image" in text else [5, 5])
    lines = judge_results(*edits[:2], judge, edits[2], Plan(swap=True))
    assert len(judge.asked) == 9 and lines[0]["model"]["SC"] == 6.5
    bias = report.trust(lines, ["SC", "PQ"])
    assert bias == {"SC": {"result shown first, less last": {"mean": 3, "low": 3, "high": 3}}}
    with serve(lambda payload, n: says('{"score": [5, 5]}')) as server:
        judge_results(*edits[:2], Endpoint("m", server.url), edits[2], Plan(swap=True))
    plain, swapped, quality = server.requests[:3]
    assert images_of(plain) == images_of(swapped)[::-1] and images_of(quality) == images_of(plain)[1:]
    assert "Image A: the source image" in text_of(plain) and "Image A: the generated image" in text_of(quality)


# ---- tables ----------------------------------------------------------------------------------------------------------


def entries(facts) -> dict:
    return {(entry["subset"], entry["measure"]): entry["mean"] for entry in facts["table"]}


def test_gedits_average_is_of_its_groups(edits):
    """Two of one group, one of the other; the intersection leaves out the first."""
    scores = iter([[1, 1], [2, 2], [7, 7], [2, 2], [4, 4], [2, 2]])
    judge = Scripted(lambda text, images, repetition: next(scores))
    facts = report.facts(edits[0], judge, Plan(), judge_results(*edits[:2], judge, edits[2], Plan()), "mine")
    found = entries(facts)
    assert found["all", "SC"] == 4 and found["mean of the groups", "SC"] == (2.5 + 7) / 2
    assert found["intersection", "SC"] == 5.5 == found["intersection, mean of the groups", "SC"]
    assert found["background_change", "SC"] == 2.5 and "3 of the 606 records" in facts["note"]
    assert facts["protocol"]["prompts"] == f"edit {EDIT.questions[0].hash}, quality {QUALITY.hash}"


def test_dreambench_plus_multiplies_means(tmp_path):
    prepare("dreambench_plus", Options(str(judged_files.dreambench_plus(tmp_path / "data"))), tmp_path / "benchmark")
    prepared = read(tmp_path / "benchmark")
    output = tmp_path / "out.png"
    files.save(output, 1)
    judge = Scripted(lambda text, images, repetition: 2 if images == 2 else (4 if "thing 0" in text else 0))
    found = dict.fromkeys((row["id"] for row in prepared.rows), output)
    facts = report.facts(prepared, judge, Plan(), judge_results(prepared, found, judge, tmp_path, Plan()), "mine")
    means = entries(facts)
    assert means["all", "CP"] == 0.5 and means["all", "PF"] == pytest.approx(1 / 9)
    assert means["all", "CP x PF"] == pytest.approx(1 / 18) and means["photorealistic", "PF"] == 0.25
    assert means["style", "CP"] == 0.5 and means["imaginative", "PF"] == 0
    assert any("manner" in text or "style of" in text for text, *_ in judge.asked)
