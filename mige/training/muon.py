"""Muon for many small matrices: matrices of one shape are orthogonalised together."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024), the same update in few large kernels instead of thousands.

    Its step sizes are Muon's "match_rms_adamw" (arXiv 2502.16982): 0.2 sqrt(longer side) x `lr`, so that rates that
    suit AdamW suit it too. Args: `params`, `lr`, `weight_decay`, `momentum` as in torch's class, whose state it keeps;
    a group of parameters may have a `scale` by which its steps are multiplied.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            trained = [p for p in group["params"] if p.grad is not None]
            moments, grads = [self._moment(p) for p in trained], [p.grad for p in trained]
            torch._foreach_lerp_(moments, grads, 1 - momentum)
            updates = defaultdict(list)  # shape -> [(parameter, its update)]
            for p, update in zip(trained, torch._foreach_lerp(grads, moments, momentum), strict=True):
                updates[p.shape].append((p, update))
            torch._foreach_mul_(trained, 1 - lr * group["weight_decay"])
            for shape, same in updates.items():
                parameters, rows = zip(*same, strict=True)
                turned = orthogonalise(torch.stack(rows), group["ns_coefficients"], group["ns_steps"], group["eps"])
                alpha = -0.2 * math.sqrt(max(shape)) * lr * group.get("scale", 1.0)
                torch._foreach_add_(parameters, list(turned.to(parameters[0].dtype).unbind()), alpha=alpha)
        return loss

    def _moment(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def muon_groups(blocks: Iterable[nn.Module]) -> list[dict]:
    """The trained matrices of repeated blocks as groups of parameters for `BatchedMuon`.

    T5 does not divide its attention's products by sqrt(d), d the width of a head: its queries start smaller by that
    instead (arXiv 1910.10683), so their steps must be smaller too. With steps of full size the attention of
    MIGE-mini's text encoder hardened to one or two positions, and learnt more slowly where to look (docs/mini.md).
    """
    modules = [module for block in blocks for module in block.modules()]
    attentions = [module for module in modules if isinstance(module, T5Attention)]
    queries = [a.q.weight for a in attentions if a.q.weight.requires_grad]
    own = {id(p) for p in queries}
    others = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2 and p.requires_grad]
    groups = [{"params": [p for p in others if id(p) not in own]}]
    return [*groups, {"params": queries, "scale": attentions[0].key_value_proj_dim ** -0.5}] if queries else groups


def orthogonalise(matrices_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz: N matrices with their singular values brought near 1, in bfloat16 [N, R, C]."""
    a, b, c = coefficients
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
