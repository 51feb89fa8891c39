"""AdamW for weights that live in bfloat16 (Loshchilov & Hutter, arXiv 1711.05101), all of its state rounded at random.

A bfloat16 has 8 bits: a change below half their spacing, 2^-9 of the value or a little more, is lost when it is rounded
to the nearest. Three things get lost that way, and stochastic rounding (up with the probability that makes the mean
right, arXiv 2010.06192) saves each of them:

* the weight's update, about lr of a weight of size 1;
* the second moment's decay: 1 - beta2 = 0.001 < 2^-9, so rounded to the nearest it can grow but never shrink;
* the first moment's last 2-4 %, where 0.1 (g - m) is too small to move it.

The random bits are a hash of (seed, step, tensor, position): no generator to save, so a resumed run equals one that
never stopped. Of a sharded tensor (FSDP2) every process updates its own part, at the positions of the whole: any number
of processes rounds alike. The arithmetic is float32. Float32 weights get plain AdamW.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

try:  # comes with CUDA builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 2048  # values a program
_MASK = 0xFFFFFFFF


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with moments in the weights' dtype; on a GPU one kernel for all tensors together.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; parameters are contiguous, bfloat16 or float32,
            and may be sharded along their first dimension.
        seed: of the rounding.

    Attributes:
        scale: what the next step multiplies the gradients with on the fly (clipping), float32 [] on their device, or
            None for 1; a step takes it away.
    """

    def __init__(self, params: Iterable, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, seed: int = 0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed))
        self.scale: Tensor | None = None
        self.firsts: dict[Tensor, int] = {}  # of sharded parameters: the position of this process's first value

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, also of a state of `torch.optim.AdamW`, whose steps are tensors."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = int(state["step"])

    def add_param_group(self, group: dict) -> None:
        """As torch's; raises ValueError for parameters that are not contiguous, or neither bfloat16 nor float32."""
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.bfloat16, torch.float32) or not p.is_contiguous():
                got = f"{p.dtype}, strides {p.stride()}"
                raise ValueError(f"parameter {tuple(p.shape)}: {got}; expected contiguous bfloat16 or float32")

    @torch.no_grad()
    def step(self, closure=None):
        """One update."""
        loss, scale, self.scale = None, self.scale, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = 0  # counted over all groups, so that each tensor has random bits of its own
        for group in self.param_groups:
            rows = defaultdict(list)  # tensors that share a launch: (device, dtype, step) -> `plain`'s rows
            for number, p in enumerate(group["params"], start=tensors):
                if p.grad is not None:
                    state = self.state[p] or self._start(p)
                    state["step"] += 1
                    here = [local(t) for t in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])]
                    here[1] = here[1].contiguous()
                    if here[0].numel():  # a tensor of few rows has none in some processes
                        rows[p.device, p.dtype, state["step"]].append((number, self._first(p), *here))
            tensors += len(group["params"])
            for (device, _, step), together in rows.items():
                (launch if device.type == "cuda" else plain)(together, scale, **scalars(group, step))
        return loss

    def _first(self, p: Tensor) -> int:
        """The position, in the whole tensor, of the first value that this process has."""
        if not isinstance(p, DTensor):
            return 0
        if p not in self.firsts:
            if any(not one.is_shard(0) for one in p.placements):
                raise ValueError(f"parameter {tuple(p.shape)}: {p.placements}; expected shards along dimension 0")
            _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            self.firsts[p] = offset[0] * p.shape[1:].numel()
        return self.firsts[p]

    def _start(self, p: Tensor) -> dict:
        self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor [...], sharded or not: [...]."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scalars(group: dict, step: int) -> dict:
    """What a step needs besides tensors; the key decides its random bits."""
    beta1, beta2 = group["betas"]
    return dict(
        key=_mix(_mix(group["seed"]) + step) >> 1,  # 31 bits: an int32 for the kernel
        decay=1 - group["lr"] * group["weight_decay"],
        size=group["lr"] / (1 - beta1**step),
        lift=(1 - beta2**step) ** -0.5,
        rate1=1 - beta1,
        rate2=1 - beta2,
        eps=group["eps"],
    )


