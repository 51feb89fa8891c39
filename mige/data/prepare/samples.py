"""What the rows of every source become: prompts, images of the set that is made, and outcomes. sources.py uses it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mige.models.instruction import MAX_WORDS, clean, point_at_source
from mige.tasks import PLACEHOLDER, placeholders


class SkippedSample(Exception):  # noqa: N818  # an outcome of a sample, not a failure of the run
    """Why a sample, or a whole row, becomes no record: a reason to count by, and the detail of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MENTION = re.compile(r"(\w*)(?:the|this) (?:image|photo|picture)(\w*)", re.IGNORECASE)
_SHIELD = "\N{NO-BREAK SPACE}"  # keeps point_at_source from a mention that must stay text
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)


def edit_prompt(instruction: Any) -> str:
    """An editing instruction with one `<imagehere>`: its first mention of the image, else appended.

    This is `point_at_source`, except that later mentions and longer words ("the photographer") stay text.
    Raises SkippedSample for an instruction that is empty or so long that the placeholder is cut in training.
    """
    text = " ".join(required_text(instruction, "instruction").split())
    first = next((m.start() for m in _MENTION.finditer(text) if not (m[1] or m[2])), None)
    shielded = _MENTION.sub(lambda m: m[0] if m.start() == first else m[0].replace(" ", _SHIELD), text)
    return short_enough(" ".join(point_at_source(shielded).replace(_SHIELD, " ").split()))


def subject_prompt(description: Any, item: Any) -> str:
    """A description with `<imagehere>` for the first mention of its item: whole words, any case, the article stays.

    Raises SkippedSample where the description or the item is empty, the description does not mention the item, or the
    placeholder is cut in training.
    """
    text = " ".join(required_text(description, "description").split())
    words = _ARTICLE.sub("", required_text(item, "subject name").strip(" \t\n.,;:!\"'"), count=1).split()
    name = r"\s+".join(map(re.escape, words))
    pointed, found = re.subn(rf"\s*(?<!\w){name}(?!\w)\s*", PLACEHOLDER, text, count=1, flags=re.IGNORECASE)
    if not (words and found):
        raise SkippedSample("description does not mention its item", f"{item!r} in {description!r}")
    return short_enough(pointed)


def required_text(value: Any, name: str) -> str:
    """The value, a text that is not blank; raises SkippedSample for any other."""
    if not isinstance(value, str | None):
        raise SkippedSample(f"{name} is no text", repr(value))
    if not value or not value.strip():
        raise SkippedSample(f"empty {name}")
    return value


def short_enough(prompt: str) -> str:
    """The prompt, with a marker and none beyond the words that training reads; raises SkippedSample for any other."""
    if placeholders(clean(prompt)) < max(1, placeholders(prompt)):
        raise SkippedSample(f"{PLACEHOLDER} is not within the first {MAX_WORDS} words", prompt)
    return prompt


# ---- images ----------------------------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class ImageFile:
    """An image of the set that is made: its file and size in pixels."""

    path: str  # relative to the output folder
    width: int  # upright
    height: int


class ImageWriter(Protocol):
    """Takes the images of one row; an image cell is {"bytes", "path"}."""

    def store(self, name: str, cell: Any) -> ImageFile:
        """Save an image cell as it is (JPEG, PNG, WebP), else as PNG, and decode it.

        Raises SkippedSample for a cell without bytes or with no whole image, OSError where writing fails.
        """

    def store_views(self, cell: Any, boxes: Callable[[int, int], Sequence[Box]]) -> list[ImageFile]:
        """Cut an image cell into the boxes for its upright width and height; saved as JPEG of quality 95 without
        chroma subsampling. Raises as `store`, and what `boxes` raises."""

    def refer(self, path: Path) -> ImageFile:
        """An image that stays where it is, decoded once to be sure of it. Raises SkippedSample where it cannot be."""

    def relative(self, path: Path) -> str:
        """The path of a file that stays where it is, relative to the output folder; the file is not opened."""
