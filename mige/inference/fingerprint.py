"""What a model is and computes, in numbers that two people can compare: keys and files of each part, and the output of
each stage for one fixed case.

The case is drawn by formula and its noise is seeded on the CPU, so nothing depends on files or machine but rounding.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige.checkpoints.folder import CLASSES
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import draw_sample_noise, make_sample

PROMPT, SEED, TIMESTEP = "replace the cup in<imagehere>with the<imagehere>", 0, 500
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-1}
"""Of a stage's numbers, as a share of its standard deviation: what other devices and versions may differ by."""


def drawn_image(side: int, phase: int) -> Image.Image:
    """A smooth RGB image of side x side px, the same anywhere: sums of whole numbers, no randomness."""
    y, x = np.mgrid[:side, :side] * 256 // side
    channels = [(x + phase * 64) % 256, (y * 2 + phase * 32) % 256, np.abs(x - y)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def digest_of_keys(shapes: Mapping[str, Sequence[int]]) -> str:
    """16 hexadecimal digits of the names and shapes of a part's tensors."""
    lines = (f"{key} {'x'.join(map(str, shape))}\n" for key, shape in sorted(shapes.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def parts_of(pipeline: MIGEPipeline, folder: Path) -> dict[str, dict[str, Any]]:
    """For each part: tensors, their values' number, the digest of their keys, and the SHA-256 of each weight file."""
    found = {}
    for name in CLASSES:
        shapes = {key: tuple(value.shape) for key, value in getattr(pipeline, name).state_dict().items()}
        numbers = {"tensors": len(shapes), "values": sum(torch.Size(shape).numel() for shape in shapes.values())}
        files = {path.name: _sha256(path) for path in sorted((folder / name).glob("*.safetensors"))}
        found[name] = numbers | {"keys": digest_of_keys(shapes), "files": files}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def stages_of(pipeline: MIGEPipeline) -> dict[str, dict[str, Any]]:
    """A summary of each stage's output for the fixed case: token ids, the VAE's encoding, the encoder's context, the
    DiT's estimate for fixed noise at one time, and the VAE's decoding of a fixed latent."""
    sizes = pipeline.sizes
    side, shape = sizes.native, sizes.latent_shape(sizes.native, sizes.native)
    source, subject = (drawn_image(side, phase) for phase in (0, 1))
    sample = make_sample(PROMPT, (source, subject), source)
    noise = draw_sample_noise(shape, [shape, shape], torch.Generator().manual_seed(SEED))
    inputs = pipeline.prepare([sample], [noise])
    condition = pipeline.encode(inputs)
    device = condition.context_BLC.device
    words = condition.mask_BL[0].bool()
    x_BCHW = noise.latent[None].to(device)
    estimate = pipeline.model.denoise(x_BCHW, torch.full((1,), float(TIMESTEP), device=device), condition)
    return {
        "source's latent": summary(condition.source_BCHW),
        "encoder's context": summary(condition.context_BLC[0][words]),
        "DiT's estimate": summary(estimate[:, : shape[0]]),
        "VAE's decoding": summary(pipeline.decode(x_BCHW)),
    }


def summary(values: Tensor) -> dict[str, Any]:
    """Shape, mean, standard deviation, and eight values evenly spaced over the tensor, of any shape, float64."""
    flat = values.detach().double().cpu().flatten()
    places = torch.linspace(0, len(flat) - 1, 8).long()
    numbers = [float(f"{one:.6g}") for one in flat[places].tolist()]
    mean, deviation = float(f"{flat.mean():.6g}"), float(f"{flat.std():.6g}")
    return {"shape": list(values.shape), "mean": mean, "std": deviation, "values": numbers}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], dtype: str) -> list[str]:
    """What of a model's parts and stages is not as expected, a sentence each; stages without expected values are none.

    Args:
        found, expected: "parts" and "stages" as above. dtype: of the computation, which decides the tolerance.
    """
    lines = []
    for name, part in expected["parts"].items():
        own = found["parts"][name]
        for what in ("tensors", "values", "keys"):
            if own[what] != part[what]:
                lines.append(f"{name}: {what} are {own[what]}, expected {part[what]}")
        for file, digest in part.get("files", {}).items():
            if own["files"].get(file) != digest:
                lines.append(f"{name}/{file}: SHA-256 is {own['files'].get(file)}, expected {digest}")
    for name, stage in expected.get("stages", {}).items():
        own, allowed = found["stages"][name], TOLERANCE[dtype] * stage["std"]
        if own["shape"] != stage["shape"]:
            lines.append(f"{name}: shape {own['shape']}, expected {stage['shape']}")
            continue
        pairs = zip([own["mean"], own["std"], *own["values"]], [stage["mean"], stage["std"], *stage["values"]],
                    strict=True)  # fmt: skip
        if off := [abs(a - b) for a, b in pairs if not abs(a - b) <= allowed]:  # NaN too
            lines.append(
                f"{name}: {len(off)} of 10 numbers are off, one by {off[0]:.3g}, expected {allowed:.3g} at most"
            )
    return lines
