"""The training loop, on accelerate: one process or many, DDP, FSDP2 or DeepSpeed ZeRO-2.

A step is a pure function of the parameters, the seed and the step's number: data, noise, times and dropout are drawn
from (seed, sample index), the networks' own dropout from (seed, micro-batch, process). So a run that was killed and
resumed equals one that never stopped, bit for bit.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env

from mige.config import Config, ConfigError
from mige.data.batch import TrainingBatch
from mige.diffusion.gaussian import Diffusion
from mige.training import checkpointing, precision, sampling
from mige.training.adapters import save_adapters
from mige.training.clipping import clip_gradients
from mige.training.data import load_dataset
from mige.training.ema import AveragedWeights
from mige.training.errors import TrainingError
from mige.training.held_out import HeldOutLoss
from mige.training.loader import build_loader, timed
from mige.training.monitor import Monitor
from mige.training.objective import Judged, NoiseObjective, Objective
from mige.training.optimizers import check_optimizer, learning_rate
from mige.training.prepare import DDP, prepare_model, prepare_vae
from mige.training.pretrained import check_shardable, load_pretrained
from mige.training.resume import ANY, check_invariants, frozen_digest, resume_invariants
from mige.training.run_folder import check_run_folder, check_trackers, log_to_terminal, open_run_folder
from mige.training.signals import PREEMPTED, StopRequest, report_outcome
from mige.training.state import TrainingState
from mige.training.warm_up import warm_up, warm_up_batches
from mige.utils.progress import Progress

log = logging.getLogger("mige")


class Trainer:
    """A training in a run folder. Everything that the config names is opened here; nothing is written before `run`.

    Args:
        resume: the checkpoint that `run` is going to resume; None: the newest of the run folder, if there is one.
    """

    def __init__(self, config: Config, run: Path, resume: Path | None = None):
        self.run_folder, self.step = run, 0
        check_run_folder(run)
        check_trackers(config.train.trackers)
        check_optimizer(config.train)
        if not config.data.sets and not config.data.world:
            raise ConfigError("data.sets is empty, and so is data.world: name a file of records or kinds of tasks")
        config, chosen = self._resolve(config, resume)
        self.config, settings = config, config.train
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            kwargs_handlers=[DDP],
            # As a number a launch file's own, which counts as 1 where it has none, would be taken instead.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
            log_with=list(settings.trackers) or None,
            project_dir=run,
        )
        self.device, self.stop = self.accelerator.device, StopRequest()
        if self.accelerator.is_main_process:
            log_to_terminal()
            log.info(chosen)
        zero2 = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        self.sharding = "ZeRO-2" if zero2 else "FSDP2" if self.accelerator.is_fsdp2 else "none"
        if self.sharding != "none":
            check_shardable(settings, self.sharding)
        self.pipeline = load_pretrained(config, self.device)
        self.frozen = frozen_digest(self.pipeline, settings.trainable)
        self.dataset = load_dataset(config, self.pipeline)
        self.sample_records = sampling.load_sample_records(settings, self.pipeline)
        self.diffusion, self.plain = Diffusion(), self.pipeline.model
        self.held_out = HeldOutLoss(config, self.pipeline, self.diffusion) if settings.held_out else None
        self.vae = prepare_vae(config, self.pipeline, self.accelerator)
        self.objective = self._make_objective()
        self.model, self.optimizers = prepare_model(settings, self.plain, self.accelerator)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = None
        if settings.ema is not None:
            self.ema = AveragedWeights(self.trained, settings.ema)
            self.accelerator.register_for_checkpointing(self.ema)  # with ZeRO-2, and of version 0.1's checkpoints
        self.state = TrainingState(self.plain, self.optimizers, self.ema)
        self.checkpoints = checkpointing.CheckpointWriter(self.accelerator, run, settings.keep_checkpoints)
        timesteps = len(self.diffusion.tables["log_beta"])
        self.monitor = Monitor(
            self.accelerator, config, run, self.pipeline, self.dataset, timesteps, self.objective, self.checkpoints.wait
        )
        self.global_batch_size = self.monitor.global_batch_size
        many = sum(p.numel() for p in self.trained)
        log.info("%s trained parameters, %d samples a step", f"{many:,}", self.global_batch_size)

    def _resolve(self, config: Config, resume: Path | None) -> tuple[Config, str]:
        """The config with its precision chosen, and a line that says so; starts the group of processes."""
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=checkpointing.PATIENCE)
        zero2, fsdp2 = (parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
        checkpoint = checkpointing.checkpoint_to_resume(self.run_folder, resume)
        saved = None if checkpoint is None else checkpointing.read_progress(checkpoint)[1]
        return precision.resolve(config, saved, state, "ZeRO-2" if zero2 else "FSDP2" if fsdp2 else "none")

    def _make_objective(self) -> Objective:
        """What is trained, made before the model is frozen and wrapped."""
        settings = self.config.train
        if self.config.distillation is not None:
            raise ConfigError("the config has a section distillation: train it by train_scripts/distill.py")
        return NoiseObjective(self.diffusion, settings.noise_levels, settings.snr_gamma, settings.snr_power)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, resume: Path | None = None) -> int:
        """Train to the last step; returns 0, or PREEMPTED after a stop. `resume`: a checkpoint; None: the newest."""
        checkpoint = checkpointing.checkpoint_to_resume(self.run_folder, resume)
        if checkpoint is not None:
            self.step, saved = checkpointing.read_progress(checkpoint)
            check_invariants(saved, self._invariants(saved), str(checkpoint))
        with self.stop.listening():
            load = partial(self._load, checkpoint)
            with open_run_folder(self.accelerator, self.config, self.run_folder, self.step, load):
                self._warm_up()
                code = self._loop()
            # Not after an error: it may wait for the other processes, they for this one, and it would go unheard.
            self.accelerator.wait_for_everyone()  # one that leaves may end those that still talk to it
            self.accelerator.state.destroy_process_group()
            report_outcome(str(code))
        return code

    def _warm_up(self) -> None:
        """Compile what the steps need; the parameters stay as they are."""
        if not self.config.train.compile or self.sharding == "ZeRO-2":  # whose engine counts every backward pass
            return
        widths = self._widths()
        log.info("warm-up: compiling for contexts of %s positions; train.compile=[] does without", widths)
        batches = warm_up_batches(self.config, self.pipeline, widths)
        self.monitor.warm_graphs = warm_up(batches, self.device, self._loss, self.accelerator.backward)
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _widths(self) -> list[int]:
        """Of the contexts that are to be expected."""
        encoder = self.plain.encoder  # pipeline.model is made anew at each call, with an encoder that pads nothing
        return encoder.widths if encoder.pad_to > 1 else encoder.widths[-1:]  # the VAE alone sees no context

    def _loop(self) -> int:
        settings, main = self.config.train, self.accelerator.is_main_process
        loader = build_loader(self.config, self.dataset, self.accelerator, self.step)
        batches = timed(loader, self.monitor.metrics)
        bar = Progress(total=settings.steps, initial=self.step, unit="step", disable=not main)
        while self.step < settings.steps:
            self._train_step(batches)
            self.monitor.flush(all_but=1)
            self.step += 1
            bar.update()
            if self.step % settings.log_every == 0:
                self.monitor.log(self.step)
            self.checkpoints.check()
            last = self.step == settings.steps
            stop = self.monitor.stop_everywhere  # as of the step before: this one's would be waited for
            if due := self.step % settings.checkpoint_every == 0 or last or stop:
                self._save(judge=last or not stop)
            if settings.sample_every and (self.step % settings.sample_every == 0 or last):
                self._sample(saved=due)
            if stop and not last:
                self.checkpoints.wait()
                log.info("Ctrl-C or SIGTERM: saved at step %d", self.step)
                return PREEMPTED
        self.checkpoints.wait()
        bar.close()
        return 0

    def _train_step(self, batches: Iterator) -> None:
        """One optimiser step."""
        settings = self.config.train
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(settings, self.step, self.global_batch_size)
        self.accelerator.step = 0  # it is restored with a checkpoint, which may have been saved with other windows
        for micro in range(settings.gradient_accumulation_steps):
            batch = self._next(batches, micro).to(self.device)
            with self.accelerator.accumulate(self.model):
                self._seed_dropout(micro)
                judged, norm = self._loss(batch), None
                self.accelerator.backward(judged.mean())
                if self.accelerator.sync_gradients:
                    norm = clip_gradients(self.accelerator, self.optimizers, self.trained, settings.max_grad_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                self.monitor.add(self.step, micro, batch, judged, norm, self.stop.given)
        if self.ema is not None:
            self.ema.step(self.trained)

    def _next(self, batches: Iterator, micro: int) -> TrainingBatch:
        try:
            return next(batches)
        except (OSError, ValueError) as error:  # a file that has gone or changed since the check
            self.monitor.fail_to_read(self.step, micro, error)

    def _seed_dropout(self, micro: int) -> None:
        """The networks' own dropout (Q-Former, T5) restarts from a known state in every micro-batch."""
        settings, accelerator = self.config.train, self.accelerator
        number = (self.step * settings.gradient_accumulation_steps + micro) * accelerator.num_processes
        torch.manual_seed((settings.seed << 32) + number + accelerator.process_index)

    def _loss(self, batch: TrainingBatch) -> Judged:
        return self.objective(self.model, self.vae, batch, self.accelerator.autocast)

    # ---- samples and checkpoints -------------------------------------------------------------------------------------

    def _sample(self, saved: bool) -> None:
        """The fixed records into samples/step-N of the run. If it fails, this step is saved before the run ends."""
        settings, pipeline, failure = self.config.train, self.pipeline, None
        averaged = {} if self.ema is None else self.ema.named(self.plain, self.trained)  # both by all processes
        state = self.accelerator.get_state_dict(self.model) if self.accelerator.is_fsdp2 else None
        if self.accelerator.is_main_process:
            folder = self.run_folder / "samples" / f"step-{self.step:08d}"
            try:
                if state is not None:
                    state |= averaged
                    pipeline, averaged = pipeline.with_weights(state).to(self.device), {}
                named = dict(self.plain.named_parameters(remove_duplicate=False))
                with sampling.holding(named, averaged):
                    sampling.sample(self.sample_records, pipeline, settings, folder, self.step)
            except Exception as error:  # whatever it is, the training so far is worth more
                failure = error
            self.plain.train()
        if sampling.agree(self.accelerator, failure is not None):
            if not saved:
                self._save(judge=False)
            self.checkpoints.wait()
            raise TrainingError(
                f"sampling at step {self.step} failed: {failure or 'in another process'}; the checkpoint of this step "
                "is saved: mend it or set train.sample_every=0, then resume"
            ) from failure

    def _invariants(self, saved: Mapping[str, Any] | None = None) -> dict:
        """What must stay; `saved`: of a checkpoint that it is compared with."""
        sharding = "ZeRO-2" if self.sharding == "ZeRO-2" else ANY
        if saved is not None and saved.get("sharding") in ("none", "FSDP2"):  # version 0.1's, in accelerate's layouts
            sharding = self.sharding
        return {"frozen": self.frozen} | resume_invariants(
            self.config,
            self.dataset,
            global_batch_size=self.global_batch_size,
            sharding=sharding,
            processes=self.accelerator.num_processes,
        )

    def _load(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        checkpointing.load_checkpoint(self.accelerator, checkpoint, self.state)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in checkpointing.abandon_others(self.run_folder, checkpoint):
                log.warning("not of this line any more, moved to %s: delete it when you do not need it", path)
        log.info("resumed from %s", checkpoint)

    def _save(self, judge: bool) -> None:
        """`judge`: measure the held-out loss first; who is asked to stop has no time for it."""
        self.monitor.flush()  # a checkpoint is good only if the loss was
        losses = {}
        if judge and self.held_out is not None:
            losses = self.held_out.measure(self.plain, self.vae, self.ema, self.accelerator)
            self.monitor.log_held_out(self.step, losses)
        started, loss = time.perf_counter(), losses.get("held_out/loss")
        state = None if self.sharding == "ZeRO-2" else self.state.tensors()
        self.checkpoints.save(self.step, self._invariants(), state, self._export, loss)
        log.info("saving step %d; training stood for %.1f s", self.step, time.perf_counter() - started)

    def _export(self, folder: Path) -> Callable[[], None]:
        """What inference loads: a pipeline folder of the averaged parameters if there are any, or the adapters.

        What is returned writes it, in the main process alone, of the state that was written: no second copy is taken.
        """
        main = self.accelerator.is_main_process
        if self.config.train.trainable == "lora":
            if main:
                save_adapters(self.plain, folder / "lora")
            return lambda: None
        if self.sharding != "ZeRO-2":
            rest, read = self.state.untrained(), partial(self.state.read_weights, folder / "state")
            return lambda: self.pipeline.with_weights(rest | read()).save_pretrained(folder / "model")
        state = self.accelerator.get_state_dict(self.model)
        averaged = {} if self.ema is None else self.ema.named(self.plain, self.trained)
        trained = [name for name, p in self.plain.named_parameters(remove_duplicate=False) if p.requires_grad and main]
        for name in trained:
            state[name] = averaged.get(name, state[name]).detach().to("cpu", state[name].dtype, copy=True)
        return lambda: self.pipeline.with_weights(state).save_pretrained(folder / "model")
