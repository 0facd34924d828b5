"""Ask base, prompted base, SFT and DPO for the same held-out rows with one load of the base."""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_assets.chat.rendering import Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.asker import Asker, active, prompts
from ft_assets.evaluation.candidate_proofs import (
    load_candidates,
    prove_adapters_act,
    prove_unseen,
    template_mismatches,
)
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.examples import Pool, choose, prompted
from ft_assets.evaluation.harness import harness_scores, require_tasks
from ft_assets.evaluation.kept_answers import (
    SIDES,
    Answers,
    AskedRow,
    Cost,
    Facts,
    HarnessScores,
    Kept,
    Side,
    digest,
)
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import AdapterProof, FewShotChoice, OwnTemplate, Proofs
from ft_assets.evaluation.scorer import Task
from ft_assets.job import Report
from ft_assets.models.loading import context_length, load_tokenizer, stop_ids

FURTHER_SEED = "_seed"  # sft_seed1 is SFT with the second seed


@dataclass(frozen=True)
class Candidates:
    """The base's snapshot, the adapters, and the identity of each one's weights.

    weights: by the adapter's name; `base` is the base's. harness: the identity of the tasks of
    lm-evaluation-harness.
    """

    snapshot: Path
    adapters: dict[str, Path]
    weights: dict[str, str]
    harness: str = ""


@dataclass(frozen=True)
class _Plan:
    """A candidate with the adapter that is active (None: the base) and its held-out rows."""

    name: str
    adapter: str | None
    rows: list[ReferencedRow]


def ask(
    candidates: Candidates, task: Task, kept: Kept, report: Report, pool: Pool | None = None
) -> Answers:
    """Ask every candidate for the same rows, and prove that it is the candidate that answers.

    What is in `kept` is not asked again. pool: the rows to choose the examples of the prompted base
    from, instead of those of the task. Raises EvaluationError.
    """
    snapshot, adapters = candidates.snapshot, candidates.adapters
    require_tasks(task.settings, task.root)
    prove_unseen(adapters, heldout=task.heldout, retention=task.retention)
    tokenizer = load_tokenizer(snapshot)
    stops = stop_ids(snapshot)
    renderer = Renderer(tokenizer, stops)
    _require_room(renderer, task, context_length(snapshot))
    model = load_candidates(snapshot, adapters)
    choice: FewShotChoice | None = None
    if pool is not None:
        base = Asker(model, tokenizer, stops, task, candidates.weights["base"], kept)
        with active(model, None):
            examples, choice = choose(base, pool, task)
        task = replace(task, few_shot=examples)
        report("chose the examples of the prompted base", **choice.numbers())
        _require_room(renderer, task, context_length(snapshot))
    plans = _plans(renderer, task, adapters)
    probe = prompts(renderer, task.heldout[:1])[0]
    acting = prove_adapters_act(model, snapshot, adapters, probe)
    rows: dict[Side, dict[str, list[AskedRow]]] = {side: {} for side in SIDES}
    harness: dict[str, HarnessScores] = {}
    cost = Cost(seconds={}, tokens=0)
    for plan in plans:
        begun = time.perf_counter()
        asker = Asker(
            model, tokenizer, stops, task, candidates.weights[plan.adapter or "base"], kept
        )
        with active(model, plan.adapter):
            side: Side = "seeds" if FURTHER_SEED in plan.name else "heldout"
            rows[side][plan.name] = asker.heldout(plan.rows, held=plan.name == "base")
            if plan.name != "few_shot" and side == "heldout":
                rows["retention"][plan.name] = asker.retention(task.retention)
                rows["train"][plan.name] = asker.train(task.train, held=plan.name == "base")
                if task.settings.lm_eval:
                    harness[plan.name] = _harness(asker, candidates.harness)
        seconds = time.perf_counter() - begun
        cost = Cost(
            seconds={**cost.seconds, plan.name: seconds},
            tokens=cost.tokens + asker.generated,
            slower=tuple(dict.fromkeys([*cost.slower, *asker.slower])),
        )
        for reason in asker.slower:
            report(reason)
        report(f"asked {plan.name}", generated_tokens=asker.generated, seconds=round(seconds, 1))
    mismatches = template_mismatches(renderer, [*task.heldout, *task.train])
    base = Asker(model, tokenizer, stops, task)
    proofs = _proofs(base, acting, mismatches, replaced_template(snapshot))
    facts = Facts(proofs=proofs, harness=harness, vocabulary=_facts(snapshot)["vocabulary"])
    if choice is not None:
        facts = facts.model_copy(update={"few_shot": choice})
    return Answers(facts, rows, cost)


def _require_room(renderer: Renderer, task: Task, context: int | None) -> None:
    """Raise EvaluationError if a few-shot prompt and its answer are longer than the context."""
    room = Room(context, task.settings.max_new_tokens)
    if task.few_shot and (
        error := room.few_shot_error(renderer, task.heldout, task.few_shot, task.few_shot_system)
    ):
        raise error


def _plans(renderer: Renderer, task: Task, adapters: Mapping[str, Path]) -> list[_Plan]:
    plans = [_Plan("base", None, task.heldout)]
    if task.few_shot:
        rows = prompted(renderer, task.heldout, task.few_shot, task.few_shot_system)
        plans.append(_Plan("few_shot", None, rows))
    return plans + [_Plan(name, name, task.heldout) for name in adapters]


def _harness(asker: Asker, tasks: str) -> HarnessScores:
    """Return the harness's scores of the active candidate, the kept ones if there are any."""
    key = digest("harness", asker.weights, tasks)
    scores = asker.kept.harness.get(key) or harness_scores(
        asker.model, asker.tokenizer, asker.settings, asker.task.root
    )
    return HarnessScores(key=key, scores=scores)


def replaced_template(snapshot: Path) -> str | None:
    """Return the base's own chat template if finetune.yaml replaced it."""
    return _facts(snapshot).get("replaced_template")


def _facts(snapshot: Path) -> dict[str, Any]:
    return json.loads((snapshot / "facts.json").read_text())


def _proofs(
    asker: Asker,
    adapters: dict[str, AdapterProof],
    mismatches: list[str],
    replaced: str | None,
) -> Proofs:
    """Return the proofs; with a replaced template also the losses under it and the base's own."""
    proofs = Proofs(adapters=adapters, template_mismatches=mismatches)
    if not replaced:
        return proofs
    task = asker.task
    # General prompts show best how well a base predicts in its own template.
    known = task.retention or task.heldout
    with active(asker.model, None):
        try:
            losses = OwnTemplate(
                loss=asker.loss_under(replaced, known),
                loss_as_configured=statistics.fmean(asker.losses(known)[0]),
                rows="general" if task.retention else "held-out",
            )
        except EvaluationError as problem:
            # The base's own template cannot render these rows, e.g. without tool calls.
            return proofs.model_copy(update={"own_template_refuses": str(problem)})
    return proofs.model_copy(update={"own_template": losses})
