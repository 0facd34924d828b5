"""Test the gate of merged_model: only a PASS for exactly the current versions opens it.

This holds for every order of runs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact, checks, failure, materialize


@pytest.fixture
def copy(copy: Path) -> Path:
    """Return a project that passed, without its merged model."""
    shutil.rmtree(copy / ".ft/store/merged_model")
    return copy


def refused(folder: Path) -> str:
    """Materialize merged_model alone; return the reason of its refusal."""
    result = materialize(folder, "merged_model")
    assert not result.success
    assert ArtifactStore(folder / ".ft/store").current("merged_model", "tiny") is None
    return failure(result)


def test_pass_opens_it(copy: Path) -> None:
    assert materialize(copy, "merged_model").success


def test_fail_then_alone(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 1})
    assert not checks(materialize(copy, "answers,eval_report"))["better_than_base"].passed
    assert "the verdict is FAIL: sft: does not stop by itself" in refused(copy)


def test_check_that_crashes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a crash. Dagster lets a later run build the assets downstream of a crashed check."""

    def crash(*_: Any) -> None:
        raise RuntimeError("the check crashed")

    edit(copy, gate={"min_heldout_rows": 1000})
    with monkeypatch.context() as patched:
        patched.setattr("ft_assets.assets.eval_report.decide", crash)
        assert not materialize(copy, "eval_report").success
    assert "the verdict is INCONCLUSIVE" in refused(copy)


@pytest.mark.parametrize("name", ["verdict.json", "report.json", "rows.parquet"])
def test_deleted_file_of_the_report(copy: Path, name: str) -> None:
    (artifact(copy, "eval_report") / name).unlink()
    assert f"{name}: is missing" in refused(copy)


def test_deleted_report(copy: Path) -> None:
    shutil.rmtree(copy / ".ft/store/eval_report")
    assert "there is no eval_report" in refused(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("verdict.json", lambda text: text.replace("PASS", "PASS ")),
        ("report.json", lambda text: text.replace('"mean": 1.0', '"mean": 0.9', 1)),
    ],
)
def test_edited_report(copy: Path, name: str, change: Callable[[str], str]) -> None:
    path = artifact(copy, "eval_report") / name
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    assert "was changed after it was published" in refused(copy)


def test_evaluation_settings_changed_after_the_pass(copy: Path) -> None:
    edit(copy, evaluation={"max_new_tokens": 9})
    assert "the verdict is about another evaluation" in refused(copy)


def test_heldout_rows_changed_after_the_pass(copy: Path) -> None:
    edit(copy, data={"split_salt": "another"})
    assert materialize(copy, "heldout_split").success
    assert "the verdict is about another heldout" in refused(copy)


def test_override_that_was_taken_back(copy: Path) -> None:
    edit(copy, gate={"min_heldout_rows": 1000, "override": "for now"})
    evaluated = checks(materialize(copy, "eval_report"))["better_than_base"]
    assert (evaluated.passed, evaluated.severity.value) == (False, "WARN")
    edit(copy, gate={"min_heldout_rows": 1000, "override": None})
    assert "the verdict is INCONCLUSIVE" in refused(copy)
