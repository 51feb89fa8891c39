"""The multimodal encoder: images and text of an instruction -> the context the DiT attends to.

Letters: B instructions, L positions, R images of all instructions, Q positions an image, N patches, C channels.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, T5EncoderModel

from mige.models.fusion import MIGEFusion
from mige.models.instruction import Instruction

_PAD = 0  # T5's padding token; its embedding fills masked positions
_HALF = (torch.float16, torch.bfloat16)


def prepare_vision_tower(tower: Blip2VisionModel) -> None:
    """Bring a freshly loaded tower into the state the released model was trained with.

    The last norm has eps 1e-5 (the class takes the blocks' 1e-6). In half precision the embeddings and norms stay in
    float32, so that under autocast the residual stream is float32 and only the matrix products are half.
    """
    tower.post_layernorm.eps = 1e-5
    if _matrix_dtype(tower) in _HALF:
        tower.embeddings.float()
        for module in tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()


def set_product_dtype(tower: Blip2VisionModel, dtype: torch.dtype) -> None:
    """Keep the matrices of the blocks in this dtype; embeddings, norms and their residual stream stay as they are."""
    for module in tower.encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


def _matrix_dtype(tower: Blip2VisionModel) -> torch.dtype:
    return tower.encoder.layers[0].mlp.fc1.weight.dtype


class MultimodalEncoder(nn.Module):
    """EVA-ViT-g -> Q-Former -> feature fusion, spliced between word embeddings, through the T5 encoder."""

    def __init__(
        self,
        image_encoder: Blip2VisionModel,
        qformer: Blip2QFormerModel,
        fusion: MIGEFusion,
        text_encoder: T5EncoderModel,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.qformer = qformer
        self.fusion = fusion
        self.text_encoder = text_encoder
        self.pad_to, self.pad_from = 1, 1

    @property
    def widths(self) -> list[int]:
        """The numbers of positions that contexts are padded to, ascending."""
        limit = self.fusion.config.max_tokens
        return [*range(self.pad_from, limit, self.pad_to), limit]

    def forward(
        self, instructions: Sequence[Instruction], vision_RCHW: Tensor, patches_RNC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode B instructions whose R images are given in order.

        Args:
            instructions: B of them; the numbers of their images add up to R.
            vision_RCHW: float [R, 3, 224, 224], CLIP-normalised; R may be 0.
            patches_RNC: float [R, N, 1152], patch features of the images' unscaled VAE latents.

        Returns context float [B, L, 4096] and mask int64 [B, L], L the longest instruction of the batch, rounded up to
        one of `widths` (a compiled model then sees few lengths; padding is masked).
        """
        images_RQC = self.encode_images(vision_RCHW, patches_RNC)
        embeds_BLC, mask_BL = self.interleave(instructions, images_RQC)
        if not len(vision_RCHW) and self.training and torch.is_grad_enabled() and self.fusion.config.num_queries:
            embeds_BLC = embeds_BLC + self._unseen(patches_RNC)
        return self.encode_text(_in_dtype_of(self.text_encoder, embeds_BLC), mask_BL), mask_BL

    def encode_images(self, vision_RCHW: Tensor, patches_RNC: Tensor) -> Tensor:
        """Images [R, 3, 224, 224] and patch features [R, N, 1152] -> text-like tokens [R, Q, 4096]."""
        shape = len(vision_RCHW), self.fusion.config.num_queries, self.fusion.config.text_width
        if 0 in shape:  # no image, or none that takes a position
            return patches_RNC.new_zeros(shape)
        if len(vision_RCHW) == 1 and self.training and self.pad_to > 1:  # kernels for any number are not those for one
            return self.encode_images(vision_RCHW.repeat(2, 1, 1, 1), patches_RNC.repeat(2, 1, 1))[:1]
        vision_RLC = self.encode_vision(vision_RCHW).to(self.qformer.dtype)
        query_RQC = self.fusion.query_tokens.to(vision_RLC).expand(len(vision_RLC), -1, -1)
        tokens_RQC = self.qformer(query_embeds=query_RQC, encoder_hidden_states=vision_RLC).last_hidden_state
        return self.fusion(_in_dtype_of(self.fusion, tokens_RQC), _in_dtype_of(self.fusion, patches_RNC))

    def _unseen(self, patches_RNC: Tensor) -> Tensor:
        """Zero, from images that are not there: the parts that see have gradients in every batch of every process.

        Where those of one process had none, it would wait for the others in another collective operation than they.
        """
        side = self.image_encoder.config.image_size
        blank = patches_RNC.new_zeros(1, 3, side, side)
        return 0 * self.encode_images(blank, patches_RNC.new_zeros(1, *patches_RNC.shape[1:])).sum()

    def encode_vision(self, vision_RCHW: Tensor) -> Tensor:
        """Vision tower and its last norm: [R, 3, 224, 224] -> [R, 257, 1408].

        Half-precision matrices decide the dtype of their products, whatever autocast runs around them.
        """
        dtype = _matrix_dtype(self.image_encoder)
        with torch.autocast(vision_RCHW.device.type, dtype) if dtype in _HALF else nullcontext():
            return self.image_encoder(vision_RCHW.to(self.image_encoder.dtype)).last_hidden_state

    def encode_text(self, embeds_BLC: Tensor, mask_BL: Tensor) -> Tensor:
        """T5: embeddings [B, L, 4096] and their mask, int64 [B, L] -> context [B, L, 4096]."""
        added_B11L = _additive(mask_BL, embeds_BLC.dtype)
        return self.text_encoder(inputs_embeds=embeds_BLC, attention_mask=added_B11L).last_hidden_state

    def interleave(self, instructions: Sequence[Instruction], images_RQC: Tensor) -> tuple[Tensor, Tensor]:
        """Splice the images between the word embeddings; cut at the token limit, pad to the longest.

        Returns embeddings [B, L, 4096] and mask int64 [B, L]. Raises ValueError if the images don't match.
        """
        room = sum(instruction.num_images for instruction in instructions)
        if room != len(images_RQC):
            raise ValueError(f"the instructions have room for {room} images, got {len(images_RQC)}")
        words, slots, mask = _upload(self._layout(instructions), images_RQC.device)  # each int64 [B, L]
        embeds_BLC = self._embed(words, like=images_RQC)
        if room:
            tokens = images_RQC.flatten(0, 1)
            no_image = tokens.new_zeros(1, tokens.shape[1])  # the row that slot R x Q reads
            spliced = F.embedding(slots, torch.cat([tokens, no_image]), padding_idx=len(tokens))
            embeds_BLC = torch.where((slots < len(tokens))[..., None], spliced, embeds_BLC)
        return embeds_BLC, mask

    def _layout(self, instructions: Sequence[Instruction]) -> np.ndarray:
        """Word ids, places in the row of all image tokens (R x Q where there is none) and mask, int64 [3, B, L]."""
        many, limit = self.fusion.config.num_queries, self.fusion.config.max_tokens
        gap, words, starts = [_PAD] * many, [], []  # `starts`: row and first position of every image
        for row, instruction in enumerate(instructions):
            line = list(instruction.segments[0])
            for segment in instruction.segments[1:]:
                starts.append((row, len(line)))
                line += gap
                line += segment
            words.append(line)
        lengths = np.array([len(line) for line in words])
        longest, used = int(lengths.max()), np.minimum(lengths, limit)
        place = np.arange(max(longest, limit + self.pad_to))
        layout = np.empty((3, len(words), len(place)), dtype=np.int64)
        layout[0], layout[1], layout[2] = _PAD, many * len(starts), place < used[:, None]
        layout[0][place < lengths[:, None]] = [word for line in words for word in line]
        rows, firsts = np.array(starts, dtype=np.int64).reshape(-1, 2).T[:, :, None]
        tokens = np.arange(many * len(starts)).reshape(len(starts), many)
        layout[1][rows, firsts + np.arange(many)] = tokens
        longest = max(int(used.max()), self.pad_from)
        return layout[:, :, : min(limit, longest + -longest % self.pad_to)].copy()

    def _embed(self, ids_BL: Tensor, like: Tensor) -> Tensor:
        """Word embeddings [B, L, 4096], looked up where the table lies: it may be off the device just now."""
        table = self.text_encoder.get_input_embeddings().weight
        return F.embedding(ids_BL.to(table.device), table).to(like.device, like.dtype)


def _in_dtype_of(part: nn.Module, x: Tensor) -> Tensor:
    """What enters a part of another dtype than the one before; autocast decides by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(part.dtype)


def _additive(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, L] to add to attention scores: 0 for valid positions, else the dtype's least number.

    What transformers makes of `mask_BL` itself, but for a look whether all are valid, which waits for the GPU.
    """
    return torch.zeros_like(mask_BL, dtype=dtype).masked_fill(mask_BL == 0, torch.finfo(dtype).min)[:, None, None]


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device; from pinned memory, since a plain copy would wait for the GPU's queue."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
