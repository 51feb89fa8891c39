"""What a run trains on: record files -> checked records, in little memory -> the dataset."""

import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mige.config import Config, DataConfig
from mige.data.checks import check_images, check_repeats, check_training_text
from mige.data.crops import training_crops
from mige.data.dataset import JointDataset, Mixture
from mige.data.latent_store.shaped import Size, Store, open_stores
from mige.data.parsing import read_records
from mige.data.randomness import Dropout
from mige.data.records import BadRecordsError, Issue, Record, Report
from mige.data.shapes import ShapedRecords, image_sizes, nearest_shapes, read_target_sizes
from mige.data.synthetic.stream import WorldDataset
from mige.data.synthetic.world import WORLDS
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.training.errors import TrainingError
from mige.utils.images import open_image

log = logging.getLogger("mige")


class PackedRecords(Sequence[Record]):
    """Records as bytes, a seventh of their size as objects, in one block that worker processes share.

    Of objects each process would come to own a copy, as counting references writes to them. A record is made anew
    whenever it is asked for.
    """

    def __init__(self, records: Iterable[Record]):
        packed = [pickle.dumps(record) for record in records]
        self._ends = np.cumsum([len(one) for one in packed], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        first = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[first : self._ends[index]])


def load_dataset(config: Config, pipeline: MIGEPipeline) -> Dataset:
    """The miniature world, or all records, read and checked.

    Raises BadRecordsError with every error unless `data.skip_bad`, which logs them.
    """
    data = config.data
    common = dict(
        seed=config.train.seed,
        latent_shape=pipeline.latent_shape(data.size, data.size),
        dropout=Dropout(data.drop_text, data.drop_source, data.drop_both),
        noise_levels=config.train.noise_levels,
    )
    if data.world:
        return WorldDataset(
            data.world,
            pipeline.tokenizer,
            size=data.size,
            vision_size=pipeline.image_encoder.config.image_size,
            world=WORLDS[data.world_name],
            shapes=image_sizes(data, pipeline.sizes.step),
            block=config.shape_block,
            **common,
        )
    sizes = image_sizes(data, pipeline.sizes.step)
    stores = None if data.features is None else open_stores(Path(data.features), pipeline.vae, sizes)
    sets, shapes = [], []
    for number, one in enumerate(data.sets):
        records, own = load_set(one, data, sizes, stores)
        if not records:
            raise BadRecordsError(
                f"data.sets[{number}], {one['file']}: no record is left to train on; correct what the log names, or "
                "leave the set out"
            )
        sets.append(PackedRecords(records))
        shapes.append(own)
    return JointDataset(
        Mixture(sets, [one["weight"] for one in data.sets]),
        pipeline.tokenizer,
        size=data.size,
        vision_size=pipeline.image_encoder.config.image_size,
        shaped=ShapedRecords(sizes, shapes, config.shape_block) if data.shapes else None,
        features=stores,
        **common,
    )


def load_set(
    one: Mapping[str, Any], data: DataConfig, sizes: Sequence[Size], stores: Mapping[Size, Store] | None
) -> tuple[list[Record], np.ndarray]:
    """The records of an entry of `data.sets` that are fit to train on, and their shapes as places in `sizes`, int8.

    Raises BadRecordsError and TrainingError as `check_set` and `stored`.
    """
    task = None if one.get("task") is None else Task(one["task"])
    root = None if one.get("root") is None else Path(one["root"])
    seen: dict[Path, tuple[int, int]] | None = {} if data.shapes else None
    records = check_set(read_records([Path(one["file"])], root=root, task=task), data, sizes, seen)
    shapes = np.zeros(len(records), np.int8)
    if seen is not None:
        shapes = nearest_shapes([seen[record.target] for record in records], sizes)
    if stores is not None:
        kept: set[str] = set()
        for number, size in enumerate(sizes):
            own = [record for record, shape in zip(records, shapes, strict=True) if shape == number]
            kept |= {record.id for record in stored(own, stores[size], data)}
        shapes = shapes[[record.id in kept for record in records]]
        records = [record for record in records if record.id in kept]
    return records, shapes


def check_set(
    report: Report,
    data: DataConfig,
    sizes: Sequence[Size] = (),
    seen: dict[Path, tuple[int, int]] | None = None,
) -> list[Record]:
    """A file's records that are fit to train on.

    sizes: heights and widths that images are cropped to, px; none: squares of `data.size`.
    seen: width and height of every target are added to it, for which headers are read where images are not checked.
    Raises BadRecordsError with every error unless `data.skip_bad`, which logs them.
    """
    issues = list(report.issues) + check_repeats(report.records)
    if data.check_images:
        side = max(map(max, sizes), default=data.size)
        opener = None if seen is None else partial(_open_and_note, seen)
        issues += check_images(report.records, size=(side, side), training=True, opener=opener)
    elif seen is not None:
        issues += read_target_sizes(report.records, seen)
    for record in report.records:
        issues += check_training_text(record)
        if record.target is None:
            issues.append(Issue(record.where, 'no target, the field "image"', "training needs one"))
    bad = {issue.where for issue in issues if issue.fatal}
    checked = Report([record for record in report.records if record.where not in bad], issues)
    if checked.issues:
        log.warning("%s", checked.text())
    return checked.records if data.skip_bad else checked.raise_if_errors()


def _open_and_note(seen: dict[Path, tuple[int, int]], path: Path) -> Image.Image:
    image = open_image(path)
    seen[path] = image.size
    return image


def stored(records: Sequence[Record], store: Store, data: DataConfig) -> list[Record]:
    """The records whose images are all in the store, and are still what was extracted.

    Raises TrainingError if any is not, unless `data.skip_bad`, which logs those.
    """
    named = {}
    for record in records:
        for crop in training_crops(record):
            named.setdefault(crop, record.where)
    unusable = {}
    for crops, how in ((store.missing(named), "not in it"), (store.changed(named), "changed or gone since")):
        if crops and not data.skip_bad:
            raise TrainingError(
                f"{data.features}: {len(crops)} of {len(named)} images {how}, the first {crops[0]} "
                f"of {named[crops[0]]}: run tools/extract_features.py on the same records again, "
                "or set data.skip_bad=True to leave these out"
            )
        unusable |= dict.fromkeys(crops, how)
    kept, left_out = [], []
    for record in records:
        bad = [f"{crop} {unusable[crop]}" for crop in training_crops(record) if crop in unusable]
        if bad:
            left_out.append(f"{record.where}: {', '.join(bad)}")
        else:
            kept.append(record)
    if left_out:
        log.warning("%s: %d records are left out: %s", data.features, len(left_out), "; ".join(left_out))
    return kept
