"""Score base, prompted base, SFT and DPO on the same held-out rows with one load of the base."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ft_assets.chat.rendering import Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.candidate_proofs import (
    load_candidates,
    prove_adapters_act,
    prove_unseen,
    template_mismatches,
)
from ft_assets.evaluation.harness import harness_scores
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import AdapterProof, OwnTemplate, Proofs
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.scorer import Scorer, Task, active, prompts, tokenized
from ft_assets.job import Report
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.rows.types import ConversationRow, Message


@dataclass
class Scored:
    """The results by candidate.

    chance: the scores of each row's answer against other rows' references. harness: {"task metric":
    scores}. train_loss: nats per token of each train row.
    """

    heldout: dict[str, list[ScoredRow]] = field(default_factory=dict)
    retention: dict[str, list[ScoredRow]] = field(default_factory=dict)
    chance: dict[str, list[float]] = field(default_factory=dict)
    harness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    train_loss: dict[str, list[float]] = field(default_factory=dict)
    proofs: Proofs = field(default_factory=lambda: Proofs(adapters={}, template_mismatches=[]))
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """A candidate with the adapter that is active (None: the base) and its held-out rows."""

    name: str
    adapter: str | None
    rows: list[ReferencedRow]


def score(snapshot: Path, adapters: dict[str, Path], task: Task, report: Report) -> Scored:
    """Score every candidate on the same rows, with the proofs of these scores.

    Raises EvaluationError.
    """
    prove_unseen(adapters, heldout=task.heldout, retention=task.retention)
    tokenizer = load_tokenizer(snapshot)
    stops = stop_ids(snapshot)
    renderer = Renderer(tokenizer, stops)
    model = load_candidates(snapshot, adapters)
    probe = prompts(renderer, task.heldout[:1])[0]
    adapter_proofs = prove_adapters_act(model, snapshot, adapters, probe)
    mismatches = template_mismatches(renderer, [*task.heldout, *task.train])
    scorer = Scorer(model, tokenizer, stops, task)
    scored = Scored()
    for plan in _plans(renderer, task, adapters):
        begun = time.perf_counter()
        _score_candidate(scorer, plan, scored)
        seconds = scored.seconds[plan.name] = time.perf_counter() - begun
        metric = task.settings.metric
        mean = statistics.fmean(row.scores[metric] for row in scored.heldout[plan.name])
        report("scored", **{f"{plan.name}_{metric}": round(mean, 4), "seconds": round(seconds, 1)})
    scored.proofs = _proofs(scorer, adapter_proofs, mismatches, replaced_template(snapshot))
    return scored


def _plans(renderer: Renderer, task: Task, adapters: Mapping[str, Path]) -> list[_Plan]:
    plans = [_Plan("base", None, task.heldout)]
    if task.few_shot:
        prompted = [_prompted(row, task) for row in task.heldout]
        plans.append(_Plan("few_shot", None, tokenized(renderer, prompted)))
    return plans + [_Plan(name, name, task.heldout) for name in adapters]


def _prompted(row: ReferencedRow, task: Task) -> ReferencedRow:
    messages = few_shot_prompt(row["messages"], task.few_shot_system, task.few_shot)
    return {**row, "messages": messages}


def few_shot_prompt(
    messages: list[Message], system: str | None, examples: Sequence[ConversationRow]
) -> list[Message]:
    """Return the messages of the prompted base.

    They are the system turn (`system`, else the row's own), the turns of the examples, and those of
    the row.
    """
    own = next((turn["content"] for turn in messages if turn["role"] == "system"), None)
    first = system or own
    turns: list[Message] = [{"role": "system", "content": first}] if first else []
    for example in examples:
        turns += [turn for turn in example["messages"] if turn["role"] != "system"]
    return turns + [turn for turn in messages if turn["role"] != "system"]


def _score_candidate(scorer: Scorer, plan: _Plan, scored: Scored) -> None:
    task, name = scorer.task, plan.name
    with active(scorer.model, plan.adapter):
        scored.heldout[name] = scorer.heldout(plan.rows, scored.heldout.get("base"))
        if plan.adapter is not None:  # only candidates for the merge are compared with chance
            scored.chance[name] = scorer.chance(scored.heldout[name])
        if name == "few_shot":
            return
        scored.retention[name] = scorer.retention(task.retention)
        scored.train_loss[name] = scorer.losses(task.train)[0]
        if task.settings.lm_eval:
            scored.harness[name] = harness_scores(
                scorer.model, scorer.tokenizer, task.settings, task.root
            )


def replaced_template(snapshot: Path) -> str | None:
    """Return the base's own chat template if finetune.yaml replaced it."""
    facts = snapshot / "facts.json"
    return json.loads(facts.read_text()).get("replaced_template") if facts.exists() else None


def _proofs(
    scorer: Scorer,
    adapters: dict[str, AdapterProof],
    mismatches: list[str],
    replaced: str | None,
) -> Proofs:
    """Return the proofs; with a replaced template also the losses under it and the base's own."""
    proofs = Proofs(adapters=adapters, template_mismatches=mismatches)
    if not replaced:
        return proofs
    task = scorer.task
    # General prompts show best how well a base predicts in its own template.
    known = task.retention or task.heldout
    with active(scorer.model, None):
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
