"""Weights in 8 and 4 bits: what is kept exactly, how far the rest is off, and a text encoder made of them."""

import pytest
import torch
from golden import golden_model
from torch import nn

from mige.inference.quantise import GROUP, QuantisedLinear, quantise


def layer(weight, bias=True):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight.data = weight
    return linear


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_on_the_grid_is_kept_exactly(bits):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (5, 2 * GROUP), generator=random).float()
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 2**bits - 1  # every group spans the grid
    weight = codes * 0.25 - 3
    linear, x = layer(weight), torch.randn(3, 2 * GROUP, generator=random)
    small = QuantisedLinear(linear, bits)
    assert torch.equal(small.dequantised(), weight) and torch.equal(small(x), linear(x))
    assert small.codes.numel() == weight.numel() * bits // 8


@pytest.mark.parametrize("bits, most", [(8, 0.008), (4, 0.12)])
@pytest.mark.parametrize("columns", [GROUP, 100, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_normal_weights(bits, most, columns, dtype):
    weight = torch.randn(50, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = QuantisedLinear(layer(weight, bias=False), bits).dequantised()
    assert got.shape == weight.shape and got.dtype == dtype
    assert 0 < (got - weight).float().norm() / weight.float().norm() < most


def test_a_constant_group():
    weight = torch.full((2, GROUP), 0.5)
    assert torch.equal(QuantisedLinear(layer(weight), 4).dequantised(), weight)


def test_a_text_encoder():
    model = golden_model()
    encoder = model.encoder.text_encoder
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 9, encoder.config.d_model, generator=random)
    mask = torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        want = encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        quantise(encoder.encoder.block, 8)
        got = encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert not any(isinstance(m, nn.Linear) for m in encoder.encoder.block.modules())
    assert 0 < (got - want).norm() / want.norm() < 0.02
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        quantise(encoder, 3)
