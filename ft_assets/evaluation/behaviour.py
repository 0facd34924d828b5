"""Habits of an answer that need no reference: does it refuse, does it repeat itself.

Not proof of anything alone: compared pair by pair with the base's answers to the same prompts.
"""

import re

WORK = r"(?:help|assist|provide|answer|comply|fulfil|give|share|discuss|access|do (?:that|this))"
REFUSALS = (
    rf"\bI (?:can(?:no|')t|won't|will not|don't have the ability to) {WORK}\b",
    rf"\bI(?:'m| am) (?:unable|not able|not allowed) to {WORK}\b",
    r"\bas an AI(?: language)? (?:model|assistant)\b",
    r"\bI (?:must|have to) (?:decline|refuse)\b",
)


def refusal_pattern(extra: list[str]) -> re.Pattern[str]:
    """Return the pattern that finds a refusal: the English phrases above and those of evaluation.refusals."""
    return re.compile("|".join((*REFUSALS, *extra)), re.IGNORECASE)


def repetition(text: str) -> float:
    """Return the share of the text's word 4-grams that stood in it before: rep-4 of Welleck et al. 2020, in [0, 1)."""
    words = text.split()
    grams = [tuple(words[index : index + 4]) for index in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
