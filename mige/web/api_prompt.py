"""Which image of a request to the HTTP endpoint each place of its prompt stands for.

1. `<imagehere>`: the k-th marker is image k, and there are as many markers as images.
2. Without a marker, "image 2" or "picture 2" is image 2; every image is named.
3. A prompt that names none: an edit of one image is read as it is; else the images follow the last word, in order.
"""

import re

from mige.data.records import UNSTORABLE
from mige.tasks import MAX_REFERENCES, PLACEHOLDER, Task, placeholders
from mige.web.instructions import MAX_CHARACTERS, Reading, RefusedError

_NAMED = re.compile(r"\s*\b(?:image|picture)\s*#?(\d{1,9})\b\s*", re.IGNORECASE)


def read_prompt(task: Task, prompt: str, count: int) -> Reading:
    """The prompt with its markers, and the image (from 1) of each. Raises RefusedError for one that cannot be read.

    Args:
        count: images of the request, in order.
    """
    _check_text(prompt)
    every = tuple(range(1, count + 1))
    if marked := placeholders(prompt):
        if marked != count:
            raise RefusedError(
                f"The prompt has {marked} times {PLACEHOLDER} for {count} images: send one marker an image, in order."
            )
        return Reading(prompt.strip(), every)
    numbers = tuple(int(number) for number in _NAMED.findall(prompt))
    if not numbers or not count:
        return Reading(prompt.strip() + ("" if task is Task.EDIT else PLACEHOLDER * count), every)
    _check_numbers(task, numbers, every)
    return Reading(_NAMED.sub(PLACEHOLDER, prompt).strip(), numbers)


def _check_text(prompt: str) -> None:
    if not prompt.strip():
        raise RefusedError("The prompt is empty: write what should happen.")
    if len(prompt) > MAX_CHARACTERS:
        raise RefusedError(f"The prompt has {len(prompt):,} characters: write at most {MAX_CHARACTERS:,}.")
    if UNSTORABLE.search(prompt):
        raise RefusedError("The prompt holds a character that is no text: delete it and type it again.")


def _check_numbers(task: Task, numbers: tuple[int, ...], every: tuple[int, ...]) -> None:
    if missing := [number for number in numbers if number not in every]:
        raise RefusedError(f"The prompt names image {missing[0]}, but {len(every)} came: name those that are sent.")
    if unnamed := [number for number in every if number not in numbers]:
        raise RefusedError(
            f"The prompt names some images, but not image {unnamed[0]}: write “image {unnamed[0]}” where it belongs, "
            "or name none."
        )
    most = 1 if task is Task.EDIT else MAX_REFERENCES
    if len(numbers) > most:
        raise RefusedError(f"The prompt names images {len(numbers)} times: {most} at most for the task “{task}”.")
