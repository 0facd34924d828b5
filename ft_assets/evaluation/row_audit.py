"""The row audit: scores of rows by models that did not see them, and the rows that it names."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel

from ft_assets.config import AuditSettings
from ft_assets.data.left_out import LONGEST, question
from ft_assets.data.private import find_private
from ft_assets.data.units import normalise
from ft_assets.evaluation.asker import active
from ft_assets.evaluation.candidate_proofs import load_candidates
from ft_assets.evaluation.form import REPEATED
from ft_assets.evaluation.references import stored_reference
from ft_assets.evaluation.wrong_rows import TEMPERATURES, Answer, Found, find_wrong, outliers
from ft_assets.inference.losses import token_scores
from ft_assets.models.padding import padding_token
from ft_assets.rows.types import AuditReason, AuditRow, CopyRow, TokenizedRow

BATCH = 16  # rows that are scored at once; halved when memory runs out
BEFORE = 8  # tokens of an answer that are shown before the one that is unlikely


class RowScore(BaseModel):
    """The scores of a row's supervised tokens, see TokenScores: a line each.

    `begin`: where the tokens of its answers begin in the list.
    """

    id: str
    begin: list[int]
    tokens: list[int]
    log_probabilities: list[list[float]]
    best: list[int]
    best_log_probability: list[float]

    @property
    def loss(self) -> float:
        """The mean cross-entropy in nats a token."""
        return -sum(line[0] for line in self.log_probabilities) / len(self.tokens)

    def answer(self) -> Answer:
        return Answer(self.tokens, self.begin, np.array(self.log_probabilities))


class FoldScores(BaseModel):
    rows: list[RowScore]


def fold_of(row: TokenizedRow, settings: AuditSettings) -> int:
    """Return the fold of a row. Rows of one group share it."""
    text = f"audit:{settings.seed}:{row['group']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % settings.folds


def score_rows(
    snapshot: Path, adapter: Path, tokenizer: Any, rows: Sequence[TokenizedRow]
) -> FoldScores:
    """Return the scores of rows under an adapter."""
    model = load_candidates(snapshot, {"sft": adapter})
    with active(model, "sft"):
        pad = padding_token(model, tokenizer)
        found = token_scores(model, rows, BATCH, pad, TEMPERATURES)
    scores = []
    for row, one in zip(rows, found, strict=True):
        flags = row["supervised"]
        places = [at for at, flag in enumerate(flags) if flag]
        scores.append(
            RowScore(
                id=row["id"],
                begin=[n for n, at in enumerate(places) if not at or not flags[at - 1]],
                tokens=[row["input_ids"][at] for at in places],
                log_probabilities=[
                    [round(value, 5) for value in line] for line in one.log_probabilities.tolist()
                ],
                best=one.best,
                best_log_probability=[round(value, 5) for value in one.best_log_probability],
            )
        )
    return FoldScores(rows=scores)


@dataclass(frozen=True)
class Audited:
    """The audit of a set of rows: what it names, and what it found of each row's answer."""

    named: list[AuditRow]
    found: Found
    losses: list[float]


def audit(
    rows: Sequence[TokenizedRow],
    general: Sequence[TokenizedRow],
    scores: Mapping[str, RowScore],
    near: Iterable[CopyRow],
    sources: Mapping[str, str],
    tokenizer: Any,
    settings: AuditSettings,
) -> Audited:
    """Return the audit of the task's rows, and of the private data of these and general rows.

    `near`: the train rows whose prompts are nearly those of other train rows. `sources`: the file
    and line of each row of the data files.
    """
    lines = [scores[row["id"]] for row in rows]
    found = find_wrong([line.answer() for line in lines], len(tokenizer))
    losses = [line.loss for line in lines]
    book = _Book(sources, tokenizer)
    named = [
        book.entry(rows[at], "wrong answer", found.rows[at].probability, book.why(lines[at], token))
        for at in found.named(settings.false_alarms, settings.min_probability)
        if (token := found.rows[at].token) is not None
    ]
    named += [
        book.entry(rows[at], "outlier", losses[at], f"a loss of {losses[at]:.2f} nats a token")
        for at in outliers(losses, settings.false_alarms)
    ]
    named += _contradictions(rows, near, book)
    named += [entry for row in (*rows, *general) for entry in _private(row, book)]
    order = {reason: at for at, reason in enumerate(get_args(AuditReason))}
    return Audited(
        sorted(named, key=lambda row: (order[row["reason"]], -row["score"], row["id"])),
        found,
        losses,
    )


