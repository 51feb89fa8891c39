"""What is wrong with records beyond their fields: images that cannot be used, prompts that are misread or cut.

Nothing here loads torch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mige.data.records import Issue, Record, count
from mige.models.instruction import MAX_WORDS, Instruction, read_prompt, training_text, unspelled
from mige.tasks import PLACEHOLDER, TASKS, near_markers, placeholders
from mige.utils.files import absolute
from mige.utils.images import BadImageError, check_shape, image_key, open_image
from mige.utils.masks import as_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATIO_TOLERANCE = 0.02  # relative difference of width / height between source and target beyond which it is noted
MANY = 5  # records of one target from which on it is worth a word


@dataclass(frozen=True)
class _Seen:
    """What the check knows of an image file: its size and pixels' digest, or why it cannot be used."""

    size: tuple[int, int] = (0, 0)
    key: bytes = b""
    error: BadImageError | None = None


def check_images(
    records: Sequence[Record],
    workers: int = 8,
    *,
    size: tuple[int, int] = (512, 512),
    training: bool = False,
    opener: Callable[[Path], Image.Image] | None = None,
) -> list[Issue]:
    """Decode each distinct image of the records once, in threads; one fatal issue a record and bad file.

    size: height and width that the images will be fitted to, px; what is too long for that is an error.
    training: fitted as in training (never letterboxed).
    opener: opens a file, or raises BadImageError, from several threads; None: `open_image`.
    Source and target whose ratios differ by more than RATIO_TOLERANCE are a warning, as is a target that equals a
    reference.
    """
    files_of = [(record, _files(record)) for record in records]
    files = list(dict.fromkeys(file for _, files in files_of for file in files))
    with ThreadPoolExecutor(workers) as pool:
        seen = dict(zip(files, pool.map(partial(_look, opener=opener or open_image), files), strict=True))
    issues = []
    for record, own in files_of:
        for file in own:
            if error := seen[file].error or _too_long(record, file, seen[file].size, size, training):
                issues.append(Issue(record.where, f"{file}: {error.message}", error.hint))
        issues += _compare(record, seen) + _check_mask(record, seen)
    return issues


def _check_mask(record: Record, seen: dict[Path, _Seen]) -> list[Issue]:
    """Whether a mask fits its source, which can be used."""
    if record.mask is None or seen[record.source].error:
        return []
    try:
        as_mask(record.mask, seen[record.source].size)
    except BadImageError as error:
        return [Issue(record.where, f"{record.mask}: {error.message}", error.hint)]
    return []


def _files(record: Record) -> list[Path]:
    return list(dict.fromkeys((*record.references, *filter(None, (record.source, record.target)))))


def _look(path: Path, opener: Callable[[Path], Image.Image]) -> _Seen:
    try:
        image = opener(path)
    except BadImageError as error:
        return _Seen(error=error)
    return _Seen(image.size, image_key(image))


def _too_long(
    record: Record, file: Path, size: tuple[int, int], fitted: tuple[int, int], training: bool
) -> BadImageError | None:
    letterboxed = not training and TASKS[record.task].letterbox and file != record.target
    try:
        check_shape(size, *fitted, letterboxed=letterboxed)
    except BadImageError as error:
        return BadImageError(file, f"{error.args[0]}: {error.message}", error.hint)
    return None


def _compare(record: Record, seen: dict[Path, _Seen]) -> list[Issue]:
    """Notes on a target and what it is made from, where both can be used."""
    if record.target is None or seen[record.target].error:
        return []
    target = seen[record.target]
    for number, reference in enumerate(record.references, 1):
        if seen[reference].key == target.key and not seen[reference].error:
            which = "source" if reference == record.source else f"reference {number}"
            return [Issue(record.where, f"{which} and target are the same image ({record.target})", "check it", False)]
    if record.source is None or seen[record.source].error:
        return []
    source = seen[record.source]
    ratio = source.size[0] / source.size[1] / (target.size[0] / target.size[1])
    if max(ratio, 1 / ratio) > 1 + RATIO_TOLERANCE:
        shapes = "source is {} x {}, target is {} x {}".format(*source.size, *target.size)
        message = f"{shapes}: their ratios differ by more than {RATIO_TOLERANCE:.0%}"
        return [Issue(record.where, message, "the source is stretched to the target's shape; crop both alike", False)]
    return []


