"""The randomness of a sample: noise, timestep, posterior and dropout, a pure function of (seed, sample index)."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dropout:
    """Shares of samples that lose their text, their source, or both."""

    text: float = 0.05
    source: float = 0.05
    both: float = 0.05

    def __post_init__(self):
        if min(self.text, self.source, self.both) < 0 or self.text + self.source + self.both > 1:
            raise ValueError(f"dropout shares must be at least 0 and add up to at most 1, got {self}")

    def draw(self, p: float) -> tuple[bool, bool]:
        """(drop text, drop source) for a uniform number p: [0, text), then source, then both, then neither."""
        only_text = p < self.text
        only_source = not only_text and p < self.text + self.source
        both = not only_text and not only_source and p < self.text + self.source + self.both
        return only_text or both, only_source or both


def sample_randomness(
    generator: torch.Generator,
    num_images: int,
    latent_shape: tuple[int, int, int],
    dropout: Dropout,
    noise_levels: int,
    train_timesteps: int,
) -> dict:
    """A sample's random numbers, by the names of `TrainingSample`'s fields, in a fixed order.

    num_images: target and references. latent_shape: [4, h, w] of each. train_timesteps: T; times are uniform in 0..T-1.
    """
    times = [int(torch.randint(train_timesteps, (), generator=generator))]
    drop_text, drop_source = dropout.draw(float(torch.rand((), generator=generator)))
    noise, source_posterior, *posterior = torch.randn(2 + num_images, *latent_shape, generator=generator)
    levels = [noise]
    for _ in range(noise_levels - 1):
        times.append(int(torch.randint(train_timesteps, (), generator=generator)))
        levels.append(torch.randn(latent_shape, generator=generator))
    return dict(
        noise=torch.stack(levels),
        posterior=torch.stack(posterior),
        source_posterior=source_posterior,
        times=tuple(times),
        drop_text=drop_text,
        drop_source=drop_source,
    )


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one sample of a run."""
    digest = hashlib.sha256(f"train:{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
