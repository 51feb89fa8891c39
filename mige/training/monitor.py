"""Losses of all processes, read one step late so that no GPU waits, and written to metrics.jsonl and the trackers."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from mige.config import Config
from mige.data.batch import TrainingBatch
from mige.inference.pipeline import MIGEPipeline
from mige.training.adapters import adapted
from mige.training.checkpointing import list_checkpoints
from mige.training.errors import TrainingError
from mige.training.flops import forward_flops, measured_peak_flops, useful_flops
from mige.training.metrics import Metrics, StepMetrics
from mige.training.objective import Judged, Objective
from mige.training.optimizers import learning_rate
from mige.training.warm_up import compiled_graphs
from mige.utils.files import append_json_line


class Monitor:
    """Collects what micro-batches give, stops a run whose loss or gradient is not finite, and logs.

    Args:
        settle: waits for the checkpoint that is being written.

    Attributes:
        stop_everywhere: whether any process was asked to stop, as of what has been read: alike in all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        run: Path,
        pipeline: MIGEPipeline,
        dataset: Dataset,
        timesteps: int,
        objective: Objective,
        settle: Callable[[], None],
    ):
        self.accelerator, self.config, self.run = accelerator, config, run
        self.pipeline, self.model, self.dataset, self.timesteps = pipeline, pipeline.model, dataset, timesteps
        self.objective, self.settle = objective, settle
        settings = config.train
        self.micro_batch = settings.batch_size * accelerator.num_processes  # samples of all processes
        self.global_batch_size = self.micro_batch * settings.gradient_accumulation_steps
        self.metrics = Metrics(objective.levels)
        self.pending: deque[StepMetrics] = deque()
        self.stop_everywhere, self.norm = False, None
        self.warm_graphs: int | None = None  # compiled before the first step; None: nothing is compiled
        self.peak = measured_peak_flops(accelerator.device)
        self._work: dict[tuple[int, int, int], float] = {}

    def add(self, step: int, micro: int, batch: TrainingBatch, judged: Judged, norm: Tensor | None, stop: bool) -> None:
        """Gather the losses of all processes, and whether one is to stop, to be read when the GPU has them.

        `norm`: the gradient's, [], in a micro-batch that ends a step.
        """
        loss, tasks = judged.loss, batch.task_B.repeat(self.objective.levels)
        stopping = torch.full_like(loss.mse, stop)
        rows = torch.stack([loss.mse, loss.vb, tasks.float(), judged.time_B.float(), stopping]).detach()
        everyone = self.accelerator.gather(rows.T.contiguous()).T
        queries = self.pipeline.fusion.config.num_queries
        cells = batch.noise_BCHW.shape[-2:].numel()
        work = sum(self._flops(one.length(queries), one.num_images, cells) for one in batch.instructions)
        self.pending.append(StepMetrics(step, micro, everyone, norm, work))

    def flush(self, all_but: int = 0) -> None:
        """Read what is pending but for the newest few. Raises TrainingError if anything is not finite."""
        while len(self.pending) > all_but:
            seen = self.pending.popleft()
            mse, vb, task, time, stopping = seen.everyone.cpu()
            self.stop_everywhere |= bool(stopping.any())
            if not (mse + vb).isfinite().all():
                self._fail(seen.step, "the loss is not finite", self._not_finite(seen.micro, mse + vb))
            if seen.norm is not None:
                self.norm = float(seen.norm)
                if not math.isfinite(self.norm):
                    self._fail(seen.step, "the gradient is not finite", range(self.global_batch_size))
            self.metrics.add(mse, vb, task, time, self.timesteps)
            self.metrics.work += seen.work

    def fail_to_read(self, step: int, micro: int, error: Exception) -> NoReturn:
        """Raise TrainingError naming the samples of this process that a micro-batch could not read."""
        size = self.config.train.batch_size
        first = step * self.global_batch_size + micro * self.micro_batch + self.accelerator.process_index * size
        names = "; ".join(sample_name(self.dataset, number) for number in range(first, first + size))
        raise TrainingError(
            f"step {step}: a sample cannot be read: {str(error).strip().splitlines()[-1]}; records: {names}. Mend the "
            "file, then resume"
        ) from error

    def _not_finite(self, micro: int, losses: Tensor) -> list[int]:
        """Places in the global batch of the samples with such a loss; they lie as process, noise level, sample."""
        levels, size = self.objective.levels, self.config.train.batch_size
        bad = (~losses.isfinite()).reshape(-1, levels, size).any(1).flatten()
        return [micro * self.micro_batch + place for place in bad.nonzero().flatten().tolist()]

    def _fail(self, step: int, problem: str, places: Sequence[int]) -> NoReturn:
        self.settle()
        good = list_checkpoints(self.run)
        records = "; ".join(sample_name(self.dataset, step * self.global_batch_size + place) for place in places)
        raise TrainingError(
            f"step {step}: {problem}; records: {records}; last good checkpoint: {good[-1] if good else 'none'}. "
            "Look at these records or lower the learning rate, then resume"
        )

    def log(self, step: int) -> None:
        """Write the means since the last line."""
        self.flush()
        settings, work = self.config.train, self.metrics.work_a_second()
        line = self.metrics.pop_means(
            step=step,
            samples=step * self.global_batch_size,
            epoch=self.dataset.epochs(step * self.global_batch_size),
            lr=learning_rate(settings, step - 1, self.global_batch_size),
            grad_norm=self.norm,
        )
        if self.warm_graphs is not None:
            line["recompiles"] = compiled_graphs() - self.warm_graphs
        if self.peak is not None:
            line |= {"mfu": work / self.peak, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        if self.accelerator.is_main_process:
            append_json_line(self.run / "metrics.jsonl", line)
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)

    def log_held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Write the losses by name that `HeldOutLoss` has measured after a step."""
        if self.accelerator.is_main_process:
            append_json_line(self.run / "held_out.jsonl", {"step": step, **losses})
            self.accelerator.log(dict(losses), step=step)

    def _flops(self, context: int, images: int, cells: int) -> float:
        """Useful FLOPs of one sample of this process, of so many latent cells."""
        if (context, images, cells) not in self._work:
            forward = forward_flops(
                self.model, cells // self.pipeline.transformer.config.patch_size**2, context, images
            )
            frozen = self.objective.frozen_passes * forward["transformer"]
            forward["transformer"] *= self.objective.levels
            settings = self.config.train
            self._work[context, images, cells] = useful_flops(forward, settings.trainable, adapted(settings)) + frozen
        return self._work[context, images, cells]


def sample_name(dataset: Dataset, number: int) -> str:
    """File and record of the sample of that number; in the miniature world, its case."""
    if hasattr(dataset, "record"):
        return dataset.record(number).where
    return f"{dataset.case(number).kind}-{number}"
