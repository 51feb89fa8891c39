"""Numbers that papers report, each with its source and as much of its protocol as the source states.

A row is shown beside a measured one only where backbone and protocol are known to be the same; see `fits`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mige.evaluation.benchmarks.files import Options

# The true image's CLIP-T is .2826 with local captions (its author, OSU-NLP-Group/MagicBrush issue 27): what lies above
# is of global ones.
LOCAL, GLOBAL = "CLIP-T (local captions)", "CLIP-T (global captions)"


@dataclass(frozen=True)
class Published:
    """One method on one benchmark."""

    benchmark: str
    method: str
    protocol: str  # in words
    scores: Mapping[str, float]
    source: str
    clip: str | None = None  # CLIP's name where stated, else None: the row is never shown beside a measured one
    iterative: bool = False  # MagicBrush's final turn
    samples: int = 1  # DreamBench: images a prompt

    def fits(self, options: Options, clip: str) -> bool:
        """Whether these are the protocol and the backbone of a measured table."""
        same = (options.iterative is not None) == self.iterative and options.samples == self.samples
        return self.clip == clip and same and options.against == "input"


def _dreambench(method: str, dino: float, clip_i: float, clip_t: float, source: str | None) -> Published:
    """Without a source: the method's own paper, whose protocol is not known to be the one of 750 images."""
    scores = {"DINO": dino, "CLIP-I": clip_i, "CLIP-T": clip_t}
    if source is None:
        return Published("dreambench", method, "not known", scores, "its paper")
    return Published("dreambench", method, "750 images, one input image a subject", scores, source, "ViT-B/32")


def _magicbrush(method: str, values: str, source: str, iterative: bool = False, captions: str = LOCAL) -> Published:
    scores = dict(zip(("L1", "L2", "CLIP-I", "DINO", captions), map(float, values.split()), strict=True))
    protocol = "final turn, iterative" if iterative else "all turns, independent"
    protocol += "; captions not stated, global by their figure" if captions == GLOBAL else ""
    return Published("magicbrush", method, protocol, scores, source, "ViT-B/32", iterative)


_UNO, _MAGICBRUSH, _MIGE = "UNO (arXiv 2504.02160)", "MagicBrush (arXiv 2306.10012)", "MIGE (arXiv 2502.21291)"

PUBLISHED = (
    _dreambench("UNO", 0.760, 0.835, 0.304, _UNO),
    _dreambench("OmniGen", 0.693, 0.801, 0.315, f"{_UNO}, its run"),
    _dreambench("OminiControl", 0.684, 0.799, 0.312, _UNO),
    _dreambench("KOSMOS-G", 0.694, 0.847, 0.287, "KOSMOS-G (arXiv 2310.02992)"),
    Published("dreambench", "real images", "images of the subject among themselves", {"DINO": 0.774, "CLIP-I": 0.885},
              "DreamBooth (arXiv 2208.12242)"),
    Published("dreambench", "MIGE", "not stated in full", {"DINO": 0.744}, _MIGE),
    _dreambench("BLIP-Diffusion", 0.670, 0.805, 0.302, None),
    _dreambench("SSR-Encoder", 0.612, 0.821, 0.308, None),
    _dreambench("MS-Diffusion", 0.671, 0.792, 0.321, None),
    Published("emu_edit", "MIGE", "3,589 rows, backbone not stated", {"CLIPim": 0.862}, _MIGE),
    _magicbrush("InstructPix2Pix", ".1122 .0371 .8524 .7428 .2764", _MAGICBRUSH),
    _magicbrush("InstructPix2Pix", ".1584 .0598 .7924 .6177 .2726", _MAGICBRUSH, iterative=True),
    _magicbrush("HIVE", ".1092 .0341 .8519 .7500 .2752", _MAGICBRUSH),
    _magicbrush("UIP2P", ".0619 .0174 .9318 .9039 .2964", "UIP2P (arXiv 2412.15216)", captions=GLOBAL),
    Published("magicbrush", "MIGE", "setting not stated; captions global by their figure",
              {"L1": 0.055, "CLIP-I": 0.902, GLOBAL: 0.306}, _MIGE),
    Published("magicbrush", "MIGE without VAE feature fusion", "setting not stated", {"L1": 0.098}, _MIGE),
    Published("magicbrush", "MIGE, text-only instructions", "setting not stated", {"L1": 0.170}, _MIGE),
)  # fmt: skip
