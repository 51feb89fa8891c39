"""Saved folders that diffusers opens by itself, and models of the hub."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder

from mige.utils.files import write_text

_OPENER = '''"""Opens this folder by diffusers alone: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).

It runs the installed package `mige`, and nothing else.
"""

from mige.inference.pipeline import MIGEPipeline

__all__ = ["MIGEPipeline"]
'''

_CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags:
- mige
- diffusers
- instruction-based-editing
- subject-driven-generation
---

# {name}

A MIGE model ([arXiv 2502.21291](https://arxiv.org/abs/2502.21291)): subject-driven generation, instruction-based
editing, and both at once. Trained at {native} x {native} px, {parameters} parameters; sampled with {scheduler}.

```python
from mige import MIGEPipeline  # or: diffusers.DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)

pipe = MIGEPipeline.from_pretrained("{name}")
image = pipe("make the sky night in<imagehere>", image="photo.jpg").images[0]
```

Both need the package `mige`. Whoever publishes a model adds its data, licence and limits here.
"""


class Saving:
    """What diffusers' own saving leaves out."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """diffusers' reader of a config. Opened by its own class, a folder's `pipeline.py` is never run."""
        read = super()._dict_from_json_file(json_file)
        if isinstance(read.get("_class_name"), list):
            read["_class_name"] = read["_class_name"][-1]
        return read

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **options: Any) -> None:
        """Write a checkpoint folder.

        Args:
            push_to_hub: upload it too, as the method does, with its arguments beside `repo_id` (the folder's name).
            options: of diffusers' `save_pretrained`: variant, max_shard_size; safe_serialization False only warns, as
                nothing here reads pickled weights.

        Raises ValueError for `use_flashpack`, whose files nothing here reads either.
        """
        if not options.pop("safe_serialization", True):
            told = "safe_serialization is False, but only *.safetensors are read: they are written"
            warnings.warn(told, stacklevel=2)
        if options.get("use_flashpack"):
            raise ValueError("use_flashpack is True, but only *.safetensors are ever read: leave it out")
        folder = Path(save_directory)
        hub = {name: options.pop(name) for name in ("repo_id", *_HUB) if name in options}
        super().save_pretrained(folder, **options)
        write_text(folder / "pipeline.py", _OPENER)
        index = folder / "model_index.json"
        listed = json.loads(index.read_text()) | {"_class_name": ["pipeline", "MIGEPipeline"]}
        write_text(index, json.dumps(listed, indent=2) + "\n")
        if push_to_hub:
            self._upload(folder, **{"repo_id": folder.name} | hub)

    def push_to_hub(self, repo_id: str, *, variant: str | None = None, **hub: Any) -> str:
        """Save to a model of the hub, with a model card.

        Args:
            repo_id: owner/name; made where there is none.
            variant: of the weight files, such as "fp16".
            hub: commit_message, private, token, create_pr.

        Returns the address of the commit. Raises TypeError for another option, and what the hub's client raises.
        """
        if unknown := sorted(hub.keys() - set(_HUB)):
            raise TypeError(f"push_to_hub() got the unknown option {unknown[0]!r}, expected {', '.join(_HUB)}")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return self._upload(Path(folder), repo_id, **hub)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str = "Upload MIGEPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        name = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if not (folder / "README.md").exists():
            parts = [part for part in self.components.values() if hasattr(part, "parameters")]
            count = sum(parameter.numel() for part in parts for parameter in part.parameters())
            told = {"native": self.native_size, "parameters": f"{count:,}", "scheduler": type(self.scheduler).__name__}
            write_text(folder / "README.md", _CARD.format(name=name, **told))
        how = {"commit_message": commit_message, "token": token, "create_pr": create_pr}
        return str(upload_folder(repo_id=name, folder_path=folder, **how))


_HUB = ("commit_message", "private", "token", "create_pr")
"""Options of an upload."""
