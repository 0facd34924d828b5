"""Which rows make an optimizer step, and how a step is cut into micro-batches.

A step is always `effective_batch` conversations in an order that depends on the seed and the epoch alone. How they are
cut (padded or packed, in how many micro-batches) changes neither the step's rows nor, because the loss is divided by the
supervised tokens of the whole step, its loss.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence


class StepBatches:
    """A batch sampler: yields the micro-batches of each step, as lists of row indices.

    Packed: `accumulation` micro-batches of nearly equal tokens. Padded: at most `ceil(effective_batch / accumulation)`
    rows of similar length each, so that little is padded. Of several ranks each yields its share of every step, as many
    micro-batches as the others; where a step has fewer rows than ranks, some rows are repeated.
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
        self.lengths, self.effective_batch, self.accumulation = (
            lengths,
            effective_batch,
            min(accumulation, effective_batch),
        )
        self.seed, self.packed, self.epoch, self.rank, self.ranks = seed, packed, 0, rank, ranks

    @property
    def sampler(self) -> "StepBatches":
        """Return itself: accelerate looks for `set_epoch` there when it has wrapped the sampler to skip batches."""
        return self

    @property
    def batch_sampler(self) -> "StepBatches":
        """Return itself: transformers looks for `set_epoch` there when accelerate has not wrapped the sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.effective_batch)
        return full * self._number(self.effective_batch) + (self._number(rest) if rest else 0)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in steps(len(self.lengths), self.effective_batch, self.seed, self.epoch):
            yield from self.micro_batches(rows)

    def micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Return one step's rows in micro-batches, the longest rows first."""
        longest_first = sorted(rows, key=lambda row: (-self.lengths[row], row))
        if len(longest_first) < self.ranks:
            longest_first = (longest_first * self.ranks)[: self.ranks]
        if self.packed:
            return balanced(
                longest_first, self.lengths, self._number(len(longest_first)) * self.ranks
            )[self.rank :: self.ranks]
        return self._cut(longest_first)[self.rank :: self.ranks]

    def _number(self, rows: int) -> int:
        """Return how many micro-batches each rank makes of a step of so many rows."""
        if self.packed:
            return max(1, min(self.accumulation, rows // self.ranks))
        return math.ceil(rows / (self._most_rows() * self.ranks))

    def _most_rows(self) -> int:
        """Return how many rows a padded micro-batch has at most."""
        return math.ceil(self.effective_batch / (self.accumulation * self.ranks))

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        if self.ranks > 1:  # every rank must get a row in each of its micro-batches
            pieces = self._number(len(rows)) * self.ranks
            edges = [len(rows) * piece // pieces for piece in range(pieces + 1)]
            return [list(rows[begin:end]) for begin, end in itertools.pairwise(edges)]
        size = self._most_rows()
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def steps(rows: int, effective_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each optimizer step of an epoch: every row once, in an order of its own."""
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[start : start + effective_batch] for start in range(0, rows, effective_batch)]


def balanced(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return the rows in `count` groups of nearly equal length: each row goes to the shortest group (Graham 1969)."""
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
    """Return the tokens of the largest micro-batch of all epochs, padding included: what memory must be planned for."""
    sampler = StepBatches(lengths, effective_batch, accumulation, seed, packed)
    largest = 0
    for epoch in range(epochs):
        for rows in steps(len(lengths), effective_batch, seed, epoch):
            for batch in sampler.micro_batches(rows):
                sizes = [lengths[row] for row in batch]
                largest = max(largest, sum(sizes) if packed else len(sizes) * max(sizes))
    return largest
