"""The row audit: wrong answers by models that did not see them, and private data by checksums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft_assets.artifacts import open_store
from ft_assets.commands.rows import listed
from ft_assets.config import AuditSettings, load_project
from ft_assets.data.private import find_private
from ft_assets.data.tables import CONVERSATION, read_table, write_table
from ft_assets.errors import DataError
from ft_assets.evaluation.wrong_rows import TEMPERATURES, Answer, find_wrong, outliers
from ft_assets.steps.audit import TABLES, require_rows, sources_of
from ft_assets.views.row_places import PLACES
from ft_assets.views.rows import AUDITED, RowFinder, Wanted
from ft_assets_tests.factories import conversations, edit, next_word, write_jsonl
from ft_assets_tests.pipeline import artifact, checks, failure, materialize

UP_TO_AUDIT = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split,row_audit"
END = 2


def scored(labels: np.ndarray, logits: np.ndarray) -> list[Answer]:
    """Return answers of one label and an end, under a model with these logits (rows, labels)."""
    answers = []
    for label, line in zip(labels, logits, strict=True):
        own = [
            float(line[label] / at - np.log(np.exp((line - line.max()) / at).sum()))
            - float(line.max() / at)
            for at in TEMPERATURES
        ]
        answers.append(Answer([10 + int(label), END], [0], np.array([own, [-1e-3] * len(own)])))
    return answers


def drawn(seed: int, rows: int, labels: int, noise: float) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return labels that follow known logits, and logits that are too sure and noisy."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 12, (rows, labels))
    gumbel = chance.gumbel(size=logits.shape)
    shown = 2 * logits + chance.normal(0, noise, logits.shape)
    return chance, (logits + gumbel).argmax(1), shown


@pytest.mark.parametrize(("labels", "noise"), [(3, 0.0), (3, 3.0), (20, 0.0), (20, 3.0)])
def test_a_set_without_wrong_rows_is_rarely_accused(labels: int, noise: float) -> None:
    accused = 0
    for seed in range(20):
        _, own, shown = drawn(seed, 120, labels, noise)
        accused += bool(find_wrong(scored(own, shown), 1000).named(0.05, 0.5))
    assert accused <= 3  # of 20 at a rate of 0.05, more happens with 2 %


@pytest.mark.parametrize("labels", [3, 20])
def test_planted_wrong_labels_are_named_and_hardly_others(labels: int) -> None:
    chance, own, shown = drawn(1, 400, labels, 1.0)
    wrong = set(range(0, 400, 20))
    for at in wrong:
        own[at] = (own[at] + 1 + chance.integers(labels - 1)) % labels
    found = find_wrong(scored(own, shown), 1000)
    named = set(found.named(0.05, 0.5))
    assert len(named & wrong) >= 0.7 * len(wrong)
    assert len(named - wrong) <= 0.2 * len(named)
    assert 0.02 < found.share < 0.12
    assert all(found.rows[at].token == 0 for at in named)


def test_models_that_learnt_nothing_accuse_nobody() -> None:
    chance = np.random.default_rng(0)
    own = chance.integers(3, size=200)
    found = find_wrong(scored(own, chance.normal(0, 6, (200, 3))), 1000)
    assert found.named(0.05, 0.5) == []
    same = find_wrong(scored(np.zeros(50, int), np.zeros((50, 3))), 1000)  # nothing is open
    assert same.named(0.05, 0.0) == []


def test_outliers_are_far_above_the_others() -> None:
    chance = np.random.default_rng(0)
    clean = [chance.lognormal(0, 0.5, 300), chance.pareto(1.0, 300), chance.normal(2, 0.1, 300)]
    assert [outliers(list(losses), 0.05) for losses in clean] == [[], [], []]
    assert outliers([*clean[0], 40.0], 0.05) == [300]
    assert outliers([1.0] * 200, 0.05) == []


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [
        ({}, {}, True),
        ({}, {"tools": [{"type": "function", "function": {"name": "weather"}}]}, False),
        ({"called": "weather"}, {"called": "clock"}, False),
        ({"called": "weather"}, {"called": "weather"}, True),
        ({"role": "text"}, {"role": "text"}, False),
        ({"role": "tool"}, {"role": "tool"}, False),
    ],
)
def test_rows_contradict_that_ask_the_same_of_the_same_tools(
    one: dict[str, Any], other: dict[str, Any], contradict: bool
) -> None:
    from ft_assets.evaluation.row_audit import RowScore, audit

    rows: list[Any] = []
    for name, given in (("a", one), ("b", other)):
        call = {"type": "function", "id": name, "function": {"name": given.get("called", "x")}}
        role = given.get("role", "assistant")
        turns = [
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": role, "content": name},
        ]
        more = {"tools": given["tools"]} if "tools" in given else {}
        rows.append({"id": name, "messages": turns[-1:] if role == "text" else turns, **more})
    scores = {
        row["id"]: RowScore(
            id=row["id"],
            begin=[0],
            tokens=[1, 2],
            best=[1, 2],
            log_probabilities=[[-0.1] * len(TEMPERATURES)] * 2,
            best_log_probability=[-0.1, -0.1],
        )
        for row in rows
    }
    done = audit(rows, [], scores, [], {}, range(1000), AuditSettings())
    assert [row["id"] for row in done.named] == (["a", "b"] if contradict else [])


def test_rows_of_all_trained_tables_have_their_places(tmp_path: Path) -> None:
    for asset, names in TABLES.items():
        for name in names:
            row = {"id": f"{asset} {name}", "source": f"{name}:1", "messages": [], "group": ""}
            write_table(tmp_path / asset / f"{name}.parquet", [row], CONVERSATION)
    inputs = {asset: tmp_path / asset for asset in TABLES}
    assert list(sources_of(inputs).values()) == ["conversations:1", "rehearsal:1", "rehearsal:1"]
    assert len(sources_of({"raw_dataset": inputs["raw_dataset"]})) == 2
    assert {name for names in TABLES.values() for name in names} < set(AUDITED)
    assert set(AUDITED) <= set(PLACES)


def test_folds_without_rows_are_refused_before_any_training() -> None:
    require_rows([2, 3], 5)
    for folds, said in (([3, 2, 0], "fold 3 of 3 has 0 rows, the others 5"), ([5], "others 0")):
        with pytest.raises(DataError, match=said):
            require_rows(folds, 5)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("card 4539 1488 0343 6467 please", ["a card number"]),
        ("card 4539 1488 0343 6468, order 1234567890123456", []),  # Luhn, issuer
        ("DE89 3704 0044 0532 0130 00", ["an IBAN"]),
        ("GB82WEST12345698765432.", ["an IBAN"]),
        ("DE88 3704 0044 0532 0130 00", []),
        ("write to Ana.Lu+x@mail.fernwick.co.uk!", ["an e-mail address"]),
        ("write to ana@example.com or a@b.test, 3@4", []),
        ("+49 30 9018-20, (212) 736-5000", ["a phone number"] * 2),
        ("FW-60718, 2024-10-11 12:30, 3.14159265358, (212) 555-0123, +1 2", []),
        ("AKIAIOSFODNN7EXAMPLE and sk-proj-abcdefghijklmnopqrst", ["a key that a service"] * 2),
        ("postgres://me:hunter2@db/x https://a.b:8080/c", ["a password in a URL"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["a private key"]),
    ],
)
def test_private_data_is_found_by_checksum_and_form(text: str, kinds: list[str]) -> None:
    found = [piece.shown for piece in find_private(text)]
    assert len(found) == len(kinds)
    assert all(
        shown.startswith(kind) for shown, kind in zip(sorted(found), sorted(kinds), strict=True)
    )
    for digits in ("45391488", "hunter2", "0532", "9018"):
        assert not any(digits in shown for shown in found)


@pytest.mark.graph
def test_audit_names_rows_and_ft_rows_lists_them(healthy: Callable[..., Path]) -> None:
    folder = healthy()
    rows = conversations(240, next_word)
    wrong = {f"train.jsonl:{at + 1}" for at in range(5, 240, 24)}
    for at in range(5, 240, 24):
        rows[at]["messages"][1]["content"] = next_word(at + 7)
    rows[3]["messages"][0]["content"] += " call +49 30 901820"
    twin = {"messages": [rows[11]["messages"][0], {"role": "assistant", "content": "no"}]}
    write_jsonl(folder / "data/train.jsonl", [*rows, twin])
    write_jsonl(folder / "data/heldout.jsonl", conversations(20, next_word, start=7000))
    data = {"heldout": ["data/heldout.jsonl"], "near_duplicate": None, "validation_share": 0}
    edit(folder, audit={"folds": 2, "num_train_epochs": 3}, data=data)
    done = materialize(folder, UP_TO_AUDIT)
    assert done.success, failure(done)
    table = read_table(artifact(folder, "row_audit") / "rows.parquet")
    places = {
        reason: {row["source"] for row in table if row["reason"] == reason}
        for reason in ("wrong answer", "contradiction", "personal data")
    }
    assert places["contradiction"] == {"train.jsonl:12", "train.jsonl:241"}
    assert places["personal data"] == {"train.jsonl:4"}
    assert len(places["wrong answer"] & wrong) >= 5
    assert len(places["wrong answer"]) <= 15
    check = checks(done)["rows_are_right"]
    assert not check.passed
    assert "data.exclude" in str(check.description)
    project = load_project(folder / "finetune.yaml")
    finder = RowFinder(project, open_store(project), "tiny")
    assert finder.find(Wanted(named="any")).total == len({row["id"] for row in table})
    lines = "\n".join(listed(finder.find(Wanted(named="personal data")), 0))
    assert "personal data: a phone number (+4…20) in the user turn" in lines
