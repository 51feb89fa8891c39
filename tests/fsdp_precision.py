"""fsdp_on_cpu.py, which writes to $PROBE-RANK.json what reaches the DiT as timesteps and how its gradients are rounded.

torchrun --nproc_per_node 2 tests/fsdp_precision.py CONFIG --output RUN ...
"""

import json
import os
import runpy
from pathlib import Path

import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel

from mige.training import clipping

seen: dict[str, list[float]] = {"timesteps": [], "beyond_bfloat16": []}
forward, norm, layer_norm = PixArtTransformer2DModel.forward, clipping.gradient_norm, F.layer_norm


def noting_forward(self, *args, timestep, **kwargs):
    seen["timesteps"] += timestep.tolist()
    return forward(self, *args, timestep=timestep, **kwargs)


def noting_norm(parameters):
    """Shares of a matrix's gradient, averaged over the processes, that no bfloat16 number is."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim == 2:
            gradient = parameter.grad.to_local().float()
            if gradient.any():
                seen["beyond_bfloat16"].append(float((gradient != gradient.bfloat16()).float().mean()))
    Path(f"{os.environ['PROBE']}-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return norm(parameters)


def float32_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """As autocast does it on GPUs; on a CPU it leaves the dtypes, which the kernel then refuses."""
    weight, bias = (one if one is None else one.float() for one in (weight, bias))
    return layer_norm(x.float(), shape, weight, bias, eps)


PixArtTransformer2DModel.forward, clipping.gradient_norm, F.layer_norm = noting_forward, noting_norm, float32_norm
runpy.run_path(str(Path(__file__).with_name("fsdp_on_cpu.py")), run_name="__main__")
