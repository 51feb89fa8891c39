"""What a judge is asked on each benchmark, on which scale, and what becomes of its numbers.

The prompts are files of our own wording in prompts/; their hash is part of a report's protocol. What is asked, the
scales and how numbers are put together are those of VIEScore (arXiv 2312.14867), DreamBench++ (arXiv 2406.16855),
ImgEdit (arXiv 2505.20275) and OmniGen2's OmniContext (arXiv 2506.18871).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from string import Template
from typing import Any

_NUMBERS = {1: "the one number", 2: "the two numbers", 3: "the three numbers"}


@dataclass(frozen=True)
class Question:
    """One question about a result.

    Attributes:
        measure: what its answer is a measure of, a column of the table.
        prompt: its file. criteria: what its numbers are of, in their order. low, high: the ends of their scale.
        sees: "all" images, the inputs before the output, or the "output" alone.
        takes: the "least" of the numbers is the measure, as in VIEScore, or their "mean".
        divisor: what the measure is divided by. DreamBench++ divides its 4 points by 4.
    """

    measure: str
    prompt: str
    criteria: tuple[str, ...]
    low: int = 0
    high: int = 10
    sees: str = "all"
    takes: str = "least"
    divisor: float = 1.0

    @property
    def template(self) -> str:
        """The text of frame and prompt, with fields such as $instruction in it."""
        folder = files("mige.evaluation.judges") / "prompts"
        frame, question = ((folder / f"{name}.txt").read_text("utf-8") for name in ("frame", self.prompt))
        return frame.replace("$question", question.strip())

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of everything that is asked but for instruction and images."""
        asked = f"{self.template}\n{self.criteria} {self.low} {self.high} {self.sees}"
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def text(self, instruction: str, names: Sequence[str]) -> str:
        """The prompt about images that are called so, in the order in which they are shown."""
        listed = "\n".join(f"Image {letter}: {name}." for letter, name in zip("ABCDEFGH", names, strict=False))
        given = "You are given one image." if len(names) == 1 else f"You are given {len(names)} images."
        places = ", ".join(f"<{name}>" for name in self.criteria)
        fields = {"inputs": f"{given}\n{listed}", "count": _NUMBERS[len(self.criteria)], "places": places}
        return Template(self.template).substitute(fields, instruction=instruction, low=self.low, high=self.high)

    def value(self, scores: Sequence[float]) -> float:
        """The measure of the numbers of one answer."""
        taken = min(scores) if self.takes == "least" else sum(scores) / len(scores)
        return taken / self.divisor

    def on_scale(self, high: int) -> "Question":
        """The same question on a scale up to `high`; its measure stays on the old one (EditScore: 25 points)."""
        return replace(self, high=high, divisor=self.divisor * high / self.high)


@dataclass(frozen=True)
class Rubric:
    """The questions about one result; `overall`: the name of the geometric mean of their measures, if there is one."""

    questions: tuple[Question, ...]
    overall: str | None = None

    def measures(self) -> list[str]:
        """The columns of the table."""
        return [question.measure for question in self.questions] + ([self.overall] if self.overall else [])


QUALITY = Question("PQ", "quality", ("naturalness", "freedom from faults"), sees="output")
EDIT = Rubric((Question("SC", "edit", ("success", "preservation")), QUALITY), "O")
SUBJECT = Rubric((Question("SC", "subject", ("text", "likeness")), QUALITY), "O")
SUBJECT_EDIT = Rubric((Question("SC", "subject_edit", ("success", "likeness", "preservation")), QUALITY), "O")

_FOLLOWING = Question("PF", "text", ("text",), high=4, sees="output", divisor=4)
_CONCEPT = Rubric((Question("CP", "concept", ("likeness",), high=4, divisor=4), _FOLLOWING))
_STYLE = Rubric((Question("CP", "style", ("likeness",), high=4, divisor=4), _FOLLOWING))

_IMGEDIT = {
    "style": ("imgedit_style", ("style", "content", "drawing")),
    "action": ("imgedit_action", ("action", "identity", "coherence")),
    "extract": ("imgedit_extract", ("object", "cut", "quality")),
}
_OTHER_EDITS = ("imgedit", ("compliance", "seamlessness", "fidelity"))

_CONTEXT = Question("PF", "context", ("request",))
_IDENTITY = Question("SC", "identity", ("likeness",))
_SCENE = Question("SC", "identity_scene", ("likeness",))


def rubric(benchmark: str, score: Mapping[str, Any]) -> Rubric:
    """What is asked about a record of a benchmark with this "score"."""
    group = score["group"]
    if benchmark == "dreambench_plus":
        return _STYLE if group == "style" else _CONCEPT
    if benchmark == "imgedit":
        prompt, criteria = _IMGEDIT.get(group, _OTHER_EDITS)
        return Rubric((Question("score", prompt, criteria, 1, 5, takes="mean"),))
    if benchmark == "omnicontext":
        return Rubric((_CONTEXT, _SCENE if "scene" in group else _IDENTITY), "O")
    return {"dreambench": SUBJECT, "migebench": SUBJECT_EDIT}.get(benchmark, EDIT)
