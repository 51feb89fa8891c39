"""Feature fusion: what the Q-Former sees of an image, completed by what the VAE keeps of it.

Source: MIGE, arXiv 2502.21291, the multimodal encoder.

Shapes: R images, Q query tokens an image, N patches of the VAE latent, C channels.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class FeatureFusion(nn.Module):
    """Cross-attention from semantic tokens (query) to VAE patch features (key, value), added to the semantic tokens.

    `LayerNorm(out(attention(q, k, v)) + tokens)`: the residual is the raw Q-Former output, not the projected query.
    `out` starts at zero, so an untrained fusion passes the Q-Former's tokens through.

    Args:
        width: channels of the Q-Former tokens (768).
        patch_width: channels of the VAE patch features (1152).
        num_heads: attention heads.
        eps: of every LayerNorm.
    """

    def __init__(self, width: int, patch_width: int, num_heads: int, eps: float):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.LayerNorm(width, eps)
        self.k_proj = nn.Sequential(nn.Linear(patch_width, width), nn.GELU(), nn.Linear(width, width))
        self.k_norm = nn.LayerNorm(width, eps)
        self.v_proj = nn.Sequential(nn.Linear(patch_width, width), nn.GELU(), nn.Linear(width, width))
        self.v_norm = nn.LayerNorm(width, eps)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.out = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width, eps)

    def forward(self, tokens_RQC: Tensor, patches_RNC: Tensor) -> Tensor:
        """Float [R, Q, width] and [R, N, patch_width] -> [R, Q, width]."""
        q = self.q_norm(self.q_proj(tokens_RQC))
        k = self.k_norm(self.k_proj(patches_RNC))
        v = self.v_norm(self.v_proj(patches_RNC))
        attended, _ = self.attention(q, k, v, need_weights=False)
        return self.out_norm(self.out(attended) + tokens_RQC)


class MIGEFusion(ModelMixin, ConfigMixin):
    """The parts of the multimodal encoder that no library has: queries, fusion, projection to T5's width, null context.

    Args:
        num_queries: learnt query tokens, and so text positions, an image takes (32). 0: the instruction is text alone,
            and the source reaches the DiT through its channels only.
        width: Q-Former width (768).
        patch_width: width of the DiT's patch embedding (1152).
        text_width: width of the text encoder (4096).
        max_tokens: longest context, and rows of the null context (256).
        num_heads: heads of the fusion attention.
        eps: of the fusion's LayerNorms.
        timestep_dtype: dtype the timestep was rounded to when these weights were trained ("bfloat16" for the released
            ones: 999 became 1000). Rounding it otherwise changes the output by several per cent.
        vision_dtype: dtype of the vision tower's matrix products when these weights were trained ("float16").
        vae_features: fuse the Q-Former's tokens with VAE patches. False: they go to the projection as they are.
    """

    @register_to_config
    def __init__(
        self,
        num_queries: int = 32,
        width: int = 768,
        patch_width: int = 1152,
        text_width: int = 4096,
        max_tokens: int = 256,
        num_heads: int = 8,
        eps: float = 1e-6,
        timestep_dtype: str = "bfloat16",
        vision_dtype: str = "float16",
        vae_features: bool = True,
    ):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, width))
        self.fusion = FeatureFusion(width, patch_width, num_heads, eps) if vae_features else None
        self.text_proj = nn.Linear(width, text_width)
        self.register_buffer("null_context", torch.empty(max_tokens, text_width))  # random and never trained, but saved
        self.initialise()

    def initialise(self) -> None:
        """Fresh weights, as training starts from: `fusion.out` zero, the other matrices truncated normal 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.fusion is not None:
            nn.init.zeros_(self.fusion.out.weight)
        nn.init.normal_(self.query_tokens, std=0.02)
        nn.init.normal_(self.null_context, std=self.config.text_width**-0.5)

    def forward(self, tokens_RQC: Tensor, patches_RNC: Tensor) -> Tensor:
        """Q-Former tokens [R, Q, width] and VAE patches [R, N, patch_width] -> text tokens [R, Q, text_width]."""
        fused_RQC = tokens_RQC if self.fusion is None else self.fusion(tokens_RQC, patches_RNC)
        return self.text_proj(fused_RQC)
