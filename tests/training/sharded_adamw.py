"""StochasticAdamW on tensors that several processes share: what it makes of them goes to a file, gathered.

torchrun --nproc_per_node 3 tests/training/sharded_adamw.py OUT.pt
"""

import sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mige.training.adamw import StochasticAdamW
from mige.training.clipping import clip_factor, gradient_norm

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, seed=3)
SHAPES = ((7, 5), (2, 33), (64,))  # not divisible by three; the second has nothing for the third process


def parameters() -> list[torch.nn.Parameter]:
    """In bfloat16, but the last in float32."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype))
            for shape, dtype in zip(SHAPES, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True)]  # fmt: skip


def train(optimizer: StochasticAdamW, trained: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Four clipped steps of gradients that are the same for whole and sharded tensors; the norms before."""
    norms = []
    for step in range(4):
        for number, p in enumerate(trained):
            generator = torch.Generator().manual_seed(10 * step + number)
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            sharded = hasattr(p, "device_mesh")
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
        norms.append(gradient_norm(trained))
        optimizer.scale = torch.tensor(0.25)  # of the norm's factor the last bit may differ
        assert 0 < clip_factor(norms[-1], 1.0) < 1
        optimizer.step()
    return norms


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters()]
    optimizer = StochasticAdamW(trained, **OPTIONS)
    norms = train(optimizer, trained)
    moments = [optimizer.state[p][slot] for p in trained for slot in ("exp_avg", "exp_avg_sq")]
    whole = [t.detach().full_tensor() for t in (*trained, *moments)]
    if dist.get_rank() == 0:
        torch.save({"tensors": whole, "norms": torch.stack(norms)}, sys.argv[1])
    dist.destroy_process_group()
