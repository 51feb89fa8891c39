"""Training as DeepSpeed ZeRO-2 on CPU processes: accelerate takes it for a GPU's business, DeepSpeed does not.

torchrun --nproc_per_node 2 tests/zero2_on_cpu.py CONFIG --output RUN ...     # arguments of train_mige.py
"""

import runpy
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device
runpy.run_path(str(Path(__file__).parent.parent / "train_scripts" / "train_mige.py"), run_name="__main__")
