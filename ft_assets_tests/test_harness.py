"""Tasks of lm-evaluation-harness that cannot be compared are refused before any model is asked."""

from pathlib import Path

import pytest

from ft_assets.config import EvaluationSettings
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.harness import _scores, require_tasks
from ft_assets_tests.factories import write_jsonl

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: ''
doc_to_target: '{{{{word}}}}'
metric_list: [{metrics}]
"""


def settings(folder: Path, kind: str, *metrics: str) -> EvaluationSettings:
    write_jsonl(folder / "tasks/rows.jsonl", [{"word": "red"}, {"word": "blue"}])
    text = TASK.format(
        name="words",
        rows=folder / "tasks/rows.jsonl",
        kind=kind,
        metrics=", ".join(
            f"{{metric: {one}, aggregation: mean, higher_is_better: true}}" for one in metrics
        ),
    )
    (folder / "tasks/words.yaml").write_text(text)
    return EvaluationSettings(lm_eval=["words"], lm_eval_path="tasks")


def test_perplexity_of_a_corpus_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    given = settings(tmp_path, "loglikelihood_rolling", "word_perplexity", "byte_perplexity")
    with pytest.raises(EvaluationError, match="words: its metric word_perplexity has no score"):
        require_tasks(given, tmp_path)


def test_score_a_document_is_accepted(tmp_path: Path) -> None:
    require_tasks(settings(tmp_path, "generate_until", "exact_match"), tmp_path)


def test_task_without_its_data_is_named(tmp_path: Path) -> None:
    given = settings(tmp_path, "generate_until", "exact_match")
    (tmp_path / "tasks/rows.jsonl").unlink()
    with pytest.raises(EvaluationError, match="tasks whose data can be read"):
        require_tasks(given, tmp_path)


def test_pair_of_a_document_is_no_score() -> None:
    samples = [{"metrics": ["mine"], "mine": (-3.0, 2), "doc_id": 0}]
    with pytest.raises(EvaluationError, match="its metric mine has no score"):
        _scores("words", samples)
