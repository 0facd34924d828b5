"""Tasks of EleutherAI's lm-evaluation-harness as general prompts, an option.

They need access to the hub, or task files of your own.

The package is not a dependency: `pip install "ft_assets[lm-eval]"`.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError

MAIN_METRICS = ("exact_match", "acc", "f1", "em")
# Their value of a document is a pair (log-likelihood, length), which has a mean only over a corpus.
OF_A_CORPUS = {"word_perplexity", "byte_perplexity", "bits_per_byte"}


def require_tasks(settings: EvaluationSettings, root: Path) -> None:
    """Raise EvaluationError unless each task of evaluation.lm_eval gives a score a document.

    It needs the tasks' data, but no model.
    """
    if not settings.lm_eval:
        return
    tasks = _task_manager(settings, root)
    with _guarded(settings):
        loaded = tasks.load(list(settings.lm_eval))["tasks"]
    for name, task in loaded.items():
        metrics = list(getattr(task, "_metric_fn_list", {}))
        if metrics and _main_metric(metrics, metrics) in OF_A_CORPUS:
            raise _no_score(name, metrics[0])


def harness_scores(
    model: Any, tokenizer: Any, settings: EvaluationSettings, root: Path
) -> dict[str, list[float]]:
    """Score the tasks of evaluation.lm_eval with the model's own chat template.

    Returns {"task metric": one score for each document}.

    Raises EvaluationError if the package or a task is missing.
    """
    tasks = _task_manager(settings, root)
    import lm_eval as package
    from lm_eval.models.huggingface import HFLM

    lm_eval: Any = package  # its annotations are wrapped away
    harness_model: Any = HFLM
    with _guarded(settings):
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
    return dict(_scores(name, samples) for name, samples in sorted(results["samples"].items()))


def _task_manager(settings: EvaluationSettings, root: Path) -> Any:
    """Return the harness's tasks. Raises EvaluationError without the package or a task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError(
            where="evaluation.lm_eval",
            found="the package lm_eval is not installed",
            expected="lm_eval",
            fix='pip install "ft_assets[lm-eval]"',
        ) from None
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
    return tasks


@contextmanager
def _guarded(settings: EvaluationSettings) -> Iterator[None]:
    """Turn what the harness and the hub's client raise into an EvaluationError."""
    try:
        yield
    except Exception as error:
        raise EvaluationError(
            where=f"evaluation.lm_eval: {', '.join(settings.lm_eval)}",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            expected="tasks whose data can be read",
            fix="the data of most tasks is on the hub; a task file of your own may read local "
            "files (evaluation.lm_eval_path)",
        ) from error


def _scores(task: str, samples: list[dict[str, Any]]) -> tuple[str, list[float]]:
    metric = _main_metric(samples[0], samples[0]["metrics"])
    by_document = {}
    for sample in samples:  # the last of several filters counts
        if not isinstance(sample[metric], int | float):
            raise _no_score(task, metric)
        by_document[sample["doc_id"]] = float(sample[metric])
    return f"{task} {metric}", [by_document[key] for key in sorted(by_document)]


def _main_metric(known: Container[str], metrics: Sequence[str]) -> str:
    return next((name for name in MAIN_METRICS if name in known), None) or metrics[0]


def _no_score(task: str, metric: str) -> EvaluationError:
    return EvaluationError(
        where=f"evaluation.lm_eval: {task}",
        found=f"its metric {metric} has no score for a single document",
        expected=f"a task with a score a document, such as {', '.join(MAIN_METRICS)}",
        fix="leave out the task; the loss on general prompts (data.retention) shows the same",
    )
