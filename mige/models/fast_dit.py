"""The DiT's forward pass arranged for sampling: the same function as `MIGEModel.denoise`, at the speed of the card.

What does not depend on the noisy latent is computed once for all steps: keys and values of the context, and the
modulations of all timesteps. What is left of a step are matrix products, attention and the sums around the norms. The
sums are compiled (three small kernels; everything else is a library call, so neither batch nor size nor prompt length
costs a compilation of minutes), and on a GPU the whole step, all guidance branches and their weighted sum included, is
replayed as one CUDA graph: the host enqueues a step in well under a millisecond.

Cross-attention needs no mask, which would rule out flash attention: padding is told by its keys. For contexts that have
some, the heads of cross-attention get more channels, for it and the products around it. The first new channel is 1 in
every query, 0 in the key of a valid position and `PADDED_SCORE` in the key of a padded one, whose weight in the softmax
then is exactly zero; the values are 0 in the new channels, and so are the weights that read them afterwards.

One approximation, off unless asked for: with `reuse` n, only every n-th step computes all blocks. The others compute
the outer ones and add what the middle ones would change if that went on as between the last two times (the idea of
Delta-DiT, arXiv 2406.01125, with the first order of TaylorSeer, arXiv 2503.06923).

Letters: B samples of all branches, N patches, M = B x N tokens, L context positions, C channels, H heads, D channels a
head, S steps; K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch
from mige.models.fast_blocks import (
    CROSS_BACKENDS,
    PADDED_SCORE,
    SELF_BACKENDS,
    Block,
    Linear,
    add,
    add_modulate,
    attend,
    check_transformer,
    modulate,
    padded_head_dim,
)
from mige.models.fast_state import Inputs, Recording, Step, addresses

LENGTHS = (32, 64, 96, 128, 192, 256)
"""Context lengths that a step is captured for; a shorter context is padded."""

_OUTER = 7  # a step that reuses the middle computes the first and the last K / 7 blocks
MAX_CAPTURED = 6  # captured steps of different shapes kept at a time: each holds its keys, values and activations


class FastDenoiser:
    """Built once from a PixArt transformer (weights are shared, except the joined and the padded matrices).

    Raises ValueError for a transformer with parts that this forward pass lacks.
    """

    def __init__(self, transformer: PixArtTransformer2DModel, timestep_dtype: torch.dtype):
        check_transformer(transformer)
        self.transformer, self.timestep_dtype = transformer, timestep_dtype
        self.heads, self.patch = transformer.config.num_attention_heads, transformer.config.patch_size
        self.head_size = transformer.config.attention_head_dim
        self.steps: dict[tuple, Step] = {}
        self.pool = torch.cuda.graph_pool_handle() if transformer.device.type == "cuda" else None
        self._take_weights()

    @torch.no_grad()
    def _take_weights(self) -> None:
        transformer, latent = self.transformer, self.transformer.config.in_channels // 2
        self.device, self.dtype = transformer.device, transformer.dtype
        self.addresses = addresses(_parts(transformer))
        self.blocks = [Block.of(block) for block in transformer.transformer_blocks]
        patches = transformer.pos_embed.proj
        self.patches = Linear(patches.weight.flatten(1), patches.bias)  # columns: channel, row, column of a patch
        # Rows come as (row, column, channel) of a patch; of the channels only the noise estimate's are needed.
        rows = torch.arange(len(transformer.proj_out.bias)).unflatten(0, (self.patch**2, -1)).t()[:latent].flatten()
        self.last = Linear(transformer.proj_out.weight[rows], transformer.proj_out.bias[rows])
        self.tables_K6C = torch.stack([block.scale_shift_table for block in transformer.transformer_blocks])
        self.one = torch.ones(transformer.inner_dim, device=self.device, dtype=self.dtype)

    def serves(self, transformer: PixArtTransformer2DModel) -> bool:
        """Whether this was built from that transformer, in the place and precision it has now."""
        return transformer is self.transformer and self.addresses == addresses(_parts(transformer))

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the transformer's weights again, which were changed in place: captured steps stay as they are."""
        for own, block in zip(self.blocks, self.transformer.transformer_blocks, strict=True):
            for kept, now in zip(own.tensors(), Block.of(block).tensors(), strict=True):
                if kept.data_ptr() != now.data_ptr():  # not shared: joined, or padded
                    kept.copy_(now)

    @torch.no_grad()
    def start(self, condition: Condition, chosen: Sequence[Branch], times_S: Tensor, reuse: int = 1) -> "Sampling":
        """Everything that all steps share.

        Args:
            condition: of all branches stacked, the first of all samples first.
            chosen: the branches.
            times_S: float, every model time that will be asked for.
            reuse: every so many steps the middle blocks are computed; 1 is exact.

        Returns the `denoise` function of a sampler: (x [samples, 4, h, w], time) -> guided noise estimate, float32.
        """
        condition = condition.drop_full_mask() if condition.mask_BL is not None else condition
        length = condition.context_BLC.shape[1]
        width = _width(length)
        has_padding = condition.mask_BL is not None or width > length
        key = (tuple(chosen), condition.source_BCHW.shape, width, has_padding, reuse > 1)
        step = self.steps.pop(key, None) or Step(self._inputs(*key))
        self.steps[key] = step  # the latest last
        while len(self.steps) > MAX_CAPTURED:
            self.steps.pop(next(iter(self.steps)))
        self._fill(step.inputs, condition)
        if self.device.type == "cuda" and not step.recordings:
            with torch.cuda.device(self.device):
                for skip_middle in {False, reuse > 1}:
                    step.recordings[skip_middle] = self._record(step.inputs, chosen, skip_middle)
        return Sampling(self, step, list(chosen), times_S.to(self.device), *self._modulations(times_S), reuse)

    def _inputs(
        self, chosen: tuple[Branch, ...], shape: torch.Size, width: int, has_padding: bool, reuses: bool
    ) -> Inputs:
        """Zeros of the right shapes, and the position table."""

        def zeros(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(size, device=self.device, dtype=dtype)

        blocks, channels = len(self.blocks), self.transformer.inner_dim
        size = padded_head_dim(self.head_size) if has_padding else self.head_size
        rows, columns = shape[2] // self.patch, shape[3] // self.patch
        return Inputs(
            x_BCHW=zeros(shape[0] // len(chosen), *shape[1:], dtype=torch.float32),
            source_BCHW=zeros(*shape),
            modulation_K6C=zeros(blocks, 6, channels),
            end_2C=zeros(2, channels),
            kv_K2BLHD=zeros(blocks, 2, shape[0], width, self.heads, size),
            position_NC=self._positions(rows, columns),
            change_2MC=zeros(2, shape[0] * rows * columns, channels) if reuses else None,
            extrapolation=zeros(1, dtype=torch.float32),
        )

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table of a latent of this many patches: the trained grid, or one spread over it."""
        embed = self.transformer.pos_embed
        if (rows, columns) == (embed.height, embed.width):
            return embed.pos_embed[0].to(self.device)
        table = get_2d_sincos_pos_embed(
            self.transformer.inner_dim,
            (rows, columns),
            base_size=embed.base_size,
            interpolation_scale=embed.interpolation_scale,
            device=self.device,
            output_type="pt",
        )
        return table.float()

    def _fill(self, inputs: Inputs, condition: Condition) -> None:
        """Source, and the keys and values of the context; those of padding are zero, but for what tells it."""
        context_BLC = self.transformer.caption_projection(condition.context_BLC.to(self.dtype))
        length, size = context_BLC.shape[1], self.head_size
        inputs.source_BCHW.copy_(condition.source_BCHW)
        if inputs.change_2MC is not None:
            inputs.change_2MC.zero_()  # an earlier run's NaN, taken no times, would still be NaN
        for block, kv_2BLHD in zip(self.blocks, inputs.kv_K2BLHD, strict=True):
            kv_BL2HD = block.cross_kv(context_BLC).unflatten(-1, (2, self.heads, size))
            kv_2BLHD[:, :, :length, :, :size] = kv_BL2HD.movedim(2, 0)
        if self._has_padding(inputs):
            mask_BL = condition.mask_BL if condition.mask_BL is not None else context_BLC.new_ones(1, length)
            padding_BL = F.pad(mask_BL, (0, inputs.kv_K2BLHD.shape[3] - length)) == 0
            inputs.kv_K2BLHD.masked_fill_(padding_BL[..., None, None], 0.0)
            inputs.kv_K2BLHD[:, 0, ..., size] = torch.where(padding_BL, PADDED_SCORE, 0.0)[..., None]

    def _has_padding(self, inputs: Inputs) -> bool:
        return inputs.kv_K2BLHD.shape[-1] > self.head_size

    def _modulations(self, times_S: Tensor) -> tuple[Tensor, Tensor]:
        """Of all times at once: those of the blocks [S, K, 6, C] and of the end [S, 2, C]."""
        times_S = times_S.to(self.device).to(self.timestep_dtype).float()
        mixed_SC, embedded_SC = self.transformer.adaln_single(times_S, batch_size=len(times_S), hidden_dtype=self.dtype)
        end_S2C = self.transformer.scale_shift_table + embedded_SC[:, None]
        return self.tables_K6C + mixed_SC.unflatten(1, (1, 6, -1)), end_S2C

    def _record(self, inputs: Inputs, chosen: Sequence[Branch], skip_middle: bool) -> Recording:
        """Run the step outside (kernels compile, libraries choose their plans), then capture it."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.forward(inputs, chosen, skip_middle)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            eps = self.forward(inputs, chosen, skip_middle)
        return Recording(graph, eps)

    @torch.no_grad()
    def forward(self, inputs: Inputs, chosen: Sequence[Branch], skip_middle: bool = False) -> Tensor:
        """Guided noise estimate, float32 [samples, 4, h, w].

        skip_middle: leave out the middle blocks, and add what they would change, extrapolated from the last two times.
        """
        x_MC = self._patchify(inputs, len(chosen))
        batch, mods = len(inputs.source_BCHW), inputs.modulation_K6C.unbind()
        scale, has_padding = self.head_size**-0.5, self._has_padding(inputs)
        h_MC = modulate(x_MC, mods[0][0], mods[0][1])
        many, outer = len(self.blocks), max(1, len(self.blocks) // _OUTER)
        for i, block in enumerate(self.blocks):
            if skip_middle and outer <= i < many - outer:
                continue
            if i == outer and inputs.change_2MC is not None:
                before_MC = x_MC
            if i == many - outer and skip_middle:
                last_MC, earlier_MC = inputs.change_2MC
                x_MC = x_MC + torch.lerp(last_MC, earlier_MC, -inputs.extrapolation.to(last_MC.dtype))
                h_MC = modulate(x_MC, mods[i][0], mods[i][1])
            elif i == many - outer and inputs.change_2MC is not None:
                inputs.change_2MC[1].copy_(inputs.change_2MC[0])
                torch.sub(x_MC, before_MC, out=inputs.change_2MC[0])
            _, _, gate_own, shift_mlp, scale_mlp, gate_mlp = mods[i].unbind()
            shift_next, scale_next = mods[i + 1][:2] if i + 1 < many else inputs.end_2C
            q, k, v = self._heads(block.qkv(h_MC).unflatten(0, (batch, -1)), 3)
            x_MC = add(x_MC, block.out(attend(q, k, v, scale, SELF_BACKENDS)), gate_own)
            cross = block.cross_padded if has_padding else block.cross
            (q,) = self._heads(cross.q(x_MC).unflatten(0, (batch, -1)), 1)
            k, v = inputs.kv_K2BLHD[i].transpose(2, 3).unbind()
            crossed = cross.out(attend(q, k, v, scale, CROSS_BACKENDS))
            x_MC, h_MC = add_modulate(x_MC, crossed, self.one, shift_mlp, scale_mlp)
            x_MC, h_MC = add_modulate(x_MC, block.down(block.up.gelu(h_MC)), gate_mlp, shift_next, scale_next)
        eps_BCHW = self._unpatchify(self.last(h_MC), inputs.source_BCHW.shape)
        return guidance.combine(eps_BCHW, list(chosen))

    def _patchify(self, inputs: Inputs, branches: int) -> Tensor:
        """Latents beside their sources, cut into patches -> tokens [M, C]."""
        latents = torch.cat([inputs.x_BCHW.repeat(branches, 1, 1, 1).to(self.dtype), inputs.source_BCHW], dim=1)
        pieces = F.pixel_unshuffle(latents, self.patch).flatten(2).transpose(1, 2)  # [B, N, 8 x 2 x 2]
        return (self.patches(pieces) + inputs.position_NC).to(self.dtype).flatten(0, 1)

    def _unpatchify(self, pieces_MC: Tensor, shape: torch.Size) -> Tensor:
        """[M, 4 x 2 x 2] -> [B, 4, h, w]."""
        rows, columns = shape[2] // self.patch, shape[3] // self.patch
        return F.pixel_shuffle(pieces_MC.view(shape[0], rows, columns, -1).permute(0, 3, 1, 2), self.patch)

    def _heads(self, x_BNC: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts x H x D] -> for every part a view [B, H, N, D]."""
        return x_BNC.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()


@dataclass
class Sampling:
    """A `denoise` function over one run's condition and times.

    Attributes:
        times_S: float32 [S]. modulation_SK6C, end_S2C: of the blocks [S, K, 6, C] and the last layer [S, 2, C] at them.
        reuse: compute the middle blocks every so many calls. calls: how many there were.

    Called with x [B, 4, h, w] and a time it returns the guided noise estimate of that shape.
    """

    denoiser: FastDenoiser
    step: Step
    chosen: list[Branch]
    times_S: Tensor
    modulation_SK6C: Tensor
    end_S2C: Tensor
    reuse: int
    calls: int = 0

    def __call__(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        inputs = self.step.inputs
        row = (self.times_S - t).abs().argmin().reshape(1)  # found on the device: reading t would wait for its queue
        inputs.x_BCHW.copy_(x_BCHW)
        inputs.modulation_K6C.copy_(self.modulation_SK6C.index_select(0, row)[0])
        inputs.end_2C.copy_(self.end_S2C.index_select(0, row)[0])
        since = self.calls % self.reuse
        skip_middle, first = since > 0, self.calls < self.reuse  # at first there is nothing to extrapolate
        inputs.extrapolation.fill_(0.0 if first else since / self.reuse)
        self.calls += 1
        if not self.step.recordings:
            return self.denoiser.forward(inputs, self.chosen, skip_middle)
        recording = self.step.recordings[skip_middle]
        recording.graph.replay()
        return recording.eps.clone()  # the next replay overwrites it, and some schedulers keep what they are given


def _parts(transformer: PixArtTransformer2DModel) -> list[nn.Module]:
    """The modules whose weights are read."""
    ends = (transformer.pos_embed, transformer.caption_projection, transformer.adaln_single, transformer.proj_out)
    return [*transformer.transformer_blocks, *ends]


def _width(length: int) -> int:
    """The first of `LENGTHS` that is long enough; beyond them, multiples of 64."""
    return next((known for known in LENGTHS if known >= length), length + -length % 64)
