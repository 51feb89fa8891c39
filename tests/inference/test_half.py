"""Half precision on a CPU: float16 with activations that it cannot hold, and the script's option."""

import pytest
import torch
from conftest import ROOT, run_here
from PIL import Image

from mige.inference.pipeline import MIGEPipeline

CAT = ROOT / "example_data" / "images" / "cat.jpg"


def load(lively, **how):
    pipe = MIGEPipeline.from_pretrained(lively, **how)
    pipe.set_progress_bar_config(disable=True)
    for block in pipe.text_encoder.encoder.block:  # T5 v1.1 has such activations; here its MLPs get them
        block.layer[-1].DenseReluDense.wo.weight.data.mul_(3e4)
    return pipe


def test_activations_of_t5_beyond_float16(lively):
    """Its residual stream stays in float32, as the second matrices of its MLPs do; all in float16 it is cut off."""
    exact, half = load(lively), load(lively, dtype=torch.float16)
    given = dict(prompt="make it red", source=CAT, num_inference_steps=2, output_type="latent")
    streams = []
    exact.text_encoder.encoder.block[-1].register_forward_hook(
        lambda module, inputs, output: streams.append(output[0] if isinstance(output, tuple) else output)
    )
    want = exact(**given).images
    assert streams[0].abs().max() > torch.finfo(torch.float16).max
    got = half(**given).images
    assert half.transformer.dtype == torch.float16 and ((got - want).norm() / want.norm()) < 0.02
    contexts = [pipe.encode_prompt("make it red", source=CAT)[0].float() for pipe in (exact, half)]
    half.text_encoder.half()
    contexts.append(half.encode_prompt("make it red", source=CAT)[0].float())
    off = [((one - contexts[0]).norm() / contexts[0].norm()).item() for one in contexts]
    assert off[1] < 0.01 and not off[2] < 0.05  # NaN too


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_script_runs_in_half_precision(lively, tmp_path, dtype):
    case = ("--prompt", "make it red", "--source", CAT, "--steps", 1, "--dtype", dtype, "--device", "cpu")
    ended = run_here("infer_scripts/infer.py", "--model", lively, "--output", tmp_path / "out", *case)
    assert ended.returncode == 0, ended.stderr
    with Image.open(tmp_path / "out" / "images" / "image.png") as image:
        assert image.size == (144, 96)
