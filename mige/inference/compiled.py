"""Encoding and decoding at the speed of the card: what `MIGEPipeline.compile` does beside the fast DiT, on a GPU.

With few steps the ends of a call take most of its time. The vision tower with Q-Former and fusion, and T5, are replayed
as CUDA graphs: the same kernels, but the host no longer launches some thousand of them one by one. Contexts are padded
to few widths, with positions that nothing looks at. A VAE in bfloat16 goes through the compiler, which joins the norms,
activations and sums between its convolutions.

Letters: B instructions, L positions, R images of all instructions, Q positions an image, N patches, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mige.models.encoder import MultimodalEncoder
from mige.models.fast_state import addresses

WIDTH = 32
"""Contexts are padded to a multiple of so many positions."""

MAX_RECORDED = 16
"""Recordings of a function that are kept: each holds its inputs and its output."""


@dataclass(frozen=True)
class Recording:
    """A function's work on `inputs`, of the shapes it was recorded for, at fixed addresses.

    `replay` does it again and returns the output, a tensor that the next replay overwrites.
    """

    inputs: tuple[Tensor, ...]
    replay: Callable[[], Tensor]


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: object) -> Recording:
    """Run aside, so that libraries choose their plans, then capture as a CUDA graph with its memory in `pool`.

    inputs: tensors of any shape on one GPU, copied.
    """
    own = tuple(value.clone() for value in inputs)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # Autocast frees its casts of weights when it ends, and the graph would read them all the same.
    with torch.cuda.device(own[0].device), torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function(*own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads open images
            output = function(*own)

    def replay() -> Tensor:
        graph.replay()
        return output

    return Recording(own, replay)


class Replayed:
    """A function of tensors without gradients, replayed for shapes that it has met before.

    A shape that is met once is computed plainly, the next time it is recorded; the latest `MAX_RECORDED` are kept. The
    tensors that the function reads besides its arguments must stay where they are.
    """

    def __init__(self, function: Callable[..., Tensor], pool: object):
        self.function, self.pool = function, pool
        self.recordings: dict[tuple, Recording | None] = {}  # None: met once

    @torch.no_grad()
    def __call__(self, *given: Tensor) -> Tensor:
        """What the function returns, one tensor, in memory of the caller's own."""
        key = (*((value.shape, value.dtype) for value in given), _autocast(given[0].device.type))
        is_new = key not in self.recordings
        recording = self.recordings.pop(key, None)
        if not is_new and recording is None:
            recording = record(self.function, given, self.pool)
        self.recordings[key] = recording  # the latest last
        while len(self.recordings) > MAX_RECORDED:
            self.recordings.pop(next(iter(self.recordings)))
        if recording is None:
            return self.function(*given)
        for own, value in zip(recording.inputs, given, strict=True):
            own.copy_(value)
        return recording.replay().clone()


class ReplayedEncoder(MultimodalEncoder):
    """The multimodal encoder with its two halves replayed: all that sees images, and T5."""

    def __init__(self, encoder: MultimodalEncoder):
        super().__init__(encoder.image_encoder, encoder.qformer, encoder.fusion, encoder.text_encoder)
        self.pad_to, self.addresses = WIDTH, addresses(_parts(encoder))
        self.training = False  # its parts keep theirs
        pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._images = Replayed(super().encode_images, pool)
        self._text = Replayed(super().encode_text, pool)

    def encode_images(self, vision_RCHW: Tensor, patches_RNC: Tensor) -> Tensor:
        """Images [R, 3, 224, 224] and patch features [R, N, 1152] -> tokens [R, Q, 4096], as `super()` does."""
        if not len(vision_RCHW) or not self.fusion.config.num_queries:
            return super().encode_images(vision_RCHW, patches_RNC)
        return self._images(vision_RCHW, patches_RNC)

    def encode_text(self, embeds_BLC: Tensor, mask_BL: Tensor) -> Tensor:
        """Embeddings [B, L, 4096] and mask, int64 [B, L] -> context [B, L, 4096], as `super()` does."""
        return self._text(embeds_BLC, mask_BL)


def replayed(encoder: MultimodalEncoder, known: ReplayedEncoder | None) -> ReplayedEncoder | None:
    """The encoder to use in place of this one: `known`, if its recordings read the same weights, or a new one.

    None off a GPU, and while a part is off-loaded: a recording reads weights where they were.
    """
    found = addresses(_parts(encoder))
    if not all(_has_graphs(device) for _, _, device in found):
        return None
    return known if known is not None and known.addresses == found else ReplayedEncoder(encoder)


def compile_vae(vae: AutoencoderKL, known: AutoencoderKL | None) -> AutoencoderKL | None:
    """Send a bfloat16 VAE on a GPU through the compiler, from its next call on; any other stays as it is.

    known: the last one that went through it. Returns the one that now has.
    """
    if vae is known or vae.dtype is not torch.bfloat16 or vae.device.type != "cuda":
        return known
    for coder in (vae.encoder, vae.decoder):
        coder.compile()
    return vae


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _parts(encoder: MultimodalEncoder) -> list[nn.Module]:
    """The modules whose weights are read."""
    tower, qformer, text = encoder.image_encoder, encoder.qformer, encoder.text_encoder
    return [tower.embeddings, *tower.encoder.layers, *qformer.encoder.layer, encoder.fusion, *text.encoder.block]


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype that products run in under autocast, None outside of it."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
