"""A checkpoint in which every part does something: of fresh weights, the tower and the fusion all but return 0."""

from pathlib import Path

import torch
from golden import golden_state

from mige.checkpoints.key_map import load_official
from mige.inference.pipeline import MIGEPipeline

torch.set_num_threads(1)  # at these sizes threads only wait for each other, for minutes on a busy machine


def nontrivial_checkpoint(tiny_model: Path, folder: Path) -> Path:
    """Copy the tiny checkpoint with the weights of the golden rule, so that images, text and noise all matter."""
    pipe = MIGEPipeline.from_pretrained(tiny_model)
    names = ("image_encoder", "qformer", "fusion", "text_encoder", "transformer")
    parts = {name: pipe.components[name] for name in names}
    load_official(parts, golden_state(parts))
    pipe.save_pretrained(folder)
    return folder
