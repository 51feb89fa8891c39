"""Results of a prepared benchmark -> scores a sample, each image and text through each network once.

Versions scored beside the model's own images: "copy", the input given back as the model is shown it; "target", the true
image; and for DreamBench "real", the subject's other photographs. Letters: D features.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mige.evaluation import metrics
from mige.evaluation.backbones import Backbone
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import BENCHMARKS, CAPTIONS, PIXELS, Metric
from mige.evaluation.features import Features, compute_images, compute_texts
from mige.evaluation.views import View
from mige.utils.files import json_lines, write_text
from mige.utils.images import MAX_PIXELS, center_crop, image_size
from mige.utils.masks import open_mask
from mige.utils.progress import Progress

PixelMeasure = Callable[[Image.Image, Image.Image, np.ndarray | None], float]
"""Output, image compared with, both RGB of one size, and the region that counts, bool [H, W], or None -> value."""

VERSIONS = {"model": "this model", "copy": "copy of the input", "target": "the true image", "real": "real images"}


@dataclass
class Scores:
    """What scoring found: a line a sample, and what had to be done to images on the way."""

    rows: list[dict[str, Any]]
    notes: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Answer:
    """What is scored of one record."""

    row: Mapping[str, Any]
    versions: Mapping[str, Sequence[View]]
    crop: View | None  # the entity cut out of the output

    def of(self, metric: Metric, version: str) -> Sequence[View]:
        """The images that a measure takes of a version; none where the measure has no value."""
        if version == "real":
            return self.versions[version] if metric.against == "references" else ()
        if not metric.crop:
            return self.versions[version]
        if version != "model":
            return ()
        found = () if self.crop is None else (self.crop,)
        return found or (self.versions[version] if metric.not_found == "whole" else ())


def score(
    prepared: Prepared,
    found: Mapping[str, Path],
    networks: Mapping[str, Backbone],
    folder: Path,
    *,
    entities: Mapping[str, Path] | None = None,
    jpeg: bool = False,
    pixels: Mapping[str, PixelMeasure] = metrics.PIXELS,
    batch: int = 64,
) -> Scores:
    """Score every record of a prepared benchmark and its baselines.

    Args:
        found: the outputs, as `outputs` gives them. networks: by the names that measures call them ("clip", "dino").
            folder: of features, kept from one run to the next. entities: crops of the outputs, without which the
            entity measures are left out.
            jpeg: outputs, and what stands for them, are scored through the JPEG that the official scripts save.
            pixels: the measures of pixels by the names that the benchmark's measures call them.
            batch: images at a time; does not change the scores.

    Raises BenchmarkError for NaN features and rows of an older version, BadImageError for an image that cannot be read.
    """
    wanted = [metric for metric in prepared.metrics if entities is not None or not metric.crop]
    _check_clusters(prepared)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        make = partial(_answer, found=found, entities=entities or {}, jpeg=jpeg)
        answers = list(pool.map(make, prepared.scored))
    stores = {name: Features(network, folder) for name, network in networks.items()}
    used = {name: [metric for metric in wanted if _network(metric) == name] for name in networks}
    for name, features in stores.items():
        texts = [text for answer in answers for text in _texts(answer.row, used[name])]
        compute_texts(features, texts, batch) if texts else None
    images = {stores[name]: [one for answer in answers for one in _images(answer, used[name])] for name in networks}
    compute_images(images, batch)
    measure = partial(_measure, wanted=wanted, networks=stores, pixels=pixels, entities=entities is not None)
    scores = Scores([])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # pixels are opened and compared on all cores
        for line, notes in Progress(pool.map(measure, answers), unit="sample", desc="scores", total=len(answers)):
            scores.rows.append(line)
            scores.notes += notes
    return scores


def _check_clusters(prepared: Prepared) -> None:
    if BENCHMARKS[prepared.name].clusters and any("cluster" not in row["score"] for row in prepared.scored):
        raise BenchmarkError(
            f"{prepared.folder}: its rows do not say which of them go together, it is of an older version; "
            "prepare it again, into the same folder"
        )


def _answer(row: Mapping[str, Any], found: Mapping[str, Path], entities: Mapping[str, Path], jpeg: bool) -> Answer:
    """The images that stand for the output in each version; "copy": the image that the model was given, as shown it."""
    score, output = row["score"], View(found[row["id"]], jpeg=jpeg)
    given, shape = View(Path(score.get("source") or row["entity_path"][0])), image_size(output.path)
    if image_size(given.path) != shape:
        given = replace(given, size=shape, letterboxed=not score.get("source"))
    versions = {"model": [output], "copy": [replace(given, jpeg=jpeg)]}
    versions |= {"target": [View(Path(score["target"]))]} if "target" in score else {}
    versions |= {"real": [View(Path(path)) for path in score["others"]]} if score.get("others") else {}
    return Answer(row, versions, View(entities[row["id"]]) if row["id"] in entities else None)


def _network(metric: Metric) -> str | None:
    """The network whose features a measure compares."""
    return None if metric.of in PIXELS else "clip" if metric.of == "direction" else metric.of


def _against(score: Mapping[str, Any], metric: Metric) -> list[View]:
    """The images that a measure compares with."""
    if metric.of == "direction":
        return [View(Path(score["source"]))]
    if metric.against in CAPTIONS:
        return []
    given = score[metric.against]
    return [View(Path(path)) for path in (given if isinstance(given, list) else [given])]


def _images(answer: Answer, used: Sequence[Metric]) -> Iterable[View]:
    for metric in used:
        yield from _against(answer.row["score"], metric)
        for version in answer.versions:
            yield from answer.of(metric, version)


def _texts(row: Mapping[str, Any], used: Sequence[Metric]) -> Iterable[str]:
    yield from (row["score"][metric.against] for metric in used if metric.against in CAPTIONS)
    if any(metric.of == "direction" for metric in used):
        yield row["score"]["source_caption"]


def _measure(
    answer: Answer,
    wanted: Sequence[Metric],
    networks: Mapping[str, Features],
    pixels: Mapping[str, PixelMeasure],
    entities: bool,
) -> tuple[dict[str, Any], Counter]:
    """The line of a record, and what had to be done to its output."""
    score, notes = answer.row["score"], Counter()
    line = {"id": answer.row["id"], "group": score["group"], "cluster": score.get("cluster", answer.row["id"])}
    line |= {"clean": score["clean"]} if "clean" in score else {}
    opened = cache(View.open)  # each image of the record once for all measures of pixels
    for version in answer.versions:
        line[version] = {}
        for metric in wanted:
            values = [
                _pixel_value(metric, one, score, opened, pixels)
                if metric.of in PIXELS
                else _value(metric, one, score, networks, version == "real")
                for one in answer.of(metric, version)
            ]
            values = [value for value in values if value is not None]
            if values:
                line[version][metric.name] = sum(values) / len(values)
            elif version == "model" and metric.crop and metric.not_found == "zero":
                line[version][metric.name] = 0.0
    if entities:
        line["entity_found"] = answer.crop is not None
    output = answer.versions["model"][0]
    compared = [other for metric in wanted if metric.of in PIXELS for other in _against(score, metric)]
    if any(image_size(output.path) != image_size(other.path) for other in dict.fromkeys(compared)):
        notes["of another size than the image compared with"] += 1
    with Image.open(output.path) as image:
        notes["not RGB"] += image.mode != "RGB"
    return line, notes


def _value(
    metric: Metric, answer: View, score: Mapping[str, Any], networks: Mapping[str, Features], apart: bool
) -> float:
    """A measure of one answer; `apart`: not compared with itself, should it be among the references (cosine 1)."""
    features = networks[_network(metric)]
    if metric.of == "direction":
        captions = features[score["caption"]], features[score["source_caption"]]
        value = metrics.direction(features[answer], features[View(Path(score["source"]))], *captions)
        return 0.0 if math.isnan(value) else value  # no change asked or made: 0, as with the usual epsilon
    if metric.against in CAPTIONS:
        return metrics.cosine(features[answer], features[score[metric.against]])
    others = [other for other in _against(score, metric) if not (apart and other == answer)]
    values = [metrics.cosine(features[answer], features[other]) for other in others]
    return sum(values) / len(values)


def _pixel_value(
    metric: Metric,
    answer: View,
    score: Mapping[str, Any],
    opened: Callable[[View], Image.Image],
    pixels: Mapping[str, PixelMeasure],
) -> float | None:
    """A measure of pixels; None where its region is empty."""
    other = opened(View(Path(score[metric.against])))
    pair = (metrics.to_target if metric.fit == "stretch" else metrics.to_output)(opened(answer), other)
    if not metric.region:
        return pixels[metric.of](*pair, None)
    mask = open_mask(Path(score["mask"]), other.size, max_pixels=MAX_PIXELS)
    if mask.size != pair[0].size:  # cropped as the image compared with was
        mask = center_crop(mask, pair[0].height, pair[0].width)
    region = (np.asarray(mask) >= 128) == (metric.region == "inside")
    return pixels[metric.of](*pair, region) if region.any() else None


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """samples.jsonl: a line a sample, replaced at once."""
    write_text(path, json_lines(rows))
