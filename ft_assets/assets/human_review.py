"""The asset `human_review`: what people who did not see the models' names think of the answers."""

from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.artifacts import Artifact
from ft_assets.evaluation.report_model import Agreement
from ft_assets.job import StepResult
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.materializer import WARN, Inputs, Materializer, result
from ft_assets.review.candidates import ADAPTERS, champion_answers, heldout_rows, items_of
from ft_assets.review.judgements import Judgements
from ft_assets.review.markdown import review_markdown
from ft_assets.review.session import BASE, drawn
from ft_assets.review.win_rates import FILE, REVIEW, HumanReview, review, write_people_scores


def _summary(metrics: Metrics) -> str:
    done = f"{metrics['judged']} of {metrics['prompts']} prompts judged"
    return f"{done}; {metrics['best']}" if metrics.get("best") else done


@asset(
    deps=["answers", "heldout_split"],
    sources=["review"],
    group="evaluation",
    kinds=["table"],
    code_version="1",
    summary=_summary,
    only_if=lambda project: project.review is not None,
)
def human_review(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """People's win rates of each candidate against the base and the last released model.

    `ft review` asks people and shows no names. Without judgements there are no win rates.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    settings = project.review
    assert settings is not None, "a project without review does not have this asset"
    judgements = Judgements(project.path(settings.folder))
    answers, split = store.need("answers", name), store.need("heldout_split", name)
    champion = champion_answers(store, name, answers)
    inputs: Inputs = {
        "answers": (answers, None),
        "heldout_split#heldout": (split, "heldout"),
        **({"champion_answers": (champion[0], None)} if champion else {}),
    }
    confidence = project.gate.confidence

    def make(output: Path) -> StepResult:
        by_row = items_of(heldout_rows(split), answers, champion)
        items = drawn(list(by_row.values()), settings)
        given, keys = judgements.read(), {item.key for item in items}
        found = review(items, given, confidence, settings.seed)
        reviewed = {row: item for row, item in by_row.items() if item.key in keys}
        write_people_scores(output / FILE, reviewed, given)
        (output / REVIEW).write_text(found.to_json())
        return StepResult(_metrics(found))

    artifact, reused = materializer.materialize(
        context,
        identity={
            "judgements": judgements.version(),
            "prompts": settings.prompts,
            "seed": settings.seed,
            "confidence": confidence,
            "champion": champion and champion[1],
        },
        inputs=inputs,
        make=make,
        libraries="score",
    )
    return result(artifact, reused, review=dg.MetadataValue.md(review_markdown(read(artifact))))


def read(artifact: Artifact) -> HumanReview:
    """Read the review of an artifact. Raises ArtifactError."""
    return HumanReview.read(artifact.path / REVIEW)


def _metrics(found: HumanReview) -> dict[str, Any]:
    ours = [one for one in found.win_rates if one.candidate in ADAPTERS and one.rival == BASE]
    best = max(ours, key=lambda one: one.rate, default=None)
    return {
        "prompts": found.prompts,
        "judged": found.judged,
        "identical": found.identical,
        "judgements": found.judgements,
        "reviewers": len(found.reviewers),
        "agreement": _alpha(found.agreement),
        "best": best.describe() if best else None,
    }


def _alpha(agreement: Agreement | None) -> float | None:
    return None if agreement is None else round(agreement.alpha, 4)


@check(human_review, description="People judged every prompt of the review.")
def every_prompt_is_judged(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the number of prompts that are left."""
    metrics = checked.metrics
    left = metrics["prompts"] - metrics["judged"]
    text = f"{metrics['judged']} of {metrics['prompts']} prompts are judged"
    return dg.AssetCheckResult(
        passed=left == 0,
        severity=WARN,
        description=text if left == 0 else f"{text}: open ft review",
    )


@check(human_review, description="Several reviewers agree with each other beyond chance.")
def people_agree(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the interval of Krippendorff's alpha reaches 0, or if one person judged alone."""
    found = read(checked.artifact).agreement
    return dg.AssetCheckResult(
        passed=found is not None and found.low > 0,
        severity=WARN,
        description=found.describe()
        if found
        else "not measured: no pair of different answers was judged by two people",
    )
