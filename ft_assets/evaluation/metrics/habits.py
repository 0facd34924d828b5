"""Habits of an answer that need no reference: does it refuse, does it repeat itself.

Not proof of anything alone: compared pair by pair with the base's answers to the same prompts.
"""

import re

REFUSALS = (
    r"\bI(?:'m| am) (?:very |really )?sorry,? (?:but )?I (?:can(?:no|')t|am (?:not able|unable))",
    r"\bI (?:can(?:no|')t|am unable to|am not able to|won't be able to) (?:help|assist|provide|answer|comply|do that|fulfil)",
    r"\bas an AI(?: language)? (?:model|assistant)",
    r"\bI (?:must|have to) (?:decline|refuse)",
)


def refusal_pattern(extra: list[str]) -> re.Pattern[str]:
    """Return the pattern that finds a refusal: the English phrases above and those of evaluation.refusals."""
    return re.compile("|".join((*REFUSALS, *extra)), re.IGNORECASE)


def repetition(text: str) -> float:
    """Return the share of the text's word 4-grams that stood in it before: rep-4 of Welleck et al. 2020, in [0, 1)."""
    words = text.split()
    grams = [tuple(words[index : index + 4]) for index in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
