"""Results of a prepared benchmark -> scores a sample, each image and text through each network once.

Versions scored beside the model's own images: "copy", the input given back; "target", the true image; and for
DreamBench "real", the subject's other photographs. Letters: D features.
"""

import hashlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from mige.evaluation import metrics
from mige.evaluation.backbones import Clip, Dino
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import CAPTIONS, Metric
from mige.utils.files import json_lines, read_json_lines, write_bytes, write_text
from mige.utils.images import open_image

VERSIONS = {"model": "this model", "copy": "copy of the input", "target": "the true image", "real": "real images"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Features:
    """Features of one backbone, kept in a file from one run to the next.

    An image's key is the hash of its file, a text's that of its letters, so that nothing stale is ever read; the file
    is named after the backbone's weights.
    """

    def __init__(self, backbone: Clip | Dino, folder: Path, batch: int):
        name = backbone.name.lower().replace(" ", "-").replace("/", "")
        self.backbone, self.batch = backbone, batch
        self.path = folder / f"{name}-{backbone.fingerprint}.safetensors"
        self.known = _read_cache(self.path)
        self.key_of: dict[Path | str, str] = {}
        self.pool = ThreadPoolExecutor(os.cpu_count())  # decoding and resizing take longer than the networks

    def compute(self, images: Iterable[Path], texts: Iterable[str] = ()) -> None:
        """See that the features of these are known; a kill loses at most the last fifty batches."""
        self._compute(dict.fromkeys(images), _file_key, self._encode, f"{self.backbone.name}, images")
        self._compute(dict.fromkeys(texts), _text_key, self._texts, f"{self.backbone.name}, captions")

    def __getitem__(self, what: Path | str) -> Tensor:
        return self.known[self.key_of[what]]

    def _encode(self, images: Sequence[Path]) -> Tensor:
        return self.backbone.encode(torch.stack(list(self.pool.map(self._pixels, images))))

    def _pixels(self, path: Path) -> Tensor:
        return self.backbone.transform(open_image(path))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.backbone.texts(texts)

    def _compute(self, wanted: Iterable[Any], key: Callable, run: Callable[..., Tensor], label: str) -> None:
        self.key_of |= {one: key(one) for one in wanted}
        todo = list({self.key_of[one]: one for one in wanted if self.key_of[one] not in self.known}.items())
        for n, first in enumerate(tqdm(range(0, len(todo), self.batch), desc=label, disable=not todo), start=1):
            part = todo[first : first + self.batch]
            for (new, one), features in zip(part, run([one for _, one in part]), strict=True):
                if not features.isfinite().all():
                    raise BenchmarkError(f"{one}: {self.backbone.name} gives NaN features; check its weights")
                self.known[new] = features.clone()
            if n % 50 == 0:
                self._save()
        if todo:
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, save(self.known))


