"""The common form of a data set's answers: JSON objects with equal keys, or few labels."""

import json
from dataclasses import dataclass, field

MOST_LABELS = 50
LONGEST_LABEL = 60  # characters
ROWS_A_LABEL = 2  # on average at least: answers that occur once are not labels


@dataclass
class Answers:
    """Collects answers; `keys` and `distinct` are None once an answer has another form."""

    count: int = 0
    longest: int = 0  # bytes of UTF-8
    keys: list[str] | None = field(default_factory=list)
    distinct: dict[str, int] | None = field(default_factory=dict)

    def add(self, answer: str) -> None:
        self.count += 1
        self.longest = max(self.longest, len(answer.encode("utf-8", "surrogatepass")))
        if self.keys is not None:
            keys = _keys(answer)
            fits = bool(keys) and (not self.keys or set(keys) == set(self.keys))
            self.keys = (self.keys or keys) if fits else None
        if self.distinct is not None:
            label = answer.strip()
            self.distinct[label] = self.distinct.get(label, 0) + 1
            if len(self.distinct) > MOST_LABELS or len(label) > LONGEST_LABEL or "\n" in label:
                self.distinct = None

    @property
    def have_a_form(self) -> bool:
        return bool(self.keys or self.distinct)

    @property
    def json_fields(self) -> list[str]:
        """The keys that all answers have, in the order of the first; [] if there are none."""
        return self.keys or []

    @property
    def labels(self) -> list[str]:
        """The distinct answers, the most frequent first; [] if too many, too long or too rare."""
        labels = self.distinct or {}
        if self.json_fields or len(labels) < 2 or len(labels) * ROWS_A_LABEL > self.count:
            return []
        return sorted(labels, key=lambda label: (-labels[label], label))

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest answer, at half a token a byte, and its end of turn."""
        needed = self.longest // 2 + 8
        return min(2048, max(32, -(-needed // 16) * 16))

    def describe(self) -> str:
        """Return the form of the answers in words."""
        if self.json_fields:
            return f"JSON objects with the keys {', '.join(self.json_fields)}"
        if self.labels:
            more = ", …" if len(self.labels) > 8 else ""
            return f"{len(self.labels)} labels: {', '.join(self.labels[:8])}{more}"
        if self.distinct is not None and len(self.distinct) == 1:
            return "always the same: a model can learn nothing else from them"
        return "free text"


def _keys(answer: str) -> list[str]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        # NaN is not JSON: the metric refuses it too.
        value = json.loads(answer, parse_constant=refuse)
    except (ValueError, RecursionError):
        return []
    return list(value) if isinstance(value, dict) and all(value) else []
