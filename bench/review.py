"""Measure how often the intervals of a blind review cover the truth.

    python bench/review.py [draws]

Simulated reviewers judge prompts of which people prefer `sft` on a known share, and err on a tenth.
The code of `human_review` computes win rate, agreement, and intervals. Prompts come alone or in
groups of three whose preference is the same.
"""

import random
import sys

from ft_assets.review.judgements import Judgement, new_judgement
from ft_assets.review.session import Item
from ft_assets.review.win_rates import HumanReview, review
from ft_assets_tests.reviewing import item

ERRS, TIES = 0.1, 0.1
CONFIDENCE = 0.95


def drawn(chance: random.Random, prompts: int, share: float, size: int) -> list[tuple[Item, float]]:
    """Return prompts in groups of `size`, each with the value of `sft`: 1, 0.5 or 0."""
    values = [
        0.5 if chance.random() < TIES else float(chance.random() < share)
        for _ in range(-(-prompts // size))
    ]
    return [(item(n, cluster=str(n // size)), values[n // size]) for n in range(prompts)]


def judgements(chance: random.Random, prompts: list[tuple[Item, float]]) -> list[Judgement]:
    """Let two reviewers judge; each turns a tenth of the judgements around."""
    given = []
    for name in ("anna", "ben"):
        for one, value in prompts:
            seen = 1 - value if chance.random() < ERRS else value
            ranked = [("sft", 1 if seen >= 0.5 else 2), ("base", 1 if seen <= 0.5 else 2)]
            shown = [(one.answers[who], rank) for who, rank in ranked]
            given.append(new_judgement(name, one.prompt, "held-out", shown))
    return given


def reviewed(chance: random.Random, prompts: int, share: float, size: int) -> HumanReview:
    """Return one simulated review."""
    asked = drawn(chance, prompts, share, size)
    return review([one for one, _ in asked], judgements(chance, asked), CONFIDENCE, 1)


def main(draws: int) -> None:
    print(f"{draws} draws a line, intervals of {CONFIDENCE:.0%}\n")
    print("| truth | prompts | in groups of | win rate covers | below | above | alpha covers |")
    print("|---|---|---|---|---|---|---|")
    for share in (0.5, 0.7, 0.9):
        truth = 0.5 + (1 - TIES) * (share - 0.5) * (1 - 2 * ERRS)
        whole = reviewed(random.Random(0), 6000, share, 1).agreement
        assert whole is not None, "not all are ties"
        for prompts, size in ((20, 1), (60, 1), (60, 3), (200, 1)):
            chance, below, above, alpha = random.Random(1), 0, 0, 0
            for _ in range(draws):
                found = reviewed(chance, prompts, share, size)
                (rate,), agreement = found.win_rates, found.agreement
                below += rate.high < truth
                above += rate.low > truth
                alpha += agreement is not None and agreement.low <= whole.alpha <= agreement.high
            shares = (1 - (below + above) / draws, below / draws, above / draws, alpha / draws)
            cells = " | ".join(f"{one:.1%}" for one in shares)
            print(f"| {truth:.2f} | {prompts} | {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
