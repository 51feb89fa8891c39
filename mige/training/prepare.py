"""Model, optimisers and VAE as the config and the launch want them: frozen, compiled, wrapped."""

import copy
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from diffusers import AutoencoderKL
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mige.config import Config, TrainConfig
from mige.inference.pipeline import MIGEPipeline
from mige.models.mige import MIGEModel
from mige.training.adapters import add_adapters
from mige.training.optimizers import build_optimizers

# Gradients lie in the buckets that are reduced: no copies. Buckets of 250 MB keep NVLink busy. Buffers never change.
DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=250, broadcast_buffers=False)

_KEPT = 0.25  # of a card's memory that gathered blocks may take until the step's end


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
        add_adapters(settings, model)
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
        keep_precision(settings, accelerator)
        if settings.trainable != "all":  # the frozen tower has a precision of its own
            accelerator.state.fsdp_plugin.ignored_modules = [tower.embeddings, tower.encoder]
            if settings.precision == "bfloat16":  # its last norm trains in float32, and a unit has one dtype
                fully_shard(tower.post_layernorm, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    frozen = [(p, p.data) for p in tower.parameters() if not p.requires_grad]
    wrapped, *optimizers = accelerator.prepare(
        model, *build_optimizers(settings, model, accelerator.device, sharded=accelerator.is_fsdp2)
    )
    if zero2:  # it casts all there is; the frozen tower has a precision of its own
        for parameter, data in frozen:
            parameter.data = data.to(accelerator.device)
    if accelerator.is_fsdp2:
        gather_ahead(model, settings, accelerator.device)
    return wrapped, optimizers


def gather_ahead(model: MIGEModel, settings: TrainConfig, device: torch.device) -> None:
    """A block of FSDP2 is gathered while the one before it computes, and kept until the step ends where there is room.

    Those of the text encoder and of the DiT, which all steps run through; without references the Q-Former rests.
    """
    if device.type == "cuda":
        trained = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # bytes, whole and in bfloat16
        if trained <= _KEPT * torch.cuda.get_device_properties(device).total_memory:
            model.set_reshard_after_forward(False)
    for part in (model.encoder.text_encoder, model.transformer):
        blocks = [module for module in part.modules() if isinstance(module, FSDPModule)]
        for before, after in itertools.pairwise(blocks):
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])


def keep_precision(settings: TrainConfig, accelerator: Accelerator) -> None:
    """FSDP2 in bfloat16 reduces gradients in float32 and leaves inputs, timesteps among them, as they are."""
    if settings.precision != "float32":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
