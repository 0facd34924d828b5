"""The name of a row's shape, for a person: the reading itself is data/shapes.py."""

from typing import Any

from ft_assets.data.shapes import COMPLETION, CONVERSATIONS, PROMPT


def shape_of(raw: dict[str, Any]) -> str:
    """Return what shape a valid conversation row has, with the keys that say so."""
    key = next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)
    if key is not None:
        spelling = set().union(*(turn for turn in raw[key] if isinstance(turn, dict)))
        return f"ShareGPT ({key} of from and value)" if "from" in spelling else f"conversations ({key} of role and content)"
    prompt = next((name for name in PROMPT if raw.get(name)), PROMPT[0])
    completion = next((name for name in COMPLETION if raw.get(name)), COMPLETION[0])
    name = "Alpaca" if prompt == "instruction" else "prompt and completion"
    return f"{name} ({prompt} and {completion})"
