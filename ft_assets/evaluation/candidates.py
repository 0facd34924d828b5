"""Score base, prompted base, SFT and DPO on the same held-out rows with one load of the base."""

import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.answer_scores import retention_scores, score_answers
from ft_assets.evaluation.behaviour import refusal_pattern, repetition
from ft_assets.evaluation.harness import harness_scores
from ft_assets.evaluation.proofs import (
    load_candidates,
    prove_adapters_act,
    prove_unseen,
    template_mismatches,
)
from ft_assets.evaluation.report_model import AdapterProof, OwnTemplate, Proofs
from ft_assets.inference.generation import generate
from ft_assets.inference.losses import answer_losses, sequence_log_probabilities
from ft_assets.job import Report
from ft_assets.metrics.judge import judge_scores
from ft_assets.metrics.label import choice
from ft_assets.metrics.user_function import load_function, user_scores
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.rows.types import Conversation, TokenSequence

Rows = list[dict[str, Any]]
LOSS_BATCH = 32
SHUFFLES = 10


@dataclass(frozen=True)
class Task:
    """What is asked: tokenized rows, the prompted base's examples, and the settings with the files they name."""

    heldout: Rows
    retention: Rows
    train: Rows
    few_shot: Rows
    few_shot_system: str | None
    settings: EvaluationSettings
    schema: Mapping[str, Any] | None = None
    root: Path = Path()


@dataclass
class Scored:
    """What came out. A held-out row is {"answer", "stopped", "tokens", "refused", "repetition", <metric>: score}, a
    retention row the same with "loss" and, for those that were answered, the retention metric; losses in nats a token.
    harness: {"task metric": scores}. chance: what each row's answer scores against other rows' references."""

    heldout: dict[str, Rows] = field(default_factory=dict)
    retention: dict[str, Rows] = field(default_factory=dict)
    chance: dict[str, list[float]] = field(default_factory=dict)
    harness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    train_loss: dict[str, list[float]] = field(default_factory=dict)
    proofs: Proofs = field(default_factory=lambda: Proofs(adapters={}, template_mismatches=[]))
    seconds: dict[str, float] = field(default_factory=dict)


def few_shot_prompt(
    messages: list[dict[str, str]], system: str | None, examples: Rows
) -> list[dict[str, str]]:
    """Return the prompt of the prompted base: the given system turn (else the row's own), the examples' turns, the row's."""
    own = next((turn["content"] for turn in messages if turn["role"] == "system"), None)
    first = system or own
    turns = [{"role": "system", "content": first}] if first else []
    for example in examples:
        turns += [turn for turn in example["messages"] if turn["role"] != "system"]
    return turns + [turn for turn in messages if turn["role"] != "system"]


def score(snapshot: Path, adapters: dict[str, Path], task: Task, report: Report) -> Scored:
    """Return every candidate's scores on the same rows, and the proofs that they mean something. Raises EvaluationError."""
    prove_unseen(adapters, heldout=task.heldout, retention=task.retention)
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    renderer = Renderer(tokenizer, stops)
    model = load_candidates(snapshot, adapters)
    scored = Scored()
    acts = prove_adapters_act(model, snapshot, adapters, _prompts(renderer, task.heldout[:1])[0])
    mismatches = template_mismatches(renderer, [*task.heldout, *task.train])
    scorer = Scorer(model, tokenizer, stops, task)
    prompted = [
        {**row, "messages": few_shot_prompt(row["messages"], task.few_shot_system, task.few_shot)}
        for row in task.heldout
    ]
    plans: list[tuple[str, str | None, Rows]] = [("base", None, task.heldout)]
    plans += [("few_shot", None, _tokenized(renderer, prompted))] if task.few_shot else []
    plans += [(name, name, task.heldout) for name in adapters]
    for name, adapter, rows in plans:
        begun = time.perf_counter()
        with acting(model, adapter):
            scored.heldout[name] = scorer.heldout(rows, scored.heldout.get("base"))
            if adapter is not None:  # only what may be merged is held against chance
                scored.chance[name] = scorer.chance(scored.heldout[name])
            if name != "few_shot":
                scored.retention[name] = scorer.retention(task.retention)
                scored.train_loss[name] = scorer.losses(task.train)[0]
                if task.settings.lm_eval:
                    scored.harness[name] = harness_scores(
                        model, tokenizer, task.settings, task.root
                    )
        scored.seconds[name] = time.perf_counter() - begun
        mean = statistics.fmean(row[task.settings.metric] for row in scored.heldout[name])
        report(
            "scored",
            **{
                f"{name}_{task.settings.metric}": round(mean, 4),
                "seconds": round(scored.seconds[name], 1),
            },
        )
    replaced = replaced_template(snapshot)
    scored.proofs = _proofs(scorer, acts, mismatches, replaced)
    return scored


