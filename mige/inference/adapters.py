"""Adapters onto a pipeline, with the sampler they were trained for where they bring one."""

from pathlib import Path
from typing import Any

from mige.checkpoints.lora import merge_lora
from mige.checkpoints.weight_files import read_json
from mige.diffusion.few_step import FewStepSolver
from mige.inference.pipeline import MIGEPipeline

_CONFIG = "scheduler_config.json"


def add_adapters(pipeline: MIGEPipeline, path: Path) -> None:
    """Merge adapters into the pipeline's DiT (`merge_lora`); a few-step student's bring their `FewStepSolver`.

    Raises CheckpointError if they do not fit or their scheduler cannot be read.
    """
    pipeline.transformer = merge_lora(pipeline.transformer, path)
    if (config := _own_config(path)) is not None:
        pipeline.scheduler = FewStepSolver.from_config(config)


def scheduler_config(model: Path, lora: Path | None) -> dict[str, Any]:
    """What decides how a checkpoint folder is sampled, under adapters if there are any; reads no weights."""
    own = None if lora is None else _own_config(lora)
    return read_json(model / "scheduler" / _CONFIG) if own is None else own


def _own_config(path: Path) -> dict[str, Any] | None:
    folder = path if path.is_dir() else path.parent
    return read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
