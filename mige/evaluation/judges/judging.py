"""Results of a prepared benchmark -> a line a record, from a judge's answers, each of which is asked for once.

Replies are kept in answers.jsonl as they came, under a digest of all that decides them: the judge, what is asked, every
pixel that is shown, the repetition. What is read out of them is worked out anew each time, so a run resumes after a
kill, and asks again only where no reply came.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.judges import answers, views
from mige.evaluation.judges.answers import Reply, UnreadableAnswerError
from mige.evaluation.judges.judge import Judge, NoReplyError
from mige.evaluation.judges.rubrics import Question, Rubric, rubric
from mige.utils.files import append_json_line, read_json_lines
from mige.utils.images import image_key
from mige.utils.progress import Progress

AT_ONCE = 16  # records whose images are in memory


@dataclass(frozen=True)
class Plan:
    """How often and how each question is asked."""

    repeats: int = 1
    swap: bool = False  # whether each is asked a second time with the result shown first
    high: int | None = None  # the upper end of VIEScore's scale, where it is not 10

    def rubric(self, benchmark: str, row: Mapping[str, Any]) -> Rubric:
        """What is asked about a record."""
        found = rubric(benchmark, row["score"])
        if self.high is None:
            return found
        return Rubric(tuple(question.on_scale(self.high) for question in found.questions), found.overall)

    def ways(self, question: Question) -> Iterator[tuple[int, bool]]:
        """(repetition, swapped) of each time that a question is asked."""
        for repetition in range(self.repeats):
            yield repetition, False
            if self.swap and question.sees == "all":
                yield repetition, True


class Replies:
    """The replies of a judge, kept in a file."""

    def __init__(self, judge: Judge, path: Path):
        self.judge, self.path = judge, path
        rows, errors = read_json_lines(path)
        for error in errors:
            print(f"warning: {error}; its question is asked again", file=sys.stderr)
        if errors:  # a line that a kill has cut must not swallow the next one
            _end_last_line(path)
        self.known = {
            row["key"]: Reply(row["text"], row["stop"]) for _, row in rows if row.keys() >= {"key", "text", "stop"}
        }

    def get(self, question: Question, instruction: str, shown: views.Shown, repetition: int) -> tuple[str, Reply]:
        """The key and the reply of one question, kept or new; raises NoReplyError, JudgeError."""
        names, images = [name for name, _ in shown], [image for _, image in shown]
        text = question.text(instruction, names)
        decides = [dict(self.judge.settings), question.hash, text, [image_key(one).hex() for one in images], repetition]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return key, self.known.get(key) or self.judge.ask(text, images, repetition)

    def keep(self, key: str, record: str, question: Question, reply: Reply) -> None:
        """Write a new reply down, on the disk before this returns."""
        if key not in self.known:
            self.known[key] = reply
            line = {"key": key, "id": record, "prompt": question.prompt, "text": reply.text, "stop": reply.stop}
            append_json_line(self.path, line)


def _end_last_line(path: Path) -> None:
    """End a last line that has no end."""
    with path.open("r+b") as file:
        file.seek(0, 2)
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")


def judge_results(
    prepared: Prepared, found: Mapping[str, Path], judge: Judge, folder: Path, plan: Plan, *, workers: int = 1
) -> list[dict[str, Any]]:
    """Ask about every scored record, and return a line for each: its measures, and every answer or why there is none.

    Args:
        found: the outputs by id. folder: an existing one, for answers.jsonl. workers: questions under way at once;
            does not change the lines.

    Raises JudgeError where no question gets a reply, BadImageError for an image that cannot be read.
    """
    replies, rows, lines = Replies(judge, folder / "answers.jsonl"), prepared.scored, []
    with ThreadPoolExecutor(workers) as pool, Progress(total=len(rows), unit="record", desc="judging") as bar:
        for first in range(0, len(rows), AT_ONCE):
            part = rows[first : first + AT_ONCE]
            asked = [(row, *one) for row in part for one in _questions(prepared.name, row, found[row["id"]], plan)]
            given = _ask(pool, replies, asked)
            for row in part:
                own = [line for record, line in given if record == row["id"]]
                lines.append(_line(row, own, plan.rubric(prepared.name, row)))
            bar.update(len(part))
    return lines


def _questions(
    benchmark: str, row: Mapping[str, Any], output: Path, plan: Plan
) -> Iterator[tuple[Question, views.Shown, int, bool]]:
    shown = views.show(benchmark, row, output)
    for question in plan.rubric(benchmark, row).questions:
        for repetition, swapped in plan.ways(question):
            yield question, views.for_question(shown, question, swapped), repetition, swapped


def _ask(
    pool: ThreadPoolExecutor,
    replies: Replies,
    asked: Sequence[tuple[Mapping[str, Any], Question, views.Shown, int, bool]],
) -> list[tuple[str, dict[str, Any]]]:
    """(id, answer) of each question, in order. What was answered is kept, also where another one ends the run."""
    tasks = [
        pool.submit(replies.get, question, views.instruction(row), shown, repetition)
        for row, question, shown, repetition, _ in asked
    ]
    given = []
    try:
        for (row, question, _, repetition, swapped), task in zip(asked, tasks, strict=True):
            answer = {"measure": question.measure, "repetition": repetition, "swapped": swapped}
            try:
                key, reply = task.result()
                replies.keep(key, row["id"], question, reply)
                read = answers.read(reply, question)
                answer |= {"scores": list(read.scores), "value": question.value(read.scores), "reason": read.reason}
            except NoReplyError as error:
                answer |= {"error": f"no reply: {error}"}
            except UnreadableAnswerError as error:
                answer |= {"error": f"unreadable: {error}"}
            given.append((row["id"], answer))
    finally:
        begun = [(one, task) for one, task in zip(asked, tasks, strict=True) if not task.cancel()]
        for (row, question, *_), task in begun:  # all of them, where one has ended the run: answers cost money
            if task.exception() is None:
                key, reply = task.result()
                replies.keep(key, row["id"], question, reply)
    return given


def _line(row: Mapping[str, Any], given: Sequence[Mapping[str, Any]], asked: Rubric) -> dict[str, Any]:
    """The line of a record. A measure is the mean of its answers that could be read; without one it is missing."""
    score = row["score"]
    line = {"group": score["group"], "cluster": score.get("cluster", row["id"]), "also": score.get("also", [])}
    scores = {}
    for question in asked.questions:
        values = [one["value"] for one in given if one["measure"] == question.measure and "value" in one]
        scores |= {question.measure: sum(values) / len(values)} if values else {}
    if asked.overall and (together := _overall(given, asked)):
        scores[asked.overall] = sum(together) / len(together)
    errors = [f"{one['measure']}: {one['error']}" for one in given if "error" in one]
    return {"id": row["id"], **line, "model": scores, "errors": errors, "answers": list(given)}


def _overall(given: Sequence[Mapping[str, Any]], asked: Rubric) -> list[float]:
    """VIEScore's O of each repetition in which all questions were answered: the geometric mean (its section 3)."""
    found = []
    for repetition in sorted({one["repetition"] for one in given}):
        own = [one for one in given if one["repetition"] == repetition and "value" in one]
        values = [[one["value"] for one in own if one["measure"] == q.measure] for q in asked.questions]
        if all(values):
            product = math.prod(sum(some) / len(some) for some in values)
            found.append(product ** (1 / len(values)))
    return found
