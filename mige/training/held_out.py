"""The loss of records that nothing is learnt from, at every checkpoint: by task, and by quartile of the timestep.

Each record is asked at four noise levels, one in each quarter of the timesteps, with noise that is the same at every
checkpoint, so that two of them differ by the weights alone. Nothing is dropped, and the networks' own dropout is off.

Letters: B samples, K = 4 noise levels of each; the first level of all samples comes first.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mige.config import Config
from mige.data.batch import TrainingSample, collate
from mige.data.dataset import JointDataset, Mixture
from mige.data.mapping import map_records
from mige.data.randomness import Dropout
from mige.diffusion.gaussian import Diffusion
from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.training.data import check_set
from mige.training.ema import AveragedWeights
from mige.training.metrics import QUARTILES
from mige.training.objective import NoiseObjective

_LEVELS = len(QUARTILES)


class HeldOutLoss:
    """Measures `train.held_out`. Raises BadRecordsError for records that cannot be trained on, as a training's own."""

    def __init__(self, config: Config, pipeline: MIGEPipeline, diffusion: Diffusion):
        records = [
            record for file in config.train.held_out for record in check_set(map_records(Path(file)), config.data)
        ]
        data = JointDataset(
            Mixture([records], [1.0]),
            pipeline.tokenizer,
            seed=0,
            size=config.data.size,
            latent_shape=pipeline.latent_shape(config.data.size, config.data.size),
            vision_size=pipeline.image_encoder.config.image_size,
            dropout=Dropout(0, 0, 0),
            noise_levels=_LEVELS,
        )
        self.records = _Quartered(data)
        self.objective = NoiseObjective(diffusion, _LEVELS, snr_gamma=None, snr_power=0)
        self.batch_size, self.workers = config.train.batch_size, config.data.workers

    def measure(
        self, model: nn.Module, vae: AutoencoderKL, ema: AveragedWeights | None, accelerator: Accelerator
    ) -> dict[str, float]:
        """Mean losses by name ("held_out/loss" over all), of the averaged parameters if there are any.

        Called by every process, each with its share of the records; `model`: not wrapped by DDP. Its parameters and
        the generators are afterwards what they were.
        """
        sums = torch.zeros(2, len(Task), _LEVELS, dtype=torch.float64, device=accelerator.device)  # losses, numbers
        trained = [p for p in model.parameters() if p.requires_grad]
        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),  # compiled without gradients, all would be compiled anew
                nullcontext() if ema is None else ema.applied(trained),
            ):
                for batch, weight_B in self._batches(accelerator):
                    batch, weight_B = batch.to(accelerator.device), weight_B.to(accelerator.device)
                    total_KB = self.objective(model, vae, batch, accelerator.autocast).loss.total.double()
                    for level, total_B in enumerate(total_KB.view(_LEVELS, -1)):
                        place = batch.task_B, torch.full_like(batch.task_B, level)
                        sums[0].index_put_(place, total_B * weight_B, accumulate=True)
                        sums[1].index_put_(place, weight_B, accumulate=True)
        finally:
            model.train()
        return _means(accelerator.reduce(sums, "sum").cpu())

    def _batches(self, accelerator: Accelerator):
        """Of this process, as many as of every other; what is shown twice for that weighs nothing."""
        many, processes = len(self.records), accelerator.num_processes
        places = range(accelerator.process_index, -(-many // processes) * processes, processes)
        loader = DataLoader(
            torch.utils.data.Subset(self.records, [place % many for place in places]),
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
        )
        for number, batch in enumerate(loader):
            own = places[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch, torch.tensor([float(place < many) for place in own], dtype=torch.float64)


class _Quartered(Dataset):
    """Samples whose K times lie in the K quarters of the timesteps."""

    def __init__(self, data: JointDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> TrainingSample:
        sample, quarter = self.data[index], self.data.train_timesteps // _LEVELS
        times = tuple(level * quarter + time % quarter for level, time in enumerate(sample.times))
        return dataclasses.replace(sample, times=times)


def _means(sums: Tensor) -> dict[str, float]:
    """Of sums and numbers [2, tasks, levels]: over all, of each task that there is, of each quartile."""
    losses, numbers = sums
    means = {"held_out/loss": losses.sum() / numbers.sum()}
    for place, task in enumerate(Task):
        if numbers[place].any():
            means[f"held_out/loss/{task}"] = losses[place].sum() / numbers[place].sum()
    for level, name in enumerate(QUARTILES):
        means[f"held_out/loss/t {name}"] = losses[:, level].sum() / numbers[:, level].sum()
    return {name: float(mean) for name, mean in means.items()}
