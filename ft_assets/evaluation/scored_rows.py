"""The scored rows of a candidate, and their tables: rows.parquet and retention.parquet of a report.

A table has one line for each candidate and row: `candidate`, `id`, `prompt` (JSON), `reference`,
`cluster`, `answer`, `stopped`, `tokens`, and a column for each score.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.errors import ArtifactError
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import Proofs
from ft_assets.metrics.judge import Orders
from ft_assets.rows.types import DataRow

IDENTITY = ("candidate", "id", "prompt", "reference", "cluster")
ANSWER = ("answer", "stopped", "tokens")
RIVALS = "rivals.parquet"  # of a report: the scored rows of its rivals
Preferred = Mapping[str, float]  # people's score of an answer by the rival answer
PeopleScores = Mapping[str, Mapping[str, Preferred]]  # by the id of a row, then by answer


@dataclass(frozen=True)
class ScoredRow:
    """One candidate's answer to a row, and its scores by metric, `refused` and `repetition` too.

    stopped: the answer ended by itself. tokens: the length of the answer. answered: False for a
    general prompt beyond `retention_answers`, which has only a loss. cluster: the key of its group.
    preferred: people's scores of this answer, for the metric `human`.
    """

    scores: dict[str, float]
    answer: str = ""
    stopped: bool = False
    tokens: int = 0
    answered: bool = True
    cluster: str | None = None
    preferred: Preferred = field(default_factory=dict)

    def scored(self, scores: Mapping[str, float]) -> "ScoredRow":
        """Return the row with further scores."""
        return replace(self, scores={**self.scores, **scores})

    def columns(self) -> dict[str, Any]:
        """Return the row as columns of the table."""
        answer = {"answer": self.answer, "stopped": self.stopped, "tokens": self.tokens}
        return {**(answer if self.answered else {}), **self.scores}


@dataclass
class Scored:
    """The results by candidate.

    chance: the scores of each row's answer against other rows' references. harness: {"task metric":
    scores}. train_loss: nats per token of each train row. judge_orders: the judge's replies.
    """

    heldout: dict[str, list[ScoredRow]] = field(default_factory=dict)
    retention: dict[str, list[ScoredRow]] = field(default_factory=dict)
    chance: dict[str, list[float]] = field(default_factory=dict)
    harness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    train_loss: dict[str, list[float]] = field(default_factory=dict)
    rivals: dict[str, list[ScoredRow]] = field(default_factory=dict)
    train: dict[str, list[ScoredRow]] = field(default_factory=dict)
    train_rivals: dict[str, list[ScoredRow]] = field(default_factory=dict)
    form_not_measured: str | None = None
    seeds: dict[str, list[list[ScoredRow]]] = field(default_factory=dict)
    judge_orders: Orders = field(default_factory=Counter)
    proofs: Proofs = field(default_factory=lambda: Proofs(adapters={}, template_mismatches=[]))


def write_scored_rows(
    path: Path, scored: Mapping[str, Sequence[ScoredRow]], rows: Sequence[ReferencedRow]
) -> None:
    """Write the scored rows of all candidates as one table."""
    flat = [
        {
            "candidate": name,
            "id": row["id"],
            "prompt": json.dumps(row["messages"][:-1], ensure_ascii=False),
            "reference": row["reference"],
            "cluster": cluster_of(row),
            **answer.columns(),
        }
        for name, answers in scored.items()
        for row, answer in zip(rows, answers, strict=True)
    ]
    # from_pylist takes the columns of the first row alone.
    columns = dict.fromkeys(key for row in flat for key in row)
    table = pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in flat])
    pq.write_table(table, path)


def read_scored_rows(table: Path, candidate: str, rows: Sequence[DataRow]) -> list[ScoredRow]:
    """Read one candidate's scored rows, in the order of `rows`."""
    lines = pq.read_table(table, filters=[("candidate", "=", candidate)]).to_pylist()
    by_id = {line["id"]: _scored_row(line) for line in lines}
    return in_clusters([by_id[row["id"]] for row in rows], rows)


def read_rivals(
    report: Path, names: Iterable[str], rows: Sequence[DataRow]
) -> dict[str, list[ScoredRow]]:
    """Read the scored rows of a report's rivals. Raises ArtifactError if it does not have them."""
    found, table = {}, report / RIVALS
    for name in names:
        if not table.exists():
            raise ArtifactError(
                where=str(report),
                found=f"has no scored rows of the rival {name}: an older version wrote it",
                expected=f"a report with {RIVALS}",
                fix="materialize eval_report again (ft run); no answer is asked again",
            )
        found[name] = read_scored_rows(table, name, rows)
    return found


def in_clusters(scored: Sequence[ScoredRow], rows: Sequence[DataRow]) -> list[ScoredRow]:
    """Return the scored rows with the key of each row's group."""
    return [replace(one, cluster=cluster_of(row)) for one, row in zip(scored, rows, strict=True)]


def cluster_of(row: DataRow) -> str:
    """Return the key of a row's group: rows of one group are not independent."""
    return row.get("cluster") or row["group"]


def _scored_row(line: Mapping[str, Any]) -> ScoredRow:
    # A column that a row does not have is null, e.g. the answer of an unanswered general prompt.
    known = {key: value for key, value in line.items() if value is not None}
    scores = {key: value for key, value in known.items() if key not in (*IDENTITY, *ANSWER)}
    answer = {key: known[key] for key in ANSWER if key in known}
    return ScoredRow(scores=scores, answered="answer" in known, **answer)


def read_scores(table: Path, metric: str) -> dict[str, dict[str, float]]:
    """Read one metric as {candidate: {row id: score}}."""
    found: dict[str, dict[str, float]] = {}
    for line in pq.read_table(table, columns=["candidate", "id", metric]).to_pylist():
        if line[metric] is not None:
            found.setdefault(line["candidate"], {})[line["id"]] = line[metric]
    return found


def read_candidate(table: Path, candidate: str, metric: str) -> list[ScoredRow]:
    """Read one candidate's scores in one metric, with the groups of the rows, by their ids."""
    lines = pq.read_table(table, filters=[("candidate", "=", candidate)]).to_pylist()
    return [
        ScoredRow(
            scores={} if line[metric] is None else {metric: line[metric]},
            cluster=line.get("cluster"),
        )
        for line in sorted(lines, key=lambda line: line["id"])
    ]
