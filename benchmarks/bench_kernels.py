"""Which kernels the DiT's forward pass should take on this GPU: attention backends, fused GELU, matrix products.

    python benchmarks/bench_kernels.py --batch 2 16 50       # samples of all branches together

Sizes of the full model at 512 px in bfloat16, 64 context positions. Medians by the GPU's clock; a kernel that
refuses the shape says so. `mige/models/fast_dit.py` names the fastest first.

A context with padding needs "cross attention, mask", or wider heads as that file has them: then the gain is
that of "cross attention, wide heads" less what "wide q" and "wide out" take more than two of "q". TFLOP/s of wide heads
count what the narrow ones need.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from harness import Machine, Report, parser
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mige.models.fast_blocks import Linear, add_modulate, padded_head_dim

HEADS, HEAD_SIZE, TOKENS, CONTEXT = 16, 72, 1024, 64
WIDTH, WIDE = HEADS * HEAD_SIZE, HEADS * padded_head_dim(HEAD_SIZE)
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def random(*size: int) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def attention(batch: int) -> list[dict]:
    """Every backend on self-attention, and on cross-attention without a mask, with one, and with wider heads."""
    own = random(batch, TOKENS, 3, HEADS, HEAD_SIZE).permute(2, 0, 3, 1, 4).unbind()
    cross, wide = (
        tuple(random(batch, length, HEADS, size).transpose(1, 2) for length in (TOKENS, CONTEXT, CONTEXT))
        for size in (HEAD_SIZE, padded_head_dim(HEAD_SIZE))
    )
    mask = random(batch, 1, 1, CONTEXT).expand(-1, HEADS, TOKENS, -1)
    lines = []
    for name, (q, k, v), bias in (
        ("self attention", own, None),
        ("cross attention", cross, None),
        ("cross attention, mask", cross, mask),
        ("cross attention, wide heads", wide, None),
    ):
        for backend in BACKENDS:
            with sdpa_kernel([backend]):
                work = lambda: F.scaled_dot_product_attention(q, k, v, bias, scale=HEAD_SIZE**-0.5)  # noqa: B023, E731
                lines.append(measure(name, backend.name, work, 4 * batch * TOKENS * k.shape[2] * WIDTH))
    return lines


def products(batch: int) -> list[dict]:
    """The block's matrix products, and the MLP's first one with its GELU in one kernel and in two."""
    tokens, lines = batch * TOKENS, []
    gelu = torch.compile(lambda x: F.gelu(x, approximate="tanh"))
    for name, width, out in (
        ("qkv", WIDTH, 3 * WIDTH),
        ("q", WIDTH, WIDTH),
        ("wide q", WIDTH, WIDE),
        ("wide out", WIDE, WIDTH),
        ("up", WIDTH, 4 * WIDTH),
        ("down", 4 * WIDTH, WIDTH),
    ):
        linear, x = Linear(random(out, width), random(out)), random(tokens, width)
        flops = 2 * tokens * width * out
        lines.append(measure(name, "product", lambda: linear(x), flops))  # noqa: B023
        if name == "up":
            lines.append(measure(name, "product, gelu", lambda: gelu(linear(x)), flops))  # noqa: B023
            lines.append(measure(name, "product with gelu", lambda: linear.gelu(x), flops))  # noqa: B023
    x, row = random(tokens, WIDTH), random(WIDTH)
    return [*lines, measure("add, norm, modulate", "compiled", lambda: add_modulate(x, x, row, row, row), 0)]


def measure(what: str, how: str, work: Callable[[], object], flops: int) -> dict:
    try:
        ms = Machine("cuda").median_ms(work)
    except RuntimeError as error:
        return {"what": what, "how": how, "refused": str(error).splitlines()[0]}
    return {"what": what, "how": how, "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--batch", type=int, nargs="+", default=[2, 16, 50])
    args = made.parse_args(argv)
    if args.device == "cpu":
        made.error("the kernels are a GPU's; --device is cpu")
    return args


@torch.no_grad()
def main() -> None:
    args = parse()
    report = Report(Machine(args.device), args.output)
    for batch in args.batch:
        for line in attention(batch) + products(batch):
            report.add({"batch": batch, **line})


if __name__ == "__main__":
    main()
