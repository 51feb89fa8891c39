"""BatchedMuon does what torch's Muon does."""

import pytest
import torch
from torch import nn

from mige.inference.pipeline import MIGEPipeline
from mige.training.muon import BatchedMuon, muon_groups, orthogonalise

SHAPES = [(8, 16), (16, 8), (8, 16), (12, 12), (12, 12), (5, 40)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(step: int, *sets: list[nn.Parameter], without: int | None = None) -> None:
    for number, same in enumerate(zip(*sets, strict=True)):
        gradient = torch.randn(same[0].shape, generator=torch.Generator().manual_seed(100 * step + number))
        for p in same:
            p.grad = None if number == without else gradient.clone()


@pytest.mark.parametrize("without", [None, 2])
def test_the_update_is_that_of_torchs_class(without):
    ours, theirs = matrices(), matrices()
    batched = BatchedMuon(ours, lr=0.1, weight_decay=0.1)
    single = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        give_gradients(step, ours, theirs, without=without)
        batched.step()
        single.step()
    for p, q, start in zip(ours, theirs, matrices(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)  # products in bfloat16, in another order
        assert p.grad is None or (p - start).norm() > 0.05 * start.norm()


def test_a_resumed_run_equals_an_uninterrupted_one():
    ours, again = matrices(), matrices()
    one, two = BatchedMuon(ours, lr=0.1), BatchedMuon(again, lr=0.1)
    for step in range(4):
        give_gradients(step, ours, again)
        one.step()
        two.step()
        if step == 1:
            state, two = two.state_dict(), BatchedMuon(again, lr=0.1)
            two.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(ours, again, strict=True))


def test_singular_values_come_near_one():
    rows = (
        torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    for batch in (rows, rows.mT):
        values = torch.linalg.svdvals(orthogonalise(batch, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_steps_of_a_group_are_scaled():
    plain, scaled = matrices(), matrices()
    one = BatchedMuon(plain, lr=0.1, weight_decay=0.0)
    two = BatchedMuon([{"params": scaled[:3]}, {"params": scaled[3:], "scale": 0.25}], lr=0.1, weight_decay=0.0)
    give_gradients(0, plain, scaled)
    one.step()
    two.step()
    for number, (p, q, start) in enumerate(zip(plain, scaled, matrices(), strict=True)):
        share = 1.0 if number < 3 else 0.25
        torch.testing.assert_close(q - start, share * (p - start), rtol=1e-3, atol=1e-4)


def test_queries_of_t5_alone_step_less(tiny_model):
    model = MIGEPipeline.from_pretrained(tiny_model).model.requires_grad_(True)
    text_encoder = model.encoder.text_encoder
    plain, queries = muon_groups(model.blocks())
    attentions = [block.layer[0].SelfAttention for block in text_encoder.encoder.block]
    assert [id(p) for p in queries["params"]] == [id(a.q.weight) for a in attentions]
    assert queries["scale"] == text_encoder.config.d_kv**-0.5 and "scale" not in plain
    there = [id(p) for group in (plain, queries) for p in group["params"]]
    expected = {id(p) for block in model.blocks() for p in block.parameters() if p.ndim == 2}
    assert len(there) == len(set(there)) and set(there) == expected
    text_encoder.requires_grad_(False)
    [alone] = muon_groups(model.blocks())
    assert {id(p) for p in alone["params"]} == expected - {id(p) for p in text_encoder.parameters()}
