"""Training as DeepSpeed ZeRO-2 on CPU processes: accelerate takes it for a GPU's business, DeepSpeed does not.

torchrun --nproc_per_node 2 tests/zero2_on_cpu.py CONFIG --output RUN ...     # arguments of train_mige.py
"""

import runpy
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from accelerate.utils import DeepSpeedPlugin

BUCKET = 20_000  # values: the tiny model fills several a step, as the full one does DeepSpeed's own of 500 million


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device
prepare_plugin = DeepSpeedPlugin.__post_init__


def with_small_buckets(self):
    prepare_plugin(self)
    self.deepspeed_config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}


DeepSpeedPlugin.__post_init__ = with_small_buckets
runpy.run_path(str(Path(__file__).parent.parent / "train_scripts" / "train_mige.py"), run_name="__main__")
