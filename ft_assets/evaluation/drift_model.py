"""The drift of answers between two releases, as a part of the register. drift.py computes it."""

from typing import Literal

from pydantic import Field

from ft_assets.evaluation.report_model import Estimate, Part

Prompts = Literal["held-out", "production"]


class Change(Part):
    """A mean before and after, and the interval of the change."""

    before: float
    after: float
    change: Estimate


class ChangedAnswer(Part):
    """A prompt whose answer changed, by the id of its row."""

    id: str
    before: str
    after: str


class Drift(Part):
    """The answers of two releases to the same prompts.

    changed, form, script: the shares of answers that are not the same, that have another form
    (JSON, code, list, paragraphs, one line), and that are mostly in another script. A change of the
    language within a script does not show.
    """

    prompts: Prompts
    rows: int
    changed: Estimate
    form: float
    script: float
    tokens: Change
    stopped: Change
    refused: Change
    examples: list[ChangedAnswer] = Field(default=[])

    def sentence(self) -> str:
        """Return the drift in a sentence."""
        shown = self.changed
        parts = [
            f"{shown.mean:.0%} of the answers to {self.rows} {self.prompts} prompts changed "
            f"[{shown.low:.0%}, {shown.high:.0%}]",
            _moved("tokens", self.tokens, ".1f"),
            _moved("ended by themselves", self.stopped, ".0%"),
            _moved("refused", self.refused, ".0%"),
            f"another form {self.form:.0%}",
            f"another script {self.script:.0%}",
        ]
        return "; ".join(parts)


def _moved(name: str, change: Change, spec: str) -> str:
    found = change.change
    moved = f"{change.before:{spec}} → {change.after:{spec}} {name}"
    return f"{moved} [{found.low:+{spec}}, {found.high:+{spec}}]"
