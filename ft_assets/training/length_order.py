"""The order of training rows: random, but rows of like length in one optimizer step, and the same on every resume.

transformers' own length grouping draws from the global random state, which a resumed process does not have.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

STEPS_TOGETHER = (
    50  # rows of this many optimizer steps are drawn and sorted by length, as transformers does
)


class LengthOrder(Sampler[int]):
    """Yields row numbers; which rows make a step depends on `step` (the effective batch), seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps: list[list[int]] = []
        for begin in range(0, len(drawn), STEPS_TOGETHER * self.step):
            rows = sorted(
                drawn[begin : begin + STEPS_TOGETHER * self.step],
                key=lambda row: -self.lengths[row],
            )
            steps += [rows[first : first + self.step] for first in range(0, len(rows), self.step)]
        whole = [rows for rows in steps if len(rows) == self.step]
        order = torch.randperm(len(whole), generator=generator).tolist()
        for index in order:
            yield from whole[index]
        for (
            rows
        ) in steps:  # the step that is not full comes last, or all after it would be cut elsewhere
            if len(rows) < self.step:
                yield from rows
