"""Numbers that papers report, each with its source and as much of its protocol as the source states.

A row is shown beside a measured one only where backbone and protocol are known to be the same; see `fits`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mige.evaluation.benchmarks.files import Options

# The true image's CLIP-T is .2826 with local captions (its author, OSU-NLP-Group/MagicBrush issue 27): what lies above
# is of global ones.
LOCAL, GLOBAL = "CLIP-T (local captions)", "CLIP-T (global captions)"
TRUE_IMAGE = {False: 0.2826, True: 0.2855}
"""MagicBrush: the true image's CLIP-T of local captions, of all turns and (True) of the final turn. It has no model in
it, so whoever gets another figure has other files, captions or weights of CLIP."""


@dataclass(frozen=True)
class Published:
    """One method on one benchmark. What the source does not state is None, and such a row is never shown beside ours.

    Attributes:
        clip, dino: backbones. count: samples that the means are of. captions: MagicBrush's, "local" or "global";
        by_figure: known only by how high the figure is. setting: what else the source says, in words.
    """

    benchmark: str
    method: str
    scores: Mapping[str, float]
    source: str
    clip: str | None = None
    dino: str | None = None
    count: int | None = None
    captions: str | None = None
    by_figure: bool = False
    setting: str = ""
    iterative: bool = False  # MagicBrush's final turn
    samples: int = 1  # DreamBench: images a prompt

    def fits(self, options: Options, clip: str) -> bool:
        """Whether these are the protocol and the backbones of a measured table."""
        same = (options.iterative is not None) == self.iterative and options.samples == self.samples
        stated = self.clip == clip and self.dino == "ViT-S/16" and self.count is not None
        return stated and same and options.against == "input"

    @property
    def protocol(self) -> str:
        """All tags in words."""
        tags = [f"{self.count:,} samples" if self.count else "count not stated"]
        tags += [f"CLIP {self.clip}" if self.clip else "CLIP not stated"]
        tags += [f"DINO {self.dino}" if self.dino else "DINO not stated"] if "DINO" in self.scores else []
        if self.benchmark == "magicbrush" and self.scores.keys() & {LOCAL, GLOBAL}:
            tags.append(f"{self.captions} captions" + (" by the figure, not stated" if self.by_figure else ""))
        return ", ".join(tags) + (f"; {self.setting}" if self.setting else "")


_UNO, _MAGICBRUSH, _MIGE = "UNO (arXiv 2504.02160)", "MagicBrush (arXiv 2306.10012)", "MIGE (arXiv 2502.21291)"
_NOT_STATED = "setting not stated"


def _dreambench(method: str, dino: float, clip_i: float, clip_t: float, source: str | None) -> Published:
    """Without a source: the method's own paper, whose protocol is not known to be the one of 750 images."""
    scores = {"DINO": dino, "CLIP-I": clip_i, "CLIP-T": clip_t}
    if source is None:
        return Published("dreambench", method, scores, "its paper", setting=_NOT_STATED)
    setting = "one input image a subject"
    return Published("dreambench", method, scores, source, "ViT-B/32", "ViT-S/16", 750, setting=setting)


def _magicbrush(method: str, values: str, source: str, iterative: bool = False, captions: str = "local") -> Published:
    names = ("L1", "L2", "CLIP-I", "DINO", LOCAL if captions == "local" else GLOBAL)
    scores = dict(zip(names, map(float, values.split()), strict=True))
    count, setting = (535, "final turn, iterative") if iterative else (1053, "all turns, independent")
    tags = {"captions": captions, "by_figure": captions == "global", "setting": setting, "iterative": iterative}
    return Published("magicbrush", method, scores, source, "ViT-B/32", "ViT-S/16", count, **tags)


PUBLISHED = (
    _dreambench("UNO", 0.760, 0.835, 0.304, _UNO),
    _dreambench("OmniGen", 0.693, 0.801, 0.315, f"{_UNO}, its run"),
    _dreambench("OminiControl", 0.684, 0.799, 0.312, _UNO),
    _dreambench("KOSMOS-G", 0.694, 0.847, 0.287, "KOSMOS-G (arXiv 2310.02992)"),
    Published("dreambench", "real images", {"DINO": 0.774, "CLIP-I": 0.885}, "DreamBooth (arXiv 2208.12242)",
              setting="images of the subject among themselves"),
    Published("dreambench", "MIGE", {"DINO": 0.744}, _MIGE, setting="not stated in full"),
    _dreambench("BLIP-Diffusion", 0.670, 0.805, 0.302, None),
    _dreambench("SSR-Encoder", 0.612, 0.821, 0.308, None),
    _dreambench("MS-Diffusion", 0.671, 0.792, 0.321, None),
    Published("emu_edit", "MIGE", {"CLIPim": 0.862}, _MIGE, count=3589),
    _magicbrush("InstructPix2Pix", ".1122 .0371 .8524 .7428 .2764", _MAGICBRUSH),
    _magicbrush("InstructPix2Pix", ".1584 .0598 .7924 .6177 .2726", _MAGICBRUSH, iterative=True),
    _magicbrush("HIVE", ".1092 .0341 .8519 .7500 .2752", _MAGICBRUSH),
    _magicbrush("UIP2P", ".0619 .0174 .9318 .9039 .2964", "UIP2P (arXiv 2412.15216)", captions="global"),
    Published("magicbrush", "the true image", {LOCAL: TRUE_IMAGE[False]}, "OSU-NLP-Group/MagicBrush, issue 27",
              "ViT-B/32", "ViT-S/16", 1053, "local", setting="all turns"),
    Published("magicbrush", "the true image", {LOCAL: TRUE_IMAGE[True]}, "OSU-NLP-Group/MagicBrush, issue 27",
              "ViT-B/32", "ViT-S/16", 535, "local", setting="final turn", iterative=True),
    Published("magicbrush", "MIGE", {"L1": 0.055, "CLIP-I": 0.902, GLOBAL: 0.306}, _MIGE, captions="global",
              by_figure=True, setting=_NOT_STATED),
    Published("magicbrush", "MIGE without VAE feature fusion", {"L1": 0.098}, _MIGE, setting=_NOT_STATED),
    Published("magicbrush", "MIGE, text-only instructions", {"L1": 0.170}, _MIGE, setting=_NOT_STATED),
)  # fmt: skip
