"""The four benchmarks: their own files in, one prepared folder each out.

A prepared folder holds records.jsonl, which infer.py runs as it is, and benchmark.json, which names the protocol. A row
of records.jsonl carries under "score" what its image is compared with: paths and captions, a group to average by.
MagicBrush edited turn by turn has a file of records for each turn, since a turn starts from the image of the last.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from PIL import Image

from mige.data.prepare import sources
from mige.utils.errors import UserError
from mige.utils.files import json_lines, read_json_lines, write_text


class BenchmarkError(UserError, RuntimeError):
    """Files of a benchmark, or results, that cannot be used: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Options:
    """What decides the rows of a prepared benchmark."""

    data: str  # folder of the benchmark's own files, or its name on the hub
    root: str | None = None  # MIGEBench: where its placeholder paths lead; by default the data
    split: str = "validation"  # Emu Edit: validation (3,589 rows) or test (2,022)
    samples: int = 1  # DreamBench: images a prompt; the paper of DreamBooth makes 4
    against: str = "input"  # DreamBench: compare with the one input, or with "all" images of the subject
    iterative: str | None = None  # MagicBrush: folder of results whose images the next turns start from


@dataclass(frozen=True)
class Metric:
    """One column: which function of the output and of what stands under this name in a row's "score"."""

    name: str
    of: str  # "clip", "dino", "l1", "l2", "direction"
    against: str  # "references", "source", "target", "caption", "local_caption", "entity"
    crop: bool = False  # of the entity cut out of the output instead of the output

    @property
    def lower_is_better(self) -> bool:
        return self.of in ("l1", "l2")


CAPTIONS = ("caption", "local_caption")  # what a measure may stand against that is no image


@dataclass(frozen=True)
class Benchmark:
    """A literal row of the table below."""

    title: str
    size: Callable[[Options], int]  # samples of the whole benchmark
    rows: Callable[[Options, Path], Iterator[dict[str, Any]]]
    metrics: tuple[Metric, ...]  # the first ranks the cases
    hub: str | None = None


# ---- DreamBench ------------------------------------------------------------------------------------------------------

# The one image of each subject that KOSMOS-G and UNO give the model.
SINGLE_IMAGE = {
    "backpack": "02", "backpack_dog": "02", "bear_plushie": "03", "berry_bowl": "02", "can": "01", "candle": "02",
    "cat": "04", "cat2": "02", "clock": "03", "colorful_sneaker": "01", "dog": "02", "dog2": "02", "dog3": "05",
    "dog5": "00", "dog6": "02", "dog7": "01", "dog8": "04", "duck_toy": "01", "fancy_boot": "02",
    "grey_sloth_plushie": "04", "monster_toy": "04", "pink_sunglasses": "04", "poop_emoji": "00", "rc_car": "03",
    "red_cartoon": "00", "robot_toy": "00", "shiny_sneaker": "01", "teapot": "04", "vase": "02", "wolf_plushie": "04",
}  # fmt: skip
LIVE = ("cat", "dog")  # classes that take the prompts of living subjects
_PROMPT = re.compile(r"^'(.*)'\.format\(unique_token, class_token\)", re.MULTILINE)


