"""Behaviour of an answer that needs no reference: refusals and repetition.

Neither proves anything alone. The rates are compared with those of the base on the same prompts.
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
    """Return the pattern of a refusal: the English phrases above and `evaluation.refusals`."""
    return re.compile("|".join((*REFUSALS, *extra)), re.IGNORECASE)


def repetition(text: str) -> float:
    """Return the share of the word 4-grams that occur earlier in the text, in [0, 1).

    This is rep-4 of Welleck et al. 2020.
    """
    words = text.split()
    grams = [tuple(words[index : index + 4]) for index in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
