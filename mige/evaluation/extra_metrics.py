"""Measures beside a benchmark's own: the same comparisons by newer backbones, and how much of an image is kept."""

from collections.abc import Sequence
from dataclasses import replace

from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import Metric

BACKBONES = {
    "DINOv2 ViT-B/14": ("dino", "DINO", "DINOv2"),
    "DINOv3 ViT-B/16": ("dino", "DINO", "DINOv3"),
    "SigLIP 2 B/16": ("clip", "CLIP", "SigLIP2"),
}
"""Name -> which of a benchmark's networks it stands beside, and how the names of measures change."""

PRESERVATION = ("psnr", "ssim", "lpips")
REGIONS = ("", "outside", "inside")


def by_backbone(prepared: Prepared, name: str) -> list[Metric]:
    """The measures of a benchmark's CLIP or DINO once more, by another backbone."""
    of, old, new = BACKBONES[name]
    return [
        replace(metric, name=metric.name.replace(old, new), of=name) for metric in prepared.metrics if metric.of == of
    ]


def of_preservation(prepared: Prepared, names: Sequence[str]) -> list[Metric]:
    """PSNR, SSIM, LPIPS against the true image where there is one, else the source; by region where rows have masks.

    Raises BenchmarkError for a benchmark without either.
    """
    scores = [row["score"] for row in prepared.scored]
    against = next((one for one in ("target", "source") if all(one in score for score in scores)), None)
    if against is None:
        raise BenchmarkError(f"{prepared.name} has neither true images nor sources, so nothing is to be preserved; "
                             "leave --preservation out")  # fmt: skip
    regions = REGIONS if all("mask" in score for score in scores) else REGIONS[:1]
    fit = "stretch" if against == "target" else "crop"
    return [
        Metric(f"{name.upper()} {region}".rstrip(), name, against, fit=fit, region=region)
        for region in regions
        for name in names
    ]
