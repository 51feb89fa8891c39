"""What a run trains on: record files -> checked records, in little memory -> the dataset."""

import logging
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from mige.config import Config, ConfigError, DataConfig
from mige.data.checks import check_images, check_repeats, check_training_text
from mige.data.crops import training_crops
from mige.data.dataset import JointDataset, Mixture
from mige.data.latent_store.store import FeatureStore, NpyFolder, open_store
from mige.data.parsing import read_records
from mige.data.randomness import Dropout
from mige.data.records import BadRecordsError, Issue, Record, Report
from mige.data.shapes import image_sizes
from mige.data.synthetic.stream import WorldDataset
from mige.data.synthetic.world import WORLDS
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.training.errors import TrainingError

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
    if data.shapes:
        raise ConfigError("data.shapes is set, which only data.world knows so far: leave it empty for data.sets")
    store = None if data.features is None else open_store(Path(data.features), vae=pipeline.vae, size=data.size)
    sets = []
    for one in data.sets:
        task = None if one.get("task") is None else Task(one["task"])
        root = None if one.get("root") is None else Path(one["root"])
        report = read_records([Path(one["file"])], root=root, task=task)
        good = check_set(report, data)
        kept = good if store is None else stored(good, store, data)
        if not kept:
            raise BadRecordsError(
                f"data.sets[{len(sets)}], {one['file']}: no record is left to train on; correct what the log names, or "
                "leave the set out"
            )
        sets.append(PackedRecords(kept))
    return JointDataset(
        Mixture(sets, [one["weight"] for one in data.sets]),
        pipeline.tokenizer,
        size=data.size,
        vision_size=pipeline.image_encoder.config.image_size,
        features=store,
        **common,
    )


def check_set(report: Report, data: DataConfig) -> list[Record]:
    """A file's records that are fit to train on.

    Raises BadRecordsError with every error unless `data.skip_bad`, which logs them.
    """
    issues = list(report.issues) + check_repeats(report.records)
    if data.check_images:
        issues += check_images(report.records, size=(data.size, data.size), training=True)
    for record in report.records:
        issues += check_training_text(record)
        if record.target is None:
            issues.append(Issue(record.where, 'no target, the field "image"', "training needs one"))
    bad = {issue.where for issue in issues if issue.fatal}
    checked = Report([record for record in report.records if record.where not in bad], issues)
    if checked.issues:
        log.warning("%s", checked.text())
    return checked.records if data.skip_bad else checked.raise_if_errors()


def stored(records: Sequence[Record], store: FeatureStore | NpyFolder, data: DataConfig) -> list[Record]:
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
