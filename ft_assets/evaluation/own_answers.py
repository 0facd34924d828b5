"""Sample the SFT model's own answers to rows of its training data, and keep them as they come.

The requests are cut into parts in a fixed order, and a part is kept when all of it is answered. A
run that is killed asks the remaining parts in the same batches, so it ends with the same answers.
Not here: the pairs that are made of them (own_pairs.py).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_assets.artifacts.line_file import LineFile
from ft_assets.config import SamplingSettings
from ft_assets.inference.generation import Answer, generate
from ft_assets.inference.sampling import Sampling
from ft_assets.job import Report

PART = 64  # requests: about a minute of a small model on two cores
PART_ON_GPU = 2048  # four of the largest batches


@dataclass(frozen=True)
class Asked:
    """A row to sample answers to: its id and the token ids of its prompt."""

    id: str
    prompt: list[int]


@dataclass(frozen=True)
class Sampler:
    """Samples answers of at most `max_new_tokens` tokens of the model's active candidate."""

    model: Any
    tokenizer: Any
    stops: frozenset[int]
    max_new_tokens: int
    batch_size: int | None
    settings: SamplingSettings

    def sample(
        self, rows: Sequence[Asked], kept: Path, report: Report
    ) -> tuple[list[list[Answer]], dict[str, float]]:
        """Return `n` answers to each row, and what was generated: tokens, seconds, tokens/s.

        `kept`: the file of the answers of finished parts, read first and extended.
        """
        requests = [
            (row, f"{row.id}/{number}") for row in rows for number in range(self.settings.n)
        ]
        requests.sort(key=lambda request: (len(request[0].prompt), request[1]))
        file = LineFile(kept)
        found = _read(file)
        size = PART_ON_GPU if self.model.device.type == "cuda" else PART
        parts = [requests[begin : begin + size] for begin in range(0, len(requests), size)]
        tokens, begun = 0, time.perf_counter()
        for number, part in enumerate(parts, 1):
            if all(key in found for _, key in part):
                continue
            answers = self._answer(part, report)
            made = {key: answer for (_, key), answer in zip(part, answers, strict=True)}
            file.add(
                json.dumps({"key": key, "answer": asdict(answer)}) for key, answer in made.items()
            )
            found |= made
            tokens += sum(answer.tokens for answer in answers)
            seconds = time.perf_counter() - begun
            left = seconds / number * (len(parts) - number)
            report(
                f"sampled part {number} of {len(parts)}",
                answers=len(found),
                tokens_per_s=round(tokens / seconds, 1),
                seconds_left=round(left),
            )
        seconds = time.perf_counter() - begun
        cost = {"generated_tokens": tokens, "seconds": round(seconds, 1)}
        if tokens:
            cost["tokens_per_s"] = round(tokens / seconds, 1)
        numbers = range(self.settings.n)
        return [[found[f"{row.id}/{number}"] for number in numbers] for row in rows], cost

    def _answer(self, part: Sequence[tuple[Asked, str]], report: Report) -> list[Answer]:
        settings = self.settings
        keys = [key for _, key in part]
        return generate(
            self.model,
            self.tokenizer,
            [row.prompt for row, _ in part],
            self.stops,
            self.max_new_tokens,
            self.batch_size,
            keys,
            report,
            Sampling(settings.temperature, settings.top_p, settings.seed, keys),
        )


def _read(kept: LineFile) -> dict[str, Answer]:
    """Return the kept answers by their keys."""
    found = {}
    for line in map(json.loads, kept.read()):
        answer = line["answer"]
        found[line["key"]] = Answer(**{**answer, "ids": tuple(answer["ids"])})
    return found
