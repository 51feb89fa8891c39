"""Records: JSON in, validated records out, and the official settings of the three tasks.

A record is one multimodal instruction: a prompt in which every `<imagehere>` stands for a reference image, in order.
Two row layouts are recognised by their fields; one file may mix them:

  multi_prompt, entity_path [], source_path [], image (the true image)      official files, DreamBench, MIGEBench
  instruction, image (the source image), task (the type of edit)            Emu Edit

Reading never stops at the first error: a `Report` holds the good records and every issue. Images are not opened
here (`checks.check_images` does that).
"""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mige.data.json_rows import read_rows, type_name
from mige.data.records import ID_PATTERN, ID_RULE, RESERVED, SURROGATE, UNSTORABLE, Issue, Record, Report, count
from mige.tasks import MAX_REFERENCES, PLACEHOLDER, Task, can_pair, is_rewritten, near_markers, placeholders


def read_records(files: Sequence[Path], *, root: Path | None = None, task: Task | None = None) -> Report:
    """Read and check .json (a list of objects) and .jsonl (an object a line) files; raises nothing for bad data.

    root: what relative paths in the rows are relative to; by default the folder of each file.
    task: what every record must be; by default each record's own fields decide.
    Ids are a row's "id", else its "idx", else its number in the file ("00012", counted from 1). Where ids of several
    files collide, every id gets its file's stem in front, and a warning says so.
    """
    report = Report()
    if not files:
        report.issues.append(Issue("no files", "nothing to read", "give at least one .json or .jsonl file"))
    records_of: list[tuple[Path, list[Record]]] = []
    for file in files:
        rows, issues = read_rows(file)
        report.issues += issues
        records = []
        for number, row in rows:
            record, issues = make_record(
                row,
                where=f"{file}, record {number}",
                root=file.parent if root is None else root,
                default_id=f"{number:05d}",
                task=task,
            )
            report.issues += issues
            records += [record] if record else []
        records_of.append((file, records))
    gather(records_of, report)
    return report


def make_record(
    row: Any, *, where: str, root: Path, default_id: str, task: Task | None = None
) -> tuple[Record | None, list[Issue]]:
    """Turn one row into a record; None where an issue is fatal. All issues of the row are returned.

    where: names the row in messages; the id is added to it. root: what relative paths are relative to.
    task: what the record must be (None: its fields decide).
    """
    if not isinstance(row, Mapping):
        message = f"the row is {type_name(row)}, expected an object"
        return None, [Issue(where, message, "write it as {...} with the fields of the record")]
    reader = _RowReader(row, where, root)
    record_id = reader.identifier(default_id)
    reader.storable()
    named = [task] if task else []
    if emu_edit := "instruction" in row:
        prompt = reader.prompt("instruction")
        sources, references, target = reader.required_path("image"), (), None
        edit_type = reader.text("task") or ""
        if "multi_prompt" in row:
            reader.error('both "instruction" and "multi_prompt" are present', "keep the one that is the prompt")
    else:
        prompt = reader.prompt("multi_prompt")
        sources, references, target = reader.paths("source_path"), reader.paths("entity_path"), reader.path("image")
        edit_type = None
        named += reader.named_task()
    mask = reader.mask()
    if sources is not None and len(sources) > 1:
        reader.error(f'"source_path" has {len(sources)} images, expected at most one', "split the record")
        sources = None
    if sources is not None and references is not None:
        source = sources[0] if sources else None
        implied = _implied_task(source, references)
        references = references or sources
        if mask is not None and source is None:
            reader.error('"mask_path" is given without a source', "name the source, or leave the mask out")
        _check_tasks(reader, named, implied, source, references)
        if prompt:
            _check_placeholders(reader, prompt, implied, references)
    if any(issue.fatal for issue in reader.issues):
        return None, reader.issues
    used = {"id", "instruction", "image", "task"} if emu_edit else set(_OFFICIAL_FIELDS)
    used |= set() if mask is None else {"mask_path"}
    extra = {name: value for name, value in row.items() if name not in used}
    record = Record(record_id, implied, prompt, references, source, target, edit_type, reader.where, extra, mask)
    return record, reader.issues