def check_repeats(records: Iterable[Record]) -> list[Issue]:
    """A warning for each target that MANY or more records of a training set share."""
    targets = Counter(absolute(record.target) for record in records if record.target is not None)
    return [shared_target(target, times) for target, times in targets.items() if times >= MANY]


def shared_target(target: str, times: int) -> Issue:
    """The warning for a target, an absolute path, that so many records share."""
    return Issue(target, f"{count(times, 'record')} have this one image as their target", "check it", False)


def check_markers(record: Record) -> list[Issue]:
    """A warning for what in the prompt looks like the marker and is read as words."""
    near = near_markers(record.prompt)
    if not near:
        return []
    message = f"{', '.join(map(repr, near))} looks like the marker and is read as words"
    return [Issue(record.where, message, f"write exactly {PLACEHOLDER} for each reference", fatal=False)]


def check_training_text(record: Record) -> list[Issue]:
    """Whether the text that the record is trained on mentions each of its references once; needs no tokenizer.

    An edit without a marker gets its mentions from its words, and text is cut after MAX_WORDS words: both can leave
    another number of markers than references, which training cannot pair, so it is an error.
    """
    found, given = placeholders(training_text(record.task, record.prompt, record.edit_type)), len(record.references)
    issues = check_markers(record)
    if found == given:
        return issues
    asked = placeholders(record.prompt)
    message = f"the text it is trained on has {found} {PLACEHOLDER} for {count(given, 'reference')}"
    if asked == 0 and found > given:
        message += f", as the prompt mentions its image {found} times"
        hint = f"write one {PLACEHOLDER} in place of one mention"
    else:
        message += f", as the text is cut after {MAX_WORDS} words"
        hint = "shorten the prompt"
    return [*issues, Issue(record.where, message, hint)]


def check_lengths(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", num_queries: int, max_tokens: int
) -> list[Issue]:
    """What of each record's instruction is not read as written.

    Near markers, tokens that the tokenizer does not know, special tokens as text, and cut text (words over MAX_WORDS,
    tokens over the limit) are warnings; a marker or a whole image that is cut is an error.
    """
    read = [(r, read_prompt(r.task, r.prompt, r.edit_type, tokenizer)) for r in records]
    return [f for record, one in read for f in check_instruction(record, one, tokenizer, num_queries, max_tokens)]


def check_instruction(
    record: Record, instruction: Instruction, tokenizer: "PreTrainedTokenizerBase", num_queries: int, max_tokens: int
) -> list[Issue]:
    """`check_lengths` of one record whose prompt has been read (`read_prompt`)."""
    issues = check_markers(record) + check_spelling(record, instruction, tokenizer)
    read, given = instruction.num_images, len(record.references)
    if read < given:
        message = f"only {read} of {given} {PLACEHOLDER} are within the first {MAX_WORDS} words"
        issues.append(Issue(record.where, message, "shorten the prompt", fatal=True))
    if (extra := read - given) > 0:
        message = f"it mentions the image {read} times; {extra} mention(s) read an empty image"
        issues.append(Issue(record.where, message, f"write one {PLACEHOLDER} to choose which", fatal=False))
    length = instruction.length(num_queries)
    if length > max_tokens:
        last_image_starts = length - len(instruction.segments[-1]) - num_queries
        lost = instruction.num_images > 0 and last_image_starts >= max_tokens
        message = f"the instruction takes {length} tokens, the last {length - max_tokens} are cut (limit {max_tokens})"
        issues.append(
            Issue(record.where, message + (" and with them a whole image" if lost else ""), "shorten it", lost)
        )
    return issues


def check_spelling(record: Record, instruction: Instruction, tokenizer: "PreTrainedTokenizerBase") -> list[Issue]:
    """Notes on tokens of the prompt that the tokenizer does not know, and on special tokens written out in it."""
    unknown, special = unspelled(record.prompt, instruction, tokenizer)
    issues = []
    if special:
        message = f"{', '.join(special)} in the prompt are special tokens of the model, read as text here"
        issues.append(Issue(record.where, message, "leave them out", fatal=False))
    if unknown:
        message = f"{count(unknown, 'token')} of the prompt are unknown to the model (it was trained on English)"
        issues.append(Issue(record.where, message, "write it in English, without emoji", fatal=False))
    return issues
