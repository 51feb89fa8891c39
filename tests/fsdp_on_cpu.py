"""Training as FSDP2 on CPU processes: accelerate offers FSDP on GPUs alone, though PyTorch shards over gloo as well.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py CONFIG --output RUN ...     # arguments of train_mige.py
"""

import runpy
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState

_init = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    first = not AcceleratorState._shared_state  # PartialState may have been there before
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # read again by every new instance


AcceleratorState.__init__ = init
runpy.run_path(str(Path(__file__).parent.parent / "train_scripts" / "train_mige.py"), run_name="__main__")
