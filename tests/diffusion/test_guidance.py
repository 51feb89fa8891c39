"""Guidance weights against the formulas as written in the papers, and what is dropped from a condition."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch, branches, combine
from mige.tasks import Task

NONE, SOURCE, FULL = (True, True), (True, False), (False, False)
SCALES = [(7.0, 1.0), (5.0, 1.0), (5.0, 1.5), (1.0, 1.0), (0.0, 0.0), (2.0, 2.0), (1.5, 0.0), (-1.0, 3.0)]


def dropped(chosen: list[Branch]) -> list[tuple[bool, bool]]:
    return [(branch.drop_text, branch.drop_source) for branch in chosen]


@pytest.mark.parametrize("text, source", SCALES)
@pytest.mark.parametrize("task", list(Task))
def test_the_weighted_sum_is_the_formula(task, text, source):
    none, middle, full = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    if task is Task.SUBJECT:
        want = none + text * (full - none)
    else:
        want = none + source * (middle - none) + text * (full - middle)
    chosen = branches(task, text, source)
    eps = {NONE: none, SOURCE: middle, FULL: full}
    got = combine(torch.cat([eps[what] for what in dropped(chosen)]).float(), chosen)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert sum(branch.weight for branch in chosen) == pytest.approx(1)
    assert all(branch.weight != 0 for branch in chosen)


def test_the_branches_that_are_evaluated():
    assert dropped(branches(Task.SUBJECT, 7.0, 1.0)) == [NONE, FULL]
    assert dropped(branches(Task.SUBJECT, 7.0, 3.0)) == [NONE, FULL]  # a subject has no source to guide towards
    for task in (Task.EDIT, Task.SUBJECT_EDIT):
        assert dropped(branches(task, 5.0, 1.0)) == [SOURCE, FULL]  # the default
        assert dropped(branches(task, 5.0, 1.5)) == [NONE, SOURCE, FULL]
        assert dropped(branches(task, 2.0, 2.0)) == [NONE, FULL]
    for task in Task:
        assert branches(task, 1.0, 1.0) == [Branch(1.0, False, False)]
        assert branches(task, 0.0, 0.0) == [Branch(1.0, True, True)]


def test_half_precision_estimates_are_combined_in_float32():
    chosen = branches(Task.SUBJECT, 7.0, 1.0)
    eps = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = combine(eps, chosen)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 7 * eps[1:].float() - 6 * eps[:1].float())


def make_condition(batch: int = 3, length: int = 6) -> Condition:
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(length) < torch.tensor([[6], [2], [4]])[:batch]).long()
    return Condition(
        torch.randn(batch, length, 40, generator=random), mask, torch.randn(batch, 4, 8, 8, generator=random)
    )


NULL = torch.randn(10, 40, generator=torch.Generator().manual_seed(9))


def test_drop_by_sample():
    full = make_condition()
    before = [part.clone() for part in (full.context_BLC, full.mask_BL, full.source_BCHW)]
    got = full.drop(NULL, text=torch.tensor([True, False, True]), source=torch.tensor([False, True, True]))
    for sample in (0, 2):
        assert torch.equal(got.context_BLC[sample], NULL[:6])
    assert torch.equal(got.context_BLC[1], full.context_BLC[1])
    assert torch.equal(got.source_BCHW[0], full.source_BCHW[0])
    assert not got.source_BCHW[1:].any() and full.source_BCHW[1:].any()
    assert torch.equal(got.mask_BL, full.mask_BL)  # the prompt's own
    after = (full.context_BLC, full.mask_BL, full.source_BCHW)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_drop_of_all_or_nothing():
    full = make_condition()
    same = full.drop(NULL)
    assert same.context_BLC is full.context_BLC and same.source_BCHW is full.source_BCHW
    text, source = full.drop(NULL, text=True), full.drop(NULL, source=True)
    assert torch.equal(text.context_BLC, NULL[:6].expand(3, 6, 40)) and text.source_BCHW is full.source_BCHW
    assert not source.source_BCHW.any() and source.context_BLC is full.context_BLC
    never = torch.zeros(3, dtype=torch.bool)
    flagged = full.drop(NULL, text=never, source=never)
    assert torch.equal(flagged.context_BLC, full.context_BLC)
    assert torch.equal(flagged.source_BCHW, full.source_BCHW)


def test_drop_keeps_the_dtype():
    full = make_condition()
    half = Condition(full.context_BLC.bfloat16(), full.mask_BL, full.source_BCHW.bfloat16())
    got = half.drop(NULL, text=True, source=True)
    assert got.context_BLC.dtype == got.source_BCHW.dtype == torch.bfloat16


def test_a_null_context_longer_than_the_prompt_changes_nothing():
    """A prompt of n tokens reads n rows; those under its zero mask don't count, whatever stands there."""
    torch.manual_seed(0)
    dit = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=40,
        use_additional_conditions=False,
    )
    x = torch.randn(3, 8, 8, 8)

    @torch.no_grad()
    def eps(condition):
        return dit(
            x,
            encoder_hidden_states=condition.context_BLC,
            encoder_attention_mask=condition.mask_BL,
            timestep=torch.full((3,), 500.0),
            return_dict=False,
        )[0]

    full = make_condition()
    got = eps(full.drop(NULL, text=True))
    scrambled = NULL.clone()
    scrambled[2:] += 1  # sample 1 has 2 tokens, sample 2 has 4
    other = eps(full.drop(scrambled, text=True))
    torch.testing.assert_close(got[1], other[1], rtol=1e-5, atol=1e-6)
    assert (got[2] - other[2]).abs().max() > 1e-3


def test_stack_puts_one_branch_after_the_other():
    full, chosen = make_condition(), branches(Task.EDIT, 5.0, 1.5)
    stacked = guidance.stack(full, chosen, NULL)
    assert stacked.context_BLC.shape == (9, 6, 40) and stacked.source_BCHW.shape == (9, 4, 8, 8)
    assert torch.equal(stacked.mask_BL, full.mask_BL.repeat(3, 1))
    none, source, text = stacked.context_BLC.chunk(3)
    assert torch.equal(none, source) and torch.equal(text, full.context_BLC)
    assert not stacked.source_BCHW[:3].any()
    assert torch.equal(stacked.source_BCHW[3:], full.source_BCHW.repeat(2, 1, 1, 1))
