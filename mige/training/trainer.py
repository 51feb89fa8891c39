"""The training loop, on accelerate: one process or many, DDP, FSDP2 or DeepSpeed ZeRO-2.

A step is a pure function of the weights, the seed and the step's number: data, noise, times and dropout are drawn from
(seed, sample counter), the networks' own dropout from (seed, micro-batch, process). So a run that was killed and
resumed equals one that never stopped, bit for bit.
"""

import copy
import json
import logging
import math
import os
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from mige.checkpoints.lora import add_lora, save_lora
from mige.config import Config, ConfigError, TrainConfig
from mige.data.dataset import Counters, TrainingBatch, collate
from mige.data.parsing import read_records
from mige.data.synthetic.stream import collate_world
from mige.diffusion.gaussian import Diffusion, Loss
from mige.diffusion.solver import DPMSolver2M
from mige.inference import run as inference
from mige.inference.pipeline import MIGEPipeline
from mige.models import vae as latents
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.mige import MODEL_PREFIXES
from mige.training import checkpointing as training_state
from mige.training.checkpointing import TrainingError
from mige.training.data import load_dataset
from mige.training.ema import AveragedWeights
from mige.training.metrics import Metrics, forget_after, forward_flops, matrix_rate, useful_flops, write_line
from mige.training.optimizers import build_optimizers, learning_rate

PREEMPTED = 75
"""Exit code after SIGTERM: the checkpoint is saved, start the same command again (EX_TEMPFAIL)."""

log = logging.getLogger("mige")


@dataclass(frozen=True)
class Watched:
    """What a micro-batch gave, still on its way from the GPU: reading it at once would leave the GPU without work."""

    step: int
    ids: tuple[str, ...]  # the samples of this process
    mine: Tensor  # float32 [K B], their losses
    everyone: Tensor  # float32 [5, all samples]: mse, vb, place in `Task`, time, whether their process is to stop
    norm: Tensor | None  # of the gradient, where an optimiser step ended
    work: float  # useful FLOPs of this process


