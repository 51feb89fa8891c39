"""Fixed records through the present weights while training: the weights that a checkpoint of the same step ships."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mige.config import TrainConfig
from mige.data.checks import check_images, check_lengths
from mige.data.parsing import read_records
from mige.data.records import Record, Report
from mige.inference import run as inference
from mige.inference.pipeline import MIGEPipeline


def load_sample_records(settings: TrainConfig, pipeline: MIGEPipeline) -> Sequence[Record]:
    """The records to sample, all of them fit for it. Raises BadRecordsError with every error."""
    if not settings.sample_every:
        return []
    report = read_records([Path(file) for file in settings.sample_records])
    fusion = pipeline.fusion.config
    issues = list(report.issues) + check_images(report.records, size=pipeline.output_size(None, None))
    issues += check_lengths(report.records, pipeline.tokenizer, fusion.num_queries, fusion.max_tokens)
    return Report(report.records, issues).raise_if_errors()


def sample(records: Sequence[Record], pipeline: MIGEPipeline, settings: TrainConfig, folder: Path, step: int) -> None:
    """The records into `folder`, a run folder of inference, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    how = inference.Settings(model=f"step {step}", dtype=settings.param_dtype, steps=settings.sample_steps)
    pipeline.model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled for its few steps, a shape would take a minute
            inference.run(records, pipeline, how, folder)
    finally:
        pipeline.model.train()


@contextmanager
def holding(named: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters hold averages of the same shape for a while; their own numbers wait in host memory."""
    own = {name: named[name].detach().cpu().clone() for name in averages}
    with torch.no_grad():
        for name, value in averages.items():
            named[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                named[name].copy_(value)


def agree(accelerator: Accelerator, failed: bool) -> bool:
    """Whether any process failed; waited for by all."""
    return bool(accelerator.gather(torch.tensor([float(failed)], device=accelerator.device)).any())
