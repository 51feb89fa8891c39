"""Model, optimisers and VAE as the config and the launch want them: frozen, compiled, wrapped."""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from mige.checkpoints.lora import add_lora
from mige.config import Config, TrainConfig
from mige.inference.pipeline import MIGEPipeline
from mige.models.mige import MIGEModel
from mige.training.optimizers import build_optimizers
from mige.training.pretrained import adapters_to_float32


def prepare_vae(config: Config, pipeline: MIGEPipeline, accelerator: Accelerator) -> AutoencoderKL:
    """The frozen VAE that encodes in training, outside the trained model."""
    vae = pipeline.vae.to(accelerator.device).requires_grad_(False)
    if config.data.world and config.train.precision != "float32":  # encodes anew at every step: be fast
        vae = copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.channels_last)
    if "vae" in config.train.compile:
        vae.encoder.compile(dynamic=True)  # the number of images differs from batch to batch
    return vae


def prepare_model(
    settings: TrainConfig, model: MIGEModel, accelerator: Accelerator
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Freeze, add adapters, compile, wrap."""
    model.freeze(settings.trainable)
    if settings.trainable == "lora":
        add_lora(model.transformer, settings.lora_rank)
        adapters_to_float32(model.transformer)
    model.checkpoint_gradients(settings.gradient_checkpointing)
    model.compile_blocks([part for part in settings.compile if part != "vae"])
    model.train()
    zero2 = accelerator.distributed_type is DistributedType.DEEPSPEED
    tower = model.encoder.image_encoder
    if zero2:
        given = accelerator.state.deepspeed_plugin.deepspeed_config
        given["train_micro_batch_size_per_gpu"] = settings.batch_size
        given["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
        given["gradient_clipping"] = settings.max_grad_norm  # it clips by itself, at 1 unless told
    else:
        model.to(accelerator.device)
    if accelerator.is_fsdp2:
        keep_precision(accelerator)
        if settings.trainable != "all":  # the frozen tower has a precision of its own
            accelerator.state.fsdp_plugin.ignored_modules = [tower.embeddings, tower.encoder]
    frozen = [(p, p.data) for p in tower.parameters() if not p.requires_grad]
    wrapped, *optimizers = accelerator.prepare(model, *build_optimizers(settings, model, accelerator.device))
    if zero2:  # it casts all there is; the frozen tower has a precision of its own
        for parameter, data in frozen:
            parameter.data = data.to(accelerator.device)
    return wrapped, optimizers


def keep_precision(accelerator: Accelerator) -> None:
    """FSDP2 in bfloat16 reduces gradients in float32 and leaves inputs, timesteps among them, as they are."""
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
