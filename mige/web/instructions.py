"""Numbered pictures: "put picture 2 to the left of picture 1" <-> a prompt with `<imagehere>` and its references.

A person counts the pictures on the page; the model reads them in the order the text names them. Every "picture N"
becomes a placeholder without blanks around it, the form the models were trained on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mige.data.records import UNSTORABLE
from mige.tasks import MAX_REFERENCES, PLACEHOLDER, Task

MAX_CHARACTERS = 2000  # the model reads 88 words

_NAMED = re.compile(r"\s*\bpicture\s*#?(\d{1,9})\b\s*", re.IGNORECASE)


class RefusedError(ValueError):
    """A request that cannot run. The message is for the person who made it: what is wrong, and what to do."""


@dataclass(frozen=True)
class Reading:
    """A numbered instruction as the pipeline takes it: the k-th placeholder stands for picture `numbers[k]`."""

    prompt: str
    numbers: tuple[int, ...]  # from 1; of an edit that names no picture, the one that is edited


def read(task: Task, text: str, given: Sequence[bool]) -> Reading:
    """The prompt of a numbered instruction and the pictures it names, in order; one may be named more than once.

    Args:
        given: whether there is a picture 1, 2, ... In the two editing tasks picture 1 is the one to edit.

    Raises RefusedError for an instruction that is empty, names a picture that isn't there, leaves out one that is, or
    asks for what the task cannot do.
    """
    _check_text(text)
    _check_given(task, given)
    numbers = tuple(int(number) for number in _NAMED.findall(text))
    _check_numbers(task, numbers, given)
    return Reading(_NAMED.sub(PLACEHOLDER, text).strip(), numbers or (1,))


def check_negative(text: str, is_read: bool) -> None:
    """Raise RefusedError for a negative text that the model cannot read, or would not at the guidance asked for."""
    _check_characters("negative text", text)
    if _NAMED.search(text):
        raise RefusedError("The negative text names a picture: write words alone.")
    if not is_read:
        raise RefusedError(
            "The negative text is not read at this guidance: choose one other than 1, or delete the text."
        )


def spell(prompt: str, numbers: Sequence[int]) -> str:
    """The instruction for people: the k-th placeholder of a prompt written as "picture `numbers[k]`"."""
    first, *rest = re.split(re.escape(PLACEHOLDER), prompt, flags=re.IGNORECASE)
    text = first + "".join(f" picture {number} {part}" for number, part in zip(numbers, rest, strict=True))
    return re.sub(r"\s+([,.:;!?]|$)", r"\1", re.sub(r"\s+", " ", text)).strip()


def _check_text(text: str) -> None:
    if not text.strip():
        raise RefusedError(
            "The instruction is empty: write what should happen, with “picture 1” where a picture belongs."
        )
    _check_characters("instruction", text)


def _check_characters(name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"The {name} has {len(text):,} characters: write at most {MAX_CHARACTERS:,}.")
    if PLACEHOLDER in text.lower():
        raise RefusedError(
            "Name the pictures by number here: write “picture 1”, “picture 2” instead of the placeholder."
        )
    if UNSTORABLE.search(text):
        raise RefusedError(f"The {name} holds a character that is no text: delete it and type it again.")


def _check_given(task: Task, given: Sequence[bool]) -> None:
    if not any(given):
        raise RefusedError("There is no picture yet: drag one into “Picture 1”.")
    if task is not Task.SUBJECT and not given[0]:
        raise RefusedError("Picture 1, the one to edit, is missing: drag it into “Picture 1”.")
    if task is Task.SUBJECT_EDIT and not any(given[1:]):
        raise RefusedError("There is no subject yet: drag one into “Picture 2”, or use the tab “Edit a picture”.")


def _check_numbers(task: Task, numbers: Sequence[int], given: Sequence[bool]) -> None:
    there = [number for number, is_given in enumerate(given, start=1) if is_given]
    if missing := [number for number in numbers if number not in there]:
        raise RefusedError(
            f"The instruction names picture {missing[0]}, but there is none: "
            f"drag one in, or name only {_listed(there)}."
        )
    if task is Task.EDIT:
        if len(numbers) > 1:
            raise RefusedError(
                f"Picture 1 is named {len(numbers)} times: name the picture to edit once, or not at all."
            )
        return
    if unnamed := [number for number in there if number not in numbers]:
        raise RefusedError(
            f"The instruction does not name {_listed(unnamed)}: write “picture {unnamed[0]}” where it belongs, "
            "or take the picture away."
        )
    if len(numbers) > MAX_REFERENCES:
        raise RefusedError(
            f"The instruction names pictures {len(numbers)} times: the model reads at most {MAX_REFERENCES}, "
            "name some of them less often."
        )


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(f"picture {number}" for number in numbers)
