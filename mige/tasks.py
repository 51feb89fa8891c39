"""The three tasks, their official settings, and the marker that stands for an image in a prompt."""

import re
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

PLACEHOLDER = "<imagehere>"
MAX_REFERENCES = 4  # the model was trained with at most this many images in a prompt


class Task(StrEnum):
    """What is asked for; which of the three follows from the images of a record."""

    SUBJECT = "subject"
    EDIT = "edit"
    SUBJECT_EDIT = "subject_edit"


@dataclass(frozen=True)
class TaskSettings:
    """How the official code runs one task; all but `training_prefix` is about inference."""

    prefix: str  # put before the prompt
    clean_prefix: bool  # whether the prefix goes through the caption cleaner together with the prompt
    training_prefix: str  # put before the cleaned prompt in training, as it is
    steps: int  # solver steps
    guidance: float  # text guidance
    source_guidance: float  # guidance towards the source image
    batch_size: int
    letterbox: bool  # VAE references: True fits the whole image on black, False crops the centre


TASKS: dict[Task, TaskSettings] = {
    Task.SUBJECT: TaskSettings(
        prefix="Follow the text instruction to generate an image with the given objects' images, "
        "preserving the subject's identity:\n ",
        clean_prefix=True,
        training_prefix="Follow the text instruction to generate an image with the given objects, "
        "preserving the subject's identity:\n ",
        steps=50,
        guidance=7.0,
        source_guidance=1.0,
        batch_size=5,
        letterbox=True,
    ),
    Task.EDIT: TaskSettings(
        prefix="Follow the instruction to edit the image:\n ",
        clean_prefix=False,
        training_prefix="Follow the instruction to edit the image:\n ",
        steps=60,
        guidance=5.0,
        source_guidance=1.0,
        batch_size=25,
        letterbox=False,
    ),
    Task.SUBJECT_EDIT: TaskSettings(
        prefix="Subject-driven editing:\n ",
        clean_prefix=True,
        training_prefix="Subject-driven editing:\n ",
        steps=60,
        guidance=5.0,
        source_guidance=1.0,
        batch_size=25,
        letterbox=False,
    ),
}


def placeholders(prompt: str) -> int:
    """How many images the prompt asks for: occurrences of `<imagehere>` in any case."""
    return prompt.lower().count(PLACEHOLDER)


def is_rewritten(task: Task, prompt: str) -> bool:
    """Whether the prompt gets its markers from its words: an edit's without any (`instruction.point_at_source`)."""
    return task is Task.EDIT and placeholders(prompt) == 0


def can_pair(task: Task, prompt: str, markers: int, references: int) -> bool:
    """The rule of markers: one for each reference, in order.

    Args:
        markers: how many are in the text as the model reads it, which is cut after so many words.

    An edit that is rewritten may mention its image again: the first mention reads it, the others an empty image.
    """
    return markers == references or (is_rewritten(task, prompt) and markers > references)


# Brackets of any script, and as HTML, URLs and JSON escape them.
_ANGLE = r"(?:[<＜﹤‹«⟨〈〈《]|&(?:amp;)*(?:lt|#0*60|#x0*3c);|%3c|\\u003c)"
_OTHER, _OTHER_CLOSING = r"[\[({［｛（【〔「]", r"[\])}］｝）】〕」]"
_CLOSING = r"(?:[>＞﹥›»⟩〉〉》]|&(?:amp;)*(?:gt|#0*62|#x0*3e);|%3e|\\u003e)"
_BRACKETED = re.compile(
    rf"{_ANGLE}(?P<angle>[^<>\[\](){{}}&%\n]{{2,60}}?){_CLOSING}|{_OTHER}(?P<other>[^<>\[\](){{}}\n]{{2,30}}?){_OTHER_CLOSING}",
    re.IGNORECASE,
)
_BARE = re.compile(r"\S*\bimage[_-]?here\b\S*", re.IGNORECASE)
_NAMES = ("image", "images", "img", "picture", "pic", "photo", "source", "reference", "ref", "subject", "entity",
          "object", "placeholder", "sourceimage", "referenceimage", "inputimage")  # fmt: skip


def near_markers(prompt: str) -> list[str]:
    """What in a prompt looks like the marker and is none, as it is written: `<image here>`, `[imagehere]`, `<img>`."""
    rest = re.sub(PLACEHOLDER, " ", prompt, flags=re.IGNORECASE)
    found = [match.group() for match in _BRACKETED.finditer(rest) if _is_near(match)]
    for text in found:
        rest = rest.replace(text, " ")
    plain = "".join(c for c in unicodedata.normalize("NFKC", rest) if unicodedata.category(c) != "Cf")
    return found + _BARE.findall(plain)


def _is_disguised(text: str, name: str) -> bool:
    """Whether a text is the name but for letters of other scripts, which look alike: Cyrillic or Greek ones."""
    letters = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalpha())
    pairs = list(zip(letters, name, strict=False))
    return len(letters) == len(name) and letters[:1].isascii() and all(a == b or not a.isascii() for a, b in pairs)


def _is_near(match: re.Match[str]) -> bool:
    inner = match["angle"] or match["other"]
    # Compatibility forms (full-width letters) become plain ones; invisible characters, digits and signs go.
    words = re.findall("[a-z]+", unicodedata.normalize("NFKC", inner).lower().replace("\u200b", ""))
    letters = "".join(words)
    name = PLACEHOLDER.strip("<>")
    if SequenceMatcher(None, letters, name).ratio() > 0.8 or _is_disguised(inner, name):
        return True
    named = letters in _NAMES or (bool(words) and words[0] in ("img", "image"))
    return named and (match["angle"] is not None or match.group()[0] not in "(（")