@dataclass(frozen=True)
class _Book:
    """Writes the entries of rows: their places in the files, and their tokens as text."""

    sources: Mapping[str, str]
    tokenizer: Any

    def place(self, row: TokenizedRow) -> str:
        return self.sources.get(raw_id(row), row["id"])

    def entry(
        self,
        row: TokenizedRow,
        reason: AuditReason,
        score: float,
        problem: str,
        twin: TokenizedRow | None = None,
    ) -> AuditRow:
        return {
            "id": raw_id(row),
            "source": self.place(row),
            "reason": reason,
            "score": round(score, 4),
            "problem": problem,
            "text": question(row["messages"]),
            "answer": stored_reference(row)[:LONGEST],
            "twin": self.place(twin) if twin else "",
            "twin_text": stored_reference(twin)[:LONGEST] if twin else "",
        }

    def why(self, line: RowScore, at: int) -> str:
        """Return the sentence about the token that shows most that the answer is wrong."""
        begin = max(start for start in line.begin if start <= at)
        before = self._text(line.tokens[max(begin, at - BEFORE) : at])
        own, best = self._text([line.tokens[at]]), self._text([line.best[at]])
        has = np.exp(line.log_probabilities[at][0])
        expected = np.exp(line.best_log_probability[at])
        place = f"after {before!r}" if before else "at its beginning"
        return f"{place} other rows make {best!r} likely ({expected:.0%}), not {own!r} ({has:.2%})"

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


def raw_id(row: TokenizedRow) -> str:
    """Return the id that raw_dataset has for a row, or for a part of it."""
    return row["id"].partition(".")[0]


def _contradictions(
    rows: Sequence[TokenizedRow], near: Iterable[CopyRow], book: _Book
) -> Iterator[AuditRow]:
    """Yield both rows of each pair that asks the same and answers differently.

    A plain text, or a row that ends in another turn, asks nothing. Nearly the same prompts count
    where answers are labels. Elsewhere two orders with other numbers are nearly the same, and have
    other answers.
    """
    rows = [row for row in rows if row["messages"][-1]["role"] == "assistant"]
    known = {row["id"]: row for row in rows}
    answers = {row["id"]: " ".join(stored_reference(row).split()).casefold() for row in rows}
    labels = len(set(answers.values())) * REPEATED <= len(answers)
    pairs: dict[tuple[str, str], float] = {}
    first: dict[str, str] = {}
    for row in rows:
        other = first.setdefault(_asked(row), row["id"])
        if answers[other] != answers[row["id"]]:
            pairs[other, row["id"]] = 1.0
    for copy in near if labels else ():
        if copy["id"] in known and copy["of"] in known:
            pairs.setdefault((copy["of"], copy["id"]), copy["similarity"])
    for (one, other), similarity in pairs.items():
        if answers[one] == answers[other]:
            continue
        for own, twin in ((known[one], known[other]), (known[other], known[one])):
            problem = f"asks what {book.place(twin)} asks and has another answer"
            yield book.entry(own, "contradiction", similarity, problem, twin)


def _asked(row: TokenizedRow) -> str:
    """Return what decides an answer: the turns before it, with their calls, and the tools."""
    turns = [
        # The ids of calls are other ones in each row.
        [turn["role"], normalise(turn["content"])]
        + [call["function"] for call in turn.get("tool_calls", ())]
        for turn in row["messages"][:-1]
    ]
    return json.dumps([turns, row.get("tools", [])], sort_keys=True)


def _private(row: TokenizedRow, book: _Book) -> Iterator[AuditRow]:
    pieces: dict[AuditReason, list[str]] = {}
    for turn in row["messages"]:
        for piece in find_private(turn["content"] or ""):
            pieces.setdefault(piece.kind, []).append(f"{piece.shown} in the {turn['role']} turn")
    for kind, shown in pieces.items():
        yield book.entry(row, kind, len(shown), ", ".join(dict.fromkeys(shown)))
