"""The rows of an optimizer step, and the micro-batches that a step is cut into.

A step always has `effective_batch` conversations, in an order that depends only on seed and epoch.
The cut (padded or packed, the number of micro-batches) does not change the rows of a step. It does
not change the loss of a step either, because that is divided by the supervised tokens of the whole
step.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence


class StepBatches:
    """A batch sampler that yields the micro-batches of each step as lists of row indices.

    Packed: `accumulation` micro-batches with nearly equal numbers of tokens. Padded: at most
    `ceil(effective_batch / accumulation)` rows of similar length each, so that padding is small.

    Each of several ranks yields its share of every step, with as many micro-batches as the others.
    If a step has fewer rows than there are ranks, some rows are repeated.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        effective_batch: int,
        accumulation: int,
        seed: int,
        packed: bool,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.lengths = lengths
        self.effective_batch = effective_batch
        self.accumulation = min(accumulation, effective_batch)
        self.seed = seed
        self.packed = packed
        self.epoch = 0
        self.rank = rank
        self.ranks = ranks

    @property
    def sampler(self) -> "StepBatches":
        """This sampler: Accelerate finds `set_epoch` here if it wrapped it to skip batches."""
        return self

    @property
    def batch_sampler(self) -> "StepBatches":
        """This sampler: transformers finds `set_epoch` here if Accelerate did not wrap it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.effective_batch)
        last = self._count(rest) if rest else 0
        return full * self._count(self.effective_batch) + last

    def __iter__(self) -> Iterator[list[int]]:
        for rows in steps(len(self.lengths), self.effective_batch, self.seed, self.epoch):
            yield from self.micro_batches(rows)

    def micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Return this rank's micro-batches of one step, the longest rows first."""
        longest_first = sorted(rows, key=lambda row: (-self.lengths[row], row))
        if len(longest_first) < self.ranks:
            longest_first = (longest_first * self.ranks)[: self.ranks]
        if self.packed:
            count = self._count(len(longest_first)) * self.ranks
            batches = balanced(longest_first, self.lengths, count)
        else:
            batches = self._cut(longest_first)
        return batches[self.rank :: self.ranks]

    def _count(self, rows: int) -> int:
        """Return the number of micro-batches of each rank in a step of `rows` rows."""
        if self.packed:
            return max(1, min(self.accumulation, rows // self.ranks))
        return math.ceil(rows / (self._max_rows() * self.ranks))

    def _max_rows(self) -> int:
        """Return the maximum number of rows of a padded micro-batch."""
        return math.ceil(self.effective_batch / (self.accumulation * self.ranks))

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        if self.ranks > 1:  # every rank must get a row in each of its micro-batches
            pieces = self._count(len(rows)) * self.ranks
            edges = [len(rows) * piece // pieces for piece in range(pieces + 1)]
            return [list(rows[begin:end]) for begin, end in itertools.pairwise(edges)]
        size = self._max_rows()
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def steps(rows: int, effective_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each optimizer step of an epoch: every row once, in the epoch's order."""
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[start : start + effective_batch] for start in range(0, rows, effective_batch)]


def balanced(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split rows into `count` groups with nearly equal numbers of tokens.

    Each row goes to the group that has the fewest tokens so far (Graham 1969).
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in longest_first:
        shortest = tokens.index(min(tokens))
        groups[shortest].append(row)
        tokens[shortest] += lengths[row]
    return groups


def largest_micro_batch(
    lengths: Sequence[int],
    effective_batch: int,
    accumulation: int,
    seed: int,
    epochs: int,
    packed: bool,
) -> int:
    """Return the tokens of the largest micro-batch of all epochs, padding included.

    The memory plan reserves memory for it.
    """
    sampler = StepBatches(lengths, effective_batch, accumulation, seed, packed)
    largest = 0
    for epoch in range(epochs):
        for rows in steps(len(lengths), effective_batch, seed, epoch):
            for batch in sampler.micro_batches(rows):
                sizes = [lengths[row] for row in batch]
                largest = max(largest, sum(sizes) if packed else len(sizes) * max(sizes))
    return largest
