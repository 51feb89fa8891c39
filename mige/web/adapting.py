"""The adapters of a server's model, and the scale that each request gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mige.inference.adapters import Adapters, own_config

SCALES = (-4.0, 4.0)


@dataclass(frozen=True)
class Adapter:
    """One that a request may give another scale."""

    name: str  # the pipeline's
    label: str  # for people, and in the settings of an image; no other has it
    scale: float  # where a request says nothing


class AdapterScales:
    """The adapters of a pipeline that were loaded with `add_adapters`, in that order.

    Args:
        given: folder or file and scale of each. One that brings a sampler keeps its scale: the number of steps and
            guidance, which requests are checked for, depend on it.

    Raises ValueError for a scale out of `SCALES`.
    """

    def __init__(self, pipeline: Adapters, given: Sequence[tuple[str, float]] = ()):
        names = pipeline.get_active_adapters()  # in the order they were loaded, of whatever parts
        self._pipeline, self._names = pipeline, names
        self._active = [scale for _, scale in given]
        for path, scale in given:
            if not SCALES[0] <= scale <= SCALES[1]:
                raise ValueError(f"the scale of {path} is {scale:g}, expected one from {SCALES[0]:g} to {SCALES[1]:g}")
        labels = _labels([Path(path).name for path, _ in given])
        self.offered = [
            Adapter(name, label, scale)
            for name, label, (path, scale) in zip(names, labels, given, strict=True)
            if own_config(Path(path)) is None
        ]
        self._fixed = dict(zip(names, self._active, strict=True))

    def named(self, scales: Sequence[float] | None) -> dict[str, float]:
        """The scale of each offered adapter by its label."""
        own = [one.scale for one in self.offered] if scales is None else scales
        return {one.label: scale for one, scale in zip(self.offered, own, strict=True)}

    def use(self, scales: Sequence[float] | None) -> None:
        """Give the offered adapters these scales, or those they came with; does nothing where they have them."""
        own = [one.scale for one in self.offered] if scales is None else scales
        wanted = self._fixed | {one.name: scale for one, scale in zip(self.offered, own, strict=True)}
        if list(wanted.values()) != self._active:
            self._pipeline.set_adapters(self._names, list(wanted.values()))
            self._active = list(wanted.values())


def _labels(names: Sequence[str]) -> list[str]:
    """The names, each once: every training calls its folder "lora", and the second is "lora (2)"."""
    times = [names[: at + 1].count(name) for at, name in enumerate(names)]
    return [f"{name} ({time})" if time > 1 else name for name, time in zip(names, times, strict=True)]
