"""The paper's public data sets: what a row becomes. readers.py reads their layouts, samples.py makes prompts.

Nothing is written here (run.py does that). docs/data.md says what is known of each source.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige.data.prepare.columns import layout_rows, layout_samples
from mige.data.prepare.index import FIELDS, index_rows, index_samples
from mige.data.prepare.readers import ParquetRows, Reader, SeedRows, Settings, SourceError
from mige.data.prepare.samples import Box, ImageFile, ImageWriter, SkippedSample, edit_prompt, subject_prompt
from mige.tasks import Task

VIEW_SIDES = (1024, 512)  # of a Subjects200K view in pixels
QUALITY = ("compositeStructure", "objectConsistency", "imageQuality")


def _side_by_side(width: int, height: int) -> list[Box]:
    """Two square views: the margin above them is the margin left of the first and right of the second.

    Raises SkippedSample for a size that is no such composite.
    """
    side = next((side for side in VIEW_SIDES if side <= height), VIEW_SIDES[-1])
    margin = (height - side) // 2
    if not (0 <= margin <= 16 and 0 <= width - 2 * side - 2 * margin <= 32):
        raise SkippedSample("composite of unexpected size", f"{width} x {height}")
    return [(left, margin, left + side, margin + side) for left in (margin, width - margin - side)]


# ---- a row -> its samples --------------------------------------------------------------------------------------------

Samples = list[dict[str, Any] | SkippedSample]


def _instruct_pix2pix(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> Samples:
    prompt = edit_prompt(row["edit_prompt"])
    images = writer.store("source", row["original_image"]), writer.store("target", row["edited_image"])
    captions = {"input_caption": row["original_prompt"], "output_caption": row["edited_prompt"]}
    return [_edit(prompt, *images, original_instruction=row["edit_prompt"], **captions)]


def _magicbrush(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> Samples:
    prompt = edit_prompt(row["instruction"])
    images = writer.store("source", row["source_img"]), writer.store("target", row["target_img"])
    turn = {"img_id": row["img_id"], "turn_index": row["turn_index"]}
    return [_edit(prompt, *images, original_instruction=row["instruction"], **turn)]


def _subjects200k(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> Samples:
    """Two samples: each view is the target of its own description, the other view is the reference."""
    _require_quality(row, settings.min_quality)
    description = row["description"] or {}
    if description.get("description_valid") is False:
        raise SkippedSample("description marked as not valid")
    item, texts = description.get("item"), [description.get(f"description_{view}") for view in (0, 1)]
    prompts = [_attempt(subject_prompt, text, item) for text in texts]
    if all(isinstance(prompt, SkippedSample) for prompt in prompts):
        return prompts
    views = writer.store_views(row["image"], _side_by_side)
    samples = []
    for view, prompt in enumerate(prompts):
        extra = {"item": item, "caption": texts[view], "collection": row["collection"]}
        is_skipped = isinstance(prompt, SkippedSample)
        samples.append(prompt if is_skipped else _subject(prompt, views[1 - view], views[view], **extra))
    return samples


def _require_quality(row: Mapping[str, Any], least: int) -> None:
    scores = {name: (row["quality_assessment"] or {}).get(name) for name in QUALITY}
    if None in scores.values():
        raise SkippedSample("no quality scores", str(scores))
    if min(scores.values()) < least:
        raise SkippedSample(f"quality below {least}", str(scores))


_TURN = re.compile(r"(?:instruction|edit_image)_([1-9][0-9]?)")


def _seed_data_edit(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> Samples:
    """One sample, or one a turn of a session: each turn edits the result of the one before."""
    try:
        fields = json.loads(row["line"])
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise SkippedSample("malformed JSON", f"{row['where']}: {error}") from error
    if not isinstance(fields, dict) or not ({"instruction", "instruction_1"} & fields.keys()):
        raise SkippedSample("neither instruction nor instruction_1", f"{row['where']}: {row['line'][:200]}")
    if "instruction" in fields:
        turns = [(fields["instruction"], fields.get("source_image"), fields.get("target_image"))]
    else:
        count = max(int(match[1]) for match in map(_TURN.fullmatch, fields) if match)
        names = [fields.get("source_image"), *(fields.get(f"edit_image_{turn}") for turn in range(1, count + 1))]
        turns = [(fields.get(f"instruction_{turn}"), names[turn - 1], names[turn]) for turn in range(1, count + 1)]
    return [
        _attempt(_seed_turn, instruction, pair, row, writer, turn) for turn, (instruction, *pair) in enumerate(turns, 1)
    ]


def _seed_turn(
    instruction: Any, pair: Sequence[Any], row: Mapping[str, Any], writer: ImageWriter, turn: int
) -> dict[str, Any]:
    prompt = edit_prompt(instruction)
    for name, value in zip(("source", "target"), pair, strict=True):
        if not isinstance(value, str) or not value:
            raise SkippedSample("missing image", f"{row['where']}: the {name} of turn {turn} is {value!r}")
    images = [writer.refer(Path(row["images"]) / name) for name in pair]
    return _edit(prompt, *images, original_instruction=instruction, turn_index=turn)


def _edit(prompt: str, source: ImageFile, target: ImageFile, **extra: Any) -> dict[str, Any]:
    return _row(Task.EDIT, prompt, source.path, [source.path], target, extra)


def _subject(prompt: str, reference: ImageFile, target: ImageFile, **extra: Any) -> dict[str, Any]:
    return _row(Task.SUBJECT, prompt, reference.path, [], target, extra)


def _row(task: Task, prompt: str, entity: str, source: list[str], target: ImageFile, extra: dict) -> dict[str, Any]:
    paths = {"entity_path": [entity], "source_path": source, "multi_prompt": prompt}
    return {"image": target.path, "width": target.width, "height": target.height, **paths, "task": task, **extra}


def _attempt(make: Callable[..., Any], *args: Any) -> Any:
    """What `make` returns, or the SkippedSample that it raises."""
    try:
        return make(*args)
    except SkippedSample as skipped:
        return skipped


@dataclass(frozen=True)
class Source:
    """A public data set: where it is, how its rows are read and what samples they give."""

    hub: str | None  # what is read where no input is given
    splits: tuple[str, ...]  # none: any
    columns: tuple[str, ...]
    reader: Callable[[Settings, Sequence[str], Mapping[str, Any] | None], Reader]
    samples: Callable[[Mapping[str, Any], ImageWriter, Settings], Samples]


SOURCES: dict[str, Source] = {
    "instructpix2pix": Source(
        "timbrooks/instructpix2pix-clip-filtered",
        ("train",),
        ("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"),
        ParquetRows,
        _instruct_pix2pix,
    ),
    "layout": Source(None, (), (), layout_rows, layout_samples),
    "magicbrush": Source(
        "osunlp/MagicBrush",
        ("train", "dev"),
        ("img_id", "turn_index", "source_img", "instruction", "target_img"),
        ParquetRows,
        _magicbrush,
    ),
    "mige_sub_edit": Source("EurekaTian/MIGE_train_sub_edit", ("train",), FIELDS, index_rows, index_samples),
    "seed_data_edit": Source(None, ("train",), (), SeedRows, _seed_data_edit),
    "subjects200k": Source(
        "Yuanshi/Subjects200K",
        ("train",),
        ("image", "collection", "quality_assessment", "description"),
        ParquetRows,
        _subjects200k,
    ),
}


def source_of(settings: Settings) -> Source:
    """The source that the settings name. Raises SourceError where it is unknown or cannot be read with them."""
    source = SOURCES.get(settings.source)
    if source is None:
        raise SourceError(f"unknown source {settings.source!r}; use one of {', '.join(SOURCES)}")
    if source.splits and settings.split not in source.splits:
        raise SourceError(f"{settings.source} has no split {settings.split!r}; use one of {', '.join(source.splits)}")
    if settings.name and not re.fullmatch("[A-Za-z0-9_-]{1,60}", settings.name):
        raise SourceError(f"--name {settings.name!r} is unfit for ids; use 1 to 60 of A-Z a-z 0-9 _ -")
    if source.samples is layout_samples and settings.layout is None:
        raise SourceError("the source layout needs --layout, a preset's name or a YAML file")
    if (settings.layout or settings.images) and source.samples is not layout_samples:
        raise SourceError(
            f"{settings.source} has a layout of its own; --layout and --images belong to the source layout"
        )
    if settings.roots and source.samples is not index_samples:
        raise SourceError(f"{settings.source} names no images elsewhere; --root belongs to mige_sub_edit")
    if not settings.inputs:
        raise SourceError(f"{settings.label} cannot be streamed from the hub; give its extracted files in --input")
    return source
