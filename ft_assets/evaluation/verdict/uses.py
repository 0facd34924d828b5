"""The verdicts that were made on held-out prompts before, as a file of each report: info/uses.json.

Each report has the whole history, as each release has, so that `ft gc` keeps it with CURRENT. A
prompt counts by its text, so that held-out rows that grow a little each week stay used rows.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field

from ft_assets.artifacts import Artifact
from ft_assets.artifacts.documents import read_document
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import EvalReport, Part

USES = "info/uses.json"


class Look(Part):
    """One verdict. key: the digest of what was judged and how. rows: the key of its prompts in
    `Uses.prompts`; None if they cannot be read any more, which counts as all of today's.
    """

    key: str
    rows: str | None


class Uses(Part):
    """The verdicts of one base model, oldest first, and the digests of their prompts."""

    looks: list[Look] = Field(default_factory=list)
    prompts: dict[str, list[str]] = Field(default_factory=dict)

    @classmethod
    def of_report(cls, report: Artifact) -> "Uses":
        """Return the verdicts up to a report; of a report without the file its own one."""
        try:
            if (report.path / USES).exists():
                return read_document(report.path / USES, cls, "materialize eval_report again")
            bound_to = EvalReport.read(report.path / "report.json").bound_to
            table = pq.read_table(report.path / "rows.parquet", columns=["prompt"])
            prompts = {_digest(text) for text in table["prompt"].to_pylist()}
        except (ArtifactError, OSError, KeyError, ValueError):
            return cls.unreadable(report)
        gate = report.manifest.settings.get("gate", {})
        return cls().after(look_key(bound_to, gate), sorted(prompts))

    @classmethod
    def unreadable(cls, report: Artifact) -> "Uses":
        """Return the one verdict of a report whose files do not count: on all of today's rows."""
        return cls(looks=[Look(key=report.fingerprint, rows=None)])

    @classmethod
    def joined(cls, parts: Iterable["Uses"]) -> "Uses":
        """Return the verdicts of several histories, each once."""
        looks: dict[str, Look] = {}
        prompts: dict[str, list[str]] = {}
        for part in parts:
            looks |= {look.key: look for look in part.looks if look.key not in looks}
            prompts |= part.prompts
        return cls(looks=list(looks.values()), prompts=prompts)

    def after(self, key: str, prompts: Sequence[str]) -> "Uses":
        """Return the history with one more verdict; one that it has is not added again."""
        if any(look.key == key for look in self.looks):
            return self
        rows = _digest("".join(prompts))
        return Uses(
            looks=[*self.looks, Look(key=key, rows=rows)],
            prompts={**self.prompts, rows: list(prompts)},
        )

    def number(self, key: str, prompts: Sequence[str]) -> int:
        """Return the number of the verdict on these prompts, counted from 1.

        An earlier verdict counts by the share of today's prompts that it saw.
        """
        today, seen = set(prompts), 0.0
        for look in self.looks:
            if look.key == key:
                break
            known = today if look.rows is None else today.intersection(self.prompts[look.rows])
            seen += len(known) / len(today)
        return 1 + math.ceil(seen - 1e-9)


def look_key(bound_to: Mapping[str, str], gate: Mapping[str, Any]) -> str:
    """Return the digest of what a verdict is about and how it is judged."""
    return _digest(json.dumps([dict(bound_to), dict(gate)], sort_keys=True))


def prompt_digests(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the sorted digests of prompts, each a list of messages."""
    return sorted({_digest(json.dumps(prompt, ensure_ascii=False)) for prompt in rows})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_uses(folder: Path, uses: Uses) -> None:
    """Write the history into a report's folder."""
    (folder / USES).write_text(uses.to_json())
