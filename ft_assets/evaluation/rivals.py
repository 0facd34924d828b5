"""Ask all rivals for the held-out rows: endpoints and base models, with documents or without.

Not here: the requests (endpoint_rival.py), the models of this machine (base_rival.py), the search
in documents (retrieval.py).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.config import EndpointRival, EvaluationSettings, RetrievalRival, answerer_of
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.endpoint_rival import Asked, ask_endpoint
from ft_assets.evaluation.references import stored_reference
from ft_assets.evaluation.report_model import Retrieved, RivalCost, Search
from ft_assets.evaluation.retrieval import DocumentFile, Documents, Hit, counted, with_documents
from ft_assets.evaluation.rival_answers import (
    KeptAnswers,
    LocalBase,
    Question,
    RivalAnswer,
    Tried,
    cost_of,
)
from ft_assets.job import Report
from ft_assets.rows.types import Message, TokenizedRow

HITS, RETRIEVED = "retrieval.parquet", "retrieval.json"
SHOWN, SHOWN_TEXT = 5, 300  # searches in a report, and characters of each text


@dataclass(frozen=True)
class Sources:
    """What rivals read besides the rows: base models by name, the files of documents by rival.

    own: the name of the base model that is fine-tuned.
    """

    own: str = ""
    bases: Mapping[str, LocalBase] = field(default_factory=dict)
    documents: Mapping[str, Sequence[DocumentFile]] = field(default_factory=dict)


@dataclass
class Given:
    """What the rivals gave: answers, and by rival the costs, the hits of each row, their counts."""

    answers: list[RivalAnswer] = field(default_factory=list)
    costs: dict[str, RivalCost] = field(default_factory=dict)
    hits: dict[str, dict[str, list[Hit]]] = field(default_factory=dict)
    retrieved: dict[str, Retrieved] = field(default_factory=dict)


def ask_rivals(
    rows: Sequence[TokenizedRow],
    settings: EvaluationSettings,
    sources: Sources,
    kept: KeptAnswers,
    tried: Tried,
    report: Report,
) -> Given:
    """Ask each rival for each row once. Raises EvaluationError at the first that fails."""
    require_text(rows)
    given = Given()
    for name, rival in settings.rivals.items():
        if isinstance(rival, RetrievalRival):
            _retrieve(name, rival, rows, sources, given)
            report(f"searched the documents of {name}", **given.retrieved[name].numbers())
    known = dict(kept)  # a question without a hit is one that another rival may have answered
    for name in settings.rivals:
        _, answerer = answerer_of(settings.rivals, name, sources.own)
        questions = [_question(name, row, settings, sources.own, given) for row in rows]
        if isinstance(answerer, EndpointRival):
            asked = Asked(name, answerer, settings)
            answers = ask_endpoint(asked, questions, known, tried, report)
        else:
            from ft_assets.evaluation.base_rival import ask_base

            base = sources.bases[answerer.base_model]
            answers = ask_base(name, base, questions, settings, known, tried, report)
        given.answers += answers
        known |= {answer.key: answer for answer in answers}
        given.costs[name] = cost_of(answers, answerer)
    return given


def _retrieve(
    name: str,
    rival: RetrievalRival,
    rows: Sequence[TokenizedRow],
    sources: Sources,
    given: Given,
) -> None:
    documents = Documents(
        f"evaluation.rivals.{name}.documents", sources.documents[name], rival.chunk_words
    )
    questions = [_last_user_turn(row)["content"] for row in rows]
    hits = [documents.find(question, rival.top_k) for question in questions]
    given.hits[name] = {row["id"]: its for row, its in zip(rows, hits, strict=True)}
    references = [stored_reference(row) for row in rows]
    given.retrieved[name] = counted(documents, list(zip(questions, references, hits, strict=True)))


def write_searches(folder: Path, rows: Sequence[TokenizedRow], given: Given) -> None:
    """Write each rival's counts as JSON, and its hits as a table, if a rival searches documents."""
    if not given.hits:
        return
    lines = [
        {"rival": name, "id": row["id"], "question": _last_user_turn(row)["content"], "rank": rank}
        | hit.model_dump()
        for name, hits in given.hits.items()
        for row in rows
        for rank, hit in enumerate(hits[row["id"]], 1)
    ]
    schema = pa.schema(
        {
            **dict.fromkeys(("rival", "id", "question"), pa.string()),
            "rank": pa.int64(),
            "source": pa.string(),
            "score": pa.float64(),
            "text": pa.string(),
        }
    )
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), folder / HITS)
    counts = {name: one.to_dict() for name, one in given.retrieved.items()}
    (folder / RETRIEVED).write_text(json.dumps(counts, indent=1))


def read_searches(folder: Path, rival: str) -> tuple[Retrieved | None, list[Search]]:
    """Read the counts of a rival, and its first searches; None if it searches no documents."""
    if not (folder / RETRIEVED).exists():
        return None, []
    counts = json.loads((folder / RETRIEVED).read_text()).get(rival)
    if counts is None:
        return None, []
    found: dict[str, list[tuple[str, float, str]]] = {}
    for line in pq.read_table(folder / HITS, filters=[("rival", "=", rival)]).to_pylist():
        hits = found.setdefault(line["question"], [])
        hits.append((line["source"], line["score"], line["text"][:SHOWN_TEXT]))
    shown = list(found.items())[:SHOWN]
    return Retrieved.model_validate(counts), [
        Search(question=question[:SHOWN_TEXT], hits=hits) for question, hits in shown
    ]


def _last_user_turn(row: TokenizedRow) -> Message:
    turns = [turn for turn in row["messages"][:-1] if turn["role"] == "user"]
    if not turns:
        raise EvaluationError(
            where=f"evaluation.rivals, held-out row {row['id']}",
            found="has no user turn before its answer",
            expected="a question that documents are searched for",
            fix="leave out the row, or the rivals with documents",
        )
    return turns[-1]


def _question(
    name: str, row: TokenizedRow, settings: EvaluationSettings, own: str, given: Given
) -> Question:
    rival, (_, answerer) = settings.rivals[name], answerer_of(settings.rivals, name, own)
    turns = prompt_of(row, rival.prompt if rival.prompt is not None else answerer.prompt)
    if isinstance(rival, RetrievalRival):
        last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
        content = with_documents(
            turns[last]["content"], given.hits[name][row["id"]], rival.template
        )
        turns[last] = {"role": "user", "content": content}
    return Question(row["id"], turns)


def prompt_of(row: TokenizedRow, system: str | None) -> list[Message]:
    """Return the turns that are sent: those before the answer, with the rival's own system turn."""
    turns: list[Message] = [
        {"role": turn["role"], "content": turn["content"]} for turn in row["messages"][:-1]
    ]
    if system is None:
        return turns
    own = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": system}, *own]


def require_text(rows: Iterable[TokenizedRow]) -> None:
    """Raise EvaluationError if a row has tools: its answer is not a text alone."""
    for row in rows:
        if row.get("tools") or any(turn.get("tool_calls") for turn in row["messages"]):
            raise EvaluationError(
                where=f"evaluation.rivals, held-out row {row['id']}",
                found="it has tools, or calls of tools",
                expected="rows whose turns and answers are texts",
                fix="leave out evaluation.rivals",
            )
