"""MIGE in ComfyUI: link this folder into ComfyUI's `custom_nodes` (docs/comfyui.md).

ComfyUI imports it and reads the two mappings below. What is heavy is imported when a node first needs it.
"""

from .names import register
from .nodes import AddAdapter, Instruction, LoadModel, Sample

register()
NODE_CLASS_MAPPINGS = {
    "MIGELoadModel": LoadModel,
    "MIGEAddAdapter": AddAdapter,
    "MIGEInstruction": Instruction,
    "MIGESample": Sample,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MIGELoadModel": "MIGE load model",
    "MIGEAddAdapter": "MIGE add adapter",
    "MIGEInstruction": "MIGE instruction",
    "MIGESample": "MIGE sample",
}
