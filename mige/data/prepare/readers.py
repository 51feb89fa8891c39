"""The rows of public training sets, from a position on: parquet files or the hub, and SEED-Data-Edit's JSON lines."""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets

from mige.data.prepare.layout import Layout
from mige.utils.errors import UserError


class SourceError(UserError, RuntimeError):
    """The run cannot start or resume: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Settings:
    """What decides the records; a folder never mixes settings."""

    source: str  # a key of SOURCES
    inputs: tuple[str, ...]  # a hub name, or local files and folders
    split: str = "train"
    name: str = ""  # how ids begin; empty: the source
    min_quality: int = 5  # Subjects200K: the least of each of its three scores, 0 to 5
    roots: tuple[tuple[str, str], ...] = ()  # mige_sub_edit: how its paths begin, and the folder here that it means
    layout: Layout | None = None  # of the source "layout"
    images: str = ""  # layout: the folder that paths of images are relative to; empty: the layout's

    @property
    def label(self) -> str:
        """What the set is called in records."""
        return self.layout.name if self.layout else self.source


class Reader(Protocol):
    """The rows of a source, from a position on."""

    exhausted: bool  # whether the source has no further rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def position(self) -> dict[str, Any]:
        """Where to resume after the rows taken so far; fit for JSON."""


class ParquetRows:
    """Rows of a hub data set or of parquet files (local, or URLs that fsspec opens), streamed; image cells stay
    {"bytes", "path"}."""

    builder, suffix = "parquet", ".parquet"  # of `datasets`; of the files

    def __init__(self, settings: Settings, columns: Sequence[str], position: Mapping[str, Any] | None):
        self.name, self.columns, self.exhausted = ", ".join(settings.inputs), columns, False
        self.taken = position["rows"] if position else 0
        found = [_files(given, settings.split, self.suffix) for given in settings.inputs]
        if not all(found) and len(found) > 1:
            raise SourceError(f"{self.name}: one of these is no local file or folder; give local ones or one hub name")
        local = [file for files in found for file in files]
        try:
            if local:
                files = {settings.split: [str(file) for file in local]}
                stream = datasets.load_dataset(self.builder, data_files=files, split=settings.split, streaming=True)
            else:
                stream = datasets.load_dataset(self.name, split=settings.split, streaming=True)
        except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(f"cannot open {self.name}: {error}; give a hub name or {self.suffix} files") from error
        self.stream = stream.decode(False)
        if position and position["datasets"] == datasets.__version__:
            self.stream.load_state_dict(position["state"])  # goes straight to the file; reads nothing twice
        elif position:
            self.stream = self.stream.skip(self.taken)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        rows = iter(self.stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                self.exhausted = True
                return
            except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
                message = f"{self.name}: row {self.taken} cannot be read: {error}"
                raise SourceError(f"{message}; fetch the file again, then run again to resume") from error
            if missing := [name for name in self.columns if name not in row]:
                message = f"{self.name}: no column {', '.join(missing)}; it has {', '.join(row)}"
                raise SourceError(f"{message}. Give the data set of this source, or another source")
            self.taken += 1
            yield row

    def position(self) -> dict[str, Any]:
        """Rows taken, and the state of the stream, which holds for this version of `datasets`."""
        return {"rows": self.taken, "datasets": datasets.__version__, "state": self.stream.state_dict()}


class TarRows(ParquetRows):
    """Samples of WebDataset archives: a column an ending ("source.jpg", "json") of the files of a sample."""

    builder, suffix = "webdataset", ".tar"


def _files(given: str, split: str, suffix: str) -> list[Path | str]:
    """The files meant by a URL or a local path, none if there is no such path (then it is a hub name)."""
    if "://" in given:
        return [given]
    path = Path(given)
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path.is_absolute() or path.suffix == suffix:
            raise SourceError(f"{path}: no such file or folder; correct --input")
        return []
    every = sorted(path.rglob(f"*{suffix}"))
    files = [file for file in every if file.name.startswith((f"{split}-", f"{split}.")) or file.parent.name == split]
    if not files:
        there = ", ".join(file.name for file in every[:5]) or f"no {suffix} file"
        raise SourceError(f"{path}: no {split}-*{suffix} in it, but {there}; name the files in --input")
    return files


class SeedRows:
    """Lines of SEED-Data-Edit's annotations/*.jsonl, each with the folder of its images."""

    def __init__(self, settings: Settings, columns: Sequence[str], position: Mapping[str, Any] | None):
        self.exhausted, self.taken = False, position["rows"] if position else 0
        given = map(Path, settings.inputs)
        self.files = [file for path in given for file in ([path] if path.is_file() else _annotations(path))]
        for file in self.files:
            if not _seed_images(file).is_dir():
                message = f"{file}: its images are expected in {_seed_images(file)}, which is no folder"
                raise SourceError(f"{message}; extract the archive there (docs/data.md)")

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in islice(self._lines(), self.taken, None):
            self.taken += 1
            yield row
        self.exhausted = True

    def _lines(self) -> Iterator[Mapping[str, Any]]:
        for file in self.files:
            with file.open(encoding="utf-8", errors="surrogateescape") as lines:  # a bad byte spoils one row, not all
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{file.parent.parent.name}/{file.name}, line {number}"
                        yield {"line": line, "where": where, "images": str(_seed_images(file))}

    def position(self) -> dict[str, Any]:
        """Rows taken; the files are read from the start to get there."""
        return {"rows": self.taken}


def _annotations(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("annotations/*.jsonl"))
    if not files:
        raise SourceError(f"{folder}: no annotations/*.jsonl in it; give the folder of a SEED-Data-Edit download")
    return files


def _seed_images(annotation: Path) -> Path:
    return annotation.parent.parent / "images"
