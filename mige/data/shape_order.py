"""The order of samples of several shapes, of which a micro-batch has one: again (seed, sample index) -> (set, record).

Samples k b to (k + 1) b - 1 of a run are block k, and all of one shape; b is a number of the config. A micro-batch
whose size divides b lies within a block, whatever the number of processes and of micro-batches a step.

The records of one shape, of all sets, are an endless row of samples, that of a run on them alone (`SampleOrder`, so
weights and epochs are exact), cut into blocks. What is left at the end of an epoch, up to b - 1 samples of a shape, is
the beginning of a block that the next epoch fills: nothing is left out and nothing shown twice. Epoch e takes the
blocks that are full in it, those of all shapes in an order of its own.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np

from mige.data.order import SampleOrder, last_epoch, permute

SHAPE_ORDER = "blocks-1"
"""The version of the order, in every checkpoint: a run is resumed only in the order it was begun in."""


class ShapeOrder:
    """Which record of which set every sample index shows.

    Args:
        shapes: of each set, its records' shapes as numbers from 0 on.
        weights: views of each record an epoch, above 0, of each set; see `exact`.
        seed: of the run. block: samples in a row of one shape.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], weights: Sequence[float | str], seed: int, block: int):
        self.seed, self.block = seed, block
        self._sets: list[list[tuple[int, np.ndarray]]] = []  # of each shape: sets that have it, and their records of it
        self._orders: list[SampleOrder] = []
        for shape in sorted({int(one) for of_set in shapes for one in np.unique(of_set)}):
            found = [(number, np.flatnonzero(np.asarray(of_set) == shape)) for number, of_set in enumerate(shapes)]
            found = [(number, records.astype(np.int32)) for number, records in found if len(records)]
            self._sets.append(found)
            counts, own = [len(records) for _, records in found], [weights[number] for number, _ in found]
            self._orders.append(SampleOrder(counts, own, f"{seed}:{shape}"))

    @property
    def epoch_samples(self) -> Fraction:
        """Samples an epoch: the mean over epochs, from which each differs by less than a block a shape."""
        return sum((order.epoch_samples for order in self._orders), Fraction(0))

    def locate(self, index: int) -> tuple[int, int]:
        """(set, record) of a sample index from 0 on, both counted from 0."""
        block, place = divmod(index, self.block)
        shape, block = self._locate_block(block)
        number, record = self._orders[shape].locate(block * self.block + place)
        number, records = self._sets[shape][number]
        return number, int(records[record])

    def _locate_block(self, block: int) -> tuple[int, int]:
        """(shape, which of its blocks) of a block of the run."""
        late = sum(1 + ceil(len(found) / self.block) for found in self._sets)
        epoch = last_epoch(block, self._start, self.epoch_samples / self.block, late)
        first = self._start(epoch)
        place = permute(block - first, self._start(epoch + 1) - first, f"blocks:{self.seed}:{epoch}")
        for shape, order in enumerate(self._orders):
            first, end = (order.start(number) // self.block for number in (epoch, epoch + 1))
            if place < end - first:
                return shape, first + place
            place -= end - first
        raise AssertionError("a block beyond its epoch")

    def _start(self, epoch: int) -> int:
        """The first block of an epoch."""
        return sum(order.start(epoch) // self.block for order in self._orders)
