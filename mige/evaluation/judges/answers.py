"""What a judge said -> its numbers and its reason, or why they cannot be read. Nothing is guessed.

Read are a JSON object with "score" (in a fence, between sentences, after thoughts, with the usual faults of hand-made
JSON), and lines such as "Score: 3", one for each criterion.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mige.evaluation.judges.rubrics import Question

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:i(?:'|’)?m sorry|i apologi[sz]e|i (?:can(?:'|’)?t|cannot|am unable to|(?:'|’)m unable to|won(?:'|’)t)"
    r"|(?:can(?:'|’)?t|cannot|unable to) (?:assist|help|rate|evaluate|comply))",
    re.IGNORECASE,
)
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_LIST = re.compile(rf"""["']?scores?["']?\s*[:=]\s*\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*,?\s*\]""", re.IGNORECASE)
_OF = r"(?:\s*(?:/|out\s+of)\s*(\d+))?"
_ALONE = re.compile(
    rf"""["']?\bscores?\b["'*]*\s*[:=]\s*["'*]*\s*({_NUMBER}){_OF}(?!\.?\d|\s*/|\s*out\s+of)""", re.IGNORECASE
)
_REASON = re.compile(
    r"""["']?(?:reasoning|reason|analysis)["']?\s*[:=]\s*["']?(.+?)["']?\s*(?:[,}\n]|$)""", re.IGNORECASE
)
_KEYS = ("score", "scores")
MAX_LENGTH = 20_000  # characters of a reply: more is no answer, and looking for one would take long


class UnreadableAnswerError(ValueError):
    """Why an answer holds no score: a phrase fit for a table."""


@dataclass(frozen=True)
class Reply:
    """What came back from a judge.

    Attributes:
        stop: why it ended: "stop", or what the endpoint says: "length", "content_filter", "refusal".
    """

    text: str
    stop: str = "stop"


@dataclass(frozen=True)
class Answer:
    """A reply that could be read: a number for each criterion, on the question's scale, and the reason."""

    scores: tuple[float, ...]
    reason: str


def read(reply: Reply, question: Question) -> Answer:
    """The numbers and the reason of a reply; raises UnreadableAnswerError that says what is wrong with it."""
    text = _THOUGHTS.sub("", reply.text).strip()
    if reply.stop in ("refusal", "content_filter"):
        raise UnreadableAnswerError(f"refused ({reply.stop}): {_short(text)}")
    if not text or len(text) > MAX_LENGTH:
        raise UnreadableAnswerError(f"{len(text):,} characters, {MAX_LENGTH:,} at most" if text else "empty")
    found = list(_from_json(text, question)) or list(_from_text(text, question))
    if not found:
        raise UnreadableAnswerError(_why_nothing(text, reply.stop))
    if len({given for given, _ in found}) > 1:
        raise UnreadableAnswerError(f"{len(found)} answers that differ: {', '.join(str(list(s)) for s, _ in found)}")
    scores, reason = found[0]
    if len(scores) != len(question.criteria):
        raise UnreadableAnswerError(f"{len(scores)} scores, expected {len(question.criteria)}: {list(scores)}")
    for score in scores:
        if not (math.isfinite(score) and question.low <= score <= question.high):
            raise UnreadableAnswerError(f"score {score:g}, expected {question.low} to {question.high}")
    return Answer(scores, storable(reason))


def storable(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which JSON may hold and no file may."""
    return text.encode(errors="replace").decode()


def _why_nothing(text: str, stop: str) -> str:
    if _REFUSAL.search(text):
        return f"refused: {_short(text)}"
    return f"cut off before a score: {_short(text)}" if stop == "length" else f"no score in it: {_short(text)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:117]}..."


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _from_json(text: str, question: Question) -> Iterator[tuple[tuple[float, ...], str]]:
    """The scores of every JSON object of a text that has some."""
    decoder, start = json.JSONDecoder(strict=False), text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            found = None
        key = next((key for key in found if key.lower() in _KEYS), None) if isinstance(found, dict) else None
        if key is not None:
            said = next((found[name] for name in found if name.lower().startswith("reason")), "")
            yield _numbers(found[key], question), str(said)
        start = text.find("{", start + 1 if key is None else end)


def _numbers(value: Any, question: Question) -> tuple[float, ...]:
    """The numbers in the value of "score": one, a list, or an object that names the criteria."""
    if isinstance(value, dict):
        if value.keys() != set(question.criteria):
            named = storable(_short(", ".join(value)))
            raise UnreadableAnswerError(f"scores of {named}; expected {', '.join(question.criteria)}")
        value = [value[name] for name in question.criteria]
    return tuple(_number(one, question) for one in (value if isinstance(value, list) else [value]))


def _number(value: Any, question: Question) -> float:
    if isinstance(value, str):
        written = re.fullmatch(rf"\s*({_NUMBER}){_OF}\s*", value)
        if written and written[2] in (None, str(question.high)):
            return float(written[1])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise UnreadableAnswerError(f"score {storable(_short(str(value)))}, expected a number")


# ---- text ------------------------------------------------------------------------------------------------------------


def _from_text(text: str, question: Question) -> Iterator[tuple[tuple[float, ...], str]]:
    """Scores of text that is no JSON, or of broken JSON: a list behind "score", or a line for each criterion."""
    reason = _REASON.search(text)
    said = reason[1].strip() if reason else ""
    for numbers in _LIST.findall(text):
        yield tuple(map(float, numbers.split(","))), said
    if _LIST.search(text):
        return
    for number, of in _ALONE.findall(text):
        if of and of != str(question.high):
            raise UnreadableAnswerError(f"score {number}/{of}, expected one of {question.high}")
        yield (float(number),), said
    lines = [re.search(rf"^\W*{re.escape(name)}\W*[:=]\W*({_NUMBER})(?:\s*/\s*{question.high})?\W*$", text,
                       re.IGNORECASE | re.MULTILINE) for name in question.criteria]  # fmt: skip
    if all(lines):
        yield tuple(float(line[1]) for line in lines), said