def dreambench(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """30 subjects x 25 prompts of `google/dreambooth`: dataset/<subject>/NN.jpg and dataset/prompts_and_classes.txt."""
    root = Path(options.data)
    root = root / "dataset" if (root / "dataset").is_dir() else root
    text = _read(root / "prompts_and_classes.txt", "DreamBench")
    head, *lists = re.split(r"^prompt_list = \[", text, flags=re.MULTILINE)
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", head.split("subject_name,class")[-1], re.MULTILINE))
    prompts = dict(zip(("object", "live"), map(_PROMPT.findall, lists), strict=False))
    if set(classes) != set(SINGLE_IMAGE) or [len(some) for some in prompts.values()] != [25, 25]:
        got = f"{len(classes)} subjects and {[len(some) for some in prompts.values()]} prompts"
        expected = "expected the 30 subjects and 25 + 25 prompts; fetch the file again"
        raise BenchmarkError(f"{root / 'prompts_and_classes.txt'}: {got}, {expected}")
    for subject, number in SINGLE_IMAGE.items():
        images = sorted((root / subject).glob("[0-9][0-9].jpg"))
        given = root / subject / f"{number}.jpg"
        if given not in images:
            raise BenchmarkError(f"{given}: no such file, and it is the input of {subject}; fetch the folder again")
        kind = "live" if classes[subject] in LIVE else "object"
        for n, prompt in enumerate(prompts[kind]):
            for sample in range(options.samples):
                suffix = f"-{sample}" if options.samples > 1 else ""
                yield {
                    "id": f"{subject}-{n:02d}{suffix}",
                    "multi_prompt": re.sub(r" ?\{0\} \{1\} ?", "<imagehere>", prompt),
                    "entity_path": [str(given)],
                    "source_path": [],
                    "task": "subject",
                    "score": {
                        "group": kind,
                        "caption": prompt.replace("{0} {1}", classes[subject]),
                        "references": [str(given)] if options.against == "input" else [str(one) for one in images],
                        "others": [str(one) for one in images if one != given],
                    },
                }


# ---- Emu Edit --------------------------------------------------------------------------------------------------------

_EMU_COLUMNS = ("instruction", "image", "task", "input_caption", "output_caption", "idx")


def emu_edit(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of `facebook/emu_edit_test_set`, parquet files or the hub; source images are written into the folder."""
    settings = sources.Settings("emu_edit", (options.data,), options.split)
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    for n, row in enumerate(sources.ParquetRows(settings, _EMU_COLUMNS, None)):
        where = f"Emu Edit, {options.split}, row {n}"
        for name in ("instruction", "input_caption", "output_caption"):
            _text(row[name], where, name)
        path = _write_image(row["image"], folder / "sources" / f"{n:05d}", where)
        captions = row["input_caption"].strip(), row["output_caption"].strip()
        yield {
            "id": f"{n:05d}",
            "instruction": row["instruction"],
            "image": str(path),
            "task": str(row["task"]),
            "idx": row["idx"],
            "score": {
                "group": str(row["task"]),
                "source": str(path),
                "caption": captions[1],
                "source_caption": captions[0],
                "clean": captions[0] != captions[1],
            },
        }


def _write_image(cell: Any, stem: Path, where: str) -> Path:
    """The bytes of a parquet image cell as a file, unchanged; its suffix is the format that they are in."""
    if not isinstance(cell, Mapping) or not cell.get("bytes"):
        raise BenchmarkError(f"{where}: the image holds no bytes; fetch the files with their images embedded")
    try:
        kind = Image.open(BytesIO(cell["bytes"])).format.lower()
    except Image.UnidentifiedImageError as error:
        raise BenchmarkError(f"{where}: the image is of no known format; fetch the file again") from error
    path = stem.with_suffix(f".{kind}")
    if not path.exists() or path.read_bytes() != cell["bytes"]:
        part = path.with_suffix(".part")
        part.write_bytes(cell["bytes"])
        part.replace(path)
    return path.resolve()


# ---- MagicBrush ------------------------------------------------------------------------------------------------------


_MAGICBRUSH_CAPTIONS = {
    "caption": ("global_descriptions.json", "global_description.json", "global_captions.json"),
    "local_caption": ("local_descriptions.json", "local_description.json", "local_captions.json"),
}


def magicbrush(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """The test archive: edit_sessions.json, images/<img_id>/<file>, and captions of two kinds or one of them.

    The paper's CLIP-T is of the local captions (what its author says in the issues of OSU-NLP-Group/MagicBrush); global
    ones give higher figures. Each has a measure of its own.

    Every turn on its own by default. Iterative: a turn starts from the result of the turn before, and only the last
    turn of a session is scored.
    """
    root = Path(options.data)
    sessions = _json(root / "edit_sessions.json", "MagicBrush", dict)
    captions = {
        name: _json(_either(root, *files), "MagicBrush", dict)
        for name, files in _MAGICBRUSH_CAPTIONS.items()
        if any((root / file).exists() for file in files) or name == "caption"
    }
    for image_id, turns in sessions.items():
        before = None
        for n, turn in enumerate(turns, start=1):
            where = f"MagicBrush, {image_id}, turn {n}"
            source, target = (_existing(root / "images" / image_id / turn[name], where) for name in ("input", "output"))
            record_id = f"{image_id}-{n}"
            given = str(source) if before is None else before
            row = {"id": record_id, "multi_prompt": _text(turn["instruction"], where, "instruction")}
            row |= {"entity_path": [given], "source_path": [given], "image": str(target), "task": "edit", "turn": n}
            if options.iterative is None or n == len(turns):
                first = _existing(root / "images" / image_id / turns[0]["input"], where)
                row["score"] = {
                    "group": f"turn {n}",
                    "source": str(source if options.iterative is None else first),
                    "target": str(target),
                }
                for name, of in captions.items():
                    caption = of.get(image_id, {}).get(turn["output"])
                    row["score"][name] = _text(caption, where, f"{name.replace('_', ' ')} of {turn['output']}")
            if options.iterative is not None:
                before = str(Path(options.iterative).resolve() / "images" / f"{record_id}.png")
            yield row


# ---- MIGEBench -------------------------------------------------------------------------------------------------------

_FIELDS = ("image", "source_path", "entity_path", "multi_prompt", "target_caption", "object")
_FOLDER = re.compile(r"(?:add|replace)_(?:entity|mask|source|target)")


def migebench(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """`EurekaTian/MIGEBench`: add_bench.json, replace_bench.json and their folders, whose paths are placeholders."""
    data = Path(options.data)
    root = Path(options.root or data)
    for kind in ("add", "replace"):
        file = data / f"{kind}_bench.json"
        for n, row in enumerate(_json(file, "MIGEBench", list), start=1):
            where = f"{file.name}, record {n}"
            if not isinstance(row, dict):
                raise BenchmarkError(f"{where}: {type(row).__name__}, expected an object; fetch the file again")
            if missing := [name for name in _FIELDS if not row.get(name)]:
                raise BenchmarkError(f"{where}: no {', '.join(missing)}; fetch the file again")
            references = [_below(root, path, where) for path in row["entity_path"]]
            found = [_below(root, path, where) for path in row["source_path"]]
            entities = [path for path in references if path not in found]
            if len(found) != 1 or len(entities) != 1:
                raise BenchmarkError(f"{where}: {len(found)} source images and {len(entities)} entities among the "
                                     "references, expected one each; correct the row")  # fmt: skip
            target = _below(root, row["image"], where)
            yield {
                "id": f"{kind}-{row.get('idx', n)}",
                "multi_prompt": row["multi_prompt"],
                "entity_path": references,
                "source_path": found,
                "image": target,
                "task": "subject_edit",
                "score": {
                    "group": kind,
                    "source": found[0],
                    "target": target,
                    "caption": _text(row["target_caption"], where, "target_caption"),
                    "entity": entities[0],
                    "object": _text(row["object"], where, "object"),
                },
            }


def _below(root: Path, placeholder: str, where: str) -> str:
    """The file that a placeholder path means: from its folder such as add_source on, below the root."""
    parts = Path(placeholder).parts
    start = next((i for i in reversed(range(len(parts))) if _FOLDER.fullmatch(parts[i])), None)
    if start is None:
        raise BenchmarkError(f"{where}: the path {placeholder} has no folder such as add_source; give --root")
    return str(_existing(root.joinpath(*parts[start:]), where))


# ---- the table -------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Benchmark] = {
    "dreambench": Benchmark(
        "DreamBench",
        lambda options: 750 * options.samples,
        dreambench,
        (
            Metric("DINO", "dino", "references"),
            Metric("CLIP-I", "clip", "references"),
            Metric("CLIP-T", "clip", "caption"),
        ),
    ),
    "emu_edit": Benchmark(
        "Emu Edit",
        lambda options: {"validation": 3589, "test": 2022}[options.split],
        emu_edit,
        (
            Metric("CLIPdir", "direction", "caption"),
            Metric("CLIPim", "clip", "source"),
            Metric("CLIPout", "clip", "caption"),
            Metric("L1", "l1", "source"),
            Metric("DINO", "dino", "source"),
        ),
        hub="facebook/emu_edit_test_set",
    ),
    "magicbrush": Benchmark(
        "MagicBrush test",
        lambda options: 1053 if options.iterative is None else 535,
        magicbrush,
        (
            Metric("L1", "l1", "target"),
            Metric("L2", "l2", "target"),
            Metric("CLIP-I", "clip", "target"),
            Metric("DINO", "dino", "target"),
            Metric("CLIP-T (local captions)", "clip", "local_caption"),
            Metric("CLIP-T (global captions)", "clip", "caption"),
        ),
    ),
    "migebench": Benchmark(
        "MIGEBench",
        lambda options: 1000,
        migebench,
        (
            Metric("DINO", "dino", "target"),
            Metric("CLIP-I", "clip", "target"),
            Metric("CLIP-T", "clip", "caption"),
            Metric("L1", "l1", "target"),
            Metric("entity DINO", "dino", "entity", crop=True),
            Metric("entity CLIP-I", "clip", "entity", crop=True),
        ),
        hub="EurekaTian/MIGEBench",
    ),
}


# ---- prepared folders ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, read back."""

    name: str
    options: Options
    rows: Sequence[Mapping[str, Any]]  # every row, scored or not
    folder: Path = field(compare=False)

    @property
    def scored(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if "score" in row]

    @property
    def metrics(self) -> list[Metric]:
        """The measures that the rows have something to compare with for (a caption may be missing)."""
        return [m for m in BENCHMARKS[self.name].metrics if all(self._has(m, row["score"]) for row in self.scored)]

    def _has(self, metric: Metric, score: Mapping[str, Any]) -> bool:
        return metric.against not in CAPTIONS or metric.against in score


def prepare(name: str, options: Options, folder: Path) -> list[Path]:
    """Write the prepared folder of a benchmark and return its files of records, in the order in which they run.

    Raises BenchmarkError for files that are missing or of another layout, for duplicate ids, and for a folder that
    holds another benchmark, or this one with other options.
    """
    benchmark = BENCHMARKS[name]
    _check_ours(name, options, folder)
    if name == "migebench" and not Path(options.data).is_dir():
        options = Options(**(asdict(options) | {"data": snapshot_download(options.data, repo_type="dataset")}))
    folder.mkdir(parents=True, exist_ok=True)
    config = {"benchmark": name, "options": asdict(options), "records": [], "rows": None}  # None: not there yet
    write_text(folder / "benchmark.json", json.dumps(config, indent=2) + "\n")
    rows = list(benchmark.rows(options, folder))
    ids = [row["id"] for row in rows]
    if twice := sorted({one for one in ids if ids.count(one) > 1} if len(set(ids)) < len(ids) else ()):
        raise BenchmarkError(f"{options.data}: {len(twice)} ids stand there twice, the first is {twice[0]}")
    if options.iterative is None:
        parts = {"records.jsonl": rows}
    else:
        turns = sorted({row["turn"] for row in rows})
        parts = {f"turn_{n}.jsonl": [row for row in rows if row["turn"] == n] for n in turns}
    for file, some in parts.items():
        write_text(folder / file, json_lines(some))
    config |= {"records": list(parts), "rows": len(rows)}
    write_text(folder / "benchmark.json", json.dumps(config, indent=2) + "\n")
    return [folder / file for file in parts]


def _check_ours(name: str, options: Options, folder: Path) -> None:
    """Raise BenchmarkError unless the folder is new, or was prepared for the same benchmark and options."""
    advice = "give another --output, or delete the folder if nothing needs it"
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"{folder} is a file, expected a folder or nothing; give another --output")
    if not (folder / "benchmark.json").exists():
        if others := sorted(path.name for path in folder.glob("*.jsonl")):
            raise BenchmarkError(f"{folder} holds {others[0]}, but no benchmark.json: it is not ours; {advice}")
        return
    there = _config(folder)
    if there.name != name:
        raise BenchmarkError(f"{folder} holds {there.name}, expected {name} or nothing; {advice}")
    ours, theirs = asdict(options), asdict(there.options)
    differing = [f"{key}: {theirs[key]} there, {ours[key]} now" for key in ("split", "samples", "against", "iterative")
                 if ours[key] != theirs[key]]  # fmt: skip
    if differing:
        raise BenchmarkError(f"{folder} holds {name} with other options ({'; '.join(differing)}); {advice}")


def _config(folder: Path) -> "Prepared":
    """What benchmark.json says, without rows; raises BenchmarkError where it is cut or another file."""
    path = folder / "benchmark.json"
    config = _json(path, "a prepared benchmark", dict)
    try:
        if config["benchmark"] not in BENCHMARKS:
            raise ValueError(f"benchmark {config['benchmark']!r}")
        return Prepared(config["benchmark"], Options(**config["options"]), (), folder)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"{path}: not what prepare_benchmark.py writes ({error!r}); prepare it again") from error


