"""The order of several shapes: one a block, every record as often as its weight says, the same however it is split."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mige.data.order import ResumableBatchSampler, SampleOrder, exact
from mige.data.shape_order import ShapeOrder
from mige.data.shapes import nearest_shapes

SHAPES = [np.array([0, 1, 0, 2, 0, 0, 1], np.int8), np.array([1, 1, 0, 1], np.int8)]


def shown(order: ShapeOrder, first: int, end: int) -> list[tuple[int, int]]:
    return [order.locate(index) for index in range(first, end)]


@pytest.mark.parametrize("block", [1, 2, 3, 8])
@pytest.mark.parametrize("weights", [(1, 1), (0.5, "1/3"), (2, 0.3)])
def test_the_blocks_of_a_shape_are_those_of_a_run_on_its_records_alone(weights, block):
    """Over 24 epochs, each once: nothing lost, nothing shown twice."""
    order, expected = ShapeOrder(SHAPES, weights, seed=3, block=block), []
    for shape in range(3):
        own = [(number, np.flatnonzero(of_set == shape)) for number, of_set in enumerate(SHAPES)]
        own = [(number, records) for number, records in own if len(records)]
        counts, shares = [len(records) for _, records in own], [weights[number] for number, _ in own]
        alone, samples = SampleOrder(counts, shares, f"3:{shape}"), []
        for number, record in map(alone.locate, range(alone.start(24) // block * block)):
            samples.append((own[number][0], int(own[number][1][record])))
        expected += [samples[first : first + block] for first in range(0, len(samples), block)]
    assert len(expected) > 5
    blocks = [shown(order, first * block, (first + 1) * block) for first in range(len(expected))]
    assert sorted(blocks) == sorted(expected) and (blocks != expected or len(expected) < 9)


@settings(deadline=None, max_examples=50)  # a busy host is no failure
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.1, "1/3", 0.5, 1, 1.5, 2.5]), min_size=3, max_size=3),
    st.integers(1, 6), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_after_every_epoch_less_than_a_block_a_shape_is_still_to_come(sets, weights, block, seed):
    """Against the definition: of a shape, whole blocks of what all epochs so far have, and each of them once."""
    order = ShapeOrder([np.array(one, np.int8) for one in sets], weights[: len(sets)], seed, block)
    has = Counter()
    for epoch in range(1, 6):
        due = Counter()
        for of_set, weight in zip(sets, weights, strict=False):
            due += Counter({shape: int(epoch * many * exact(weight)) for shape, many in Counter(of_set).items()})
        blocks = sum(many // block for many in due.values())
        has = Counter(sets[number][record] for number, record in shown(order, 0, blocks * block))
        assert has == Counter({shape: many // block * block for shape, many in due.items()})
    assert order.epoch_samples == sum(len(one) * exact(w) for one, w in zip(sets, weights, strict=False))


def test_records_are_shown_as_often_as_their_weights_say():
    """After 24 epochs, 48 or 12 views of each; blocks of 3 come out even then for every shape of these sets."""
    order = ShapeOrder(SHAPES, [2, 0.5], seed=0, block=3)
    samples = int(order.epoch_samples * 24)
    counts = Counter(shown(order, 0, samples))
    assert counts == {(0, r): 48 for r in range(7)} | {(1, r): 12 for r in range(4)}
    assert Counter(shown(order, samples, 2 * samples)) == counts
    assert shown(order, 0, samples) != shown(order, samples, 2 * samples)


def test_any_split_shows_the_same_samples_and_no_micro_batch_mixes_shapes():
    """Steps of 24 samples, by processes and micro-batches as may be, begun anew at step 3; blocks of 6."""
    order = ShapeOrder(SHAPES, [1, 1], seed=1, block=6)
    steps = []
    for batch, processes, accumulation in ((6, 4, 1), (3, 4, 2), (2, 2, 6), (1, 3, 8), (6, 1, 4)):
        ranks = [
            ResumableBatchSampler(
                batch=batch, processes=processes, rank=rank, gradient_accumulation_steps=accumulation, start=3
            )
            for rank in range(processes)
        ]
        micros = [list(itertools.islice(rank, accumulation)) for rank in ranks]
        for indices in itertools.chain(*micros):
            located = [order.locate(index) for index in indices]
            assert len({SHAPES[number][record] for number, record in located}) == 1
        steps.append([order.locate(index) for index in sorted(itertools.chain(*itertools.chain(*micros)))])
    assert all(step == shown(order, 72, 96) for step in steps)


def test_shapes_are_mixed_within_an_epoch_and_epochs_differ():
    shapes = np.repeat(np.array([0, 1], np.int8), 400)
    order = ShapeOrder([shapes], [1], seed=1, block=4)
    firsts = [int(shapes[order.locate(4 * block)[1]]) for block in range(400)]
    assert sum(firsts[:200]) == 100 and 30 < sum(firsts[:100]) < 70 and firsts[:200] != firsts[200:]
    other = ShapeOrder([shapes], [1], seed=2, block=4)
    assert shown(order, 0, 40) != shown(other, 0, 40)


def test_huge_sets_take_their_numbers_alone():
    shapes = np.random.default_rng(0).integers(0, 9, 2_000_000).astype(np.int8)
    tracemalloc.start()
    order = ShapeOrder([shapes], [1], seed=0, block=16)
    far = 10**10
    seen = [shapes[order.locate(index)[1]] for index in range(far, far + 64)]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 9_000_000  # four bytes a record
    assert all(len(set(seen[first : first + 16])) == 1 for first in range(0, 64, 16))


def test_the_order_is_fixed():
    """A checkpoint of today must be resumed in it tomorrow; a change of it needs another `SHAPE_ORDER`."""
    order = ShapeOrder(SHAPES, [1, "1/3"], seed=42, block=2)
    located = [order.locate(index) for index in (0, 1, 2, 3, 20, 21, 10**9)]
    assert located == [(0, 2), (0, 5), (0, 6), (0, 1), (1, 1), (0, 6), (1, 1)]


# ---- which shape a record has ----------------------------------------------------------------------------------------

SIZES = [(512, 512), (448, 576), (576, 448), (384, 672), (672, 384), (336, 768), (768, 336), (288, 896), (896, 288)]


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        ((100, 100), 0), ((1000, 1000), 0), ((640, 480), 1), ((480, 640), 2), ((1920, 1080), 3), ((1080, 1920), 4),
        ((2390, 1000), 5), ((1000, 2100), 6), ((3000, 1000), 7), ((9000, 100), 7), ((1, 500), 8),
    ],
)  # fmt: skip
def test_a_record_has_the_nearest_shape(image, shape):
    assert nearest_shapes([image], SIZES) == [shape]


@given(st.lists(st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)), min_size=1, max_size=20))
def test_turned_images_have_turned_shapes_and_no_other_is_nearer(images):
    for (width, height), shape in zip(images, nearest_shapes(images, SIZES), strict=True):
        factors = [max(a, 1 / a) for a in (width / height / (w / h) for h, w in SIZES)]
        assert factors[shape] <= min(factors) * (1 + 1e-12)
        [turned] = nearest_shapes([(height, width)], SIZES)
        assert SIZES[turned] == SIZES[shape][::-1] or factors.count(factors[shape]) > 1