def plain(rows: list, scale: Tensor | None, *, key, decay, size, lift, rate1, rate2, eps) -> None:
    """The update in plain torch; the kernel's reference.

    Args:
        rows: (number, position of the first value, parameter, gradient, first moment, second moment), four tensors of
            one shape [...] each.
        scale: of the gradients, float32 [], or None for 1.
        The numbers are those of the step: decay and size of a weight's update, rates of the moments.
    """
    for number, start, p, g, m, v in rows:
        grad, first, second = g.float() if scale is None else g.float() * scale, m.float(), v.float()
        first = first + rate1 * (grad - first)
        second = second + rate2 * (grad * grad - second)
        weight = decay * p.float() - size * first / (second.sqrt() * lift + eps)  # 1711.05101, algorithm 2
        position = torch.arange(start, start + p.numel(), device=p.device).view_as(p)
        bits = _mix(_mix(position) + _mix(_mix(number) + key))
        p.copy_(_round(weight, bits >> 16, p.dtype))
        v.copy_(_round(second, bits & 0xFFFF, v.dtype))
        m.copy_(_round(first, _mix(bits) >> 16, m.dtype))


def _round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Up in size with the probability of the part cut off: add 16 random bits below the last kept one, then cut."""
    if dtype is torch.float32:
        return x
    bits = torch.where(x == x, bits, 0).int()  # a NaN stays one
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).to(dtype)


def _mix(x):
    """A permutation of 32 bits in which each input bit flips each output bit half the time (C. Wellons, lowbias32)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def launch(rows: list, scale: Tensor | None, *, key, **numbers) -> None:
    """The update of `plain` on the same rows, tensors of one shape [...] a row, by one kernel.

    It finds its tensors in a table of addresses.
    """
    _, _, p, *_ = rows[0]
    owner, blocks = _blocks(tuple(row[2].numel() for row in rows), p.device)
    table = torch.tensor(
        [(number, first, block, tensors[0].numel(), *(t.data_ptr() for t in tensors))
         for (number, first, *tensors), block in zip(rows, blocks, strict=True)]
    )  # fmt: skip
    if p.is_cuda:
        table = table.pin_memory().to(p.device, non_blocking=True)  # the host need not wait for the backward pass
    half = p.dtype is torch.bfloat16
    wide = all(t.numel() % 8 == 0 and t.data_ptr() % 16 == 0 for _, _, *tensors in rows for t in tensors)
    with torch.cuda.device_of(p):
        _kernel[(len(owner),)](table, owner, scale, key, **numbers, HALF=half, WIDE=wide, BLOCK=_BLOCK)


@functools.lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """For every block the row of its tensor, and for every row its first block."""
    counts = torch.tensor([-(-size // _BLOCK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    return owner.to(device), (counts.cumsum(0) - counts).tolist()


if triton is not None:

    @triton.jit
    def _mixed(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _rounded(x, bits, HALF: tl.constexpr):
        if HALF:
            bits = tl.where(x == x, bits, 0)
            x = ((x.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return x

    @triton.jit(do_not_specialize=["key"])
    def _kernel(table, owner, scale, key, decay, size, lift, rate1, rate2, eps,
                HALF: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        block = tl.program_id(0)
        row = table + tl.load(owner + block) * 8
        position = (block - tl.load(row + 2)) * BLOCK + tl.arange(0, BLOCK)
        inside = position < tl.multiple_of(tl.load(row + 3), 8 if WIDE else 1)
        kind = tl.pointer_type(tl.bfloat16 if HALF else tl.float32)
        p = tl.multiple_of(tl.load(row + 4).to(kind), 16 if WIDE else 2) + position
        g = tl.multiple_of(tl.load(row + 5).to(kind), 16 if WIDE else 2) + position
        m = tl.multiple_of(tl.load(row + 6).to(kind), 16 if WIDE else 2) + position
        v = tl.multiple_of(tl.load(row + 7).to(kind), 16 if WIDE else 2) + position
        grad = tl.load(g, inside, 0.0).to(tl.float32)
        if scale is not None:
            grad *= tl.load(scale)
        first = tl.load(m, inside, 0.0).to(tl.float32)
        first += rate1 * (grad - first)
        second = tl.load(v, inside, 0.0).to(tl.float32)
        second += rate2 * (grad * grad - second)
        weight = decay * tl.load(p, inside, 0.0).to(tl.float32) - size * first / (tl.sqrt(second) * lift + eps)
        stream = _mixed(_mixed(tl.load(row).to(tl.uint32)) + key.to(tl.uint32))
        bits = _mixed(_mixed((tl.load(row + 1) + position).to(tl.uint32)) + stream)
        tl.store(p, _rounded(weight, bits >> 16, HALF), inside)
        tl.store(v, _rounded(second, bits & 0xFFFF, HALF), inside)
        tl.store(m, _rounded(first, _mixed(bits) >> 16, HALF), inside)
