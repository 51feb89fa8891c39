"""The trainable whole: multimodal encoder and DiT as one module.

Letters: B samples, R images of all samples, L context positions, N patches, C channels; latents are [B, 4, h, w].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, T5EncoderModel

from mige.diffusion.conditioning import Condition
from mige.models.encoder import MultimodalEncoder
from mige.models.fusion import MIGEFusion
from mige.models.instruction import Instruction

MODEL_PREFIXES = {
    "image_encoder": "encoder.image_encoder.",
    "qformer": "encoder.qformer.",
    "fusion": "encoder.fusion.",
    "text_encoder": "encoder.text_encoder.",
    "transformer": "transformer.",
}
"""Where the parts of a checkpoint folder sit in the model's state dict."""


PARTS = ("transformer", "text_encoder", "image_encoder", "qformer")
"""The parts with repeated blocks."""


class MIGEModel(nn.Module):
    """Encoder and DiT. `forward` is the training pass; inference calls `encode` once and `denoise` at every step."""

    def __init__(
        self,
        image_encoder: Blip2VisionModel,
        qformer: Blip2QFormerModel,
        fusion: MIGEFusion,
        text_encoder: T5EncoderModel,
        transformer: PixArtTransformer2DModel,
    ):
        super().__init__()
        self.encoder = MultimodalEncoder(image_encoder, qformer, fusion, text_encoder)
        self.transformer = transformer

    def forward(
        self,
        x_t_BCHW: Tensor,
        t_B: Tensor,
        instructions: Sequence[Instruction] = (),
        vision_RCHW: Tensor | None = None,
        references_RCHW: Tensor | None = None,
        source_BCHW: Tensor | None = None,
        drop_text_B: Tensor | bool = False,
        drop_source_B: Tensor | bool = False,
        *,
        condition: Condition | None = None,
    ) -> Tensor:
        """One training pass: encode, drop conditions, denoise -> [K B, 8, h, w]; arguments as in `encode`, `denoise`.

        `x_t_BCHW`, `t_B`: K noise levels of every sample, the first of all samples first: [K B, 4, h, w] and [K B].
        `condition`: one that is made already, in place of all that it would be made of.
        """
        if condition is None:
            condition = self.encode(instructions, vision_RCHW, references_RCHW, source_BCHW)
            condition = condition.drop(self.null_context, text=drop_text_B, source=drop_source_B)
        levels = len(t_B) // len(condition.context_BLC)
        return self.denoise(x_t_BCHW, t_B, Condition.stack([condition] * levels))

    def encode(
        self,
        instructions: Sequence[Instruction],
        vision_RCHW: Tensor,
        references_RCHW: Tensor,
        source_BCHW: Tensor,
    ) -> Condition:
        """Everything that does not depend on the timestep.

        Args:
            instructions: B of them, with R images in all.
            vision_RCHW: float [R, 3, 224, 224], the images for the vision tower.
            references_RCHW: float [R, 4, h', w'], *unscaled* VAE latents of the same images.
            source_BCHW: float [B, 4, h, w], *scaled* latents of the source images, zeros for none.
        """
        patches_RNC = self.patchify(references_RCHW)
        context_BLC, mask_BL = self.encoder(instructions, vision_RCHW, patches_RNC)
        return Condition(context_BLC, mask_BL, source_BCHW)

    def patchify(self, latents_RCHW: Tensor) -> Tensor:
        """The DiT's own patch convolution without position table: [R, 4, h, w] -> [R, N, 1152]."""
        conv = self.transformer.pos_embed.proj
        weight, bias = conv.weight.to(latents_RCHW.device), conv.bias.to(latents_RCHW.device)  # DiT may be off-loaded
        padded = torch.cat([latents_RCHW, torch.zeros_like(latents_RCHW)], dim=1).to(weight)  # no source beside it
        return F.conv2d(padded, weight, bias, stride=conv.stride).flatten(2).transpose(1, 2)

    def denoise(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """Noise estimate and variance mix [B, 8, h, w] of noisy latents x at model times t, float in 0..999."""
        latents = torch.cat([x_BCHW, condition.source_BCHW.to(x_BCHW)], dim=1)  # [B, 8, h, w]
        return self.transformer(
            latents.to(self.transformer.dtype),
            encoder_hidden_states=condition.context_BLC.to(self.transformer.dtype),
            encoder_attention_mask=condition.mask_BL,
            timestep=t_B.to(self.timestep_dtype).float(),
            return_dict=False,
        )[0]

    def freeze(self, trainable: str) -> None:
        """Choose what trains: "all" all, "full" all but the vision tower, "text_encoder_frozen" neither
        that nor T5, "dit" the DiT but for its patch convolution, which the encoder reads too, "lora" nothing.

        The tower's last norm trains with "full", as in the released weights. What nothing reads does not train: where
        images take no positions, the parts that see them. Call before the optimiser is built.
        """
        self.requires_grad_(trainable != "lora")
        tower = self.encoder.image_encoder
        tower.embeddings.requires_grad_(trainable == "all")
        tower.encoder.requires_grad_(trainable == "all")
        if trainable == "text_encoder_frozen":
            self.encoder.text_encoder.requires_grad_(False)
        if trainable == "dit":
            self.encoder.requires_grad_(False)
            self.transformer.pos_embed.requires_grad_(False)
        if self.encoder.fusion.config.num_queries == 0:
            for part in (tower, self.encoder.qformer, self.encoder.fusion):
                part.requires_grad_(False)

    def checkpoint_gradients(self, parts: Sequence[str]) -> None:
        """Recompute the blocks' activations in the backward pass: of the "transformer", the "text_encoder", or both."""
        if "transformer" in parts:
            self.transformer.enable_gradient_checkpointing()
        if "text_encoder" in parts:
            self.encoder.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_blocks(self, parts: Sequence[str]) -> None:
        """torch.compile every repeated block of these `PARTS` by itself: one graph a kind of block and context width.

        The number of images differs from batch to batch: the blocks that see them are compiled for any number.
        """
        if not parts:
            return
        torch._dynamo.config.recompile_limit = 64  # of one kind of block
        torch._dynamo.config.optimize_ddp = False  # it would split blocks at DDP's buckets; they are small enough
        # Every width is compiled anew. Few batches of prompts with images are shorter than half of the longest.
        self.encoder.pad_to, self.encoder.pad_from = 64, max(64, self.encoder.fusion.config.max_tokens // 128 * 64)
        # Its tokens come in the order of the convolution: the first block would be compiled apart from the others.
        self.transformer.pos_embed.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
        # A step calls 130 blocks, and looks through a compiled one's guards at each: those on the layers of torch.nn
        # are a tenth of the host's time. They do not change while a model trains; what samples runs as it is.
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
        for part in parts:
            for block in self.blocks([part]):
                block.compile(dynamic=part in ("image_encoder", "qformer"), options=options)

    def blocks(self, parts: Sequence[str] = PARTS) -> list[nn.Module]:
        """The repeated blocks of these parts."""
        encoder = self.encoder
        lists = {
            "transformer": self.transformer.transformer_blocks,
            "text_encoder": encoder.text_encoder.encoder.block,
            "image_encoder": encoder.image_encoder.encoder.layers,
            "qformer": encoder.qformer.encoder.layer,
        }
        return [block for part in parts for block in lists[part]]

    @property
    def null_context(self) -> Tensor:
        """Float [max_tokens, text width]: what a dropped prompt reads."""
        return self.encoder.fusion.null_context

    @property
    def timestep_dtype(self) -> torch.dtype:
        """The dtype timesteps are rounded to, a fact of the weights (see `MIGEFusion`)."""
        return getattr(torch, self.encoder.fusion.config.timestep_dtype)
