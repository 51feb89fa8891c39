"""A judge on this machine: any vision-language model of transformers that takes several images (Qwen2.5-VL, Qwen3-VL).

EditScore (arXiv 2509.23909) is such a model with adapters: `adapter="EditScore/EditScore-7B"` over
Qwen2.5-VL-7B-Instruct, on its scale of 25 points.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mige.evaluation.judges.answers import Reply
from mige.evaluation.judges.judge import JudgeError

MAX_TOKENS = 512  # of a reply, as EditScore has it


class LocalJudge:
    """Asks a model of transformers, one question at a time.

    Args:
        model: its folder or hub name. adapter: PEFT's folder or hub name, merged into the weights.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn, seeded by the repetition.

    Raises JudgeError for files that are no such model.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        temperature: float = 0.0,
    ):
        self.name, self.temperature, self.device = model + (f" with {adapter}" if adapter else ""), temperature, device
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise JudgeError(f"--judge {model}: {error}; give a vision-language model of transformers") from error
        if adapter:
            network = _merged(network, adapter)
        self.model = network.eval().to(device)
        self.fingerprint = fingerprint(self.model)

    @property
    def settings(self) -> Mapping[str, str]:
        """Model, weights and how they are asked."""
        return {
            "judge": self.name,
            "judge's weights": self.fingerprint,
            "precision": str(self.model.dtype).removeprefix("torch."),
            "temperature": f"{self.temperature:g}",
            "tokens of an answer": f"at most {MAX_TOKENS}",
        }

    @torch.inference_mode()
    def ask(self, text: str, images: Sequence[Image.Image], repetition: int) -> Reply:
        """The model's reply; see `Judge.ask`."""
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        given = inputs["input_ids"].shape[1]
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.random.fork_rng(devices=[self.device] if "cuda" in self.device else []):
            torch.manual_seed(repetition)
            out = self.model.generate(**inputs, **sampling, max_new_tokens=MAX_TOKENS)[0, given:]
        said = self.processor.batch_decode([out], skip_special_tokens=True)[0]
        return Reply(said.strip(), "length" if len(out) == MAX_TOKENS else "stop")


def _merged(network: nn.Module, adapter: str) -> nn.Module:
    """The network with adapters merged into its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(network, adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise JudgeError(f"--adapter {adapter}: {error}; give a folder of PEFT for this model") from error


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of the names, the shapes and 64 numbers of each tensor of a model."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{key} {list(value.shape)}".encode() + some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