def _proofs(
    scorer: "Scorer",
    adapters: dict[str, AdapterProof],
    mismatches: list[str],
    replaced: str | None,
) -> Proofs:
    """Return the proofs; with a replaced template also the losses under it and the base's own."""
    proofs = Proofs(adapters=adapters, template_mismatches=mismatches)
    if not replaced:
        return proofs
    task = scorer.task
    # General prompts show best what a base knows in its own template.
    known = task.retention or task.heldout
    with acting(scorer.model, None):
        try:
            losses = OwnTemplate(
                loss=scorer.loss_under(replaced, known),
                loss_as_configured=statistics.fmean(scorer.losses(known)[0]),
                rows="general" if task.retention else "held-out",
            )
        except EvaluationError as problem:
            # The base's own template cannot render these rows, e.g. without tool calls.
            return proofs.model_copy(update={"own_template_refuses": str(problem)})
    return proofs.model_copy(update={"own_template": losses})


def _tokenized(renderer: Renderer, rows: Rows) -> Rows:
    tokenized = []
    answered = cast(list[Conversation], rows)
    for row, rendered in zip(rows, renderer.answers(answered), strict=True):
        prompt, answer = _proven(row, rendered)
        tokenized.append(
            {
                **row,
                "input_ids": prompt + answer,
                "supervised": [False] * len(prompt) + [True] * len(answer),
            }
        )
    return tokenized


def _prompts(renderer: Renderer, rows: Rows) -> list[list[int]]:
    asked: list[Any] = [{**row, "messages": row["messages"][:-1]} for row in rows]
    return [_proven(row, prompt) for row, prompt in zip(rows, renderer.prompts(asked), strict=True)]


def _proven(row: Mapping[str, Any], rendered: Any) -> Any:
    if isinstance(rendered, ProofFailed):
        raise EvaluationError(
            where=f"held-out row {row.get('id', '')}",
            found=f"cannot be rendered for this candidate: {rendered}",
            expected="a prompt that the template takes",
            fix="correct data.few_shot and few_shot_system, or chat.chat_template",
        )
    return rendered


def replaced_template(snapshot: Path) -> str | None:
    """Return the base's own chat template if finetune.yaml replaced it."""
    facts = snapshot / "facts.json"
    return json.loads(facts.read_text()).get("replaced_template") if facts.exists() else None