class Trainer:
    """A run in a folder: config.json, metrics.jsonl, log.txt, checkpoints/, samples/."""

    def __init__(self, config: Config, run: Path):
        self.config, self.run_folder = config, run
        settings = config.train
        self.accelerator = Accelerator(
            # As a number a launch file's own, which counts as 1 where it has none, would be taken instead.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
            log_with=list(settings.trackers) or None,
            project_dir=run,
        )
        self.device = self.accelerator.device
        self.global_batch_size = (
            settings.batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.zero2 = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        self.step, self.stopping, self.all_stop = 0, False, False
        self.unread: deque[Watched] = deque()
        if self.zero2 or self.accelerator.is_fsdp2:
            check_shardable(settings, "ZeRO-2" if self.zero2 else "FSDP2")
        self._open_run()
        self.pipeline = load_start(config, self.device)
        self.dataset = load_dataset(config, self.pipeline)
        self.diffusion = Diffusion()
        self._prepare()

    def _open_run(self) -> None:
        if self.accelerator.is_main_process:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            log_to(self.run_folder / "log.txt")
            inference.write_text(self.run_folder / "config.json", json.dumps(self.config.dump(), indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("mige")

    def _prepare(self) -> None:
        """Freeze, compile, wrap; the VAE stays outside the trained model."""
        settings = self.config.train
        self.pipeline.vae.to(self.device).requires_grad_(False)
        self.vae = self.pipeline.vae
        if self.config.data.world and self.accelerator.mixed_precision == "bf16":  # encodes anew at every step: be fast
            self.vae = copy.deepcopy(self.vae).to(torch.bfloat16, memory_format=torch.channels_last)
        model = self.pipeline.model
        model.freeze(settings.trainable)
        if settings.trainable == "lora":
            add_lora(model.transformer, settings.lora_rank)
        model.checkpoint_gradients(settings.gradient_checkpointing)
        model.compile_blocks([part for part in settings.compile if part != "vae"])
        if "vae" in settings.compile:
            self.vae.encoder.compile(dynamic=True)  # the number of pictures differs from batch to batch
        model.train()
        if self.zero2:
            given = self.accelerator.state.deepspeed_plugin.deepspeed_config
            given["train_micro_batch_size_per_gpu"] = settings.batch_size
            given["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
            given["gradient_clipping"] = settings.max_grad_norm  # it clips by itself, at 1 unless told
        else:
            model.to(self.device)
        if self.accelerator.is_fsdp2 and settings.trainable != "all":  # the frozen tower has a precision of its own
            tower = model.encoder.image_encoder
            self.accelerator.state.fsdp_plugin.ignored_modules = [tower.embeddings, tower.encoder]
        frozen = [(p, p.data) for p in model.encoder.image_encoder.parameters() if not p.requires_grad]
        self.plain, self.work, self.queries = model, {}, self.pipeline.fusion.config.num_queries
        self.model, *self.optimizers = self.accelerator.prepare(model, *build_optimizers(settings, model, self.device))
        if self.zero2:  # it casts all there is; the frozen tower has a precision of its own
            for parameter, data in frozen:
                parameter.data = data.to(self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = None
        if settings.ema is not None:
            self.ema = AveragedWeights(self.trained, settings.ema)
            self.accelerator.register_for_checkpointing(self.ema)
        many = sum(p.numel() for p in self.trained)
        log.info("%s trained values, %d samples a step", f"{many:,}", self.global_batch_size)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, resume: Path | None = None) -> int:
        """Train to the last step; returns 0, or PREEMPTED after SIGTERM. `resume`: a checkpoint; None: the newest."""
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            self._resume(resume)
            code = self._loop()
        finally:
            signal.signal(signal.SIGTERM, before)
            for tracker in self.accelerator.trackers:
                tracker.finish()
        # Not after an error: it may wait for the other processes, they for this one, and the error would go unheard.
        self.accelerator.state.destroy_process_group()
        return code

    def _stop(self, *_) -> None:
        self.stopping = True

    def _loop(self) -> int:
        settings, main = self.config.train, self.accelerator.is_main_process
        metrics, batches = Metrics(settings.noise_levels), iter(self._loader())
        rate = matrix_rate(self.device)
        bar = tqdm(total=settings.steps, initial=self.step, unit="step", disable=not main)
        while self.step < settings.steps:
            self._train_step(batches)
            self._read(metrics, all_but=1)
            self.step += 1
            bar.update()
            if self.step % settings.log_every == 0:
                self._log(metrics, self._read(metrics), rate)
            last = self.step == settings.steps
            stop = self.all_stop  # as of the step before, which is read by now: asking for this one would wait for it
            if self.step % settings.checkpoint_every == 0 or last or stop:
                self._read(metrics)  # a checkpoint is good only if the loss was
                self._save()
            if settings.sample_every and (self.step % settings.sample_every == 0 or last):
                self._sample()
            if stop and not last:
                log.info("SIGTERM: saved at step %d", self.step)
                return PREEMPTED
        bar.close()
        return 0

    def _loader(self) -> DataLoader:
        settings, accelerator = self.config.train, self.accelerator
        counters = Counters(
            batch=settings.batch_size,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
            accumulate=settings.gradient_accumulation_steps,
            start=self.step,
        )
        workers = self.config.data.workers
        return DataLoader(
            self.dataset,
            batch_sampler=counters,
            collate_fn=collate_world if self.config.data.world else collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_leave_group,
        )

    def _train_step(self, batches) -> None:
        """One optimiser step."""
        settings = self.config.train
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(settings, self.step, self.global_batch_size)
        for micro in range(settings.gradient_accumulation_steps):
            batch = next(batches).to(self.device)
            with self.accelerator.accumulate(self.model):
                self._seed_dropout(micro)
                loss, norm = self._loss(batch), None
                weight = self.diffusion.weight(batch.time_B, settings.snr_gamma, settings.snr_power)
                self.accelerator.backward((loss.total * weight).mean())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.trained, settings.max_grad_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                self._watch(batch, loss, norm)
        if self.ema is not None:
            self.ema.step(self.trained)

    def _seed_dropout(self, micro: int) -> None:
        """The networks' own dropout (Q-Former, T5) restarts from a known state in every micro-batch."""
        number = (self.step * self.config.train.gradient_accumulation_steps + micro) * self.accelerator.num_processes
        torch.manual_seed((self.config.train.seed << 32) + number + self.accelerator.process_index)

    def _loss(self, batch: TrainingBatch) -> Loss:
        x0, references, source = batch.latents(self.vae)
        x0 = x0.repeat(self.config.train.noise_levels, 1, 1, 1)
        x_t = self.diffusion.add_noise(x0, batch.noise_BCHW, batch.time_B)
        with self.accelerator.autocast():
            output = self._forward(self.model, batch, x_t, references, source)
        return self.diffusion.loss(output, x0, x_t, batch.noise_BCHW, batch.time_B)

    @staticmethod
    def _forward(model: nn.Module, batch: TrainingBatch, x_t: Tensor, references: Tensor, source: Tensor) -> Tensor:
        return model(
            x_t,
            batch.time_B.float(),
            batch.instructions,
            batch.vision_RCHW,
            references,
            source,
            batch.drop_text_B,
            batch.drop_source_B,
        )

    # ---- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, batch: TrainingBatch, loss: Loss, norm: Tensor | None) -> None:
        """Collect the losses of all processes, and whether one is to stop, to be read when the GPU has them."""
        tasks = batch.task_B.repeat(self.config.train.noise_levels)
        stopping = torch.full_like(loss.mse, self.stopping)
        rows = torch.stack([loss.mse, loss.vb, tasks.float(), batch.time_B.float(), stopping]).detach()
        everyone = self.accelerator.gather(rows.T.contiguous()).T
        work = sum(self._work(i.length(self.queries), i.pictures) for i in batch.instructions)
        self.unread.append(Watched(self.step, batch.ids, rows[0] + rows[1], everyone, norm, work))

    def _read(self, metrics: Metrics, all_but: int = 0) -> float | None:
        """Read what was watched, but for the newest few; the last gradient norm. Raises if anything is not finite.

        What is read is alike in all processes, so they agree on the step at which a SIGTERM to one of them ends all.
        """
        last = None
        while len(self.unread) > all_but:
            seen = self.unread.popleft()
            mse, vb, task, time, stopping = seen.everyone.cpu()
            self.all_stop |= bool(stopping.any())
            if not (mse + vb).isfinite().all():
                bad = (~seen.mine.isfinite()).reshape(-1, len(seen.ids)).any(0).tolist()
                ids = [id_ for id_, is_bad in zip(seen.ids, bad, strict=True) if is_bad]
                self._fail(seen.step, "the loss is not finite", ids)
            if seen.norm is not None:
                last = float(seen.norm)
                if not math.isfinite(last):
                    self._fail(seen.step, "the gradient is not finite", seen.ids)
            metrics.add(mse, vb, task, time, len(self.diffusion.tables["log_beta"]))
            metrics.work += seen.work
        return last

    def _work(self, context: int, pictures: int) -> float:
        """Useful FLOPs of one sample of this process."""
        if (context, pictures) not in self.work:
            side = self.config.data.size // latents.downscale(self.pipeline.vae)
            tokens = (side // self.pipeline.transformer.config.patch_size) ** 2
            forward = forward_flops(self.plain, tokens, context, pictures)
            forward["transformer"] *= self.config.train.noise_levels
            self.work[context, pictures] = useful_flops(forward, self.config.train.trainable)
        return self.work[context, pictures]

    def _fail(self, step: int, problem: str, ids: Sequence[str]) -> None:
        good = training_state.finished(self.run_folder)
        raise TrainingError(
            f"step {step}: {problem}; records of process {self.accelerator.process_index}: "
            f"{', '.join(ids) or 'none of them'}; last good checkpoint: {good[-1] if good else 'none'}. "
            "Look at these records, lower the learning rate or use a wider dtype, then resume"
        )

    def _log(self, metrics: Metrics, norm: float | None, rate: float | None) -> None:
        settings = self.config.train
        work = metrics.work_a_second()
        line = metrics.line(
            step=self.step,
            samples=self.step * self.global_batch_size,
            epoch=self.step * self.global_batch_size / len(self.dataset),
            lr=learning_rate(settings, self.step - 1, self.global_batch_size),
            grad_norm=norm,
        )
        if rate is not None:
            line |= {"mfu": work / rate, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        if self.accelerator.is_main_process:
            write_line(self.run_folder / "metrics.jsonl", line)
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=self.step)

    def _sample(self) -> None:
        """The fixed records through the present weights, into samples/step-N of the run."""
        settings, pipeline = self.config.train, self.pipeline
        state = self.accelerator.get_state_dict(self.model) if self.accelerator.is_fsdp2 else None  # by all processes
        if self.accelerator.is_main_process:
            records = read_records([Path(file) for file in settings.sample_records]).require()
            if state is not None:
                pipeline = pipeline.with_weights(state).to(self.device)
            pipeline.model.eval()
            name = f"{self.run_folder.name}, step {self.step}"
            how = inference.Settings(model=name, dtype=settings.param_dtype, steps=settings.sample_steps)
            folder = self.run_folder / "samples" / f"step-{self.step:08d}"
            inference.run(records, pipeline, how, folder)
            self.pipeline.model.train()
        self.accelerator.wait_for_everyone()

    # ---- saving and resuming -----------------------------------------------------------------------------------------

    def _fixed(self) -> dict:
        """What decides which sample comes when; with DeepSpeed also how the optimiser's state is split."""
        fixed = {
            "seed": self.config.train.seed,
            "global_batch_size": self.global_batch_size,
            "epoch_samples": len(self.dataset),
        }
        if self.zero2:
            fixed["processes"] = self.accelerator.num_processes
        return fixed

    def _resume(self, checkpoint: Path | None) -> None:
        whole = training_state.finished(self.run_folder)
        checkpoint = checkpoint or (whole[-1] if whole else None)
        if checkpoint is not None:
            self.step = training_state.restore(self.accelerator, checkpoint, self._fixed())
            log.info("resumed from %s", checkpoint)
        if self.accelerator.is_main_process:
            forget_after(self.run_folder / "metrics.jsonl", self.step)

    def _save(self) -> None:
        saved = training_state.save(
            self.accelerator,
            self.run_folder,
            self.step,
            self._fixed(),
            self._export,
            self.config.train.keep_checkpoints,
        )
        log.info("saved %s", saved)

    def _export(self, folder: Path) -> None:
        """The weights for inference: a pipeline folder of the averaged weights if there are any, or the adapters."""
        state = self.accelerator.get_state_dict(self.model)  # gathered, by all processes, where it is sharded
        averaged = {} if self.ema is None else self._averaged()
        if not self.accelerator.is_main_process:
            return
        if self.config.train.trainable == "lora":
            save_lora(self.plain.transformer, folder / "lora")
        else:
            state |= {name: average.to("cpu", state[name].dtype) for name, average in averaged.items()}
            self.pipeline.with_weights(state).save_pretrained(folder / "model")

    def _averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name, a tied one under each of its names; called by all processes."""
        average = dict(zip(map(id, self.trained), self.ema.whole(), strict=True))
        named = self.plain.named_parameters(remove_duplicate=False)
        return {name: average[id(parameter)] for name, parameter in named if id(parameter) in average}


def _leave_group(_: int) -> None:
    """For the data loader's workers: a scheduler's SIGTERM to the process group must not reach them before the save.

    Ignoring it would not do: at an exception Python ends its workers by SIGTERM and waits for them.
    """
    os.setpgid(0, 0)


def log_to(path: Path) -> None:
    """The run's own messages go to the terminal and to a file; accelerate's stay out of both."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in (logging.StreamHandler(), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def check_shardable(settings: TrainConfig, by: str) -> None:
    """Raise TrainingError for what FSDP2 or ZeRO-2 (`by`) cannot split over processes."""
    if by == "FSDP2" and settings.trainable == "lora":
        raise TrainingError("train.trainable is 'lora': its few weights are not sharded; launch without FSDP2 (DDP)")
    if (settings.optimizer, settings.param_dtype) != ("adamw", "float32"):
        raise TrainingError(
            f"train.optimizer is {settings.optimizer!r} on {settings.param_dtype} weights; {by} shards 'adamw' on "
            "float32 weights (and computes in bfloat16): set these, or launch without it"
        )


def check_sizes(config: Config, pipeline: MIGEPipeline) -> None:
    """Raise ConfigError if the config describes another model than the one training starts from.

    The VAE is left out: it is not trained, and its scale factor is a fact of its weights.
    """
    for part in MODEL_PREFIXES:
        there = getattr(pipeline, part).config
        for key, value in getattr(config.model, part).items():
            found = getattr(there, key, None)
            if found != value and (type(value) is int or part == "fusion"):  # other facts the libraries may rewrite
                raise ConfigError(
                    f"model.{part}.{key} is {value!r}, but {config.train.pretrained} has {found!r}: make them equal, "
                    "or train fresh weights with train.pretrained=None"
                )


def load_start(config: Config, device: torch.device) -> MIGEPipeline:
    """The pipeline that training starts from: a checkpoint folder, or fresh weights from the seed.

    Trained parts are in `train.param_dtype`, the frozen vision tower on a GPU in the dtype it was trained with, the VAE
    in float32.
    """
    settings = config.train
    dtype = getattr(torch, settings.param_dtype)
    if settings.pretrained is not None:
        pipeline = MIGEPipeline.from_pretrained(settings.pretrained, dtype=dtype)
        check_sizes(config, pipeline)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            parts = build_parts(config.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        pipeline = MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M())
    if device.type != "cpu" and settings.trainable != "all":
        set_product_dtype(pipeline.image_encoder, getattr(torch, pipeline.fusion.config.vision_dtype))
    return pipeline
