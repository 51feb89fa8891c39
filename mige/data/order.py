"""The order of samples: sample index -> (set, record), one computed permutation walked through the epochs.

A run counts its samples 0, 1, 2, ... over all processes. Nothing is shuffled or stored: where a sample index leads is
computed from (seed, index) in constant memory. So it is the same for any number of processes, workers and micro-batches
and after resuming, and sets of 10^8 records cost no more than small ones.

Set i has n_i records and weight w_i, and is one endless stream: its records in laps, each lap in an order of its own.
Epoch e takes the positions floor(e a_i) to floor((e + 1) a_i) - 1 of every stream, a_i = n_i w_i as exact fractions,
and shows them in an order of its own. So weight 2 shows every record twice an epoch, and weight 1/2 half of them in one
epoch and the other half in the next.

Both orders are permutations by a keyed Feistel network, made to fit any length by cycle walking: Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import floor

from torch.utils.data import Sampler

ORDER = "feistel-1"
"""The version of the order, in every checkpoint: a run is resumed only in the order it was begun in."""

_ROUNDS = 24  # with 10, as NIST's FF1 takes, the 120 orders of five records are not equally likely
_EXACT = 10**6  # the largest denominator that a float is taken to mean


class SampleOrder:
    """Which record of which set every sample index shows.

    Args:
        counts: records of each set, at least 1.
        weights: views of each record an epoch, above 0; see `exact`.
        seed: of the run; a text where a run has several orders.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float | str], seed: int | str):
        self.counts, self.seed = tuple(counts), seed
        self._rates = [count * exact(weight) for count, weight in zip(counts, weights, strict=True)]  # a_i

    @property
    def epoch_samples(self) -> Fraction:
        """Samples an epoch: the mean over epochs, of which each has this number rounded down or up."""
        return sum(self._rates, Fraction(0))

    def locate(self, index: int) -> tuple[int, int]:
        """(set, record) of a sample index from 0 on, both counted from 0."""
        epoch = last_epoch(index, self.start, self.epoch_samples, late=len(self.counts))
        place = self._place_in_epoch(epoch, index - self.start(epoch))
        for number, rate in enumerate(self._rates):
            first, end = floor(epoch * rate), floor((epoch + 1) * rate)
            if place < end - first:
                lap, place = divmod(first + place, self.counts[number])
                return number, permute(place, self.counts[number], f"records:{self.seed}:{number}:{lap}")
            place -= end - first
        raise AssertionError("a place beyond its epoch")

    def start(self, epoch: int) -> int:
        """The first sample index of an epoch."""
        return sum(floor(epoch * rate) for rate in self._rates)

    def _place_in_epoch(self, epoch: int, place: int) -> int:
        """Where in the epoch's row of all sets' positions its sample of that place is taken from."""
        return permute(place, self.start(epoch + 1) - self.start(epoch), f"places:{self.seed}:{epoch}")


class ResumableBatchSampler(Sampler[list[int]]):
    """The sample indices of one process, a list a micro-batch, from optimiser step `start` on, without end.

    A step takes `batch * processes * gradient_accumulation_steps` consecutive indices, whatever they are split into.

    Args:
        batch: samples a process and micro-batch. processes, rank: how many share the run, and which is this one.
        gradient_accumulation_steps: micro-batches a step. start: steps done.
    """

    def __init__(self, *, batch: int, processes: int, rank: int, gradient_accumulation_steps: int, start: int):
        self.batch, self.processes, self.rank, self.start = batch, processes, rank, start
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start * self.gradient_accumulation_steps
        while True:
            first = (micro * self.processes + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            micro += 1


def last_epoch(index: int, start: Callable[[int], int], mean: Fraction, late: int) -> int:
    """The last epoch that starts at or before the index, by bisection; epochs without samples are passed over.

    start: the first index of an epoch, never after epoch * mean, and before it by less than `late`. mean: of an epoch.
    """
    low, high = floor(index / mean), floor((index + late) / mean) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if start(middle) <= index else (low, middle)
    return low


def exact(weight: float | str) -> Fraction:
    """A weight as the fraction that is meant: .3 is 3/10, and a third is 1/3, written as text or computed (1 / 3).

    That is the fraction with that float and a denominator of at most 10^6, if there is one, else the decimal itself.
    Raises ValueError for a text that is no number.
    """
    written = Fraction(str(weight))
    simple = written.limit_denominator(_EXACT)
    return simple if float(simple) == float(written) else written


def permute(place: int, length: int, key: str) -> int:
    """Where a permutation of 0 .. length - 1, chosen by the key, takes `place`: in constant memory, some 50 us.

    A Feistel network permutes the smallest power of two that holds `length`; what lands outside walks on through it
    until it is back inside, fewer than two times on average, which leaves a permutation of the inside.
    """
    bits = (length - 1).bit_length()
    low = bits // 2
    while True:
        place = _feistel(place, bits - low, low, key)
        if place < length:
            return place


def _feistel(value: int, high_bits: int, low_bits: int, key: str) -> int:
    """A bijection of numbers of high_bits + low_bits bits: each half in turn takes on what is hashed of the other."""
    high, low = value >> low_bits, value & ((1 << low_bits) - 1)
    for number in range(0, _ROUNDS, 2):
        high ^= _hash(f"{key}:{number}:{low}") & ((1 << high_bits) - 1)
        low ^= _hash(f"{key}:{number + 1}:{high}") & ((1 << low_bits) - 1)
    return high << low_bits | low


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
