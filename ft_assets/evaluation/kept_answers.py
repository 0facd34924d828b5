"""The answers and losses of all candidates, as files: what a model is asked for, without a score.

heldout.parquet, retention.parquet, train.parquet, and seeds.parquet have one line for each
candidate and row. asked.json has what is not of a row: proofs, harness scores. No torch: scoring
reads these files.
Each value has the digest of all that decided it: the weights, the prompt or the tokens, the limit
of new tokens, the libraries. An equal digest in an earlier version is an equal value, so that only
what is new is asked (`Kept`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import FewShotChoice, Part, Proofs
from ft_assets.job import Report

# seeds: the held-out rows again, by adapters of further seeds
Side = Literal["heldout", "retention", "train", "seeds"]
SIDES: tuple[Side, ...] = ("heldout", "retention", "train", "seeds")
FACTS, COST = "asked.json", "info/cost.json"


@dataclass(frozen=True)
class GivenAnswer:
    """A generated answer. stopped: it ended by itself. tokens: its length. key: its digest."""

    text: str
    stopped: bool
    tokens: int
    key: str = ""


@dataclass(frozen=True)
class AskedOption:
    """A possible answer and its log-probability in nats, summed over its tokens."""

    text: str
    log_probability: float
    tokens: int
    key: str = ""


@dataclass(frozen=True)
class AskedRow:
    """What one candidate gave for one row.

    reference: the text to compare the answer with. loss: of the reference, in nats per token.
    token_accuracy: the share of the reference's tokens that are the most likely ones. answer: None
    if the row was not answered, e.g. a general prompt beyond `retention_answers`. options: the
    labels or the row's own choices. loss_key: the digest of loss and token accuracy.
    """

    id: str
    reference: str
    loss: float
    token_accuracy: float
    answer: GivenAnswer | None = None
    options: list[AskedOption] = field(default_factory=list)
    loss_key: str = ""

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "AskedRow":
        """Return the row of a line of the table."""
        answer = GivenAnswer(**line["answer"]) if line["answer"] else None
        options = [AskedOption(**option) for option in line["options"]]
        return cls(**{**line, "answer": answer, "options": options})


class HarnessScores(Part):
    """{"task metric": a score for each document} of one candidate, and the digest of the scores."""

    key: str
    scores: dict[str, list[float]]


class Facts(Part):
    """asked.json. harness: by candidate. vocabulary: the size of the base's.

    few_shot: the choice of the examples by `data.few_shot: auto`.
    """

    proofs: Proofs
    harness: dict[str, HarnessScores]
    vocabulary: int
    few_shot: FewShotChoice | None = None


class Cost(Part):
    """info/cost.json: seconds by candidate, and the generated tokens.

    `slower`: why answers were generated without a shortcut.
    """

    seconds: dict[str, float]
    tokens: int
    slower: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float | None]:
        """Return the numbers of a manifest. tokens_per_s is None if nothing was generated."""
        seconds = sum(self.seconds.values())
        rate = round(self.tokens / seconds, 1) if self.tokens else None
        return {"seconds": round(seconds, 1), "tokens_per_s": rate}


@dataclass
class Answers:
    """All answers: by side of the split, then by candidate, in the order of the rows."""

    facts: Facts
    rows: dict[Side, dict[str, list[AskedRow]]]
    cost: Cost

    def write(self, folder: Path) -> None:
        """Write the files of the artifact."""
        for side, candidates in self.rows.items():
            lines = [
                {"candidate": name, **asdict(row)}
                for name, rows in candidates.items()
                for row in rows
            ]
            pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), folder / f"{side}.parquet")
        (folder / FACTS).write_text(self.facts.to_json())
        (folder / COST).parent.mkdir()
        (folder / COST).write_text(self.cost.to_json())

    @classmethod
    def read(cls, folder: Path) -> "Answers":
        """Read the files of the artifact. Raises ArtifactError."""
        rows: dict[Side, dict[str, list[AskedRow]]] = {side: {} for side in SIDES}
        for side in SIDES:
            for line in pq.read_table(folder / f"{side}.parquet").to_pylist():
                candidate = line.pop("candidate")
                rows[side].setdefault(candidate, []).append(AskedRow.of(line))
        return cls(Facts.read(folder / FACTS), rows, Cost.read(folder / COST))


_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    {
        "candidate": _TEXT,
        "id": _TEXT,
        "reference": _TEXT,
        "loss": _NUMBER,
        "token_accuracy": _NUMBER,
        "answer": pa.struct({"text": _TEXT, "stopped": pa.bool_(), "tokens": _COUNT, "key": _TEXT}),
        "options": pa.list_(
            pa.struct({"text": _TEXT, "log_probability": _NUMBER, "tokens": _COUNT, "key": _TEXT})
        ),
        "loss_key": _TEXT,
    }
)


@dataclass
class Kept:
    """The values of an earlier version by their digests. `losses`: (loss, token accuracy)."""

    answers: dict[str, GivenAnswer] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    options: dict[str, float] = field(default_factory=dict)
    harness: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Answers) -> "Kept":
        """Return the values of an earlier version."""
        kept = cls(harness={one.key: one.scores for one in answers.facts.harness.values()})
        for row in _every_row(answers):
            kept.losses[row.loss_key] = (row.loss, row.token_accuracy)
            if row.answer:
                kept.answers[row.answer.key] = row.answer
            kept.options |= {option.key: option.log_probability for option in row.options}
        return kept


def _every_row(answers: Answers) -> Iterator[AskedRow]:
    for candidates in answers.rows.values():
        for rows in candidates.values():
            yield from rows


def read_kept(folder: Path | None, report: Report) -> Kept:
    """Return what an artifact `answers` has; nothing if its files are not as they were written."""
    if folder is None:
        return Kept()
    try:
        verify_files(Artifact.read(folder))
        return Kept.of(Answers.read(folder))
    except (ArtifactError, OSError, TypeError) as error:  # damaged, or of another layout
        report(f"asks everything: the last answers cannot be read ({error})")
        return Kept()


def digest(*decisive: Any) -> str:
    """Return the digest of the plain data that decides a value."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:20]