def read(folder: Path) -> Prepared:
    """A prepared folder; raises BenchmarkError if it is none, or not whole."""
    prepared, config = _config(folder), _json(folder / "benchmark.json", "a prepared benchmark", dict)
    rows = []
    for file in config.get("records", []):
        _read(folder / file, "records")
        found, errors = read_json_lines(folder / file)
        bad = [
            f"{folder / file}, line {n}: no record with an id" for n, row in found if not isinstance(row.get("id"), str)
        ]
        if errors := errors + bad:
            raise BenchmarkError(f"{errors[0]} ({len(errors)} such lines); prepare it again")
        rows += [row for _, row in found]
    if len(rows) != config.get("rows"):
        raise BenchmarkError(f"{folder}: {len(rows)} records, expected {config.get('rows')}; prepare it again")
    return replace(prepared, rows=rows)


def _json(path: Path, what: str, kind: type) -> Any:
    """The object or list in a JSON file."""
    try:
        found = json.loads(_read(path, what))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: no JSON ({error}); fetch or make the file again") from error
    if not isinstance(found, kind):
        problem = f"JSON of type {type(found).__name__}, expected a {kind.__name__}"
        raise BenchmarkError(f"{path}: {problem}; fetch or make the file again")
    return found


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise BenchmarkError(f"{path}: no such file; give the folder of {what} that holds it") from error


def _either(folder: Path, *names: str) -> Path:
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise BenchmarkError(f"{where}: no file {path}; fetch it or correct --root")
    return path.resolve()


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BenchmarkError(f"{where}: the {name} is {value!r}, expected a text; correct the row")
    return value
