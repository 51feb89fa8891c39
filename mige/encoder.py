"""The multimodal encoder: pictures and text of an instruction -> the context the DiT attends to.

Letters: B instructions, L positions, R pictures of all instructions, Q positions a picture, N patches, C channels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionModel, T5EncoderModel

from mige.fusion import MIGEFusion
from mige.instruction import Instruction

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

    def forward(
        self, instructions: Sequence[Instruction], vision_RCHW: Tensor, patches_RNC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode B instructions whose R pictures are given in order.

        Args:
            instructions: B of them; the numbers of their pictures add up to R.
            vision_RCHW: float [R, 3, 224, 224], CLIP-normalised; R may be 0.
            patches_RNC: float [R, N, 1152], patch features of the pictures' unscaled VAE latents.

        Returns context float [B, L, 4096] and mask int64 [B, L], L the longest instruction of the batch.
        """
        pictures_RQC = self.see(vision_RCHW, patches_RNC)
        embeds_BLC, mask_BL = self.interleave(instructions, pictures_RQC)
        context_BLC = self.text_encoder(inputs_embeds=embeds_BLC, attention_mask=mask_BL).last_hidden_state
        return context_BLC, mask_BL

    def see(self, vision_RCHW: Tensor, patches_RNC: Tensor) -> Tensor:
        """Pictures [R, 3, 224, 224] and patch features [R, N, 1152] -> text-like tokens [R, Q, 4096]."""
        if len(vision_RCHW) == 0:
            return patches_RNC.new_zeros(0, self.fusion.config.num_queries, self.fusion.config.text_width)
        vision_RLC = self.look(vision_RCHW).to(self.qformer.dtype)
        query_RQC = self.fusion.query_tokens.to(vision_RLC).expand(len(vision_RLC), -1, -1)
        tokens_RQC = self.qformer(query_embeds=query_RQC, encoder_hidden_states=vision_RLC).last_hidden_state
        return self.fusion(tokens_RQC, patches_RNC)

    def look(self, vision_RCHW: Tensor) -> Tensor:
        """Vision tower and its last norm: [R, 3, 224, 224] -> [R, 257, 1408], matrix products in the weights' dtype."""
        dtype = _matrix_dtype(self.image_encoder)
        with torch.autocast(vision_RCHW.device.type, dtype, enabled=dtype in _HALF):
            return self.image_encoder(vision_RCHW.to(self.image_encoder.dtype)).last_hidden_state

    def interleave(self, instructions: Sequence[Instruction], pictures_RQC: Tensor) -> tuple[Tensor, Tensor]:
        """Splice the pictures between the word embeddings; cut at the token limit, pad to the longest.

        Returns embeddings [B, L, 4096] and mask int64 [B, L]. Raises ValueError if the pictures don't match.
        """
        room = sum(instruction.pictures for instruction in instructions)
        if room != len(pictures_RQC):
            raise ValueError(f"the instructions have room for {room} pictures, got {len(pictures_RQC)}")
        pictures = iter(pictures_RQC)
        rows = [self._splice(instruction, pictures, like=pictures_RQC) for instruction in instructions]
        lengths_B = torch.tensor([len(row) for row in rows], device=pictures_RQC.device)
        mask_BL = (torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]).long()
        padded_BLC = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        pad_C = self._embed([_PAD], pictures_RQC)[0]
        return torch.where(mask_BL[..., None].bool(), padded_BLC, pad_C), mask_BL

    def _splice(self, instruction: Instruction, pictures: Iterator[Tensor], like: Tensor) -> Tensor:
        parts = [self._embed(instruction.segments[0], like)]
        for segment in instruction.segments[1:]:
            parts += [next(pictures), self._embed(segment, like)]
        return torch.cat(parts)[: self.fusion.config.max_tokens]

    def _embed(self, ids: Sequence[int], like: Tensor) -> Tensor:
        """Word embeddings [len(ids), 4096], looked up where the table lies: it may be off the device just now."""
        table = self.text_encoder.get_input_embeddings().weight
        ids = torch.tensor(ids, dtype=torch.long, device=table.device)
        return F.embedding(ids, table).to(like.device, like.dtype)
