"""What a run trains on: record files -> checked records, mapped from the disk -> the dataset."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from mige.config import Config, DataConfig
from mige.data.checks import check_images
from mige.data.crops import training_crops
from mige.data.dataset import JointDataset, Mixture
from mige.data.latent_store.shaped import Size, Store, open_stores
from mige.data.mapped_records import MappedRecords
from mige.data.mapping import MappedSet, map_records
from mige.data.randomness import Dropout
from mige.data.records import BadRecordsError, Record, Report
from mige.data.shapes import ShapedRecords, image_sizes, nearest_shapes, read_target_sizes
from mige.data.synthetic.stream import WorldDataset
from mige.data.synthetic.world import WORLDS
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.training.errors import TrainingError
from mige.utils.images import open_image

log = logging.getLogger("mige")

_CHUNK = 16_384  # records that are checked together: an image that several of them name is decoded once


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
        sets.append(records)
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
) -> tuple[MappedRecords, np.ndarray]:
    """The records of an entry of `data.sets` that are fit to train on, and their shapes as places in `sizes`, int8.

    Raises BadRecordsError and TrainingError as `check_set` and `not_stored`.
    """
    task = None if one.get("task") is None else Task(one["task"])
    root = None if one.get("root") is None else Path(one["root"])
    records, shapes = check_in_shapes(map_records(Path(one["file"]), root=root, task=task), data, sizes)
    if stores is not None and (bad := not_stored(records, [stores[size] for size in sizes], data, shapes)):
        records, shapes = records.without(bad), np.delete(shapes, bad)
    return records, shapes


def check_set(found: MappedSet, data: DataConfig) -> MappedRecords:
    """A file's records that are fit to train on, in squares of `data.size`.

    Raises BadRecordsError with every error unless `data.skip_bad`, which logs them.
    """
    return check_in_shapes(found, data, [(data.size, data.size)])[0]


def check_in_shapes(found: MappedSet, data: DataConfig, sizes: Sequence[Size]) -> tuple[MappedRecords, np.ndarray]:
    """As `check_set`, and of each record the shape that is nearest to its target's, as places in `sizes`, int8.

    The sizes of images are those that the check has seen; without a check, headers are read.
    """
    issues, bad, shapes = list(found.issues), list(found.unfit), np.zeros(len(found.records), np.int8)
    side, many = max(map(max, sizes)), len(sizes) > 1
    for first, some in chunks(found.records) if data.check_images or many else ():
        seen: dict[Path, tuple[int, int]] = {}
        if data.check_images:
            new = check_images(some, size=(side, side), training=True, opener=partial(_open_and_note, seen))
        else:
            new = read_target_sizes(some, seen)
        issues += new
        named = {issue.where for issue in new if issue.fatal}
        bad += [first + at for at, record in enumerate(some) if record.where in named]
        if many:
            known = [at for at, record in enumerate(some) if record.target in seen]
            shapes[first + np.array(known, int)] = nearest_shapes([seen[some[at].target] for at in known], sizes)
    checked = Report(issues=issues)
    if issues:
        log.warning("%s", checked.text())
    if not data.skip_bad:
        checked.raise_if_errors()
    return found.records.without(bad, fit=True), np.delete(shapes, np.array(bad, int))


def chunks(records: MappedRecords) -> Iterator[tuple[int, list[Record]]]:
    """The records some at a time, each time with the place of the first: all at once may not fit into memory."""
    iterator = iter(records)
    for first in range(0, len(records), _CHUNK):
        yield first, list(itertools.islice(iterator, _CHUNK))


def _open_and_note(seen: dict[Path, tuple[int, int]], path: Path) -> Image.Image:
    image = open_image(path)
    seen[path] = image.size
    return image


def not_stored(
    records: MappedRecords, stores: Sequence[Store], data: DataConfig, shapes: np.ndarray | None = None
) -> list[int]:
    """Places of the records of which an image is not in the store, or is not any more what was extracted.

    stores: one a shape; `shapes`: which of them each record is of, int8 [records], None if there is one.
    Raises TrainingError if there is such a record, unless `data.skip_bad`, which logs them.
    """
    bad = []
    for first, some in chunks(records):
        own = np.zeros(len(some), np.int8) if shapes is None else shapes[first : first + len(some)]
        for number, store in enumerate(stores):
            places = np.flatnonzero(own == number)
            found = _not_in(store, [some[place] for place in places], data)
            bad += [(first + int(places[at]), why) for at, why in found]
    bad.sort()
    if bad:
        log.warning("%s: %d records are left out: %s", data.features, len(bad), "; ".join(why for _, why in bad))
    return [place for place, _ in bad]


def _not_in(store: Store, records: Sequence[Record], data: DataConfig) -> list[tuple[int, str]]:
    """Places of records that the store does not serve, and what they lack."""
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
    left_out = []
    for at, record in enumerate(records):
        bad = [f"{crop} {unusable[crop]}" for crop in training_crops(record) if crop in unusable]
        if bad:
            left_out.append((at, f"{record.where}: {', '.join(bad)}"))
    return left_out