_READ_FIELDS = ("id", "idx", "multi_prompt", "entity_path", "source_path", "image", "task", "instruction")
_OFFICIAL_FIELDS = ("id", "multi_prompt", "entity_path", "source_path", "image", "task")


def _implied_task(source: Path | None, references: tuple[Path, ...]) -> Task:
    if source is None:
        return Task.SUBJECT
    return Task.EDIT if references in ((), (source,)) else Task.SUBJECT_EDIT


_IMAGES = {
    Task.SUBJECT: "no source image",
    Task.EDIT: "a source image and no other reference",
    Task.SUBJECT_EDIT: "a source image and other references",
}


def _check_tasks(
    reader: "_RowReader", named: list[Task], implied: Task, source: Path | None, references: tuple[Path, ...]
) -> None:
    for task in dict.fromkeys(named):
        if task != implied:
            reader.error(
                f'the task is named "{task}", but the record has {_IMAGES[implied]}, which makes it "{implied}"',
                f'a record of task "{task}" has {_IMAGES[task]}: correct the images or the task',
            )
    if source is not None and source not in references:
        reader.error(
            f"the source {source} is not among the references",
            'list it in "entity_path" too, at the place of its <imagehere>',
        )


def _check_placeholders(reader: "_RowReader", prompt: str, task: Task, references: tuple[Path, ...]) -> None:
    asked, given = placeholders(prompt), len(references)
    found = f"{asked} {PLACEHOLDER} in the prompt, {count(given, 'reference')}"
    if near := near_markers(prompt):
        found += f" ({', '.join(map(repr, near))} is read as words)"
    if asked == 0 and given == 0:
        reader.error(f"{found}, and no source", f'write {PLACEHOLDER} and list its image in "entity_path"')
    elif not is_rewritten(task, prompt) and not can_pair(task, prompt, asked, given):
        reader.error(found, f"write one {PLACEHOLDER} for each reference, in their order")
    if given > MAX_REFERENCES:
        reader.warning(count(given, "reference"), f"the model was trained with at most {MAX_REFERENCES}")


