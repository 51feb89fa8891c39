"""What is wrong with records beyond their fields: images that cannot be decoded, prompts that are cut."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mige.data.records import Finding, Record
from mige.models.instruction import MAX_WORDS, full_text, tokenize
from mige.tasks import PLACEHOLDER
from mige.utils.images import BadImageError, open_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_images(records: Sequence[Record], workers: int = 8) -> list[Finding]:
    """Decode each distinct picture of the records once, in threads; one fatal finding a record and bad file."""
    files_of = [
        (record, dict.fromkeys((*record.references, *filter(None, (record.source, record.target)))))
        for record in records
    ]
    files = list(dict.fromkeys(file for _, files in files_of for file in files))
    with ThreadPoolExecutor(workers) as pool:
        errors = dict(zip(files, pool.map(_decoding_error, files), strict=True))
    return [
        Finding(record.where, f"{file}: {error.problem}", error.remedy)
        for record, files in files_of
        for file in files
        if (error := errors[file])
    ]


def _decoding_error(path: Path) -> BadImageError | None:
    try:
        open_image(path)
    except BadImageError as error:
        return error
    return None


def check_lengths(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", num_queries: int, max_tokens: int
) -> list[Finding]:
    """What of each record's instruction is cut: words over 88, tokens over the limit.

    Cut text is a note; a placeholder or a whole picture that is cut is a fault.
    """
    return [f for record in records for f in _check_length(record, tokenizer, num_queries, max_tokens)]


def _check_length(
    record: Record, tokenizer: "PreTrainedTokenizerBase", num_queries: int, max_tokens: int
) -> list[Finding]:
    text = full_text(record.task, record.prompt, record.edit_type)
    instruction = tokenize(text, tokenizer)
    findings = []
    read, given = instruction.pictures, len(record.references)
    if read < given:
        problem = f"only {read} of {given} {PLACEHOLDER} are within the first {MAX_WORDS} words"
        findings.append(Finding(record.where, problem, "shorten the prompt", fatal=True))
    if (extra := read - given) > 0:
        problem = f"it mentions the picture {read} times; {extra} mention(s) read an empty picture"
        findings.append(Finding(record.where, problem, f"write one {PLACEHOLDER} to choose which", fatal=False))
    length = instruction.length(num_queries)
    if length > max_tokens:
        last_picture_starts = length - len(instruction.segments[-1]) - num_queries
        lost = instruction.pictures > 0 and last_picture_starts >= max_tokens
        problem = f"the instruction takes {length} tokens, the last {length - max_tokens} are cut (limit {max_tokens})"
        findings.append(
            Finding(record.where, problem + (" and with them a whole picture" if lost else ""), "shorten it", lost)
        )
    return findings
