"""Useful FLOPs of a training pass, and the matrix rate of a card that they are set against."""

from collections.abc import Collection

import torch
from torch import nn


def measured_peak_flops(device: torch.device) -> float | None:
    """This card's bfloat16 matrix rate, measured on random 8192 x 8192 operands, FLOP/s; None without a GPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize(device)
    return 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000)


def forward_flops(model: nn.Module, latent_tokens: int, context: int, images: int) -> dict[str, float]:
    """FLOPs of one sample's forward pass by part, two for a multiply and add.

    Matrix products of the blocks and projections; timestep modulation and the fusion's own attention, under a
    thousandth at full size, are left out.

    Args:
        model: a `MIGEModel`; the meta device will do.
        latent_tokens: patches of the latent (1024). context: positions of the text encoder. images: references.
    """
    encoder, dit = model.encoder, model.transformer
    vision, n, c = encoder.image_encoder.config, latent_tokens, dit.inner_dim
    seen = (vision.image_size // vision.patch_size) ** 2 + 1
    queries, t5 = encoder.fusion.config.num_queries, encoder.text_encoder.config
    images = images if queries else 0  # without positions they are not looked at

    dit_block = dit.transformer_blocks[0]
    keys = _weights(dit_block.attn2.to_k) + _weights(dit_block.attn2.to_v)
    block = 2 * n * (_weights(dit_block) - keys) + 2 * context * keys + _attention(n, n, c) + _attention(n, context, c)
    ends = n * (_weights(dit.pos_embed) + _weights(dit.proj_out)) + context * _weights(dit.caption_projection)
    tower = seen * _weights(encoder.image_encoder.encoder) + (seen - 1) * _weights(encoder.image_encoder.embeddings)
    text = 2 * context * _weights(encoder.text_encoder)
    crossing = sum(_weights(m.key) + _weights(m.value) for m in _cross_attentions(encoder.qformer))
    qformer = queries * (_weights(encoder.qformer) - crossing) + seen * crossing
    fusion = encoder.fusion.fusion  # None without VAE features
    by_patch = 0 if fusion is None else _weights(fusion.k_proj) + _weights(fusion.v_proj)
    fused = n * by_patch + queries * (_weights(encoder.fusion) - by_patch)
    return {
        "transformer": len(dit.transformer_blocks) * block + 2 * ends,
        "image_encoder": images * (2 * tower + vision.num_hidden_layers * _attention(seen, seen, vision.hidden_size)),
        "text_encoder": text + t5.num_layers * _attention(context, context, t5.d_kv * t5.num_heads),
        "qformer": images * 2 * qformer,
        "fusion": images * 2 * fused,
    }


def useful_flops(forward: dict[str, float], trainable: str, adapted: Collection[str] = ("transformer",)) -> float:
    """FLOPs of a sample's training pass without recomputation, from those of its forward pass.

    A trained part counts three times (forward, gradient of inputs, of weights); a frozen one that gradients pass
    through twice; one that none pass through once. `trainable`: as in the config.
    `adapted`: the parts that have adapters, with "lora".
    """
    seeing = {"qformer", "fusion"} & set(adapted)
    text, fusion, qformer = 1 + bool(seeing or "text_encoder" in adapted), 1 + bool(seeing), 1 + ("qformer" in adapted)
    passes = {
        "all": {},
        "full": {"image_encoder": 1},
        "text_encoder_frozen": {"image_encoder": 1, "text_encoder": 2},
        "dit": {"image_encoder": 1, "qformer": 1, "fusion": 1, "text_encoder": 1},
        "lora": {"image_encoder": 1, "qformer": qformer, "fusion": fusion, "text_encoder": text, "transformer": 2},
    }[trainable]
    return sum(passes.get(part, 3) * flops for part, flops in forward.items())


def _weights(module: nn.Module) -> int:
    """Values of the matrices a token is multiplied with."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def _attention(queries: int, keys: int, width: int) -> int:
    return 2 * 2 * queries * keys * width


def _cross_attentions(qformer: nn.Module) -> list[nn.Module]:
    return [layer.crossattention.attention for layer in qformer.encoder.layer if hasattr(layer, "crossattention")]
