"""What the DiT is conditioned on, and how a part of it is dropped."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the DiT's cross-attention reads of B prompts.

    Attributes:
        context_BLC: float [B, L, text width], the multimodal encoder's output; rows where the mask is 0 are ignored.
        mask_BL: int64 [B, L], 1 for a valid token.
    """

    context_BLC: Tensor
    mask_BL: Tensor

    def pad(self, length: int) -> "Context":
        """The same, at least so many positions long: zeros under a mask of 0 at the end."""
        missing = length - self.mask_BL.shape[1]
        if missing <= 0:
            return self
        return Context(F.pad(self.context_BLC, (0, 0, 0, missing)), F.pad(self.mask_BL, (0, missing)))


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser needs besides the noisy latent and the timestep. Made once a sample.

    Attributes:
        context_BLC: float [B, L, text width], the multimodal encoder's output; rows where the mask is 0 are ignored.
        mask_BL: int64 [B, L], 1 for a valid token; None where all are valid (`drop_full_mask`).
        source_BCHW: float [B, 4, h, w], scaled latent of the source image; zeros where there is none.
    """

    context_BLC: Tensor
    mask_BL: Tensor | None
    source_BCHW: Tensor

    def drop(self, null_LC: Tensor, *, text: Tensor | bool = False, source: Tensor | bool = False) -> "Condition":
        """Replace the text by the null context and / or the source by zeros, for the chosen samples.

        Training's condition dropout and the branches of classifier-free guidance are this one act. The prompt's own
        mask stays: a dropped prompt of n tokens reads the first n rows of the null context, as in training.

        Args:
            null_LC: float [max_tokens, text width].
            text, source: bool, or bool [B] to choose sample by sample.
        """
        context, source_latent = self.context_BLC, self.source_BCHW
        if text is not False:
            null = null_LC[: context.shape[1]].to(context).expand_as(context)
            context = torch.where(_per_sample(text, context), null, context)
        if source is not False:
            source_latent = torch.where(_per_sample(source, source_latent), 0.0, source_latent)
        return replace(self, context_BLC=context, source_BCHW=source_latent)

    def drop_full_mask(self) -> "Condition":
        """The same without its mask if nothing is masked: attention has faster kernels then.

        On a GPU this waits for the encoder.
        """
        return replace(self, mask_BL=None) if bool(self.mask_BL.all()) else self

    @staticmethod
    def stack(conditions: "list[Condition]") -> "Condition":
        """Concatenate along the batch; conditions of one length L and one size, with their masks."""
        return Condition(*(torch.cat(parts) for parts in zip(*map(_fields, conditions), strict=True)))


def _fields(c: Condition) -> tuple[Tensor, Tensor | None, Tensor]:
    return c.context_BLC, c.mask_BL, c.source_BCHW


def _per_sample(flag: Tensor | bool, like: Tensor) -> Tensor:
    flag = torch.as_tensor(flag, device=like.device)
    return flag.reshape(-1, *[1] * (like.ndim - 1))
