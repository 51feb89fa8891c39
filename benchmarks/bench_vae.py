"""How fast the VAE can be on this GPU: images/s of encoding and decoding, and the difference from plain float32.

    python benchmarks/bench_vae.py                    # the SD VAE at 512 px, random weights
    python benchmarks/bench_vae.py --config configs/tiny.py --size 64 --batch 2 --repeats 1 --device cpu

Variants: "plain"; "channels last"; "fused norms", which has the VAE's norms and the SiLU after them in one pass over
channels-last images (a few small kernels to compile); "compiled", the whole encoder and decoder. In float32 and
bfloat16. A line of JSON each.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from harness import ROOT, Machine, Report, digits, parser
from torch import Tensor, nn

from mige import config
from mige.models.build import build_parts

VARIANTS = ["plain", "channels last", "fused norms", "compiled"]


def _norm_silu(x_BCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """SiLU of a group norm, from sums a channel, which channels-last images are read in order for.

    The sums are of differences from a pixel, or the variance of a channel far from zero would cancel.
    """
    pivot_BC11 = x_BCHW[:, :, :1, :1].float()
    apart = x_BCHW.float() - pivot_BC11
    pixels = x_BCHW.shape[2] * x_BCHW.shape[3]
    mean_BC, square_BC = apart.sum(dim=(2, 3)) / pixels, apart.square().sum(dim=(2, 3)) / pixels
    pivot_BC = pivot_BC11[:, :, 0, 0]
    variance_BGD, mean_BGD = (t.unflatten(1, (groups, -1)) for t in (square_BC - mean_BC.square(), mean_BC + pivot_BC))
    mean_BG1 = mean_BGD.mean(dim=2, keepdim=True)
    variance_BG1 = (variance_BGD + (mean_BGD - mean_BG1).square()).mean(dim=2, keepdim=True)
    scale_BC = (variance_BG1 + eps).rsqrt().expand_as(mean_BGD).flatten(1) * weight_C.float()
    shift_BC = bias_C.float() - mean_BG1.expand_as(mean_BGD).flatten(1) * scale_BC
    return F.silu(x_BCHW.float() * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]).to(x_BCHW.dtype)


norm_silu = torch.compile(_norm_silu, dynamic=True)


class NormSiLU(nn.Module):
    """In the place of a group norm, with its weights: SiLU too."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return norm_silu(x_BCHW, self.groups, self.weight, self.bias, self.eps)


def fuse_norms(vae: AutoencoderKL) -> None:
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            block.norm1, block.norm2, block.nonlinearity = NormSiLU(block.norm1), NormSiLU(block.norm2), nn.Identity()
    for coder in (vae.encoder, vae.decoder):
        coder.conv_norm_out, coder.conv_act = NormSiLU(coder.conv_norm_out), nn.Identity()


def variant(vae: AutoencoderKL, name: str, dtype: torch.dtype) -> AutoencoderKL:
    vae = copy.deepcopy(vae).to(dtype)
    if name != "plain":
        vae.to(memory_format=torch.channels_last)
    if name == "fused norms":
        fuse_norms(vae)
    if name == "compiled":
        vae.encoder.compile()
        vae.decoder.compile()
    return vae


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    made.add_argument("--size", type=int, default=512, help="pixels a side (%(default)s)")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    return made.parse_args(argv)


@torch.no_grad()
def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output)
    torch.manual_seed(0)
    vae = build_parts(config.load(args.config).model, device=machine.device, only=("vae",))["vae"].eval()
    images = torch.rand(args.batch, 3, args.size, args.size, device=machine.device) * 2 - 1
    latents = vae.encode(images).latent_dist.mode()
    exact = {"encode": latents, "decode": vae.decode(latents).sample}

    def measure(name: str, dtype: torch.dtype) -> dict:
        changed, line = variant(vae, name, dtype), {}
        x, z = (t.to(dtype, memory_format=torch.channels_last) for t in (images, latents))
        works = {"encode": lambda: changed.encode(x).latent_dist.mode(), "decode": lambda: changed.decode(z).sample}
        for what, work in works.items():
            line[f"{what}_first_s"] = round(machine.seconds(work), 1)
            line[f"{what}_per_s"] = round(args.batch / machine.median_seconds(work, args.repeats, warm_up=0), 1)
            error = (work().float() - exact[what]).norm() / exact[what].norm()
            line[f"{what}_error"] = digits(error.item(), 2)
        return line

    for dtype in (torch.float32, torch.bfloat16):
        for name in args.variants:
            case = {"variant": name, "dtype": str(dtype).removeprefix("torch.")}
            report.attempt(case, lambda name=name, dtype=dtype: measure(name, dtype))


if __name__ == "__main__":
    main()
