"""Break a pipeline in four common ways, and test that the diagnosis names each cause.

A healthy pipeline has no cause.
"""

import random
from collections.abc import Callable
from pathlib import Path

from ft_assets_tests.factories import WORDS, conversations, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, checks, materialize, read

FOREIGN = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def causes(folder: Path) -> list[str]:
    return [finding["cause"] for finding in read(folder, "eval_report", "diagnosis.json")]


def test_healthy_pipeline_passes_and_names_no_cause(healthy: Callable[..., Path]) -> None:
    folder = healthy()
    result = materialize(folder, UP_TO_REPORT)
    verdict = read(folder, "eval_report", "verdict.json")
    assert verdict["status"] == "PASS", verdict["reasons"]
    assert causes(folder) == []
    assert all(
        check.passed for name, check in checks(result).items() if name != "better_than_prompting"
    )


def test_healthy_pipeline_with_too_few_rows_cannot_tell_and_names_no_cause(
    healthy: Callable[..., Path],
) -> None:
    folder = healthy(gate={"min_heldout_rows": 1000})
    materialize(folder, UP_TO_REPORT)
    assert read(folder, "eval_report", "verdict.json")["status"] == "INCONCLUSIVE"
    assert causes(folder) == []


def test_foreign_template_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(
        chat={"chat_template": "template.jinja"}, sft={"max_steps": 2, "learning_rate": 1e-4}
    )
    (folder / "template.jinja").write_text(FOREIGN)
    materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["template mismatch"], read(folder, "eval_report", "verdict.json")


def test_narrow_data_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(data={"rehearsal": []})
    write_jsonl(folder / "data/train.jsonl", conversations(240, lambda _: "yes"))
    result = materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["training data too narrow"], read(
        folder, "eval_report", "verdict.json"
    )
    assert read(folder, "eval_report", "verdict.json")["status"] == "FAIL"
    assert not checks(result)["nothing_forgotten"].passed


def test_overfit_is_named(healthy: Callable[..., Path]) -> None:
    folder = healthy(sft={"num_train_epochs": 25, "keep": "last"})
    chance = random.Random(0)
    # The answers are random: the model can only memorize them.
    write_jsonl(folder / "data/train.jsonl", conversations(120, lambda _: chance.choice(WORDS)))
    materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["overfit"], read(folder, "eval_report", "verdict.json")


def test_wrong_base_is_named(healthy: Callable[..., Path], tiny_model: Path) -> None:
    folder = healthy(
        base_models={"tiny": {"folder": str(tiny_model)}},
        sft={"max_steps": 2, "learning_rate": 1e-4},
    )
    materialize(folder, UP_TO_REPORT)
    assert causes(folder) == ["wrong base model"], read(folder, "eval_report", "verdict.json")
