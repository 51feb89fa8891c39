"""The order of samples: a permutation, exact weights, the same however it is split, uniform, in constant memory."""

import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mige.data.order import ResumableBatchSampler, SampleOrder, exact, permute


def shown(order: SampleOrder, first: int, end: int) -> Counter:
    return Counter(order.locate(index) for index in range(first, end))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 100, 1000])
def test_it_is_a_permutation_another_for_another_key(length):
    rows = [[permute(place, length, key) for place in range(length)] for key in ("a", "b", "a")]
    assert all(sorted(row) == list(range(length)) for row in rows)
    assert rows[0] == rows[2] and (rows[0] != rows[1] or length < 6)


@given(st.integers(1, 10**12), st.data())
def test_no_two_places_meet_in_a_huge_permutation(length, data):
    places = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=20))
    images = {permute(place, length, "key") for place in places}
    assert len(images) == len(places) and min(images) >= 0 and max(images) < length


@pytest.mark.parametrize(
    ("weight", "meant"),
    [
        (1, Fraction(1)), (1.0, Fraction(1)), (0.5, Fraction(1, 2)), (0.3, Fraction(3, 10)), (1 / 3, Fraction(1, 3)),
        ("1/3", Fraction(1, 3)), (2.5, Fraction(5, 2)), (2 / 7, Fraction(2, 7)), (1e-9, Fraction(1, 10**9)),
        (0.1 + 0.2, Fraction("0.30000000000000004")), ("0.3", Fraction(3, 10)),
    ],
)  # fmt: skip
def test_a_weight_is_the_fraction_that_is_meant(weight, meant):
    assert exact(weight) == meant


@pytest.mark.parametrize(
    ("count", "weight", "epochs", "times"),
    [
        (1000, 0.5, 2, 1), (100, 0.3, 10, 3), (300, "1/3", 3, 1), (301, 1 / 3, 3, 1), (7, 0.3, 10, 3),
        (101, 2.5, 2, 5), (1, 0.1, 10, 1), (1, 0.3, 10, 3), (12, 2, 1, 2), (12, 1, 1, 1), (3, 0.7, 10, 7),
        (2, 1.01, 100, 101),
    ],
)  # fmt: skip
def test_a_weight_is_exact_over_its_epochs(count, weight, epochs, times):
    """Beside another set, which is shown in the same epochs."""
    order = SampleOrder([count, 5], [weight, 1.0], seed=3)
    samples = int(order.epoch_samples * epochs)
    assert order.epoch_samples == count * exact(weight) + 5
    expected = {(0, record): times for record in range(count)} | {(1, record): epochs for record in range(5)}
    assert shown(order, 0, samples) == expected
    assert shown(order, samples, 2 * samples) == expected  # and again, in another order
    assert [order.locate(i) for i in range(samples)] != [order.locate(i) for i in range(samples, 2 * samples)]


def test_half_is_every_other_epoch():
    order = SampleOrder([1000], [0.5], seed=0)
    first, second = shown(order, 0, 500), shown(order, 500, 1000)
    assert len(first) == len(second) == 500 and not first.keys() & second.keys()


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.25, 0.3, "1/3", 0.5, 1, 1.5, 2.5])), min_size=1,
             max_size=4),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_epoch_takes_the_next_positions_of_each_set(sets, seed):
    """Against the definition: epoch e takes positions floor(e a) to floor((e + 1) a) - 1 of a set's endless laps."""
    order = SampleOrder([count for count, _ in sets], [weight for _, weight in sets], seed)
    index = 0
    for epoch in range(5):
        found = []
        for count, weight in sets:
            rate = count * exact(weight)
            found.append((int(epoch * rate), int((epoch + 1) * rate)))
        length = sum(end - first for first, end in found)
        seen = shown(order, index, index + length)
        for number, ((count, _), (first, end)) in enumerate(zip(sets, found, strict=True)):
            laps = [permute(k % count, count, f"records:{seed}:{number}:{k // count}") for k in range(first, end)]
            assert Counter({record: n for (which, record), n in seen.items() if which == number}) == Counter(laps)
        index += length


def test_sets_are_mixed_within_an_epoch():
    order = SampleOrder([1000, 1000], [1, 1], seed=1)
    halves = Counter(order.locate(index)[0] for index in range(1000))
    assert 430 < halves[0] < 570  # 500 on average, standard deviation 11


def test_any_split_shows_the_same_samples():
    """Steps of twelve samples, by processes, micro-batches and workers as may be, begun anew at step 3."""
    steps = []
    for batch, processes, accumulation in ((12, 1, 1), (3, 4, 1), (2, 2, 3), (1, 3, 4), (6, 1, 2)):
        ranks = [
            ResumableBatchSampler(
                batch=batch, processes=processes, rank=rank, gradient_accumulation_steps=accumulation, start=3
            )
            for rank in range(processes)
        ]
        taken = [list(itertools.islice(rank, 2 * accumulation)) for rank in ranks]
        micros = [range(0, accumulation), range(accumulation, 2 * accumulation)]  # of the two steps
        steps.append([sorted(i for one in taken for micro in step for i in one[micro]) for step in micros])
    assert all(step == [list(range(36, 48)), list(range(48, 60))] for step in steps)


def test_huge_sets_need_no_memory():
    order = SampleOrder([2_280_000, 10**8, 3], [1.0, 0.25, "1/3"], seed=0)
    tracemalloc.start()
    far = 10**12
    seen = {order.locate(index) for index in itertools.chain(range(200), range(far, far + 200))}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert all(record < order.counts[number] for number, record in seen)
    assert order.epoch_samples == 2_280_000 + 25_000_000 + 1


def test_a_place_of_a_huge_epoch_comes_once():
    order = SampleOrder([2_280_000], [1], seed=5)
    assert len({order.locate(index) for index in range(2_279_000, 2_280_000)}) == 1000


def test_orders_are_equally_likely():
    """All 120 orders of five records over keys; where neighbours of a long permutation go, and how far apart."""
    orders = Counter(tuple(permute(place, 5, f"{key}") for place in range(5)) for key in range(4000))
    assert len(orders) == 120 and chisquare(list(orders.values())).pvalue > 1e-3
    row = [permute(place, 10_007, "key") for place in range(4000)]
    tenths = Counter(10 * image // 10_007 for image in row)
    assert chisquare([tenths[tenth] for tenth in range(10)]).pvalue > 1e-3
    steps = Counter(10 * ((b - a) % 10_007) // 10_007 for a, b in itertools.pairwise(row))
    assert chisquare([steps[tenth] for tenth in range(10)]).pvalue > 1e-3


def test_seeds_epochs_and_sets_have_orders_of_their_own():
    order, other = (SampleOrder([50, 50], [1, 1], seed) for seed in (0, 1))
    by_set = [[r for n, r in map(order.locate, range(100)) if n == number] for number in (0, 1)]
    assert by_set[0] != by_set[1]
    epochs = [[one.locate(first + i) for i in range(100)] for one in (order, other) for first in (0, 100)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_the_order_is_fixed():
    """A checkpoint of today must be resumed in it tomorrow; a change of it needs another `ORDER`."""
    order = SampleOrder([1000, 10], [0.5, "1/3"], seed=42)
    located = [order.locate(index) for index in (0, 1, 2, 502, 503, 504, 10**9)]
    assert located == [(0, 457), (0, 208), (0, 203), (0, 742), (0, 687), (0, 817), (0, 672)]
