"""`ft doctor` reads the rows and tells what a run would find after training."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_assets.commands.doctor.check import Check
from ft_assets.commands.doctor.rows import rows
from ft_assets.config import load_project
from ft_assets_tests.factories import write_jsonl

WORDS = [*"船山川空海森町駅店道窓扉机椅本紙筆時電写"]


def chats(count: int, answer: str = "赤", start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{WORDS[at % 20]}の{WORDS[at * 7 % 20]}は{at}何色", "completion": answer}
        for at in range(start, start + count)
    ]


def doctor(folder: Path, base: Path, settings: dict[str, Any], **files: Any) -> dict[str, Check]:
    """Return the checks of the rows of a project with these files of `data`."""
    for key, values in files.items():
        write_jsonl(folder / f"{key}.jsonl", values)
    data = {key: [f"{key}.jsonl"] for key in files} | settings.get("data", {})
    evaluation = {"max_new_tokens": 8, **settings.get("evaluation", {})}
    text = {
        "data": data,
        "base_models": {"tiny": {"folder": str(base)}},
        "gate": {"min_heldout_rows": 10},
        "evaluation": evaluation,
        **{key: value for key, value in settings.items() if key not in ("data", "evaluation")},
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(text))
    project = load_project(folder / "finetune.yaml")
    return {check.name: check for check in rows(project, list(files))}


LONG = "ยาวมาก" * 40
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, str, str]] = [
    ("unusable", {}, {"train": [{"a": "b"}] * 5}, "data.train: rows", "fail", "0 of 5 can be used"),
    ("empty", {}, {"train": []}, "data.train: rows", "fail", "there are none"),
    (
        "some",
        {"data": {"max_invalid": 0.2}},
        {"train": [*chats(40), {"a": "b"}]},
        "data.train: rows",
        "warn",
        "first train.jsonl:41",
    ),
    (
        "columns",
        {},
        {"train": [{**row, "note": "سفينة"} for row in chats(40)]},
        "data.train: columns",
        "warn",
        "note (40 rows)",
    ),
    (
        "question",
        {},
        {"train": [{**row, "question": "لماذا؟"} for row in chats(40)]},
        "data.train: rows",
        "fail",
        "two columns that can be the prompt",
    ),
    ("few", {}, {"train": chats(20)}, "held-out rows", "warn", "all rows are 20 groups"),
    ("share", {}, {"train": chats(60)}, "held-out rows", "warn", "gate.min_heldout_rows is 10"),
    (
        "fixed",
        {},
        {"train": chats(60), "heldout": chats(5, start=900)},
        "held-out rows",
        "warn",
        "5 groups in 5 rows",
    ),
    (
        "copies",
        {},
        {"train": chats(40), "heldout": chats(30)},
        "left out",
        "fail",
        "30 of 40 rows repeat held-out rows",
    ),
    (
        "labels",
        {"evaluation": {"labels": ["赤", "青"], "metric": "label"}},
        {"train": chats(40), "heldout": [*chats(11, start=500), *chats(1, "緑", 700)]},
        "tiny: references",
        "fail",
        "heldout.jsonl:12",
    ),
    (
        "long answers",
        {},
        {"train": chats(40), "heldout": chats(12, LONG, 500)},
        "tiny: lengths",
        "warn",
        "12 of 12 held-out answers are longer than evaluation.max_new_tokens (8)",
    ),
    (
        "long rows",
        {"chat": {"max_length": 64}},
        {"train": chats(40, LONG), "heldout": chats(12, start=500)},
        "tiny: lengths",
        "fail",
        "40 of 52 rows are longer than 64 tokens",
    ),
]


@pytest.mark.parametrize(
    ("settings", "files", "name", "state", "found"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_doctor_tells_what_the_rows_would_do_later(
    tmp_path: Path,
    tiny_model: Path,
    settings: dict[str, Any],
    files: dict[str, Any],
    name: str,
    state: str,
    found: str,
) -> None:
    checks = doctor(tmp_path, tiny_model, settings, **files)
    assert checks[name].state == state, checks
    assert found in checks[name].found
    assert checks[name].advice


def test_doctor_finds_nothing_in_rows_that_are_right(tmp_path: Path, tiny_model: Path) -> None:
    checks = doctor(tmp_path, tiny_model, {}, train=chats(40), heldout=chats(12, start=500))
    assert {check.state for check in checks.values()} == {"ok"}, checks
    assert list(checks) == [
        *("data.train: rows", "data.heldout: rows", "held-out rows", "left out"),
        *("tiny: references", "tiny: lengths"),
    ]
