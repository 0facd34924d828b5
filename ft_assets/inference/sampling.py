"""Sample answers by a seeded rule: each answer has its own random numbers.

The rule is a logits processor, so greedy decoding takes the token that it leaves. Position t of an
answer uses the t-th number of a stream of its own key, so an answer depends neither on the other
rows of its batch nor on the size of the batch, up to the rounding of the logits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """How to sample. `keys`: the key of each prompt's answer; equal keys give equal numbers.

    `top_p`: the probability of the smallest set of tokens that is sampled from (Holtzman et al.
    2020, nucleus sampling).
    """

    temperature: float
    top_p: float
    seed: int
    keys: Sequence[str]

    def of(self, batch: Sequence[int], tokens: int) -> "Sampled":
        """Return the processor of a batch of prompts, for answers of at most `tokens` tokens."""
        return Sampled(self.numbers(batch, tokens), self.temperature, self.top_p)

    def numbers(self, batch: Sequence[int], tokens: int) -> torch.Tensor:
        """Return the random numbers (prompts, tokens) of a batch, fp64 in [0, 1)."""
        return torch.tensor(np.stack([self._numbers(self.keys[row], tokens) for row in batch]))

    def _numbers(self, key: str, count: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode()).digest()
        stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        return np.random.Generator(stream).random(count)


class Sampled(LogitsProcessor):
    """Leave one token of each row, drawn from the distribution of its logits.

    `numbers` (rows, positions) are uniform in [0, 1).
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, top_p: float) -> None:
        self.numbers, self.temperature, self.top_p = numbers, temperature, top_p
        self._width: int | None = None  # of the prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return (rows, vocabulary): 0 at the drawn token, -inf elsewhere."""
        width = input_ids.shape[1]
        self._width = width if self._width is None else self._width
        drawn = self.draw(scores, width - self._width)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

    def draw(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """Return the token of each row (rows,) at a position."""
        return draw(logits, self.numbers[:, position], self.temperature, self.top_p)


def draw(
    logits: torch.Tensor, numbers: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Return the token of each row (rows,): the inverse of the distribution at its number.

    logits: (rows, vocabulary). numbers: (rows,) in [0, 1), fp64.
    """
    probability = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        probability = _nucleus(probability, top_p)
    sums = probability.cumsum(-1)
    # In (0, total]: the first sum that reaches it is that of a token with a weight.
    wanted = (1 - numbers).to(sums) * sums[:, -1]
    return torch.searchsorted(sums, wanted.unsqueeze(1)).squeeze(1)


def _nucleus(probability: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set the tokens outside the nucleus to 0. The likeliest token always stays."""
    ordered = probability.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p).sum(-1, keepdim=True)
    smallest = ordered.gather(1, kept - 1)
    return torch.where(probability >= smallest, probability, 0.0)
