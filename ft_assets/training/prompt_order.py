"""The order of RL's prompts: random, and the same after every resume."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PromptOrder(Sampler[int]):
    """Yield row numbers: each step's prompts `n` times in a row, and the step `parts` times.

    TRL reads a step once for each of its `parts` micro-batches, and samples at the first.
    Prompts that do not fill a step are left out of the epoch; another epoch draws others.
    TRL's own sampler draws from a generator that a resumed process has not moved on.
    """

    def __init__(self, rows: int, prompts: int, n: int, parts: int, seed: int) -> None:
        self.rows, self.prompts, self.n, self.parts, self.seed = rows, prompts, n, parts, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows // self.prompts * self.prompts * self.n * self.parts

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randperm(self.rows, generator=generator).tolist()
        for begin in range(0, self.rows - self.prompts + 1, self.prompts):
            step = [row for row in drawn[begin : begin + self.prompts] for _ in range(self.n)]
            for _ in range(self.parts):
                yield from step
