"""Rows of the four benchmarks: their own files in, records with what is compared ("score") out."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mige.data.prepare import sources
from mige.evaluation.benchmarks.files import (
    BenchmarkError,
    Options,
    checked_text,
    existing_file,
    first_of,
    read_file,
    read_json,
    write_image,
)

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
    text = read_file(root / "prompts_and_classes.txt", "DreamBench")
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
                        "cluster": subject,
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
            checked_text(row[name], where, name)
        path = write_image(row["image"], folder / "sources" / f"{n:05d}", where)
        captions = row["input_caption"].strip(), row["output_caption"].strip()
        yield {
            "id": f"{n:05d}",
            "instruction": row["instruction"],
            "image": str(path),
            "task": str(row["task"]),
            "idx": row["idx"],
            "score": {
                "group": str(row["task"]),
                "cluster": hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16],
                "source": str(path),
                "caption": captions[1],
                "source_caption": captions[0],
                "clean": captions[0] != captions[1],
            },
        }


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
    sessions = read_json(root / "edit_sessions.json", "MagicBrush", dict)
    captions = {
        name: read_json(first_of(root, *files), "MagicBrush", dict)
        for name, files in _MAGICBRUSH_CAPTIONS.items()
        if any((root / file).exists() for file in files) or name == "caption"
    }
    for image_id, turns in sessions.items():
        before = None
        for n, turn in enumerate(turns, start=1):
            where = f"MagicBrush, {image_id}, turn {n}"
            source, target = (
                existing_file(root / "images" / image_id / turn[name], where) for name in ("input", "output")
            )
            record_id = f"{image_id}-{n}"
            given = str(source) if before is None else before
            row = {"id": record_id, "multi_prompt": checked_text(turn["instruction"], where, "instruction")}
            row |= {"entity_path": [given], "source_path": [given], "image": str(target), "task": "edit", "turn": n}
            if options.iterative is None or n == len(turns):
                first = existing_file(root / "images" / image_id / turns[0]["input"], where)
                row["score"] = {
                    "group": f"turn {n}",
                    "cluster": image_id,
                    "source": str(source if options.iterative is None else first),
                    "target": str(target),
                }
                mask = root / "images" / image_id / str(turn.get("mask"))
                row["score"] |= {"mask": str(mask.resolve())} if mask.is_file() else {}
                for name, of in captions.items():
                    caption = of.get(image_id, {}).get(turn["output"])
                    row["score"][name] = checked_text(caption, where, f"{name.replace('_', ' ')} of {turn['output']}")
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
        for n, row in enumerate(read_json(file, "MIGEBench", list), start=1):
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
                    "cluster": found[0],
                    "source": found[0],
                    "target": target,
                    "caption": checked_text(row["target_caption"], where, "target_caption"),
                    "entity": entities[0],
                    "object": checked_text(row["object"], where, "object"),
                },
            }


def _below(root: Path, placeholder: str, where: str) -> str:
    """The file that a placeholder path means: from its folder such as add_source on, below the root."""
    parts = Path(placeholder).parts
    start = next((i for i in reversed(range(len(parts))) if _FOLDER.fullmatch(parts[i])), None)
    if start is None:
        raise BenchmarkError(f"{where}: the path {placeholder} has no folder such as add_source; give --root")
    return str(existing_file(root.joinpath(*parts[start:]), where))