class Scorer:
    """Scores whatever acts in the model now."""

    def __init__(self, model: Any, tokenizer: Any, stops: frozenset[int], task: Task) -> None:
        self.model, self.tokenizer, self.stops, self.task, self.settings = (
            model,
            tokenizer,
            stops,
            task,
            task.settings,
        )
        self.renderer = Renderer(tokenizer, stops)
        self.refusal = refusal_pattern(task.settings.refusals)
        user = task.settings.user_metric
        self.user_function = load_function(user.function, task.root) if user else None

    def tokenized(self, rows: Rows) -> Rows:
        """Return rows whose tokens may be another tokenizer's, with this one's."""
        return _tokenized(self.renderer, rows)

    def losses(self, rows: Rows) -> tuple[list[float], list[float]]:
        """Return (nats a token, token accuracy) of the reference answers."""
        return answer_losses(
            self.model,
            cast(list[TokenSequence], rows),
            self.settings.batch_size or LOSS_BATCH,
            self.tokenizer.pad_token_id,
        )

    def loss_under(self, template: str, rows: Rows) -> float:
        """Return the mean loss of the reference answers rendered with another template, in nats a token."""
        used = self.tokenizer.chat_template
        self.tokenizer.chat_template = template
        try:
            return statistics.fmean(
                self.losses(_tokenized(Renderer(self.tokenizer, self.stops), rows))[0]
            )
        finally:
            self.tokenizer.chat_template = used

    def answers(self, rows: Rows) -> Rows:
        """Return each row's greedy answer and its habits."""
        prompts = _prompts(self.renderer, rows)
        found = generate(
            self.model,
            self.tokenizer,
            prompts,
            self.stops,
            self.settings.max_new_tokens,
            self.settings.batch_size,
            [row["id"] for row in rows],
        )
        return [
            {
                "answer": answer.text,
                "stopped": answer.stopped,
                "tokens": answer.tokens,
                "refused": float(self.refusal.search(answer.text) is not None),
                "repetition": repetition(answer.text),
            }
            for answer in found
        ]

    def heldout(self, rows: Rows, base: Rows | None) -> Rows:
        """Return the scored rows; `base` are the base's own, which the judge compares with (None: this is the base)."""
        settings, answered = self.settings, self.answers(rows)
        texts, references = [row["answer"] for row in answered], [row["reference"] for row in rows]
        ids, prompts = (
            [row["id"] for row in rows],
            [row["messages"][:-1] for row in self.task.heldout],
        )
        scores = score_answers(texts, references, settings, self.task.schema)
        scores["loss"], scores["token_accuracy"] = self.losses(rows)
        if settings.choice:
            scores["choice"] = self.choices(rows, references)
        if self.user_function is not None and (user := settings.user_metric):
            scores[user.name] = user_scores(
                self.user_function, user.function, ids, texts, references, prompts
            )
        if settings.judge:
            rivals = texts if base is None else [row["answer"] for row in base]
            scores["judge"] = judge_scores(settings.judge, ids, prompts, texts, rivals)
        return [
            {**row, **{key: values[index] for key, values in scores.items()}}
            for index, row in enumerate(answered)
        ]

    def chance(self, scored: Rows) -> list[float]:
        """Return what each answer scores on average against the references of other rows, by the gate metric.

        [] where that says nothing: all references are the same, or the metric is not one of answer and reference alone.
        """
        answers, references = (
            [row["answer"] for row in scored],
            [row["reference"] for row in self.task.heldout],
        )
        gate = next(one for one in self.settings.measured() if one.name == self.settings.metric)
        if len(set(references)) == 1 or not (gate.of_answer and gate.needs_reference):
            return []
        count = min(SHUFFLES, len(references) - 1)
        offsets = random.Random(self.settings.seed).sample(range(1, len(references)), count)
        drawn = [
            score_answers(
                answers,
                references[offset:] + references[:offset],
                self.settings,
                self.task.schema,
                only=gate.name,
            )[gate.name]
            for offset in offsets
        ]
        return [statistics.fmean(values) for values in zip(*drawn, strict=True)]

    def choices(self, rows: Rows, references: list[str]) -> list[float]:
        """Return 1 where the reference is the most likely of the labels, by the summed log-probability of label and end of turn."""
        labels, count = self.settings.labels, len(self.settings.labels)
        asked = [
            {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": label}]}
            for row in rows
            for label in labels
        ]
        tokenized = _tokenized(self.renderer, asked)
        sums = sequence_log_probabilities(
            self.model,
            cast(list[TokenSequence], tokenized),
            self.settings.batch_size or LOSS_BATCH,
            self.tokenizer.pad_token_id,
        )
        by_row = [sums[begin : begin + count] for begin in range(0, len(sums), count)]
        return choice(by_row, references, labels)

    def retention(self, rows: Rows) -> Rows:
        """Return the general prompts' rows: the loss of all, and the first `retention_answers` answered and scored."""
        if not rows:
            return []
        answered = self.answers(rows[: self.settings.retention_answers])
        references = [row["reference"] for row in rows]
        metric = self.settings.retention_metric
        scores = retention_scores(
            [row["answer"] for row in answered], references[: len(answered)], metric
        )
        scored: Rows = [{**row, metric: value} for row, value in zip(answered, scores, strict=True)]
        scored += [{} for _ in rows[len(answered) :]]
        return [
            {**row, "loss": loss} for row, loss in zip(scored, self.losses(rows)[0], strict=True)
        ]


@contextmanager
def acting(model: Any, adapter: str | None) -> Iterator[None]:
    """Context in which one adapter acts, or none."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield
