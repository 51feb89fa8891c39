"""The libraries' quantisers through `from_pretrained(quantization_config=...)`, and half precision, on a CPU."""

import diffusers
import pytest
import torch
import transformers
from conftest import ROOT
from diffusers import PipelineQuantizationConfig
from torch import nn

from mige.inference.pipeline import MIGEPipeline

QUANTISED = ("transformer", "text_encoder", "image_encoder", "qformer", "fusion")
OF_DIFFUSERS = ("transformer", "fusion")


def load(folder, **options):
    made = MIGEPipeline.from_pretrained(folder, **options)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe):
    cat = str(ROOT / "example_data" / "images" / "cat.jpg")
    return pipe("make<imagehere>red", source=cat, num_inference_steps=3, output_type="latent", seed=0).images.float()


@pytest.fixture(scope="module")
def want(lively):
    return call(load(lively))


def far(got, want):
    return ((got - want).norm() / want.norm()).item()


def torchao(scheme, *parts):
    quantization = pytest.importorskip("torchao.quantization")
    how = getattr(quantization, scheme)
    made = {part: (diffusers if part in OF_DIFFUSERS else transformers).TorchAoConfig(how()) for part in parts}
    return PipelineQuantizationConfig(quant_mapping=made)


def nf4():
    pytest.importorskip("bitsandbytes")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return PipelineQuantizationConfig(quant_mapping={"text_encoder": transformers.BitsAndBytesConfig(**how)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu(lively, want, dtype):
    assert 0 < far(call(load(lively, dtype=dtype)), want) < 0.05


@pytest.mark.parametrize("scheme, most", [("Int8WeightOnlyConfig", 0.05), ("Float8WeightOnlyConfig", 0.15)])
def test_torchao_in_bfloat16(lively, want, scheme, most):
    pipe = load(lively, dtype=torch.bfloat16, quantization_config=torchao(scheme, "transformer", "text_encoder"))
    kinds = [type(part.weight.data) for name in ("transformer", "text_encoder") for part in
             pipe.components[name].modules() if isinstance(part, nn.Linear)]  # fmt: skip
    assert sum(kind is not torch.Tensor for kind in kinds) > 0.8 * len(kinds)
    assert 0 < far(call(pipe), want) < most


@pytest.mark.parametrize("part", QUANTISED)
def test_each_part_can_be_quantised_alone(lively, want, part):
    pipe = load(lively, quantization_config=torchao("Int8WeightOnlyConfig", part))
    for name in QUANTISED:
        linear = [one for one in pipe.components[name].modules() if isinstance(one, nn.Linear)]
        assert any(type(one.weight.data) is not torch.Tensor for one in linear) == (name == part)
    assert 0 < far(call(pipe), want) < 0.1


def test_nf4_of_t5_leaves_wo(lively):
    """T5 makes its activations of `wo`'s dtype, which would be uint8; on a CPU nf4 computes widths of 64 n alone."""
    pipe = load(lively, quantization_config=nf4())
    block = pipe.text_encoder.encoder.block[0]
    assert block.layer[1].DenseReluDense.wo.weight.is_floating_point()
    assert block.layer[0].SelfAttention.q.weight.dtype is torch.uint8


def test_what_quantised_weights_cannot_do_is_refused(lively, tmp_path):
    config = torchao("Int8WeightOnlyConfig", "transformer", "text_encoder")
    pipe = load(lively, quantization_config=config)
    with pytest.raises(
        ValueError, match=r"compile needs plain weights, but transformer\..* is quantised \(Int8Tensor\)"
    ):
        pipe.compile()
    with pytest.raises(ValueError, match=r"quantise_text_encoder needs plain weights, but text_encoder\."):
        pipe.quantise_text_encoder(8)
    assert not pipe.is_compiled
    with pytest.raises(ValueError, match="compile needs plain weights"):
        load(lively, quantization_config=config, compile=True)


def test_own_bits_and_adapters_beside_quantised_parts(lively, want):
    pipe = load(lively, quantization_config=torchao("Int8WeightOnlyConfig", "transformer"))
    pipe.quantise_text_encoder(8)
    pipe.offload_encoders("cpu")
    assert 0 < far(call(pipe), want) < 0.1
    state = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(shape)
             for half, shape in (("A", (2, 64)), ("B", (64, 2)))}  # fmt: skip
    with pytest.raises(ValueError, match="to_q is a Linear, quantised or off-loaded: load adapters first"):
        pipe.load_lora_weights(state)