def _read_cache(path: Path) -> dict[str, Tensor]:
    """The kept features; none, with a word on stderr, of a file that is cut or another one: they are computed anew."""
    if not path.exists():
        return {}
    try:
        known = load(path.read_bytes())
        shapes = {tuple(features.shape) for features in known.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise ValueError(f"tensors of shapes {sorted(shapes)}, expected one vector an image or text")
        if strangers := [key for key in known if not re.fullmatch("(picture|text) [0-9a-f]{64}", key)]:
            raise ValueError(f"the key {strangers[0]!r}, expected those of images and texts")
        if not all(features.dtype == torch.float32 and features.isfinite().all() for features in known.values()):
            raise ValueError("features that are no finite float32")
    except (ValueError, SafetensorError) as error:
        print(f"warning: {path}: {error}; its features are computed anew", file=sys.stderr)
        return {}
    return known


def _file_key(path: Path) -> str:
    return "picture " + hashlib.sha256(path.read_bytes()).hexdigest()


def _text_key(text: str) -> str:
    return "text " + hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Scores:
    """What scoring found: a line a sample, and what had to be done to images on the way."""

    rows: list[dict[str, Any]]
    notes: Counter = field(default_factory=Counter)


def outputs(prepared: Prepared, results: Path) -> dict[str, Path]:
    """The image of every record by its id: RESULTS/images/ID.png, or RESULTS/ID.png where there is no such folder.

    Raises BenchmarkError that lists what is missing, what belongs to no record, and ids with two files.
    """
    folder = results / "images" if (results / "images").is_dir() else results
    if not folder.is_dir():
        raise BenchmarkError(f"{results}: no such folder; give the one that infer.py wrote")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    many = Counter(path.stem for path in files)
    ids = {row["id"] for row in prepared.rows}
    wrong = {
        "missing": sorted(ids - many.keys()),
        "of no record": sorted(many.keys() - ids),
        "with two files": sorted(name for name, n in many.items() if n > 1),
    }
    found = [f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names]
    if found:
        raise BenchmarkError(f"{folder}: {'; '.join(found)}. expected one image for each of the {len(ids)} records")
    return {path.stem: path for path in files}


def crops(prepared: Prepared, folder: Path) -> dict[str, Path]:
    """The entity cut out of every output, by id, without those where nothing was found; see extract_entities.py."""
    path = folder / "entities.jsonl"
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; run tools/extract_entities.py first")
    rows, errors = read_json_lines(path)
    ids = {row["id"] for row in prepared.scored}
    lines = {line.get("id"): line for _, line in rows if isinstance(line.get("id"), str) and "crop" in line}
    for error in errors:
        print(f"warning: {error}", file=sys.stderr)
    if missing := sorted(ids - lines.keys()):
        raise BenchmarkError(f"{path}: {len(missing)} ids missing ({_some(missing)}); run extract_entities.py again")
    return {one: folder / lines[one]["crop"] for one in ids if lines[one]["crop"]}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")


def score(
    prepared: Prepared,
    found: Mapping[str, Path],
    clip: Clip,
    dino: Dino,
    cache: Path,
    *,
    entities: Mapping[str, Path] | None = None,
    batch: int = 64,
) -> Scores:
    """Score every record of a prepared benchmark and its baselines.

    Args:
        found: the outputs, as `outputs` gives them. cache: folder of features. entities: crops of the outputs, without
            which the entity measures are left out. batch: images at a time; does not change the scores.

    Raises BenchmarkError for NaN features, BadImageError for an image that cannot be read.
    """
    wanted = [metric for metric in prepared.metrics if entities is not None or not metric.crop]
    versions = {row["id"]: _versions(row, found[row["id"]]) for row in prepared.scored}
    crop_of = entities or {}
    networks = {"clip": Features(clip, cache, batch), "dino": Features(dino, cache, batch)}
    for of, features in networks.items():
        used = [metric for metric in wanted if metric.of == of or (of, metric.of) == ("clip", "direction")]
        images = [path for row in prepared.scored for path in _images(row, used, versions[row["id"]], crop_of)]
        features.compute(images, [text for row in prepared.scored for text in _texts(row, used)])
    scores = Scores([])
    for row in tqdm(prepared.scored, desc="scores"):
        line = {"id": row["id"], "group": row["score"]["group"]}
        line |= {"clean": row["score"]["clean"]} if "clean" in row["score"] else {}
        for version, given in versions[row["id"]].items():
            line[version] = {}
            answered = {"output": given, "entity": [crop_of[row["id"]]] if row["id"] in crop_of else []}
            for metric in wanted:
                answers = answered["entity" if metric.crop else "output"] if _applies(metric, version) else []
                noted = scores.notes if version == "model" else Counter()
                values = [_value(metric, one, row["score"], networks, noted, version == "real") for one in answers]
                line[version] |= {metric.name: sum(values) / len(values)} if values else {}
        if entities is not None:
            line["entity_found"] = row["id"] in crop_of
        scores.rows.append(line)
    scores.notes["not RGB"] = sum(_mode(path) != "RGB" for path in (found[row["id"]] for row in prepared.scored))
    return scores


def _versions(row: Mapping[str, Any], output: Path) -> dict[str, list[Path]]:
    """The images that stand for the output in each version; "copy": the image that the model was given."""
    score = row["score"]
    copied = score.get("source") or row["entity_path"][0]
    versions = {"model": [output], "copy": [Path(copied)]}
    versions |= {"target": [Path(score["target"])]} if "target" in score else {}
    return versions | ({"real": [Path(path) for path in score["others"]]} if score.get("others") else {})


def _applies(metric: Metric, version: str) -> bool:
    if version == "real":
        return metric.against == "references"
    return version == "model" or not metric.crop


def _against(score: Mapping[str, Any], metric: Metric) -> list[Path]:
    """The images that a measure compares with."""
    if metric.of == "direction":
        return [Path(score["source"])]
    if metric.against in CAPTIONS:
        return []
    given = score[metric.against]
    return [Path(path) for path in (given if isinstance(given, list) else [given])]


def _images(
    row: Mapping[str, Any], used: Sequence[Metric], versions: Mapping[str, Sequence[Path]], crop_of: Mapping[str, Path]
) -> Iterable[Path]:
    for metric in used:
        yield from _against(row["score"], metric)
        if metric.crop:
            yield from [crop_of[row["id"]]] if row["id"] in crop_of else []
        else:
            yield from (path for version, paths in versions.items() if _applies(metric, version) for path in paths)


def _texts(row: Mapping[str, Any], used: Sequence[Metric]) -> Iterable[str]:
    yield from (row["score"][metric.against] for metric in used if metric.against in CAPTIONS)
    if any(metric.of == "direction" for metric in used):
        yield row["score"]["source_caption"]


def _value(
    metric: Metric,
    answer: Path,
    score: Mapping[str, Any],
    networks: Mapping[str, Features],
    notes: Counter,
    apart: bool,
) -> float:
    """A measure of one answer; `apart`: not compared with itself, should it be among the references (cosine 1)."""
    if metric.of in ("l1", "l2"):
        return _pixel_value(metric, answer, Path(score[metric.against]), notes)
    clip = networks["clip"]
    if metric.of == "direction":
        captions = clip[score["caption"]], clip[score["source_caption"]]
        value = metrics.direction(clip[answer], clip[Path(score["source"])], *captions)
        return 0.0 if math.isnan(value) else value  # no change asked or made: 0, as with the usual epsilon
    if metric.against in CAPTIONS:
        return metrics.cosine(clip[answer], clip[score[metric.against]])
    features = networks[metric.of]
    others = [other for other in _against(score, metric) if not (apart and other == answer)]
    values = [metrics.cosine(features[answer], features[other]) for other in others]
    return sum(values) / len(values)


def _pixel_value(metric: Metric, answer: Path, other: Path, notes: Counter) -> float:
    made, true = open_image(answer), open_image(other)
    resize = metrics.to_target if metric.against == "target" else metrics.to_output
    if made.size != true.size and metric.of == "l1":
        notes["of another size than the image compared with"] += 1
    return (metrics.l1 if metric.of == "l1" else metrics.l2)(*resize(made, true))


def _mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """samples.jsonl: a line a sample, replaced at once."""
    write_text(path, json_lines(rows))
