"""Faster and smaller ways to run, as methods of the pipeline."""

import torch

from mige.inference.compiled import compile_vae, replayed
from mige.inference.offload import stream_blocks
from mige.inference.quantise import check_plain, quantise
from mige.models.mige import MIGEModel


class Modes:
    """What a pipeline can do to be faster or take less memory; its parts are attributes by their names."""

    is_compiled = False
    _replayed = _compiled_vae = None

    def compile(self) -> None:
        """From now on the same result but for rounding, sooner.

        Denoising is `FastDenoiser`, one CUDA graph a step. On a GPU the encoders are CUDA graphs too, and a VAE in
        bfloat16 is compiled (`mige.inference.compiled`). The transformer's weights are read when the first image is
        made: change them before (adapters, for one). Raises ValueError for a transformer that a quantiser has changed.
        """
        check_plain(self.transformer, "transformer", "compile")
        self.is_compiled = True

    def _compile_ends(self, model: MIGEModel) -> MIGEModel:
        """The pipeline's model with the encoder to use now, and its VAE compiled if it is to be."""
        if self.is_compiled:
            self._replayed = replayed(model.encoder, self._replayed)
            self._compiled_vae = compile_vae(self.vae, self._compiled_vae)
            model.encoder = self._replayed or model.encoder
        return model

    def vae_to_bfloat16(self) -> None:
        """The VAE in bfloat16, channels last: faster, and images differ by rounding (docs/inference.md)."""
        self.vae.to(torch.bfloat16).to(memory_format=torch.channels_last)

    def quantise_text_encoder(self, bits: int) -> None:
        """Keep T5's matrices in 8 or 4 bits a value, rounded (`mige.inference.quantise`); call before off-loading.

        Raises ValueError for other bits, and where another quantiser has been at it.
        """
        check_plain(self.text_encoder, "text_encoder", "quantise_text_encoder")
        quantise(self.text_encoder.encoder.block, bits)

    def offload_encoders(self, device: torch.device | str) -> None:
        """In place of `.to(device)`: DiT, VAE and fusion there, the blocks of the encoders in host memory.

        A block is on the device only while it computes, once a batch: the same images in far less memory.
        """
        streamed = ("text_encoder", "image_encoder", "qformer")
        stream_blocks([getattr(self, part) for part in streamed], self.model.blocks(streamed), torch.device(device))
        for part in (self.fusion, self.transformer, self.vae):
            part.to(device)

    def enable_vae_tiling(self) -> None:
        """Images larger than the VAE's `sample_size` go through it in tiles that overlap: less memory, other edges."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Whole images go through the VAE again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """One image at a time goes through the VAE: less memory, the same images."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Several images go through the VAE together again, as many as fit its chunk."""
        self.vae.disable_slicing()
