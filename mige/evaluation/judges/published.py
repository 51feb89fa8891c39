"""Numbers that papers report for these benchmarks, by their judges and their prompts: never of one table with ours.

Read where later papers and READMEs repeat the tables, some of them in one place only: check a row before you cite it.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One method on one benchmark."""

    benchmark: str
    method: str
    scores: Mapping[str, float]  # by the measures' names
    judge: str  # with its protocol, in words
    source: str


def _gedit(method: str, values: str, source: str) -> Published:
    scores = dict(zip(("SC", "PQ", "O"), map(float, values.split()), strict=True))
    return Published("gedit", method, scores, "GPT-4.1, English, full set, mean of the groups", source)


def _imgedit(method: str, score: float) -> Published:
    return Published("imgedit", method, {"score": score}, "GPT-4o, mean of the 9 types", "Ovis-U1 (arXiv 2506.23044)")


def _omnicontext(method: str, score: float, source: str) -> Published:
    return Published("omnicontext", method, {"O": score}, "GPT-4.1, mean of the 8 types", source)


_BAGEL, _UNIWORLD = "BAGEL (arXiv 2505.14683), table 7", "UniWorld-V2 (arXiv 2510.16888), table 2"
_OMNIGEN2 = "OmniGen2 (arXiv 2506.18871)"

PUBLISHED = (
    _gedit("InstructPix2Pix", "3.58 5.49 3.68", _BAGEL),
    _gedit("AnyEdit", "3.18 5.82 3.21", _UNIWORLD),
    _gedit("MagicBrush", "4.68 5.66 4.52", _BAGEL),
    _gedit("OmniGen", "5.96 5.89 5.06", _BAGEL),
    _gedit("OmniGen2", "7.16 6.77 6.41", _UNIWORLD),
    _gedit("BAGEL", "7.36 6.83 6.52", _BAGEL),
    _gedit("Step1X-Edit", "7.09 6.76 6.70", f"{_BAGEL}; its first release"),
    _gedit("Qwen-Image-Edit", "8.00 7.86 7.56", _UNIWORLD),
    _imgedit("InstructPix2Pix", 1.88),
    _imgedit("MagicBrush", 1.90),
    _imgedit("AnyEdit", 2.45),
    _imgedit("UltraEdit", 2.70),
    _imgedit("OmniGen", 2.96),
    _imgedit("Step1X-Edit", 3.06),
    _imgedit("GPT-4o", 4.2),
    _omnicontext("OmniGen", 4.34, _OMNIGEN2),
    _omnicontext("UNO", 4.71, _OMNIGEN2),
    _omnicontext("BAGEL", 5.73, _OMNIGEN2),
    _omnicontext("OmniGen2", 7.18, _OMNIGEN2),
    _omnicontext("GPT-4o", 8.80, _OMNIGEN2),
)
