"""Averaged weights: the recursion, in float32, read back in place. Sharded ones: test_many_processes.py."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from mige.training import ema
from mige.training.ema import AveragedWeights


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def test_the_average_is_the_recursion_in_float32():
    parameters = weights((3, 2), (4,), dtype=torch.bfloat16)
    average, expected = AveragedWeights(parameters, 0.75), [p.detach().double() for p in parameters]
    for number in range(1, 6):
        for p in parameters:
            p.data += 0.25
        average.step(parameters)
        decay = average.get_decay(number)
        expected = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, parameters, strict=True)]
    assert all(t.dtype is torch.float32 for t in average.whole())
    for got, wanted in zip(average.whole(), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_average_is_that_of_diffusers():
    """To the rounding of one product, over more tensors than one kernel takes."""
    parameters = weights(*[(3, 5)] * (ema._TOGETHER + 3))
    ours, theirs = AveragedWeights(parameters, 0.9), EMAModel(parameters, decay=0.9, foreach=True)
    for _ in range(12):
        for p in parameters:
            p.data += torch.randn(p.shape)
        ours.step(parameters)
        theirs.step(parameters)
    for a, b in zip(ours.whole(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert ours.cur_decay_value == theirs.cur_decay_value == (1 + 11) / (10 + 11)


def test_a_saved_average_is_read_into_its_place():
    parameters = weights((3, 2), (4,))
    saved, fresh = AveragedWeights(parameters, 0.5), AveragedWeights(weights((3, 2), (4,)), 0.5)
    for p in parameters:
        p.data.zero_()
    for _ in range(3):
        saved.step(parameters)
    places = [t.data_ptr() for t in fresh.shadow_params]
    fresh.load_state_dict(saved.state_dict())
    assert [t.data_ptr() for t in fresh.shadow_params] == places and fresh.optimization_step == 3
    assert all(torch.equal(a, b) for a, b in zip(fresh.whole(), saved.whole(), strict=True))


def test_the_average_of_another_model_is_refused():
    average, other = AveragedWeights(weights((3, 2)), 0.5), AveragedWeights(weights((3, 2), (4,)), 0.5)
    with pytest.raises(ValueError, match="2 averaged weights, expected 1 of this model's shapes"):
        average.load_state_dict(other.state_dict())
