"""A public data set -> a folder of records and images, by a run that may be killed and resumes where it stopped.

The folder holds records.jsonl (official layout, paths relative to it), images/, skipped.jsonl (a line a skipped
sample, with its reason) and summary.json (counts, and how far a killed run got).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from mige.data.parsing import make_record
from mige.data.prepare.samples import Box, ImageFile, SkippedSample
from mige.data.prepare.sources import Settings, Source, SourceError, source_of
from mige.utils import images
from mige.utils.files import folder_lock, read_json_object, sync_folder
from mige.utils.progress import Progress

RECORDS, SKIPPED, SUMMARY = "records.jsonl", "skipped.jsonl", "summary.json"
BATCH = 32  # rows between two commits: what a kill costs at most
ROWS_A_FOLDER = 1000  # images are spread over folders images/0000, images/0001, ...


@dataclass
class Summary:
    """What became of the rows so far. A sample is a would-be record; a row that is skipped whole counts as one."""

    settings: dict[str, Any]
    finished: bool = False  # the source has no further rows
    rows: int = 0
    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # samples by reason
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the .jsonl files that are accounted for
    position: dict[str, Any] | None = None  # where the reader resumes

    def text(self) -> str:
        """Counts in and out, a line a reason."""
        total = sum(self.skipped.values())
        state = "finished" if self.finished else "unfinished"
        lines = [f"{self.rows} rows read, {self.written} records written, {total} samples skipped ({state})"]
        lines += [f"{count:9d}  {reason}" for reason, count in Counter(self.skipped).most_common()]
        return "\n".join(lines)


def prepare(
    settings: Settings, folder: Path, *, limit: int | None = None, workers: int = 4, progress: bool = True
) -> Summary:
    """Read the source from where the folder's last run stopped; write records, images, skipped.jsonl, summary.json.

    limit: rows of the source to have read in the end, over all runs; None: all. workers: threads that decode and save.

    A row is committed after its images are on disk, `BATCH` rows at a time; what a killed run wrote beyond its last
    commit is cut off and made again. A finished folder is left alone. Raises SourceError for an unknown source or
    split, missing inputs or columns, an unreadable source, a folder of other settings or one in use, and OSError where
    writing fails (a full disk): run again to resume.
    """
    source = source_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        summary = _open(folder, settings)
        if summary.finished or (limit is not None and summary.rows >= limit):
            return summary
        rows = source.reader(settings, source.columns, summary.position)
        left = None if limit is None else limit - summary.rows
        bar = Progress(total=limit, initial=summary.rows, unit="row", desc=settings.label, disable=not progress)
        with bar, ThreadPoolExecutor(workers) as pool:
            numbered = enumerate(islice(rows, left), summary.rows)
            while batch := list(islice(numbered, BATCH)):
                outcomes = pool.map(lambda item: _outcomes(source, settings, folder, *item), batch)
                lines = list(chain.from_iterable(outcomes))
                _commit(folder, summary, lines, len(batch), rows.position())
                bar.update(len(batch), failed=sum("reason" in line for line in lines))
        if rows.exhausted:
            summary.finished = True
            _save(folder, summary)
    return summary


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderImageWriter:
    """The `mige.data.prepare.samples.ImageWriter` of an output folder: where the images of one row go."""

    folder: Path  # the output folder
    stem: str  # images/0012/magicbrush-train-0012345

    def store(self, name: str, cell: Any) -> ImageFile:
        """`<stem>_<name>.jpg`, .png or .webp, with the bytes of the cell; an image of another format as PNG."""
        data = _bytes(cell, name)
        path = self._path(f"{name}{_suffix(data)}")
        image = _decode(data, path, name)
        if path.suffix == ".raw":
            path.unlink()
            path = path.with_suffix(".png")
            images.save_image(image, path)
        return self._image_file(path, image)

    def store_views(self, cell: Any, boxes: Callable[[int, int], Sequence[Box]]) -> list[ImageFile]:
        """`<stem>_view0.jpg`, `<stem>_view1.jpg`, ..."""
        path = self._path("composite.raw")
        image = _decode(_bytes(cell, "image"), path, "image")
        path.unlink()
        views = []
        for number, box in enumerate(boxes(*image.size)):
            view, path = image.crop(box), self._path(f"view{number}.jpg")
            images.save_image(view, path, quality=95, subsampling=0)
            views.append(self._image_file(path, view))
        return views

    def refer(self, path: Path) -> ImageFile:
        """The image where it lies, by its path relative to the output folder."""
        try:
            return self._image_file(path, images.open_image(path))
        except images.BadImageError as error:
            raise SkippedSample("missing image" if not path.exists() else "damaged image", str(error)) from error

    def relative(self, path: Path) -> str:
        """The path relative to the output folder."""
        return os.path.relpath(path, self.folder)

    def _path(self, name: str) -> Path:
        path = self.folder / f"{self.stem}_{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _image_file(self, path: Path, image: Image.Image) -> ImageFile:
        return ImageFile(self.relative(path), image.width, image.height)


def _bytes(cell: Any, name: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, Mapping) else None
    if not data:
        raise SkippedSample("missing image", f"{name} holds no bytes")
    return data


def _suffix(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ".raw"


def _decode(data: bytes, path: Path, name: str) -> Image.Image:
    """Write and open; a file that cannot be opened does not stay."""
    _write(path, data)
    try:
        return images.open_image(path)
    except images.BadImageError as error:
        path.unlink()
        raise SkippedSample("damaged image", f"{name}: {error.message}") from error


# ---- the output folder -----------------------------------------------------------------------------------------------


def _outcomes(source: Source, settings: Settings, folder: Path, number: int, row: Mapping[str, Any]) -> list[dict]:
    """The lines of a row: records, and for each skipped sample a line with its reason."""
    name = f"{settings.name or settings.label}-{settings.split}-{number:07d}"
    writer = FolderImageWriter(folder, f"images/{number // ROWS_A_FOLDER:04d}/{name}")
    try:
        samples = source.samples(row, writer, settings)
    except SkippedSample as skipped:
        samples = [skipped]
    lines = []
    for place, sample in enumerate(samples):
        sample_id = name if len(samples) == 1 else f"{name}-{place}"
        line = {"id": sample_id, "row": number}
        if not isinstance(sample, SkippedSample):
            record = {**line, **sample, "origin": f"{settings.label}/{settings.split}"}
            _, issues = make_record(record, where=sample_id, root=folder, default_id=sample_id)
            errors = [issue.message for issue in issues if issue.fatal] or _unwritable(record)
            if not errors:
                lines.append(record)
                continue
            sample = SkippedSample("no valid record", "; ".join(errors))
        lines.append({**line, "reason": sample.reason, "detail": sample.detail})
    return lines


def _unwritable(record: dict[str, Any]) -> list[str]:
    """Why a record cannot be written as JSON that every reader takes: NaN, bytes, dates."""
    try:
        json.dumps(record, allow_nan=False)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


def _open(folder: Path, settings: Settings) -> Summary:
    """The summary of the folder's last run, what was written beyond it cut off; a fresh one in a fresh folder."""
    ours = json.loads(json.dumps(asdict(settings)))
    summary = Summary(ours, sizes={RECORDS: 0, SKIPPED: 0})
    if (folder / SUMMARY).exists():
        try:
            saved = read_json_object(folder / SUMMARY)
            if "left_out" in saved:  # version 0.1.0's names
                saved["skipped"] = {k.replace("picture", "image"): n for k, n in saved.pop("left_out").items()}
            last = Summary(**saved)
            _check_summary(last)
        except (ValueError, TypeError, AttributeError) as error:
            advice = "it says how far the run came: restore it, or use another --output"
            raise SourceError(f"{folder / SUMMARY} is damaged or another file ({error}); {advice}") from error
        summary = last if last.rows else summary  # a run without a commit binds nobody
    elif any((folder / name).exists() for name in summary.sizes):
        raise SourceError(f"{folder} holds records but no {SUMMARY}, so they are not ours; use another --output")
    theirs = json.loads(json.dumps(asdict(Settings("", ())))) | summary.settings  # settings newer than the folder
    differing = [f"{key}: {theirs.get(key)} there, {ours[key]} now" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise SourceError(f"{folder} was made with other settings ({'; '.join(differing)}); use another --output")
    if not summary.rows:
        _save(folder, summary)
    for name, size in summary.sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise SourceError(f"{path} has {found} bytes, {SUMMARY} speaks of {size}; prepare into a fresh folder")
        if found > size:
            os.truncate(path, size)
    return summary


def _check_summary(summary: Summary) -> None:
    """Raise ValueError naming the field that is not what a run writes."""
    kinds = dict(settings=dict, finished=bool, rows=int, written=int, skipped=dict, sizes=dict)
    for name, kind in kinds.items():
        if type(getattr(summary, name)) is not kind:
            raise ValueError(f"its {name} is {getattr(summary, name)!r:.80}")
    counts = [summary.rows, summary.written, *summary.skipped.values(), *summary.sizes.values()]
    if any(type(one) is not int or one < 0 for one in counts):
        raise ValueError("it counts something by no whole number")
    if summary.rows and summary.sizes.keys() != {RECORDS, SKIPPED}:
        raise ValueError(f"its sizes are of {', '.join(summary.sizes) or 'nothing'}, not of {RECORDS} and {SKIPPED}")
    if not isinstance(summary.position, dict | None):
        raise ValueError(f"its position is {summary.position!r:.80}")


def _commit(folder: Path, summary: Summary, lines: list[dict], rows: int, position: dict[str, Any]) -> None:
    """Append the lines, then say in summary.json that they are there: only the second makes them count."""
    skipped = [line for line in lines if "reason" in line]
    records = [line for line in lines if "reason" not in line]
    for name, chosen in ((RECORDS, records), (SKIPPED, skipped)):
        text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in chosen)
        with _named(folder / name), (folder / name).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        summary.sizes[name] += len(text)
    summary.rows += rows
    summary.written += len(records)
    summary.skipped = dict(sorted((Counter(summary.skipped) + Counter(line["reason"] for line in skipped)).items()))
    summary.position = position
    _save(folder, summary)


def _save(folder: Path, summary: Summary) -> None:
    _write(folder / SUMMARY, (json.dumps(asdict(summary), indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Write beside and rename; OSError names the path."""
    part = path.with_name(f".{path.name}.part")
    try:
        with _named(path), part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an error of writing the name of its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
