"""The order of DPO's training pairs: random, but with pairs of similar length in one step.

The order is the same after every resume. transformers' own length grouping draws from the global
random state, which a resumed process does not have.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Rows of this many optimizer steps are drawn together and sorted by length, as transformers does.
STEPS_TOGETHER = 50


class LengthOrder(Sampler[int]):
    """Yield row numbers.

    The rows of a step depend only on `step` (the effective batch), seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths = lengths
        self.step = step
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randperm(len(self.lengths), generator=generator).tolist()
        together = STEPS_TOGETHER * self.step
        steps: list[list[int]] = []
        for begin in range(0, len(drawn), together):
            rows = sorted(drawn[begin : begin + together], key=lambda row: -self.lengths[row])
            steps += [rows[first : first + self.step] for first in range(0, len(rows), self.step)]
        full = [rows for rows in steps if len(rows) == self.step]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from full[index]
        # A step that is not full comes last. Elsewhere it would shift the cuts of all later steps.
        for rows in steps:
            if len(rows) < self.step:
                yield from rows