class _RowReader:
    """Reads typed fields of one row and collects what is wrong with them; None stands for a field that is unusable."""

    def __init__(self, row: Mapping[str, Any], where: str, root: Path):
        self.row, self.where, self.root = row, where, root
        self.issues: list[Issue] = []

    def error(self, message: str, hint: str) -> None:
        """Note what makes the row unusable."""
        self.issues.append(Issue(self.where, message, hint))

    def warning(self, message: str, hint: str) -> None:
        """Note what is odd but usable."""
        self.issues.append(Issue(self.where, message, hint, fatal=False))

    def identifier(self, default: str) -> str | None:
        """The row's "id", else its "idx", else the default; further issues name it."""
        name = next((name for name in ("id", "idx") if self.row.get(name) is not None), None)
        value = default if name is None else self.row[name]
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.error(f'"{name}" is {type_name(value)}, expected a string or an integer', "correct it or leave it out")
            return None
        if not ID_PATTERN.fullmatch(str(value)) or RESERVED.fullmatch(str(value)):
            self.error(f'"{name}" is {reprlib.repr(value)}, unfit for a file name', f"use {ID_RULE}")
            return None
        self.where = f"{self.where} (id {value})"
        return str(value)

    def storable(self) -> None:
        """Refuse half a surrogate pair in names and in fields that nobody reads, which could not be written again."""
        for name, value in self.row.items():
            if name in _READ_FIELDS:
                continue
            if character := SURROGATE.search(f"{name} {value}" if isinstance(value, str) else f"{name} {value!r}"):
                self.error(
                    f"{reprlib.repr(name)} holds {character.group()!r}, which is no character of a text", "remove it"
                )

    def text(self, name: str) -> str | None:
        """An optional string; null counts as absent."""
        value = self.row.get(name)
        return None if value is None else self._string(f'"{name}"', value)

    def prompt(self, name: str) -> str | None:
        """A string that has to be there."""
        if name not in self.row:
            self.error(f'no prompt: the field "{name}" is missing', f'add "{name}" with the instruction')
            return None
        return self._string(f'"{name}"', self.row[name])

    def path(self, name: str) -> Path | None:
        """An optional path, put below the root."""
        value = self.text(name)
        return None if value is None else self.root / value

    def required_path(self, name: str) -> tuple[Path, ...] | None:
        """A path that has to be there, as a list of one."""
        if self.row.get(name) is None:
            self.error(f'no source: the field "{name}" is missing or null', f'add "{name}" with the path of the image')
        path = self.path(name)
        return None if path is None else (path,)

    def paths(self, name: str) -> tuple[Path, ...] | None:
        """A list of paths, put below the root; absent and null are an empty one."""
        value = self.row.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.error(f'"{name}" is {type_name(value)}, expected a list of paths', "put it in [ ]")
            return None
        texts = [self._string(f'"{name}"[{position}]', item) for position, item in enumerate(value)]
        return None if None in texts else tuple(self.root / text for text in texts)

    def mask(self) -> Path | None:
        """The mask of the source, optional: a path. A list is MIGEBench's own field, of masks that it was made with."""
        return None if isinstance(self.row.get("mask_path"), list) else self.path("mask_path")

    def named_task(self) -> list[Task]:
        """The task that the field "task" names: one or none."""
        name = self.text("task")
        if name is None:
            return []
        if name not in set(Task):
            names = ", ".join(Task)
            self.error(
                f"unknown task {reprlib.repr(name)}, expected one of {names}",
                'correct it, or name the prompt "instruction" where this is an Emu Edit row',
            )
            return []
        return [Task(name)]

    def _string(self, label: str, value: Any) -> str | None:
        """`value` if it is a string with something in it, else an error and None."""
        if not isinstance(value, str):
            self.error(f"{label} is {type_name(value)}, expected a string", "correct the field")
        elif not value.strip():
            self.error(f"{label} is empty", "fill it in")
        elif character := UNSTORABLE.search(value):
            self.error(f"{label} holds {character.group()!r}, which is no character of a text", "remove it")
        else:
            return value
        return None


def gather(records_of: list[tuple[Path, list[Record]]], report: Report) -> None:
    """Put the records of all files into the report under ids that are unique in the run."""
    # Case-folded: some file systems know "a" and "A" as one name. Ids are ASCII, so accents cannot differ.
    files_with = Counter(folded for _, records in records_of for folded in {r.id.casefold() for r in records})
    shared = [folded for folded, files in files_with.items() if files > 1]
    if shared:
        message = f"{count(len(shared), 'id')} used by more than one file, the first is {shared[0]!r}"
        report.issues.append(Issue("all files", message, "every id now starts with its file's name", fatal=False))
    first: dict[str, Record] = {}
    for file, records in records_of:
        for record in records:
            record_id = f"{file.stem}_{record.id}" if shared else record.id
            if not ID_PATTERN.fullmatch(record_id) or RESERVED.fullmatch(record_id):
                message = f"the id with its file's name, {reprlib.repr(record_id)}, is unfit for a file name"
                report.issues.append(Issue(record.where, message, f"rename the file; ids are {ID_RULE}"))
            elif taken := first.get(record_id.casefold()):
                message = f"the id {record_id!r} is already taken by {taken.where}"
                if taken.id != record.id:
                    message += ", as file names may not tell upper from lower case"
                report.issues.append(Issue(record.where, message, "give each record its own id"))
            else:
                first[record_id.casefold()] = record
                report.records.append(replace(record, id=record_id))
