"""Measure a sample of training rows for the advice: the base alone, prompted, and with documents.

No held-out row takes part, so that the verdict stays unspent.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ft_assets.chat.rendering import Renderer
from ft_assets.config import AdviseSettings, EvaluationSettings, RetrievalRival, answerer_of
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.advice import BASE, CONFIDENCE, FEW_SHOT, AdviceEvidence, fact_shares
from ft_assets.evaluation.asker import Asker, tokenized
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.examples import EXAMPLES, prompted
from ft_assets.evaluation.kept_answers import AskedRow, read_kept
from ft_assets.evaluation.references import ReferencedRow, stored_reference, with_references
from ft_assets.evaluation.report_model import Difference, Estimate, Retrieved
from ft_assets.evaluation.retrieval import DocumentFile, Documents, counted, with_documents
from ft_assets.evaluation.scored_rows import ScoredRow, cluster_of
from ft_assets.evaluation.scorer import Scorer, Task
from ft_assets.evaluation.verdict.statistics import compare, interval
from ft_assets.job import Report
from ft_assets.models.loading import context_length, load_base, load_tokenizer, stop_ids
from ft_assets.rows.types import DataRow, Message, TokenizedRow

BAR = 0.9  # of a metric between 0 and 1 of which more is better
MOST_FACTS = 2000  # rows whose words are compared


@dataclass(frozen=True)
class Sample:
    """What is measured: the base's snapshot and weights, the training rows, and the ways to ask.

    The other fields are those of the step's settings.
    """

    snapshot: Path
    weights: str
    train: list[TokenizedRow]
    examples: list[DataRow]
    system: str | None
    advise: AdviseSettings
    settings: EvaluationSettings
    schema: Any
    root: Path
    documents: Mapping[str, Sequence[DocumentFile]]
    not_asked: dict[str, str]
    heldout_groups: int
    min_heldout: int
    pairs: int
    answers: Path | None
    uniform: float


@dataclass(frozen=True)
class Measured:
    """The evidence, the sampled rows with the answers and scores of each way, and the cost."""

    evidence: AdviceEvidence
    rows: list[ReferencedRow]
    scored: dict[str, list[ScoredRow]]
    cost: dict[str, float]


def measure(sample: Sample, report: Report) -> Measured:
    """Ask the base for the sample in each way, and score the answers. Raises EvaluationError."""
    begun = time.perf_counter()
    tokenizer, stops = load_tokenizer(sample.snapshot), stop_ids(sample.snapshot)
    rows, examples = _chosen(sample)
    referenced = with_references(tokenizer, rows)
    task = Task(
        heldout=referenced, settings=sample.settings, schema=sample.schema, root=sample.root
    )
    model = load_base(sample.snapshot)
    kept = read_kept(sample.answers, report)
    asker = Asker(model, tokenizer, stops, task, sample.weights, kept, "train")
    ways, not_asked = {BASE: referenced}, dict(sample.not_asked)
    try:
        ways[FEW_SHOT] = _few_shot(asker.renderer, referenced, examples, sample)
    except EvaluationError as error:
        not_asked[FEW_SHOT] = error.found
    retrieved: dict[str, Retrieved] = {}
    for name, files in sample.documents.items():
        try:
            ways[name], retrieved[name] = _with_documents(asker, referenced, name, files, sample)
        except EvaluationError as error:
            not_asked[name] = error.found
    asked: dict[str, list[AskedRow]] = {}
    for name, its in ways.items():
        try:
            asked[name] = asker.heldout(its)
        except EvaluationError as error:  # e.g. longer than the context
            if name == BASE:
                raise
            not_asked[name] = error.found
            retrieved.pop(name, None)
            continue
        report(f"asked {name}", rows=len(its), seconds=round(time.perf_counter() - begun, 1))
    evidence, scored = _evidence(sample, task, asked, retrieved, not_asked)
    cost = {
        "seconds": round(time.perf_counter() - begun, 1),
        "generated_tokens": asker.generated,
    }
    return Measured(evidence, referenced, scored, cost)


def _chosen(sample: Sample) -> tuple[list[TokenizedRow], list[DataRow]]:
    """Return the rows to ask, one a group, and the examples: the given ones, or other train rows.

    No row of an example's group is asked: its answer would stand in its prompt. Ids are hashes of
    the content, so the first ones by id are a sample.
    """
    examples: list[DataRow] = list(sample.examples)
    shown = {row["group"] for row in examples}
    train = [row for row in sample.train if row["group"] not in shown]
    rows = {row["group"]: row for row in sorted(train, key=lambda row: row["id"])}
    by_id = sorted(rows.values(), key=lambda row: row["id"])
    if len(by_id) < 2:
        raise EvaluationError(
            where="advice",
            found=f"there are {len(by_id)} groups of train rows whose answers the metric judges"
            + (", besides those of data.few_shot" if examples else ""),
            expected="at least two rows of the task in data.train",
            fix="add rows; before that there is nothing to measure",
        )
    others = by_id
    if not examples:
        count = min(EXAMPLES, len(by_id) // 2)
        chosen = random.Random(sample.settings.seed).sample(by_id, count)
        examples = [*chosen]
        others = [row for row in by_id if row not in chosen]
    return others[: sample.advise.rows], examples


def _few_shot(
    renderer: Renderer, rows: list[ReferencedRow], examples: list[DataRow], sample: Sample
) -> list[ReferencedRow]:
    """Return the rows with the examples, or the first of them, that fit. Raises EvaluationError."""
    room = Room(context_length(sample.snapshot), sample.settings.max_new_tokens)
    error = room.few_shot_error(renderer, rows, examples, sample.system)
    while error is not None and len(examples) > 1:
        examples = examples[: len(examples) // 2]
        error = room.few_shot_error(renderer, rows, examples, sample.system)
    if error is not None:
        raise error
    return prompted(renderer, rows, examples, sample.system)


def _with_documents(
    asker: Asker,
    rows: list[ReferencedRow],
    name: str,
    files: Sequence[DocumentFile],
    sample: Sample,
) -> tuple[list[ReferencedRow], Retrieved]:
    rival = sample.settings.rivals[name]
    assert isinstance(rival, RetrievalRival), "the asset passes documents of such rivals alone"
    _, answerer = answerer_of(sample.settings.rivals, name, BASE)
    system = rival.prompt if rival.prompt is not None else answerer.prompt
    documents = Documents(f"evaluation.rivals.{name}.documents", files, rival.chunk_words)
    asked, found = [], []
    for row in rows:
        turns: list[Message] = [*row["messages"]]
        if system is not None:  # in place of the row's own, as on held-out rows (rivals.py)
            own = [turn for turn in turns if turn["role"] != "system"]
            turns = [{"role": "system", "content": system}, *own]
        places = [place for place, turn in enumerate(turns[:-1]) if turn["role"] == "user"]
        question = turns[places[-1]]["content"] if places else ""
        hits = documents.find(question, rival.top_k)
        if places:
            content = with_documents(question, hits, rival.template)
            turns[places[-1]] = {"role": "user", "content": content}
        changed = row.copy()
        changed["messages"] = turns
        asked.append(changed)
        found.append((question, row["reference"], hits))
    return tokenized(asker.renderer, asked), counted(documents, found)


def _evidence(
    sample: Sample,
    task: Task,
    asked: Mapping[str, list[AskedRow]],
    retrieved: dict[str, Retrieved],
    not_asked: dict[str, str],
) -> tuple[AdviceEvidence, dict[str, list[ScoredRow]]]:
    settings = sample.settings
    metric, scored = _scored(task, asked)
    higher = metric != "loss" and metric not in settings.lower_is_better()
    bounded = metric != "loss" and settings.main_metric().bounded
    values = {way: [row.scores[metric] for row in rows] for way, rows in scored.items()}
    groups = [cluster_of(row) for row in task.heldout]

    def against(way: str, other: str) -> Difference:
        return compare(
            values[way], values[other], CONFIDENCE, settings.seed, not higher, groups, bounded
        )

    prompts = [way for way in (BASE, FEW_SHOT) if way in values]
    best = max(prompts, key=lambda way: (1 if higher else -1) * fmean(values[way]))
    bar = sample.advise.bar
    if bar is None and higher and bounded:
        bar = BAR
    return AdviceEvidence(
        metric=metric,
        higher_is_better=higher,
        bar=bar if metric == settings.metric else None,  # a bar is not one of the loss
        sampled=len(task.heldout),
        train_groups=len({row["group"] for row in sample.train}),
        heldout_groups=sample.heldout_groups,
        min_heldout=sample.min_heldout,
        scores={way: _estimate(its, groups, settings.seed, bounded) for way, its in values.items()},
        against_base={way: against(way, BASE) for way in values if way != BASE},
        against_prompt={way: against(way, best) for way in values if way in retrieved},
        retrieved=retrieved,
        facts=_facts(sample),
        loss=min(fmean(row.loss for row in asked[way]) for way in prompts),
        uniform=sample.uniform,
        pairs=sample.pairs,
        not_asked=not_asked,
    ), scored


def _scored(
    task: Task, asked: Mapping[str, list[AskedRow]]
) -> tuple[str, dict[str, list[ScoredRow]]]:
    """Return the metric, and the scored rows by way; the loss where no answer alone has a score."""
    scorer, metric = Scorer(task), task.settings.metric
    found: dict[str, list[ScoredRow]] = {}
    for way, rows in asked.items():
        scores = scorer.gate_scores(rows)
        if not all(scores):
            metric, scores = "loss", [{"loss": row.loss} for row in rows]
        found[way] = [
            replace(scorer.answered(row).scored(score), cluster=cluster_of(its))
            for row, score, its in zip(rows, scores, task.heldout, strict=True)
        ]
    return metric, found


def _facts(sample: Sample) -> Estimate:
    rows = sorted(sample.train, key=lambda row: row["id"])[:MOST_FACTS]
    texts = [
        (
            row["group"],
            "\n".join(turn["content"] for turn in row["messages"][:-1]),
            stored_reference(row),
        )
        for row in rows
    ]
    shares = fact_shares(texts)
    return _estimate(shares or [0.0], None, sample.settings.seed, True)


def _estimate(
    values: Sequence[float], groups: Sequence[str] | None, seed: int, bounded: bool
) -> Estimate:
    low, high = interval(values, CONFIDENCE, seed, groups, bounded)
    return Estimate(mean=fmean(values), low=low, high=high)
