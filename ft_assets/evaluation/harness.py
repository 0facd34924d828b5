"""Tasks of EleutherAI's lm-evaluation-harness as general prompts, an option.

They need access to the hub, or task files of your own.

The package is not a dependency: `pip install "ft_assets[lm-eval]"`.
"""

from pathlib import Path
from typing import Any

from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError

MAIN_METRICS = ("exact_match", "acc", "f1", "em")


def harness_scores(
    model: Any, tokenizer: Any, settings: EvaluationSettings, root: Path
) -> dict[str, list[float]]:
    """Score the tasks of evaluation.lm_eval with the model's own chat template.

    Returns {"task metric": one score for each document}.

    Raises EvaluationError if the package or a task is missing.
    """
    try:
        import lm_eval as package
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError(
            where="evaluation.lm_eval",
            found="the package lm_eval is not installed",
            expected="lm_eval",
            fix='pip install "ft_assets[lm-eval]"',
        ) from None
    lm_eval: Any = package  # its annotations are wrapped away
    harness_model: Any = HFLM
    tasks = TaskManager(
        include_path=str(root / settings.lm_eval_path) if settings.lm_eval_path else None
    )
    missing = [name for name in settings.lm_eval if name not in tasks.all_tasks]
    if missing:
        raise EvaluationError(
            where=f"evaluation.lm_eval: {missing[0]}",
            found="is not a task",
            expected="a task of lm_eval, or of evaluation.lm_eval_path",
            fix="correct the name",
        )
    try:
        results: Any = lm_eval.simple_evaluate(
            model=harness_model(
                pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size or 16
            ),
            tasks=list(settings.lm_eval),
            task_manager=tasks,
            limit=settings.lm_eval_limit,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=True,
        )
    except Exception as error:  # the harness and the hub's client raise their own
        raise EvaluationError(
            where=f"evaluation.lm_eval: {', '.join(settings.lm_eval)}",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            expected="tasks whose data can be read",
            fix="the data of most tasks is on the hub; a task file of your own may read local "
            "files (evaluation.lm_eval_path)",
        ) from error
    return dict(_scores(name, samples) for name, samples in sorted(results["samples"].items()))


def _scores(task: str, samples: list[dict[str, Any]]) -> tuple[str, list[float]]:
    metric = (
        next((name for name in MAIN_METRICS if name in samples[0]), None)
        or samples[0]["metrics"][0]
    )
    by_document = {
        sample["doc_id"]: float(sample[metric]) for sample in samples
    }  # the last of several filters
    return f"{task} {metric}", [by_document[key] for key in sorted(by_document)]
