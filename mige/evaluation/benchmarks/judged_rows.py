"""Rows of the benchmarks that are scored by a judge: their own files in, records and what a judge is told out."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mige.data.prepare import sources
from mige.evaluation.benchmarks.files import (
    BenchmarkError,
    Options,
    checked_text,
    existing_file,
    read_file,
    read_json,
    write_image,
)
from mige.tasks import MAX_REFERENCES, PLACEHOLDER

# ---- GEdit-Bench -----------------------------------------------------------------------------------------------------

_GEDIT_COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist")


def gedit(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """`stepfun-ai/GEdit-Bench`: parquet, split train; its 606 English rows of 1,212, as MIGE reads no Chinese.

    Sources are `input_image`, which the judge is shown too. "intersection": rows on which all methods of the paper gave
    a result.
    """
    rows = _parquet(options, _GEDIT_COLUMNS)
    for n, row in enumerate(rows):
        where = f"GEdit-Bench, row {n}"
        if checked_text(row["instruction_language"], where, "instruction_language") != "en":
            continue
        key, group = (checked_text(row[name], where, name) for name in ("key", "task_type"))
        source = write_image(row["input_image"], folder / "sources" / f"{n:05d}", where)
        also = ["intersection"] if row["Intersection_exist"] else []
        instruction = checked_text(row["instruction"], where, "instruction")
        cluster = hashlib.sha256(row["input_image"]["bytes"]).hexdigest()[:16]
        yield _edit(f"{group}-{key}", instruction, source, group, cluster, also)


def _parquet(options: Options, columns: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    return iter(sources.ParquetRows(sources.Settings("benchmark", (options.data,), "train"), columns, None))


def _edit(key: str, instruction: str, source: Path, group: str, cluster: str, also: list[str]) -> dict[str, Any]:
    """The row of an edit of one image."""
    return {
        "id": key,
        "multi_prompt": instruction,
        "entity_path": [str(source)],
        "source_path": [str(source)],
        "task": "edit",
        "score": {
            "group": group,
            "also": also,
            "cluster": cluster,
            "source": str(source),
            "instruction": instruction,
        },
    }


# ---- ImgEdit-Bench ---------------------------------------------------------------------------------------------------

IMGEDIT_TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")


def imgedit(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """The basic suite of PKU-YuanGroup/ImgEdit: basic_edit.json, and the originals unpacked from Benchmark.tar.

    Both may lie deeper in the folder of the data. Every path in the file is relative to the folder of the originals.
    """
    file = _only(Path(options.data), "basic_edit.json")
    edits = read_json(file, "ImgEdit-Bench", dict)
    roots = _roots(Path(options.root or options.data), next(iter(edits.values()), None))
    for key, edit in edits.items():
        where = f"{file}, {key}"
        if not isinstance(edit, dict):
            raise BenchmarkError(f"{where}: {type(edit).__name__}, expected an object; fetch the file again")
        name, prompt, kind = (checked_text(edit.get(field), where, field) for field in ("id", "prompt", "edit_type"))
        if kind not in IMGEDIT_TYPES:
            raise BenchmarkError(f"{where}: the edit_type is {kind}, expected {', '.join(IMGEDIT_TYPES)}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BenchmarkError(
                f"{where}: the id is {name}, expected a path below the originals; fetch the file again"
            )
        yield _edit(key, prompt, existing_file(roots / name, where), kind, name, [])


def _only(root: Path, name: str) -> Path:
    """The one file of this name in a folder or below it."""
    found = sorted(root.rglob(name))
    if len(found) != 1:
        raise BenchmarkError(f"{root}: {len(found)} files {name} in it, expected one; give the folder of the benchmark")
    return found[0]


def _roots(root: Path, first: Any) -> Path:
    """The folder that the paths of a file are relative to: the one in which the first of them is there."""
    name = first.get("id") if isinstance(first, dict) else None
    if isinstance(name, str) and not (root / name).is_file():
        parts = Path(name).parts
        matches = sorted(path for path in root.rglob(parts[-1]) if path.parts[-len(parts) :] == parts)
        return matches[0].parents[len(parts) - 1] if matches else root
    return root


# ---- DreamBench++ ----------------------------------------------------------------------------------------------------

_KINDS = ("photorealistic",) * 4 + ("style transfer",) * 3 + ("imaginative",) * 2  # of the 9 prompts, in their order
_CATEGORIES = ("animal", "human", "object", "style")


def dreambench_plus(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """`yuangpeng/dreambench_plus`, its data folder: images/**/NN.jpg, captions/**/NN.txt; 150 subjects x 9 prompts.

    A caption file names its subject in the first line, then come the prompts. The marker takes the place of the
    subject's name; where a prompt doesn't say it, as those of styles, it stands in front.
    """
    root = Path(options.data)
    root = root / "data" if (root / "data" / "captions").is_dir() else root
    files = sorted((root / "captions").rglob("*.txt"))
    if not files:
        raise BenchmarkError(f"{root}: no captions/**/*.txt in it; give the folder of DreamBench++'s data")
    for file in files:
        place = file.relative_to(root / "captions").with_suffix("")
        category, where = file.parent.name, f"DreamBench++, {place}"
        if category not in _CATEGORIES:
            raise BenchmarkError(f"{where}: in the folder {category}, expected one of {', '.join(_CATEGORIES)}")
        given = existing_file(root / "images" / place.with_suffix(".jpg"), where)
        subject, *prompts = [line.strip() for line in read_file(file, "DreamBench++").splitlines() if line.strip()] or [
            ""
        ]
        if len(prompts) != len(_KINDS):
            raise BenchmarkError(f"{where}: {len(prompts)} prompts, expected 9 below the subject; fetch the file again")
        name = re.sub(r"[^a-z0-9]+", "_", subject.lower()).strip("_")
        for n, (prompt, kind) in enumerate(zip(prompts, _KINDS, strict=True)):
            yield {
                "id": f"{category}_{file.stem}_{name}-{n}",
                "multi_prompt": subject_prompt(prompt, subject),
                "entity_path": [str(given)],
                "source_path": [],
                "task": "subject",
                "score": {
                    "group": category,
                    "also": [kind],
                    "cluster": str(place),
                    "caption": prompt,
                    "references": [str(given)],
                    "instruction": prompt,
                },
            }


def subject_prompt(prompt: str, subject: str) -> str:
    """A prompt with the marker for the first mention of its subject: whole words, in any case; else in front."""
    pointed, found = re.subn(
        rf"\s*(?<!\w){re.escape(subject)}(?!\w)\s*", PLACEHOLDER, prompt, count=1, flags=re.IGNORECASE
    )
    return pointed if found else f"{PLACEHOLDER}{prompt}"


# ---- OmniContext -----------------------------------------------------------------------------------------------------

_OMNICONTEXT_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "input_images")
_NAMED = re.compile(
    r"\s*\b(?:the )?(?:(?P<word>first|second|third|fourth) (?:image|picture|photo)"
    r"|(?:image|picture|photo) ?#?(?P<number>[1-9]))\b\s*",
    re.IGNORECASE,
)
_WORDS = {"first": 1, "second": 2, "third": 3, "fourth": 4}


def omnicontext(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """`OmniGen2/OmniContext`: parquet, split train; 8 types of task x 50 rows with one to several images each.

    An instruction names its images by number. A marker takes the place of each name, in the order of the text; images
    that are not named come in front of it.
    """
    for n, row in enumerate(_parquet(options, _OMNICONTEXT_COLUMNS)):
        where = f"OmniContext, row {n}"
        if checked_text(row["instruction_language"], where, "instruction_language") != "en":
            continue
        key, group = (checked_text(row[name], where, name) for name in ("key", "task_type"))
        instruction, cells = checked_text(row["instruction"], where, "instruction"), row["input_images"]
        if not isinstance(cells, list) or not 1 <= len(cells) <= MAX_REFERENCES:
            got = f"{len(cells)} images" if isinstance(cells, list) else type(cells).__name__
            raise BenchmarkError(f"{where}: {got} as input_images, expected 1 to {MAX_REFERENCES}")
        images = [write_image(cell, folder / "sources" / f"{n:05d}-{i}", where) for i, cell in enumerate(cells, 1)]
        prompt, order = context_prompt(instruction, len(images))
        yield {
            "id": f"{group}-{key}",
            "multi_prompt": prompt,
            "entity_path": [str(images[i - 1]) for i in order],
            "source_path": [],
            "task": "subject",
            "score": {
                "group": group,
                "also": [],
                "cluster": f"{group}-{key}",
                "references": [str(path) for path in images],  # in the order of their numbers, as a judge is shown them
                "instruction": instruction,
            },
        }


def context_prompt(instruction: str, images: int) -> tuple[str, list[int]]:
    """The prompt with a marker for the first name of each of so many images, and their numbers in its order."""
    order: list[int] = []

    def mark(match: re.Match) -> str:
        number = int(match["number"] or _WORDS[match["word"].lower()])
        if number > images or number in order:
            return match[0]
        order.append(number)
        return PLACEHOLDER

    pointed = _NAMED.sub(mark, instruction)
    others = [number for number in range(1, images + 1) if number not in order]
    return PLACEHOLDER * len(others) + pointed, others + order
